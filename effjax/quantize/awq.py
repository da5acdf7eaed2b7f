"""AWQ: weights that meet large activations are made larger before all are rounded to few bits."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.interpret import Operation
from effjax.prune import calibration, matrices
from effjax.quantize import numerics
from effjax.quantize.layerwise import check_size
from effjax.quantize.rescale import KINDS, Rescaling
from effjax.select import replace

LEAST, CLIPS = 0.5, 11  # the smallest range after clipping, of the whole; how many are tried

Largest = Callable[[Array], Array]


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
    clip: bool = False,
    epsilon: float = 1e-5,
) -> tuple[PyTree, PyTree]:
    """Protects the weights that matter most to the outputs; these stay as they are.

    The input channel j of a layer is divided by s_j = (mean |x_j|)^alpha, over the geometric mean
    of the largest and the smallest, and its weights multiplied by it, so that less of them is lost
    where activations are large. Alpha in [0, 1] is the one of a grid for which rounding the weights
    changes the layer's outputs on the data least,

      E ‖(Q(W s) / s - W) x‖² = Σ_o e_o · (E x xᵀ) e_o,   e_o the error of an output's weights.

    Alpha = 0, which leaves all as it is, is among them: with the float model's inputs no layer
    loses more than it did. (qwix's `awq_core` has (mean |x_j|)² on a diagonal in place of the
    moments E x xᵀ, and may do worse than rounding to nearest.) What is in front takes the division,
    as in `smooth`, so that inference costs what it did; where several layers read the same, the sum
    is over them all. Then round the weights alone: `ptq(..., 4, 32)`, with the same scales. With
    per_channel=False the layer in front may lose, as its outputs' weights share a scale.

    Args:
      apply, params, model_state: a model in evaluation. BatchNorms are folded.
      batches: of a calibration split.
      layers: whose outputs are divided, by path without "/kernel" or "/scale". Left out, all those
        of which the program shows that it is possible.
      bits: of the weights, later.
      per_channel, tile: their scales, as for `qat`.
      ratios: values of alpha.
      clip: whether the weights of the layers that read the divided outputs are then clipped to a
        part of their range, 0.5 to 1, for each output that which changes it least once rounded.
        Outputs do not stay as they are then. Before `gptq` the whole range is usually better.
      epsilon: the BatchNorms'.

    Returns:
      (params, model_state) of the same structure.

    Raises:
      SetupError: as `smooth`; a tile that does not divide a layer's inputs; bits that `qat` does
        not have; ratios or a tile that are not positive.

    Reference: Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression
    and acceleration", 2023, https://arxiv.org/abs/2306.00978.
    """
    check_size("awq", ratios=ratios, **({} if tile is None else {"tile": tile}))
    numerics.check_bits(bits, "a weight of awq()")
    grid = numerics.grid(bits)
    first, batches = calibration.peek(batches)
    kinds = (*KINDS, "scale")
    model = Rescaling("awq", apply, params, model_state, first, layers, kinds, epsilon)
    named = model.named()
    ranges = {}
    for name, readers in model.chosen.items():
        for reader, weight in zip(readers, model.inputs(named, name), strict=True):
            kind = model.layers[reader].kind
            ranges[reader] = partial(_largest, kind=kind, per_channel=per_channel, tile=tile)
            _check_tile(reader, kind, weight, tile)
    found = model.read(batches, _statistics, jnp.add)
    moments = {reader: own for reader, (own, _) in found.items()}
    for name, readers in model.chosen.items():
        size = sum((found[reader][1] for reader in readers), jnp.zeros(()))
        weights = [w.astype(jnp.float32) for w in model.inputs(named, name)]
        own = [(w, moments[n], ranges[n]) for n, w in zip(readers, weights, strict=True)]
        s = _best(own, size, grid, ratios)
        named = model.moved(named, name, s)
        moments |= {n: _divided(moments[n], s) for n in readers}
    params, model_state = model.finished(named)
    if not clip:
        return params, model_state
    clipped = {}
    for name, readers in model.chosen.items():
        for reader, w in zip(readers, model.inputs(named, name), strict=True):
            path = model.layers[reader].kernel
            given = w.astype(jnp.float32), moments[reader], ranges[reader], grid
            new = _clipped(*given, per_channel)
            clipped[path] = new.reshape(named[path].shape).astype(named[path].dtype)
    return replace(params, clipped), model_state


def _check_tile(reader: str, kind: str, weight: Array, tile: int | None) -> None:
    inputs = weight.shape[1] * (weight.shape[0] if kind == "dense" else 1)
    if tile is not None and kind != "depthwise" and inputs % tile:
        raise SetupError(
            f"awq(tile={tile}): {reader!r} sums over {inputs} inputs. Choose a tile that divides "
            "them, or leave out the layer in front of it."
        )


def _statistics(op: Operation, features: int) -> tuple[Array, PyTree]:
    """Measures Σ x xᵀ, [groups, in, in], and Σ |x| [features]."""
    out, moments = matrices.second_moments(op)
    x = op.operands[0].astype(jnp.float32).reshape(-1, features)
    return out, (moments, jnp.sum(jnp.abs(x), axis=0))


def _largest(w: Array, kind: str, per_channel: bool, tile: int | None) -> Array:
    """The largest magnitude that shares `qat`'s scale with each of the weights [taps, channels,
    outputs of each]."""
    rows = w.reshape(1, -1, w.shape[2]) if kind == "dense" else w
    alone = kind == "depthwise"
    channels = () if not per_channel else (1, 2) if alone else (2,)
    if tile is None or alone:
        found = numerics.absmax(rows, channels)
    else:
        found = numerics.tiled_absmax(rows, channels, 1, tile)
    return jnp.broadcast_to(found, rows.shape).reshape(w.shape)


def _lost(change: Array, moments: Array) -> Array:
    """Σ_ij e_i (Σ x_i x_j) e_j of each output, [groups, outputs], from changes e [taps, channels,
    outputs of each]; the groups of a depthwise kernel are its channels."""
    groups = len(moments)
    rows = change.swapaxes(0, 1) if groups > 1 else change.reshape(1, -1, change.shape[2])
    return jnp.sum(rows * (moments @ rows), axis=1)


def _divided(moments: Array, s: Array) -> Array:
    """The moments [groups, in, in] of inputs x / s."""
    groups, inputs, _ = moments.shape
    own = s[:, None] if groups > 1 else jnp.tile(s, inputs // len(s))[None]
    return moments / (own[:, :, None] * own[:, None, :])


def _best(
    readers: Sequence[tuple[Array, Array, Largest]], size: Array, grid: numerics.Grid, ratios: int
) -> Array:
    """Scales of the inputs [channels] of weights [taps, channels, outputs] with their moments."""
    alive = size > 0
    logs = jnp.log(jnp.where(alive, size, 1.0))
    ends = [f(jnp.where(alive, logs, x)) for f, x in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))]
    logs = jnp.where(alive, logs - sum(ends) / 2, 0.0)

    def loss(ratio: Array) -> Array:
        s, total = jnp.exp(ratio * logs)[:, None], jnp.zeros(())
        for w, moments, largest in readers:
            scale = numerics.scale_of(largest(w * s), grid)
            total += jnp.sum(_lost(numerics.fake_quant(w * s, scale, grid) / s - w, moments))
        return total

    values = jnp.linspace(0, 1, ratios)
    return jnp.exp(values[jnp.argmin(lax.map(loss, values))] * logs)


def _clipped(
    w: Array, moments: Array, largest: Largest, grid: numerics.Grid, per_channel: bool
) -> Array:
    """The weights [taps, channels, outputs], clipped to the part of their ranges that serves each
    output best; one part for all where outputs share scales."""
    whole = largest(w)

    def loss(part: Array) -> Array:
        rounded = numerics.fake_quant(w, numerics.scale_of(part * whole, grid), grid)
        return _lost(rounded - w, moments)

    parts = jnp.linspace(1, LEAST, CLIPS)
    losses = lax.map(loss, parts)
    losses = losses if per_channel else jnp.sum(losses, axis=(1, 2), keepdims=True)
    limit = parts[jnp.argmin(losses, axis=0)] * whole
    return jnp.clip(w, -limit, limit)
