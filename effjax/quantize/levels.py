"""The arithmetic of learned quantization: ranges of integers, rounding to them with a trainable
step, offset or bound, and the published derivatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.quantize.numerics import FLOAT, Bits, straight_through

SMALLEST = 1e-8  # a step: what is learnt may pass through zero, what is divided by may not


class Levels(NamedTuple):
    """The integers low ... high of a bit width; may be traced."""

    low: Array  # float32 []
    high: Array  # float32 []
    signs: Array  # bool []: the values are -1 and 1, one bit with a sign
    identity: Array  # bool []: the width means float


def signed(bits: Bits) -> Levels:
    """-2^(b-1) ... 2^(b-1) - 1; of one bit, -1 and 1."""
    half, one, identity = _half(bits)
    return Levels(jnp.where(one, -1.0, -half), jnp.where(one, 1.0, half - 1), one, identity)


def unsigned(bits: Bits) -> Levels:
    """0 ... 2^b - 1."""
    half, one, identity = _half(bits)
    return Levels(jnp.zeros(()), 2 * half - 1, jnp.zeros_like(one), identity)


def choose(is_signed: Array, bits: Bits, narrow: bool = False) -> Levels:
    """The signed integers where `is_signed`, else the unsigned; `narrow` is symmetric about 0."""
    both, positive = signed(bits), unsigned(bits)
    if narrow:
        both = both._replace(low=-both.high)
    return Levels(
        jnp.where(is_signed, both.low, positive.low),
        jnp.where(is_signed, both.high, positive.high),
        both.signs & is_signed,
        both.identity,
    )


def _half(bits: Bits) -> tuple[Array, Array, Array]:
    width = jnp.asarray(bits, jnp.int32)
    half = jnp.left_shift(jnp.int32(1), jnp.clip(width, 1, FLOAT) - 1)
    return half.astype(jnp.float32), width == 1, width >= FLOAT


def codes(v: Array, levels: Levels) -> Array:
    """The nearest of the integers, as floats: clip(round(v), low, high), or sign(v)."""
    nearest = jnp.clip(jnp.round(v), levels.low, levels.high)
    return jnp.where(levels.signs, jnp.sign(v), nearest)


def learned_step(x: Array, step: Array, levels: Levels, factor: Array) -> Array:
    """x rounded to multiples of a trainable step: q = s · clip(round(x / s), low, high).

    With v = x / s the derivatives are

        dq/dx = 1 where low <= v <= high, else 0
        dq/ds = factor · (round(v) - v  where low < v < high;  low below;  high above)

    and of one bit, where round(v) is sign(v), the same. Steps below 1e-8 count as 1e-8.

    Args:
      x: any shape, floating point.
      step: broadcasts against x, of equal rank; float32.
      levels: see `signed`, `unsigned`.
      factor: float32 [], LSQ's gradient scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.quantize import levels
      >>> x, s = jnp.array([-3.0, 0.3, 0.7]), jnp.array([0.5])
      >>> q, pull = jax.vjp(lambda s: levels.learned_step(x, s, levels.signed(2), 1.0), s)
      >>> q.tolist()
      [-1.0, 0.5, 0.5]
      >>> [round(float(pull(e)[0][0]), 3) for e in jnp.eye(3)]  # low; 1 - 0.6; high
      [-2.0, 0.4, 1.0]

    Reference: Esser et al., "Learned step size quantization", 2020,
    https://arxiv.org/abs/1902.08153.
    """
    return _learned_step(x, step, levels, jnp.asarray(factor, jnp.float32))


@jax.custom_jvp
def _learned_step(x: Array, step: Array, levels: Levels, factor: Array) -> Array:
    s = jnp.maximum(step, SMALLEST)
    rounded = codes(x.astype(s.dtype) / s, levels) * s
    return jnp.where(levels.identity, x, rounded.astype(x.dtype))


@_learned_step.defjvp
def _learned_step_jvp(primals, tangents):
    x, step, levels, factor = primals
    dx, ds = tangents[:2]
    s = jnp.maximum(step, SMALLEST)
    v = x.astype(s.dtype) / s
    inside = (v >= levels.low) & (v <= levels.high)
    # Outside the codes are low and high themselves.
    slope = factor * (codes(v, levels) - jnp.where(inside, v, 0.0))
    passes = inside | levels.identity
    slope = jnp.where(levels.identity, 0.0, slope)
    tangent = jnp.where(passes, dx, jnp.zeros_like(dx)) + (slope * ds).astype(x.dtype)
    return _learned_step(x, step, levels, factor), tangent


def learned_offset(x: Array, step: Array, offset: Array, levels: Levels, factor: Array) -> Array:
    """x rounded to an asymmetric range: q = s · (clip(round(x / s) - z, low, high) + z).

    z = round(b / s) is the offset b in whole steps, so that zero stays exact where it is in the
    range (the paper adds b itself, which no padding with zeros survives). With v = x / s - z,

        dq/dx = 1, dq/ds = factor · (round(v) - v), dq/db = 0          where low <= v <= high
        dq/dx = 0, dq/ds = factor · low (or high),  dq/db = factor     elsewhere

    Reference: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization", 2020, https://arxiv.org/abs/2004.09576.
    """
    return _learned_offset(x, step, offset, levels, jnp.asarray(factor, jnp.float32))


@jax.custom_jvp
def _learned_offset(x: Array, step: Array, offset: Array, levels: Levels, factor: Array) -> Array:
    s = jnp.maximum(step, SMALLEST)
    zero = jnp.round(offset / s)
    code = jnp.clip(jnp.round(x.astype(s.dtype) / s) - zero, levels.low, levels.high)
    return jnp.where(levels.identity, x, ((code + zero) * s).astype(x.dtype))


@_learned_offset.defjvp
def _learned_offset_jvp(primals, tangents):
    x, step, offset, levels, factor = primals
    dx, ds, db = tangents[:3]
    s = jnp.maximum(step, SMALLEST)
    v = x.astype(s.dtype) / s - jnp.round(offset / s)
    inside = (v >= levels.low) & (v <= levels.high)
    slope = jnp.clip(jnp.round(v), levels.low, levels.high) - jnp.where(inside, v, 0.0)
    learnt = slope * ds + jnp.where(inside, 0.0, 1.0) * db
    learnt = factor * jnp.where(levels.identity, 0.0, learnt)
    passes = inside | levels.identity
    tangent = jnp.where(passes, dx, jnp.zeros_like(dx)) + learnt.astype(x.dtype)
    return _learned_offset(x, step, offset, levels, factor), tangent


def learned_bound(x: Array, alpha: Array, levels: Levels) -> Array:
    """x clipped at a trainable bound and rounded below it: s · round(clip(x, l, a) / s).

    s = a / high, and l = 0 for unsigned levels, -a for signed ones. Derivatives:

        dq/dx = 1 where l <= x < a, else 0;   dq/da = 1 where x >= a, -1 where x < l < 0, else 0

    Reference: Choi et al., "PACT: Parameterized clipping activation for quantized neural networks",
    2018, https://arxiv.org/abs/1805.06085.
    """
    return _learned_bound(x, alpha, levels)


@jax.custom_jvp
def _learned_bound(x: Array, alpha: Array, levels: Levels) -> Array:
    s = jnp.maximum(alpha, SMALLEST) * (1.0 / levels.high)
    rounded = codes(x.astype(s.dtype) / s, levels) * s
    return jnp.where(levels.identity, x, rounded.astype(x.dtype))


@_learned_bound.defjvp
def _learned_bound_jvp(primals, tangents):
    x, alpha, levels = primals
    dx, da = tangents[:2]
    least = jnp.where(levels.low < 0, -alpha, 0.0)
    above, below = x >= alpha, x < least
    passes = ~(above | below) | levels.identity
    slope = jnp.where(above, 1.0, 0.0) - jnp.where(below & (levels.low < 0), 1.0, 0.0)
    slope = jnp.where(levels.identity, 0.0, slope)
    tangent = jnp.where(passes, dx, jnp.zeros_like(dx)) + (slope * da).astype(x.dtype)
    return _learned_bound(x, alpha, levels), tangent


def between(
    x: Array, low: Array, high: Array, levels: Levels, clipped: bool, key: Array | None = None
) -> Array:
    """x rounded to s · (z ... z + n), s = (high - low) / n, z = round(low / s), n = levels.high.

    The straight-through derivative: dq/dx = 1, or where `clipped` 0 outside these. Ranges get none.
    With a key, rounding is stochastic: floor(x / s + u), u ~ U[0, 1).

    Args:
      x: any shape, floating point.
      low, high: broadcast against x; low <= 0 <= high.
      levels: see `unsigned`.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.quantize import levels
      >>> x = jnp.array([-1.0, 0.0, 0.4, 2.0])
      >>> levels.between(x, x.min(), x.max(), levels.unsigned(2), False).tolist()
      [-1.0, 0.0, 0.0, 2.0]
    """
    still = lax.stop_gradient(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    s = (high - low).astype(wide) * (1.0 / levels.high).astype(wide)
    s = jnp.where(s < jnp.finfo(wide).tiny, jnp.ones((), wide), s)
    v, zero = still.astype(wide) / s, jnp.round(low / s)
    rounded = jnp.round(v) if key is None else jnp.floor(v + jax.random.uniform(key, v.shape, wide))
    value = (jnp.clip(rounded, zero, zero + levels.high) * s).astype(x.dtype)
    passes = jnp.asarray(True)
    if clipped:
        passes = ((v >= zero) & (v <= zero + levels.high)) | levels.identity
    return straight_through(x, jnp.where(levels.identity, still, value), passes)


def per_layer(x: Array) -> int:
    """How many values share a step, in one example: LSQ's N. The leading axis is the batch's."""
    return max(x.size // max(x.shape[0], 1), 1) if x.ndim else 1
