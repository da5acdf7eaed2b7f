"""Quant-noise: in each training step a random part of the weights is quantized."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Transform
from effjax.errors import ScheduleError, SetupError
from effjax.quantize import engine, numerics
from effjax.quantize.operands import Operand, Place, Values, transform_of
from effjax.quantize.rules import Bits
from effjax.schedules import Scalar, is_traced
from effjax.select import KERNELS
from effjax.sites import Site


def quant_noise(
    weights: numerics.Bits = 8,
    activations: numerics.Bits = 32,
    *,
    rate: Scalar = 0.5,
    block: int = 1,
    select: str = KERNELS,
    per_channel: bool = True,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
) -> Transform:
    """Quant-noise: training sees each block of weights quantized with probability `rate`.

    The blocks are drawn anew in each step and for each layer of a scan. A quantized weight is as
    in `qat`, with its straight-through gradient; the others are used as they are and get their
    exact gradient. With rate 1 this is `qat`. Evaluation quantizes all weights. Activations are
    always quantized, with dynamic ranges as in `qat`.

    Args:
      weights, activations: bits, 2..8, or 16 and more for floating point; may be traced.
      rate: in [0, 1]; may be traced. The paper takes 0.05 to 0.5 with integers.
      block: how many weights in a row share their fate, along the last axis that is summed over.
      select, per_channel, rules, embeddings: as `qat`.

    Raises:
      ScheduleError: a rate outside [0, 1].
      SetupError: a block that is no positive integer or (at `init`) does not divide its axis;
        SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.quant_noise(4, rate=0.5, block=8).kind
      'quantize'

    Reference: Fan et al., "Training with quantization noise for extreme model compression", 2021,
    https://arxiv.org/abs/2004.07320.
    """
    if not is_traced(rate) and not 0 <= rate <= 1:
        raise ScheduleError(f"the rate of quant-noise is {rate}; it is a probability, 0 to 1.")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise SetupError(f"block is {block!r}; it is how many weights share their fate, >= 1.")
    default = Bits(weights, activations)
    asked = engine.rules_of("quant_noise", default, rules, select, embeddings, False)

    def weight(w: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        grid = numerics.grid(bits)
        scale = numerics.scale_of(numerics.absmax(w, place.axes), grid)
        rounded = numerics.fake_quant(w, scale, grid)
        if not place.train:
            return rounded
        assert place.key is not None  # `random`
        axis = engine.tiled_axis(place.site)
        shape = tuple(n // block if i == axis else n for i, n in enumerate(w.shape))
        drawn = jax.random.bernoulli(place.key, rate, shape)
        if axis is not None and block > 1:
            drawn = jnp.repeat(drawn, block, axis=axis)
        return jnp.where(drawn, rounded, w)

    def activation(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        grid = numerics.grid(bits)
        return numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x), grid), grid)

    def check(sites: list[Site]) -> None:
        engine.check_tiles(sites, block, "a block")

    return transform_of(
        asked,
        Operand(weight),
        Operand(activation),
        per_channel=per_channel,
        random=True,
        check=check,
    )
