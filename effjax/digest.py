"""Digests of arrays: 64 bits that tell whether what was read is what was written."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_SEEDS = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))


def digests(arrays: Sequence[Array]) -> list[str]:
    """One digest an array, as 16 hexadecimal digits.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.digest import digests
      >>> a, b = digests([jnp.zeros(3), jnp.zeros(3).at[1].set(-0.0)])
      >>> a == b
      False
    """
    words = jax.device_get([digest(x) for x in arrays])
    return ["".join(f"{int(w):08x}" for w in pair) for pair in words]


@jax.jit
def digest(x: Array) -> Array:
    """64 bits that change when a bit of the array does, or when two entries change places.

    The sum over entries, modulo 2^32, of a hash of the entry's bits and its position, for two
    seeds. A sum of integers is exact in any order, so every sharding gives the same, and nothing
    is gathered. It finds damage; it is no protection against someone who forges.

    Args:
      x: any shape and dtype, PRNG keys included.

    Returns:
      uint32 [2].
    """
    x = plain(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return digest(jnp.stack([x.real, x.imag]))
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{min(jnp.finfo(x.dtype).bits, 32)}")
    elif x.dtype.itemsize > 4:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)  # adds an axis of two words
    words = x.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * np.uint32(size) + index
    return jnp.stack(
        [jnp.sum(_mix(words ^ _mix(position + seed)), dtype=jnp.uint32) for seed in _SEEDS]
    )


def _mix(h: Array) -> Array:
    """MurmurHash3's finalizer: each bit of a uint32 changes half of the bits of the result."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def is_key(x: Any) -> bool:
    """Whether an array, or the shape of one, holds typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def plain(x: Array) -> Array:
    """The array, or the words of its keys."""
    return jax.random.key_data(x) if is_key(x) else x
