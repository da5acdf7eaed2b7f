"""Measured time of jitted functions, several candidates in one process, in turns."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.errors import SetupError

MIN_SAMPLE_S = 1e-3  # a sample repeats a short call until it is well above the clock's resolution


class Latency(NamedTuple):
    """How long one call takes, in seconds, over `samples` samples."""

    median: float
    p95: float
    batch_size: int
    samples: int
    device: str

    @property
    def per_example(self) -> float:
        """Median seconds an example."""
        return self.median / self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return self._asdict()

    def __str__(self) -> str:
        return (
            f"{_readable(self.median)} median, {_readable(self.p95)} p95 at batch "
            f"{self.batch_size} ({self.samples} samples, {self.device})"
        )


def latency(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    batch_size: int,
    samples: int = 30,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Times candidates against each other: each round times all of them, in a random order, so
    that a slow moment of the machine, or a neighbour's threads still waiting for work, falls on all
    alike.

    A sample is the mean of as many calls as take a millisecond; compilation, `warmup` calls and one
    call just before each sample do not count. Each sample ends when the results are there
    (`block_until_ready`).

    Args:
      candidates: by name, a function without arguments that calls a jitted function and returns its
        result: `{"dense": lambda: predict(params, images)}`; or another engine's, in NumPy.
      batch_size: examples in a call.
      samples: rounds; median and 95th percentile are over these.
      warmup: calls before the first round.
      clock: seconds; for tests.

    Returns:
      {name: Latency}, in the order given.

    Raises:
      SetupError: no candidates, numbers that are not positive, or a candidate returning no array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> f = jax.jit(lambda x: x @ x)
      >>> x = jnp.ones((8, 8))
      >>> found = ej.latency({"matmul": lambda: f(x)}, batch_size=8, samples=3)
      >>> found["matmul"].samples
      3
    """
    if not candidates:
        raise SetupError("latency got no candidates; give it {'name': lambda: f(x)}.")
    if min(samples, batch_size) < 1 or warmup < 0:
        raise SetupError(
            f"latency got samples={samples}, batch_size={batch_size}, warmup={warmup}; it needs at "
            "least 1, 1 and 0."
        )
    repeats, devices = {}, {}
    for name, call in candidates.items():
        devices[name] = _device(name, jax.block_until_ready(call()))  # compiles
        for _ in range(warmup):
            jax.block_until_ready(call())
        start = clock()
        jax.block_until_ready(call())
        repeats[name] = max(1, math.ceil(MIN_SAMPLE_S / max(clock() - start, 1e-9)))
    names, times = list(candidates), {name: list[float]() for name in candidates}
    rng = np.random.default_rng(0)
    for _ in range(samples):
        for name in rng.permutation(names).tolist():
            jax.block_until_ready(candidates[name]())  # the caches are its own again
            start = clock()
            for _ in range(repeats[name]):
                result = candidates[name]()
            jax.block_until_ready(result)
            times[name].append((clock() - start) / repeats[name])
    return {
        name: Latency(
            float(np.median(times[name])),
            float(np.percentile(times[name], 95)),
            batch_size,
            samples,
            devices[name],
        )
        for name in names
    }


def _device(name: str, result: Any) -> str:
    arrays = [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array | np.ndarray)]
    if not arrays:
        raise SetupError(
            f"the candidate {name!r} returned no jax array ({type(result).__name__}), so there is "
            "nothing to wait for. Return the jitted function's result."
        )
    if isinstance(arrays[0], np.ndarray):  # of another engine, which is done when it returns
        return f"{_cpu_model()}, {os.cpu_count()} cores (cpu)"
    return device_name(min(arrays[0].devices(), key=lambda d: d.id))


def device_name(device: Any) -> str:
    """What times on a jax device are times of: the accelerator's kind, or the processor's model."""
    if device.platform != "cpu":
        return f"{device.device_kind} ({device.platform})"
    return f"{_cpu_model()}, {os.cpu_count()} cores (cpu)"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere, what Python knows
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _readable(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
