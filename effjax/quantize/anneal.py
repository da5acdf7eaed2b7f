"""Soft-to-hard quantization: a smooth staircase that sharpens into the hard one."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from effjax.core import Transform
from effjax.errors import ScheduleError
from effjax.quantize import engine, numerics
from effjax.quantize.operands import Operand, Place, Values, transform_of
from effjax.quantize.rules import Bits
from effjax.schedules import check_window
from effjax.select import KERNELS


def soft_staircase(x: Array, scale: Array, grid: numerics.Grid, softness: Array) -> Array:
    """Differentiable soft quantization (DSQ): a tanh between each two points of the grid.

        q(x) = s · (i + 1/2 + tanh(k r) / (2 tanh(k / 2))),  i = floor(x / s),  r = x / s - i - 1/2

    with tanh(k / 2) = 1 - softness, k = log(2 / softness - 1): near softness 1 it is x, near 0 the
    hard staircase, and the points of the grid, zero among them, stay where they are. The gradient
    is that of this expression; the scale gets none.

    Args:
      x: any shape, with |x| <= scale · bound.
      scale: broadcasts against x.
      grid: see `numerics.grid`.
      softness: float32 [] in (0, 1), DSQ's alpha.

    Reference: Gong et al., "Differentiable soft quantization", 2019,
    https://arxiv.org/abs/1908.05033.
    """
    v = x.astype(scale.dtype) / scale
    k = jnp.log(2.0 / softness - 1.0)
    below = jnp.floor(v)
    step = 0.5 * jnp.tanh(k * (v - below - 0.5)) / jnp.tanh(0.5 * k)
    soft = ((below + 0.5 + step) * scale).astype(x.dtype)
    return jnp.where(grid.identity, x, soft)


def soft_to_hard(
    weights: numerics.Bits = 4,
    activations: numerics.Bits = 32,
    *,
    begin: int = 0,
    end: int = 1000,
    initial: float = 0.5,
    final: float = 0.01,
    select: str = KERNELS,
    per_channel: bool = True,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
) -> Transform:
    """Soft-to-hard annealing: values are drawn to the grid ever more sharply, then rounded.

    At first training sees `soft_staircase`s of weights and activations, whose softness goes
    geometrically from `initial` at step `begin` to `final` at step `end`, and which pass their
    exact gradients. From `end` on, and in evaluation always, values are rounded as in `qat` with
    dynamic ranges, with its straight-through gradients. (The paper trains the softness; this is its
    staircase on a schedule.)

    Args:
      weights, activations: bits, 2..8, or 16 and more for floating point; may be traced.
      begin, end: steps.
      initial, final: softness, 1 > initial >= final > 0.
      select, per_channel, rules, embeddings: as `qat`.

    Raises:
      ScheduleError: a window that ends before it begins, or softness outside (0, 1) or growing.
      SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.soft_to_hard(2, begin=0, end=5000).kind
      'quantize'

    Reference: Gong et al., "Differentiable soft quantization: Bridging full-precision and low-bit
    neural networks", 2019, https://arxiv.org/abs/1908.05033.
    """
    check_window(begin, end, "soft-to-hard annealing")
    if not 1 > initial >= final > 0:
        raise ScheduleError(
            f"softness goes from {initial} to {final}; it falls from below 1 to above 0."
        )
    default = Bits(weights, activations)
    asked = engine.rules_of("soft_to_hard", default, rules, select, embeddings, False)

    def rounded(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        grid = numerics.grid(bits)
        scale = numerics.scale_of(numerics.absmax(x, place.axes), grid)
        hard = numerics.fake_quant(x, scale, grid)
        if not place.train:
            return hard
        done = jnp.clip((place.step - begin).astype(jnp.float32) / (end - begin), 0.0, 1.0)
        softness = initial * jnp.exp(done * math.log(final / initial))
        return jnp.where(place.step >= end, hard, soft_staircase(x, scale, grid, softness))

    return transform_of(asked, Operand(rounded), Operand(rounded), per_channel=per_channel)
