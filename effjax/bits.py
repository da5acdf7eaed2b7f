"""Masks as bits: bool arrays of any shape and sharding, eight entries to a byte."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


class Packing(NamedTuple):
    """Along which axis the entries of an array share bytes.

    axis: the packed one.
    parts: into how many equal parts it is cut, each with bytes of its own, the last one filled up
      with zeros. One part for each shard, so that every device packs what it has.
    """

    axis: int
    parts: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in bytes."""
        each = -(-shape[self.axis] // self.parts // 8)
        return (*shape[: self.axis], self.parts * each, *shape[self.axis + 1 :])


def packing(shape: tuple[int, ...], sharding: Sharding) -> Packing | None:
    """The packing that takes the fewest bytes; None where it saves nothing.

    Of equal ones it takes an axis that is not split, and then the first: along the last axis
    packing is slower, since its entries are neighbours.
    """
    if not math.prod(shape):
        return None
    shard = sharding.shard_shape(shape)
    choices = [Packing(axis, shape[axis] // shard[axis]) for axis in range(len(shape))]
    choices.sort(key=lambda p: (math.prod(p.shape(shape)), p.parts > 1))
    return choices[0] if choices and math.prod(choices[0].shape(shape)) < math.prod(shape) else None


def pack(x: Array, packing: Packing) -> Array:
    """The bytes of a bool array; each device packs its own shard, and nothing moves.

    Args:
      x: bool [...], sharded or not.
      packing: see there.

    Returns:
      uint8, of shape `packing.shape(x.shape)`, sharded like x. The first entry is the lowest bit.

    Example:
      >>> import jax.numpy as jnp
      >>> pack(jnp.arange(10) % 2 == 1, Packing(axis=0, parts=1)).tolist()
      [170, 2]
    """
    layout = automatic(x.sharding)
    return _compiled(_pack, packing, x.shape, layout)(_laid(x, layout))


def unpack(packed: Array, packing: Packing, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """The bool array whose bytes these are.

    Args:
      packed: uint8, as `pack` returned it.
      packing: the one it was packed by.
      shape: of the array.
      sharding: where the array shall lie.
    """
    found = _compiled(_unpack, packing, shape, automatic(sharding))(packed)
    return _laid(found, sharding)


def packed_sharding(sharding: Sharding, packing: Packing, shape: tuple[int, ...]) -> Sharding:
    """How the bytes of an array lie where the array shall lie like this.

    The same, where every shard has whole bytes. Otherwise, as the array was packed for another
    layout, its packed axis is not split.
    """
    layout = automatic(sharding)
    ways = shape[packing.axis] // layout.shard_shape(shape)[packing.axis]
    if packing.parts % ways == 0 or not isinstance(layout, NamedSharding):
        return layout
    spec = [*layout.spec]
    spec[packing.axis] = None
    return NamedSharding(layout.mesh, PartitionSpec(*spec))


def automatic(sharding: Sharding) -> Sharding:
    """The same sharding with no explicit mesh axes, over which reshapes would need annotations."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh: Any = sharding.mesh
    plain = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(plain, sharding.spec, memory_kind=sharding.memory_kind)


def _laid(x: Array, sharding: Sharding) -> Array:
    return x if x.sharding == sharding else jax.device_put(x, sharding)


@functools.lru_cache(maxsize=1024)
def _compiled(function: Any, packing: Packing, shape: tuple[int, ...], layout: Sharding) -> Any:
    return jax.jit(lambda x: function(x, packing, shape), out_shardings=layout)


def _pack(x: Array, packing: Packing, shape: tuple[int, ...]) -> Array:
    axis, parts = packing
    split = x.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
    packed = jnp.packbits(split, axis=axis + 1, bitorder="little")
    return packed.reshape(packing.shape(shape))


def _unpack(packed: Array, packing: Packing, shape: tuple[int, ...]) -> Array:
    axis, parts = packing
    split = packed.reshape(*shape[:axis], parts, -1, *shape[axis + 1 :])
    each = shape[axis] // parts
    found = jnp.unpackbits(split, axis=axis + 1, count=each, bitorder="little")
    return found.astype(bool).reshape(shape)
