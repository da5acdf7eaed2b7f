"""A quantized backward pass: the gradient that enters an operation is rounded on its way back."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.errors import SetupError
from effjax.quantize import numerics

FLOATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
Small = Literal["e4m3", "e5m2"]


def round_gradient(
    y: Array, bits: numerics.Bits | Small, key: Array, channels: tuple[int, ...] = ()
) -> Array:
    """y itself, whose gradient g is rounded stochastically: s · floor(g / s + u), u ~ U[0, 1).

    s = max|g| / (2^(b-1) - 1), one for the tensor or for each entry of the axes `channels`. The
    rounded gradient is g on average, and its zeros stay zeros. What an operation's operands get
    back then comes from integers alone, where they are integers themselves. Only reverse-mode
    derivatives can be taken through it.

    To an 8-bit float the largest gradient becomes the format's largest number (448 in e4m3, 57344
    in e5m2), and g / s goes to one of the two neighbours in the format, to the nearer with the
    greater probability: e5m2 has but two bits of mantissa, and rounding to nearest would lose every
    sum of small gradients in the same way.

    Args:
      y: an operation's result, any shape.
      bits: 2..8, or 16 and more for no rounding; may be traced. Or "e4m3" or "e5m2".
      key: of this operation and step.
      channels: axes with scales of their own.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.quantize.backward import round_gradient
      >>> y, pull = jax.vjp(lambda x: round_gradient(x, 2, jax.random.key(0)), jnp.ones(3))
      >>> pull(jnp.array([-4.0, 0.0, 4.0]))[0].tolist()
      [-4.0, 0.0, 4.0]

    Reference: Zhou et al., "DoReFa-Net", 2016, https://arxiv.org/abs/1606.06160; Gupta et al.,
    "Deep learning with limited numerical precision", 2015, https://arxiv.org/abs/1502.02551;
    Micikevicius et al., "FP8 formats for deep learning", 2022, https://arxiv.org/abs/2209.05433.
    """
    kind = bits if isinstance(bits, str) else None
    width = jnp.asarray(numerics.WIDEST if isinstance(bits, str) else bits, jnp.int32)
    impl = str(jax.random.key_impl(key))
    return _through(y, width, jax.random.key_data(key), impl, channels, kind)


def check_gradients(bits: numerics.Bits | Small, what: str) -> None:
    """Raises unless gradients can be rounded so."""
    if not isinstance(bits, str):
        numerics.check_bits(bits, f"gradients of {what}()")
    elif bits not in FLOATS:
        raise SetupError(
            f"gradients of {what}() are {bits!r}; they have bits, or are one of {list(FLOATS)}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _through(
    y: Array, bits: Array, data: Array, impl: str, channels: tuple[int, ...], kind: Small | None
) -> Array:
    return y


def _forward(
    y: Array, bits: Array, data: Array, impl: str, channels: tuple[int, ...], kind: Small | None
) -> Any:
    return y, (bits, data)


def _backward(impl: str, channels: tuple[int, ...], kind: Small | None, kept: Any, g: Array) -> Any:
    bits, data = kept
    key = jax.random.wrap_key_data(data, impl=impl)
    grid = numerics.grid(bits)
    if kind is not None:
        largest = jnp.float32(jnp.finfo(FLOATS[kind]).max)
        grid = numerics.Grid(largest, jnp.asarray(False))
    scale = numerics.scale_of(numerics.absmax(g, channels), grid)
    rounded = stochastic(g, scale, grid, key) if kind is None else _small(g, scale, kind, key)
    return rounded, np.zeros(bits.shape, jax.dtypes.float0), np.zeros(data.shape, jax.dtypes.float0)


_through.defvjp(_forward, _backward)


def stochastic(x: Array, scale: Array, grid: numerics.Grid, key: Array) -> Array:
    """x rounded to the grid so that it is x on average: s · clip(floor(x / s + u), -B, B)."""
    u = jax.random.uniform(key, x.shape, scale.dtype)
    bound = grid.bound.astype(scale.dtype)
    codes = jnp.clip(jnp.floor(x.astype(scale.dtype) / scale + u), -bound, bound)
    return jnp.where(grid.identity, x, (codes * scale).astype(x.dtype))


def _small(x: Array, scale: Array, kind: Small, key: Array) -> Array:
    """x rounded to s times the numbers of an 8-bit float so that it is x on average."""
    form = jnp.finfo(FLOATS[kind])
    largest = float(form.max)
    v = jnp.clip((x.astype(scale.dtype) / scale).astype(jnp.float32), -largest, largest)
    # The distance of neighbours, from the bits of v: exact, and that of the smallest for all below.
    exponent = ((lax.bitcast_convert_type(v, jnp.int32) >> 23) & 255) - 127
    exponent = jnp.maximum(exponent, int(form.minexp)) - int(form.nmant)
    apart = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    rounded = jnp.floor(v / apart + jax.random.uniform(key, v.shape)) * apart
    return (jnp.clip(rounded, -largest, largest).astype(scale.dtype) * scale).astype(x.dtype)
