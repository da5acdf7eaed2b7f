"""AWQ: weights that meet large activations are made larger before all are rounded to few bits."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.prune import calibration
from effjax.quantize import numerics
from effjax.quantize.layerwise import check_size
from effjax.quantize.rescale import KINDS, Rescaling


def awq(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[PyTree],
    layers: Sequence[str] | None = None,
    *,
    bits: int = 4,
    per_channel: bool = True,
    tile: int | None = None,
    ratios: int = 20,
    epsilon: float = 1e-5,
) -> tuple[PyTree, PyTree]:
    """Protects the weights that matter most to the outputs; these stay as they are.

    The input channel j of a layer is divided by s_j = (mean |x_j|)^alpha, over the geometric mean
    of the largest and the smallest, and its weights multiplied by it, so that less of them is lost
    where activations are large. Alpha in [0, 1] is the one of a grid for which rounding costs least

      Σ_ij (w_ij - Q(w_ij s_j) / s_j)² mean x_j²,

    what the layer's outputs lose if its inputs are uncorrelated (qwix's `awq_core` has (mean |x|)²
    in place of the mean of x²). Alpha = 0, which leaves all as it is, is among them. What is in
    front takes the division, as in `smooth`; where several layers read the same, the sum is over
    them all. Then round the weights alone: `ptq(..., 4, 32)`, with the same scales.

    Args:
      apply, params, model_state: a model in evaluation. BatchNorms are folded.
      batches: of a calibration split.
      layers: whose outputs are divided, by path without "/kernel" or "/scale". Left out, all those
        of which the program shows that it is possible.
      bits: of the weights, later.
      per_channel, tile: their scales, as for `qat`.
      ratios: values of alpha.
      epsilon: the BatchNorms'.

    Returns:
      (params, model_state) of the same structure.

    Raises:
      SetupError: as `smooth`; a tile that does not divide a layer's inputs; bits that `qat` does
        not have.

    Reference: Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression
    and acceleration", 2023, https://arxiv.org/abs/2306.00978.
    """
    check_size("awq", ratios=ratios)
    numerics.check_bits(bits, "a weight of awq()")
    grid = numerics.grid(bits)
    first, batches = calibration.peek(batches)
    kinds = (*KINDS, "scale")
    model = Rescaling("awq", apply, params, model_state, first, layers, kinds, epsilon)
    sums = model.seen(batches, _sums, jnp.add)
    named = model.named()
    for name in model.chosen:
        weights = model.inputs(named, name)
        depthwise = [model.layers[n].kind == "depthwise" for n in model.chosen[name]]
        if tile is not None and weights[0].shape[1] % tile and not all(depthwise):
            raise SetupError(
                f"awq(tile={tile}): {name!r} has {weights[0].shape[1]} outputs, and the tiles are "
                "of the inputs of what follows. Choose a tile that divides them, or leave the "
                "layer out."
            )
        axes: list[tuple[int, ...]] = [(0,) if alone else (0, 2) for alone in depthwise]
        axes = axes if per_channel else [(0, 1, 2, 3)] * len(axes)
        s = _best(weights, axes, sums[name], grid, tile, ratios)
        named = model.moved(named, name, s)
    return model.finished(named)


def _sums(x: Array) -> Array:
    """Of values [n, channels]: sums of magnitudes and of squares, [2, channels]."""
    return jnp.stack([jnp.sum(jnp.abs(x), axis=0), jnp.sum(x * x, axis=0)])


def _best(
    weights: Sequence[Array],
    axes: Sequence[tuple[int, ...]],
    sums: Array,
    grid: numerics.Grid,
    tile: int | None,
    ratios: int,
) -> Array:
    """Scales of the inputs [channels] of weights [taps, channels, outputs].

    axes: of [taps, tiles, values of a tile, outputs], those that share a scale.
    """
    size, square = sums
    alive = size > 0
    logs = jnp.log(jnp.where(alive, size, 1.0))
    middle = (
        jnp.max(logs, where=alive, initial=-jnp.inf),
        jnp.min(logs, where=alive, initial=jnp.inf),
    )
    logs = jnp.where(alive, logs - (middle[0] + middle[1]) / 2, 0.0)

    def rounded(w: Array, over: tuple[int, ...]) -> Array:
        values = w.shape[1] if tile is None or over == (0,) else tile
        split = w.reshape(w.shape[0], -1, values, w.shape[2])
        scale = numerics.scale_of(jnp.max(jnp.abs(split), axis=over, keepdims=True), grid)
        return numerics.fake_quant(split, scale, grid).reshape(w.shape)

    def loss(ratio: Array) -> Array:
        s = jnp.exp(ratio * logs)[:, None]
        lost = [w - rounded(w * s, over) / s for w, over in zip(weights, axes, strict=True)]
        return sum((jnp.sum(x * x * square[:, None]) for x in lost), jnp.zeros(()))

    values = jnp.linspace(0, 1, ratios)
    return jnp.exp(values[jnp.argmin(jax.lax.map(loss, values))] * logs)
