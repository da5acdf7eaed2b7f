"""Batches as a function of seed and step, made on the device inside the jitted step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import Layout
from experiments.harness.errors import ConfigError

_ROUNDS = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batches:
    """A data set on the device, and which of it each step sees.

    `batches(step)` is a pure function of the data, the key and the step: nothing is carried from
    step to step, so a run that is resumed sees what it would have seen. Every epoch goes through
    the examples in a new order, without replacement, and leaves out the last few that fill no
    batch.

    data: arrays with the examples along their first axis, for example {"image", "label"}.
    key: chooses the orders.
    shift, scale: "image" is given as float32 (image - shift) * scale.
    size: examples in a batch.
    sharding: how the batch's first axis is split over a mesh; see `on`.
    """

    data: dict[str, Array]
    key: Array
    shift: Array
    scale: Array
    size: int = dataclasses.field(metadata={"static": True})
    sharding: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self.examples // self.size

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch's shapes, for `effjax.init_state`."""
        return jax.eval_shape(lambda batches: batches(0), self)

    def indices(self, step: Array) -> Array:
        """Which examples a step sees: int32 [size]."""
        epoch, position = step // self.per_epoch, step % self.per_epoch
        places = position * self.size + jnp.arange(self.size, dtype=jnp.int32)
        return shuffled(jax.random.fold_in(self.key, epoch), places, self.examples)

    def __call__(self, step: Array) -> dict[str, Array]:
        """The batch of a step."""
        chosen = self.indices(jnp.asarray(step, jnp.int32))
        batch = standardized({n: x[chosen] for n, x in self.data.items()}, self.shift, self.scale)
        if self.sharding is not None:
            batch = jax.lax.with_sharding_constraint(batch, self.sharding)
        return batch

    def on(self, layout: Layout) -> "Batches":
        """The same on a mesh: every device has the data, each makes its part of the batch."""
        ways = layout.ways(layout.batch_axes)
        if self.size % ways:
            raise ConfigError(
                f"a batch of {self.size} does not divide among the {ways} devices of the mesh axes "
                f"{layout.batch_axes}; use a multiple of {ways}."
            )
        spec = jax.sharding.PartitionSpec(layout.batch_axes)
        everywhere = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
        placed = jax.device_put(self, everywhere)
        return dataclasses.replace(placed, sharding=jax.sharding.NamedSharding(layout.mesh, spec))


def make_batches(
    data: Mapping[str, Any], size: int, seed: int, *, shift: Any = 0.0, scale: Any = 1.0
) -> Batches:
    """Puts arrays on the device as `Batches`.

    Raises:
      ConfigError: the arrays have different lengths, or a batch is larger than the data set.
    """
    lengths = {name: len(x) for name, x in data.items()}
    if len(set(lengths.values())) != 1:
        raise ConfigError(f"the data's arrays have different numbers of examples: {lengths}.")
    examples = next(iter(lengths.values()))
    if not 1 <= size <= examples:
        raise ConfigError(f"the batch size is {size}; the data has {examples} examples.")
    arrays = {name: jnp.asarray(x) for name, x in data.items()}
    shift, scale = jnp.asarray(shift, jnp.float32), jnp.asarray(scale, jnp.float32)
    return Batches(arrays, jax.random.key(seed), shift, scale, size)


def standardized(batch: dict[str, Array], shift: Array, scale: Array) -> dict[str, Array]:
    """The batch with "image", where it has one, as float32 (image - shift) * scale."""
    if "image" not in batch:
        return batch
    return {**batch, "image": (batch["image"].astype(jnp.float32) - shift) * scale}


def shuffled(key: Array, places: Array, size: int) -> Array:
    """Entries of a random permutation of 0 .. size-1, without making the permutation.

    A Feistel network on the smallest power of two that holds `size` is a permutation of it, keyed
    by the round keys; a place that lands beyond `size` is sent through again until it lands inside,
    which makes it one of 0 .. size-1. The cost is that of the places asked for, whatever the size.

    Args:
      key: chooses the permutation.
      places: int32 [...], each in 0 .. size-1.
      size: at most 2^31.

    Returns:
      int32 [...], different for different places.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.harness.batches import shuffled
      >>> sorted(shuffled(jax.random.key(0), jnp.arange(5), 5).tolist())
      [0, 1, 2, 3, 4]

    Reference: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    low_mask, high_mask = np.uint32(2**low - 1), np.uint32(2 ** (bits - low) - 1)
    keys = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)

    def encrypt(x: Array) -> Array:
        left, right = x >> low, x & low_mask
        for k in keys:
            left = left ^ (_mix(right ^ k[0]) & high_mask)
            right = right ^ (_mix(left ^ k[1]) & low_mask)
        return (left << low) | right

    def again(x: Array) -> Array:
        return jnp.where(x >= size, encrypt(x), x)

    start = encrypt(places.astype(jnp.uint32))
    return jax.lax.while_loop(lambda x: jnp.any(x >= size), again, start).astype(jnp.int32)


def _mix(h: Array) -> Array:
    """MurmurHash3's finalizer: each bit of a uint32 changes half of the bits of the result."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def evaluator(
    evaluate: Callable[..., Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    size: int = 500,
    shift: Any = 0.0,
    scale: Any = 1.0,
    prefix: str = "",
    frozen: Any = None,
) -> Callable[[Any], dict[str, float]]:
    """From `effjax.make_eval`'s function to one from a state to its means over a whole data set.

    Args:
      evaluate: `(state, batch, frozen) -> {name: Mean}`.
      data: arrays with the examples along their first axis.
      size: examples at a time; the last chunk is padded, and marked in the batch's "valid".
      shift, scale: as for `Batches`.
      prefix: put before the metrics' names: "validation/".

    Returns:
      `state -> {prefix + name: float}`.
    """
    examples = len(next(iter(data.values())))
    size = min(size, examples)
    chunks = -(-examples // size)

    def chunked(x: Any) -> Array:
        x = np.asarray(x)
        padding = [(0, chunks * size - examples)] + [(0, 0)] * (x.ndim - 1)
        return jnp.asarray(np.pad(x, padding).reshape(chunks, size, *x.shape[1:]))

    arrays = {name: chunked(x) for name, x in data.items()}
    arrays["valid"] = chunked(np.ones(examples, bool))
    shift, scale = jnp.asarray(shift, jnp.float32), jnp.asarray(scale, jnp.float32)

    @jax.jit
    def one(state: Any, arrays: dict[str, Array], chunk: Array, frozen: Any) -> Mapping[str, Any]:
        batch = standardized({n: x[chunk] for n, x in arrays.items()}, shift, scale)
        return evaluate(state, batch, frozen)

    def whole(state: Any) -> dict[str, float]:
        total: dict[str, Any] = {}
        for chunk in range(chunks):
            found = one(state, arrays, np.int32(chunk), frozen)
            total = {n: total[n].merge(m) if n in total else m for n, m in found.items()}
        return {prefix + n: float(m.value) for n, m in total.items()}

    return whole
