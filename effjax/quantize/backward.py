"""A quantized backward pass: the gradient that enters an operation is rounded on its way back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.quantize import numerics


def round_gradient(
    y: Array, bits: numerics.Bits, key: Array, channels: tuple[int, ...] = ()
) -> Array:
    """y itself, whose gradient g is rounded stochastically: s · floor(g / s + u), u ~ U[0, 1).

    s = max|g| / (2^(b-1) - 1), one for the tensor or for each entry of the axes `channels`. The
    rounded gradient is g on average, and its zeros stay zeros. What an operation's operands get
    back then comes from integers alone, where they are integers themselves. Only reverse-mode
    derivatives can be taken through it.

    Args:
      y: an operation's result, any shape.
      bits: 2..8, or 16 and more for no rounding; may be traced.
      key: of this operation and step.
      channels: axes with scales of their own.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.quantize.backward import round_gradient
      >>> y, pull = jax.vjp(lambda x: round_gradient(x, 2, jax.random.key(0)), jnp.ones(3))
      >>> pull(jnp.array([-4.0, 0.0, 4.0]))[0].tolist()
      [-4.0, 0.0, 4.0]

    Reference: Zhou et al., "DoReFa-Net", 2016, https://arxiv.org/abs/1606.06160; Gupta et al.,
    "Deep learning with limited numerical precision", 2015, https://arxiv.org/abs/1502.02551.
    """
    width = jnp.asarray(bits, jnp.int32)
    return _through(y, width, jax.random.key_data(key), str(jax.random.key_impl(key)), channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _through(y: Array, bits: Array, data: Array, impl: str, channels: tuple[int, ...]) -> Array:
    return y


def _forward(y: Array, bits: Array, data: Array, impl: str, channels: tuple[int, ...]) -> Any:
    return y, (bits, data)


def _backward(impl: str, channels: tuple[int, ...], kept: Any, g: Array) -> Any:
    bits, data = kept
    key = jax.random.wrap_key_data(data, impl=impl)
    grid = numerics.grid(bits)
    rounded = stochastic(g, numerics.scale_of(numerics.absmax(g, channels), grid), grid, key)
    return rounded, np.zeros(bits.shape, jax.dtypes.float0), np.zeros(data.shape, jax.dtypes.float0)


_through.defvjp(_forward, _backward)


def stochastic(x: Array, scale: Array, grid: numerics.Grid, key: Array) -> Array:
    """x rounded to the grid so that it is x on average: s · clip(floor(x / s + u), -B, B)."""
    u = jax.random.uniform(key, x.shape, scale.dtype)
    bound = grid.bound.astype(scale.dtype)
    codes = jnp.clip(jnp.floor(x.astype(scale.dtype) / scale + u), -bound, bound)
    return jnp.where(grid.identity, x, (codes * scale).astype(x.dtype))
