"""What XLA makes of a model: operations, memory, the time to compile and to run."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.cost.latency import Latency, latency
from effjax.errors import SetupError


class Compute(NamedTuple):
    """One batch size of a compiled model. What XLA does not say for a device is None."""

    batch_size: int
    flops: float | None  # XLA's count: a multiplication and an addition are two
    bytes_accessed: float | None  # read and written by all operations, caches left aside
    peak_bytes: int | None  # of memory: arguments, outputs and temporaries
    trace_seconds: float  # Python to jaxpr to StableHLO
    compile_seconds: float  # StableHLO to machine code, or from jax's compilation cache if it is on
    latency: Latency

    @property
    def throughput(self) -> float:
        """Examples a second, at the median latency."""
        return 1 / self.latency.per_example

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {**self._asdict(), "latency": self.latency.to_dict(), "throughput": self.throughput}

    def __str__(self) -> str:
        counts = {"FLOPs": self.flops, "bytes accessed": self.bytes_accessed}
        counts |= {"bytes at the peak": self.peak_bytes}
        known = ", ".join(f"{n:,.0f} {what}" for what, n in counts.items() if n is not None)
        return (
            f"{self.latency}, {self.throughput:,.0f} examples/s; XLA: {known or 'says nothing'}; "
            f"traced in {self.trace_seconds:.2g} s, compiled in {self.compile_seconds:.2g} s"
        )


def compute(
    apply: Apply,
    params: PyTree,
    batch: PyTree,
    model_state: PyTree = None,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    samples: int = 30,
) -> tuple[Compute, ...]:
    """Compiles a model for inference and measures it, on the default device.

    Args:
      apply: `Model.apply`; it is called with `train=False`.
      params: of the model; arguments of the program, not constants in it.
      batch: examples along the first axis of every leaf; repeated or cut to each batch size.
      model_state: of the model; {} by default.
      batch_sizes: to compile for.
      samples: of the latency; see `effjax.latency`.

    Raises:
      SetupError: a leaf of the batch without a first axis, or a batch size below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> params, batch = {"kernel": jnp.ones((64, 10))}, {"x": jnp.ones((1, 64))}
      >>> one, many = ej.cost.compute(apply, params, batch, samples=2)
      >>> many.batch_size, many.flops
      (32, 40960.0)
    """
    if wrong := [n for n in batch_sizes if n < 1]:
        raise SetupError(f"batch_sizes has {wrong}; a batch has at least 1 example.")
    if any(not jnp.shape(x) for x in jax.tree.leaves(batch)) or not jax.tree.leaves(batch):
        raise SetupError(
            "compute needs a batch whose leaves have the examples along their first axis, but got "
            f"the shapes {jax.tree.map(jnp.shape, batch)}."
        )
    state = {} if model_state is None else model_state

    def predict(params: PyTree, model_state: PyTree, batch: PyTree) -> Any:
        return apply(params, model_state, batch, jax.random.key(0), False)[0]

    def one(size: int) -> Compute:
        examples = jax.tree.map(lambda x: _resized(jnp.asarray(x), size), batch)
        began = time.perf_counter()
        lowered = jax.jit(predict).lower(params, state, examples)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        timed = latency(
            {"model": lambda: compiled(params, state, examples)}, batch_size=size, samples=samples
        )
        return Compute(
            size,
            cost.get("flops"),
            cost.get("bytes accessed"),
            None if memory is None else _peak(memory),
            traced - began,
            done - traced,
            timed["model"],
        )

    return tuple(one(size) for size in batch_sizes)


def _resized(x: Array, size: int) -> Array:
    return x[jnp.arange(size) % x.shape[0]]


def _peak(memory: Any) -> int:
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(held + memory.temp_size_in_bytes - memory.alias_size_in_bytes)
