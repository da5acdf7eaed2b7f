"""The arithmetic of one bit, of ternary values, and of DoReFa's tanh-normalised weights."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from effjax.quantize import levels, numerics
from effjax.quantize.operands import Place, Values
from effjax.schedules import is_traced

TERNARY_THRESHOLD = 0.7  # of the mean magnitude


def signs(x: Array, axes: tuple[int, ...] = (), *, clipped: bool = True) -> Array:
    """One bit: s · sign(x), s = mean|x| over the values that are not 0, for each entry of `axes`.

    dq/dx = 1, or where `clipped` 1 for |x| <= 1 and 0 elsewhere; the scale gets none. Zeros stay
    zeros. The same values as `formats.encode(x, "int1")`.

    Reference: Courbariaux et al., 2015, https://arxiv.org/abs/1511.00363 (BinaryConnect);
    Rastegari et al., 2016, https://arxiv.org/abs/1603.05279 (XNOR-Net).
    """
    return _extreme(x, axes, 0.0, clipped)


def rounded(x: Array, bits: numerics.Bits, axes: tuple[int, ...] = ()) -> Array:
    """x as `qat` rounds weights: signs of one bit, an integer grid, or as it is; dq/dx = 1.

    Args:
      x: any shape, floating point.
      bits: 1..8, or 16 and more; may be traced.
      axes: those along which scales differ.
    """
    traced = is_traced(bits)
    if not traced and int(bits) >= numerics.FLOAT:
        return x
    if not traced and int(bits) == 1:
        return signs(x, axes, clipped=False)
    grid = numerics.grid(bits)
    many = numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x, axes), grid), grid)
    if not traced:
        return many
    return jnp.where(jnp.asarray(bits) == 1, signs(x, axes, clipped=False), many)


def ternary_values(x: Array, axes: tuple[int, ...] = ()) -> Array:
    """s · sign(x) where |x| > 0.7 mean|x|, else 0; s = mean|x| over those. dq/dx = 1.

    The same values as `formats.encode(x, "ternary")`.

    Reference: Li et al., "Ternary weight networks", 2016, https://arxiv.org/abs/1605.04711.
    """
    return _extreme(x, axes, TERNARY_THRESHOLD, False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _extreme(x: Array, axes: tuple[int, ...], threshold: float, clipped: bool) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.abs(wide)
    over = tuple(axis for axis in range(x.ndim) if axis not in axes)
    least = threshold * jnp.mean(size, over, keepdims=True) if threshold else 0.0
    on = size > least
    count = jnp.maximum(jnp.sum(on, over, keepdims=True), 1)
    scale = jnp.sum(jnp.where(on, size, 0), over, keepdims=True) / count
    return (jnp.where(on, jnp.sign(wide), 0) * scale).astype(x.dtype)


@_extreme.defjvp
def _extreme_jvp(axes, threshold, clipped, primals, tangents):
    (x,), (tangent,) = primals, tangents
    if clipped:
        tangent = jnp.where(jnp.abs(x) <= 1, tangent, jnp.zeros_like(tangent))
    return _extreme(x, axes, threshold, clipped), tangent


@jax.custom_jvp
def nearest(x: Array, steps: Array) -> Array:
    """round(x · n) / n, with dq/dx = 1."""
    return jnp.round(x * steps) / steps


@nearest.defjvp
def _nearest_jvp(primals, tangents):
    return nearest(*primals), tangents[0]


def dorefa_weights(w: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
    """DoReFa's weights: 2 round((2^b - 1) (t / (2 max|t|) + 1/2)) / (2^b - 1) - 1, t = tanh(w).

    They lie in [-1, 1], for normalization to scale. Of one bit: sign(w) · mean|w| of the layer.
    Rounding and signs are straight-through, and gradients flow through tanh and the maximum. This
    grid has no zero, but weights that are exactly 0 (pruned) stay 0.
    """
    steps = levels.unsigned(bits).high
    wide = w.astype(jnp.float32)
    t = jnp.tanh(wide)
    largest = jnp.max(jnp.abs(t))
    safe = jnp.where(largest > 0, largest, 1.0)
    many = 2 * nearest(t / (2 * safe) + 0.5, steps) - 1
    own = levels.signed(bits)
    found = jnp.where(own.signs, signs(wide, clipped=False), many)
    return jnp.where(own.identity | (w == 0), w, found.astype(w.dtype))


def unit_interval(x: Array, is_signed: Array, bits: numerics.Bits) -> Array:
    """DoReFa's activations: clip(x, 0, 1), or clip(x, -1, 1) where signed, rounded; dq/dx = 1
    inside and 0 outside."""
    own = levels.choose(is_signed, bits, narrow=True)
    return levels.learned_bound(x, jnp.ones_like(is_signed, jnp.float32), own)
