"""The arithmetic of quantization: symmetric integer grids, rounding to them, and its derivative.

A grid of b bits has the integers -(2^(b-1) - 1) ... 2^(b-1) - 1, times a scale s. It is symmetric,
so zero is on it exactly (pruned weights stay pruned) and the largest magnitude of a range is a
point of the grid rather than a tie between two, where eager, jitted and sharded runs would
disagree.

The helpers are jitted and inlined: their traces are cached by shape, which is a third of the time
it takes to trace a quantized model, and leave no calls behind.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.errors import SetupError
from effjax.schedules import is_traced

Bits = int | Array

FLOAT = 16  # from this width on, quantization is the identity
WIDEST = 8  # of a grid: what int8 holds


class Grid(NamedTuple):
    """The integers of a bit width; may be traced."""

    bound: Array  # float32 []: 2^(b-1) - 1
    identity: Array  # bool []: the width means float


def check_bits(bits: Bits, what: str, least: int = 2) -> None:
    """Raises unless bits is `least`..8, or 16 and more for float; a traced width passes."""
    if is_traced(bits):
        return
    if (
        isinstance(bits, bool)
        or int(bits) != bits
        or not (least <= bits <= WIDEST or bits >= FLOAT)
    ):
        raise SetupError(
            f"{what} has {bits} bits; a quantized value has {least} to {WIDEST}, like the "
            f"integers that hardware multiplies, and {FLOAT} or more leave it in floating point."
        )


@functools.partial(jax.jit, inline=True)
def grid(bits: Bits) -> Grid:
    """The grid of a bit width, which may be traced, so that one program serves every width."""
    width = jnp.asarray(bits, jnp.int32)
    # A shift is exact; exp2 may not be.
    half = jnp.left_shift(jnp.int32(1), jnp.clip(width, 1, FLOAT) - 1)
    return Grid((half - 1).astype(jnp.float32), width >= FLOAT)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def absmax(x: Array, channels: Sequence[int] = ()) -> Array:
    """The largest magnitude over all axes but `channels`, which are kept; others have length 1.

    No gradient flows through it.
    """
    others = tuple(axis for axis in range(x.ndim) if axis not in channels)
    return jnp.max(jnp.abs(lax.stop_gradient(x)), axis=others, keepdims=True, initial=0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def tiled_absmax(x: Array, channels: Sequence[int], axis: int, size: int) -> Array:
    """As `absmax`, and for each run of `size` values along an axis, which keeps its length."""
    split = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    kept = {c + (c > axis) for c in channels if c != axis} | {axis}
    if axis in channels:
        kept.add(axis + 1)
    largest = absmax(x.reshape(split), tuple(sorted(kept)))
    shape = tuple(x.shape[a] if a == axis or a in channels else 1 for a in range(x.ndim))
    rows = jnp.broadcast_to(
        largest, tuple(n if a != axis + 1 else size for a, n in enumerate(largest.shape))
    )
    return rows.reshape(shape)


@jax.custom_jvp
def straight_through(x: Array, value: Array, passes: Array) -> Array:
    """A value in the place of x, with dq/dx = 1 where `passes`, else 0; others get no gradient."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    tangent = jnp.where(primals[2], tangents[0], jnp.zeros_like(tangents[0]))
    return straight_through(*primals), tangent


@functools.partial(jax.jit, inline=True)
def scale_of(largest: Array, grid: Grid) -> Array:
    """The scale that maps a range onto the grid: s = max|x| / bound.

    Ranges of zeros (and those too small to divide by) have scale 1, and their values become 0.
    """
    wide = jnp.promote_types(largest.dtype, jnp.float32)
    # Times the reciprocal: XLA turns a division by a constant into that, and a traced width must
    # give the same bits as a constant one.
    scale = largest.astype(wide) * (1.0 / grid.bound).astype(wide)
    return jnp.where(scale < jnp.finfo(wide).tiny, jnp.ones((), wide), scale)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def round_to(x: Array, scale: Array, grid: Grid, inside: bool = False) -> Array:
    """The nearest integers of the grid, clip(round(x / s), -bound, bound), as floats.

    Ties go to the even integer. Where all of x is known to be `inside` the range that the scale was
    made of, nothing is clipped, which takes as long as the rounding itself: |x| / s is at most
    bound (1 + 2^-22) then, and rounds to bound.
    """
    steps = jnp.round(x.astype(scale.dtype) / scale)
    bound = grid.bound.astype(scale.dtype)
    return steps if inside else jnp.clip(steps, -bound, bound)


def fake_quant(
    x: Array, scale: Array, grid: Grid, clipped: bool = False, inside: bool = False
) -> Array:
    """x rounded to the grid: q(x) = s · clip(round(x / s), -bound, bound), or x itself if float.

    The derivative is the straight-through estimate: dq/dx = 1. Where `clipped`, it is 0 for values
    outside the grid's range, |x| > s · bound. The scale gets none.

    A custom derivative rather than x + stop_gradient(q - x), which is an ulp off the grid.

    Args:
      x: any shape, floating point.
      scale: broadcasts against x; float32 (float64 for float64 x).
      grid: see `grid`.
      inside: see `round_to`; a Python bool.
      clipped: whether values outside the range lose their gradient; a Python bool.

    Returns:
      The shape and dtype of x. In bfloat16 the points of the grid are rounded to bfloat16.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.quantize import numerics
      >>> x = jnp.array([-1.0, -0.3, 0.0, 0.2, 0.9])
      >>> g = numerics.grid(3)  # -3 ... 3
      >>> numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x), g), g) * 3
      Array([-3., -1.,  0.,  1.,  3.], dtype=float32)

    Reference: Bengio, Léonard and Courville, 2013, https://arxiv.org/abs/1308.3432, for the
    derivative; Jacob et al., 2018, https://arxiv.org/abs/1712.05877, for training with it.
    """
    return _cached_fake_quant(x, scale, grid, clipped, inside)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _fake_quant(x: Array, scale: Array, grid: Grid, clipped: bool, inside: bool) -> Array:
    rounded = (round_to(x, scale, grid, inside) * scale).astype(x.dtype)
    return jnp.where(grid.identity, x, rounded)


@_fake_quant.defjvp
def _fake_quant_jvp(clipped, inside, primals, tangents):
    x, scale, grid = primals
    tangent, _, _ = tangents
    if clipped:
        passes = (jnp.abs(x) <= scale * grid.bound) | grid.identity
        # A select, not a product: the gradient of what is clipped is 0 even where the incoming one
        # is infinite.
        tangent = jnp.where(passes, tangent, jnp.zeros_like(tangent))
    return _fake_quant(*primals, clipped, inside), tangent


_cached_fake_quant = jax.jit(_fake_quant, static_argnums=(3, 4), inline=True)
