"""Latency with a clock of our own, and with the real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import SetupError


class Clock:
    """A clock that the timed calls move."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def candidate(self, name, seconds):
        result = jnp.zeros(())

        def call():
            self.calls.append(name)
            self.now += seconds(len(self.calls)) if callable(seconds) else seconds
            return result

        return call


def test_median_and_percentile_by_hand():
    clock = Clock()
    # Calls 1 to 3 compile, warm up and size the sample; ten samples of 1 to 10 s follow, each
    # after a call that does not count.
    call = clock.candidate("a", lambda n: max((n - 3) / 2, 1))
    found = ej.latency({"a": call}, batch_size=4, samples=10, warmup=1, clock=clock)["a"]
    assert (found.median, found.samples, found.batch_size) == (5.5, 10, 4)
    assert found.p95 == pytest.approx(9.55)
    assert found.per_example == pytest.approx(5.5 / 4)


def test_rounds_are_interleaved_in_random_order():
    clock = Clock()
    names = {name: clock.candidate(name, 1.0) for name in "abc"}
    ej.latency(names, batch_size=1, samples=200, warmup=0, clock=clock)
    calls = "".join(clock.calls[6:])
    assert calls[::2] == calls[1::2]  # the call before a sample is of the same candidate
    rounds = [calls[i : i + 6 : 2] for i in range(0, len(calls), 6)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(rounds) == 200
    assert min(map(rounds.count, ("abc", "acb", "bac", "bca", "cab", "cba"))) > 15


def test_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    names = {"slow": clock.candidate("slow", 1.0), "fast": clock.candidate("fast", 1e-4)}
    found = ej.latency(names, batch_size=1, samples=2, warmup=0, clock=clock)
    assert clock.calls.count("fast") >= 2 * 10
    assert clock.calls.count("slow") == 2 + 2 * 2
    assert found["fast"].median == pytest.approx(1e-4)


def test_a_real_function_is_timed_and_its_device_named():
    f = jax.jit(lambda x: x @ x)
    small, large = jnp.ones((8, 8)), jnp.ones((384, 384))
    candidates = {"small": lambda: f(small), "large": lambda: f(large)}
    found = ej.latency(candidates, batch_size=8, samples=5)
    assert 0 < found["small"].median < found["large"].median <= found["large"].p95
    assert found["small"].device.endswith(f"({jax.default_backend()})")
    assert "median" in str(found["small"])
    assert "batch 8" in str(found["small"])


@pytest.mark.parametrize(
    ("candidates", "options", "says"),
    [
        ({}, {}, "no candidates"),
        ({"a": lambda: jnp.ones(1)}, {"samples": 0}, "samples=0"),
        ({"a": lambda: 3}, {}, "no jax array"),
    ],
)
def test_what_cannot_be_timed_is_refused(candidates, options, says):
    with pytest.raises(SetupError, match=says):
        ej.latency(candidates, batch_size=1, **options)


def test_other_engines_return_numpy():
    found = ej.latency({"numpy": lambda: np.ones(2)}, batch_size=1, samples=2)["numpy"]
    assert found.device.endswith("cores (cpu)")
