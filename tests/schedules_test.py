"""Schedules: each against its formula at every step, windows, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ScheduleError
from effjax.schedules import (
    Window,
    as_schedule,
    check_fraction,
    cubic,
    cyclic,
    is_traced,
    linear,
    one_shot,
    periodic,
)


@pytest.mark.parametrize(
    ("final", "begin", "end", "initial"),
    [(0.8, 0, 4, 0.0), (0.95, 10, 110, 0.0), (0.5, 3, 4, 0.25), (0.2, 5, 30, 0.9)],
)
def test_cubic_is_the_formula_at_every_step(final, begin, end, initial):
    schedule = jax.jit(cubic(final, begin, end, initial))
    for t in range(end + 5):
        if t < begin:
            wanted = 0.0
        elif t > end:
            wanted = final
        else:
            wanted = final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3
        found = schedule(jnp.int32(t))
        assert found.dtype == jnp.float32
        assert not found.weak_type
        assert float(found) == pytest.approx(wanted, abs=3e-7)
    assert float(schedule(end)) == np.float32(final)  # reached exactly, not nearly


def test_cubic_by_hand():
    # The values of Zhu and Gupta's equation 1 for s_f = 0.8 in 4 steps.
    found = [float(cubic(0.8, 0, 4)(t)) for t in range(6)]
    np.testing.assert_allclose(found, [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8], atol=1e-6)


def test_cubic_with_traced_sparsities_is_cubic_with_numbers():
    steps = jnp.arange(12)
    finals = jnp.array([0.3, 0.9])
    found = jax.jit(jax.vmap(lambda s: cubic(s, 2, 9, 0.1 * s)(steps)))(finals)
    for row, final in zip(found, finals, strict=True):
        wanted = jax.jit(cubic(float(final), 2, 9, 0.1 * float(final)))(steps)
        np.testing.assert_allclose(row, wanted, rtol=1e-6)


def values(schedule, steps):
    """At steps 0, 1, ... as float32 under jit, and the same for a Python integer."""
    found = [jax.jit(schedule)(jnp.int32(t)) for t in range(steps)]
    assert all(x.dtype == jnp.float32 and not x.weak_type and x.shape == () for x in found)
    np.testing.assert_allclose([schedule(t) for t in range(steps)], found, atol=1e-7)
    return [float(x) for x in found]


@pytest.mark.parametrize(
    ("final", "begin", "end", "initial"),
    [(0.8, 0, 4, 0.0), (0.95, 10, 40, 0.0), (0.5, 3, 4, 0.25), (0.2, 5, 30, 0.9)],
)
def test_linear_is_the_formula_at_every_step(final, begin, end, initial):
    found = values(linear(final, begin, end, initial), end + 5)
    steps = np.arange(end + 5)
    wanted = initial + (final - initial) * np.minimum((steps - begin) / (end - begin), 1.0)
    np.testing.assert_allclose(found, np.where(steps < begin, 0.0, wanted), atol=3e-7)
    assert found[end] == found[-1] == np.float32(final)  # reached exactly, not nearly


def test_one_shot_by_hand():
    final = float(np.float32(0.8))
    assert values(one_shot(0.8), 3) == [final] * 3
    assert values(one_shot(0.8, 2), 5) == [0.0, 0.0, final, final, final]


@pytest.mark.parametrize(
    ("every", "begin", "end"), [(3, 0, 8), (3, 2, 8), (4, 0, None), (100, 1, 5), (1, 2, 9)]
)
def test_periodic_holds_the_value_of_the_last_step_of_its_window(every, begin, end):
    inner = cubic(0.9, 0, 10, 0.1)
    window = Window(begin, end, every)
    found = values(periodic(inner, every, begin, end), 14)
    held = 0.0
    for t in range(14):
        if window.contains(t):
            held = float(inner(t))
        assert found[t] == pytest.approx(held, abs=1e-6)


def test_cyclic_by_hand():
    # Dense for 2 steps, then 3 compressed and 1 decompressed, the last 2 before 12 compressed.
    found = values(cyclic(0.5, 2, 12, 3, 1, low=0.25, last=2), 15)
    assert found == [0, 0, 0.5, 0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("compressed", "decompressed"), [(1, 1), (2, None), (5, 3), (40, 7)])
def test_cyclic_is_the_formula_and_ends_compressed(compressed, decompressed):
    begin, end = 3, 50
    found = values(cyclic(0.75, begin, end, compressed, decompressed), end + 4)
    both = compressed + (compressed if decompressed is None else decompressed)
    for t, value in enumerate(found):
        pruned = t >= begin and ((t - begin) % both < compressed or t >= end - compressed)
        assert value == (0.75 if pruned else 0.0)
    assert set(found[end - compressed :]) == {0.75}


@pytest.mark.parametrize(
    "make",
    [
        lambda s: linear(s, 2, 9, 0.1 * s),
        lambda s: one_shot(s, 3),
        lambda s: periodic(cubic(s, 0, 9), 4, 0, 9),
        lambda s: cyclic(s, 1, 9, 2, 1, low=0.1 * s),
    ],
    ids=["linear", "one_shot", "periodic", "cyclic"],
)
def test_traced_sparsities_follow_the_schedule_of_numbers(make):
    steps = jnp.arange(12)
    finals = jnp.array([0.3, 0.9])
    found = jax.jit(jax.vmap(lambda s: jax.vmap(make(s))(steps)))(finals)
    for row, final in zip(found, finals, strict=True):
        np.testing.assert_allclose(row, values(make(float(final)), 12), rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        (Window(0, 4), [0, 1, 2, 3, 4]),
        (Window(2, 9, 3), [2, 5, 8, 9]),  # always at the end
        (Window(2, 8, 3), [2, 5, 8]),
        (Window(1, 6, 100), [1, 6]),
        (Window.once(3), [3]),
        (Window(3, None, 4), [3, 7, 11]),
    ],
)
def test_the_steps_of_a_window(window, wanted):
    window.check("it")
    contains = jax.jit(window.contains)
    assert [t for t in range(12) if contains(jnp.int32(t))] == wanted
    assert [t for t in range(12) if window.contains(t)] == wanted


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cubic(0.8, 5, 5), "begins at step 5 and ends at step 5"),
        (lambda: cubic(0.8, 5, 3), "begins at step 5 and ends at step 3"),
        (lambda: cubic(0.8, -2, 3), "begins at step -2"),
        (lambda: cubic(1.0, 0, 3), "final sparsity is 1.0"),
        (lambda: cubic(0.8, 0, 3, -0.1), "initial sparsity is -0.1"),
        (lambda: linear(0.8, 5, 5), "linear sparsity schedule begins at step 5 and ends at step 5"),
        (lambda: linear(1.5, 0, 5), "final sparsity is 1.5"),
        (lambda: linear(0.5, 0, 5, -1.0), "initial sparsity is -1.0"),
        (lambda: one_shot(1.0), r"the sparsity is 1.0.*\[0, 1\)"),
        (lambda: one_shot(0.5, -1), "happens at step -1"),
        (lambda: periodic(cubic(0.8, 0, 9), 0), "happens every 0 steps"),
        (lambda: periodic(cubic(0.8, 0, 9), 2, 5, 3), "begins at step 5 and ends at step 3"),
        (lambda: cyclic(0.9, 5, 5, 1), "cyclic sparsity schedule begins at step 5"),
        (lambda: cyclic(1.0, 0, 9, 2), "sparsity of compressed phases is 1.0"),
        (lambda: cyclic(0.9, 0, 9, 2, low=1.0), "sparsity of decompressed phases is 1.0"),
        (lambda: cyclic(0.9, 0, 9, 0), "phases of 0 steps compressed"),
        (lambda: cyclic(0.9, 0, 9, 2, 0), "0 decompressed"),
        (lambda: cyclic(0.9, 0, 9, 2, last=10), "last 10 of steps 0 to 9.*fit into the 9 steps"),
        (lambda: Window(4, 2).check("masks"), "masks begins at step 4 and ends at step 2"),
        (lambda: Window(-1, None).check("masks"), "masks begins at step -1"),
        (lambda: Window.once(-1).check("masks"), "masks happens at step -1"),
        (lambda: Window(0, 5, 0).check("masks"), "masks happens every 0 steps"),
        (lambda: check_fraction(float("nan"), "it"), "it is nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(ScheduleError, match=words):
        make()


def test_as_schedule_and_is_traced():
    constant = as_schedule(0.3)(jnp.int32(7))
    assert constant.dtype == jnp.float32
    assert not constant.weak_type
    assert float(constant) == np.float32(0.3)
    schedule = cubic(0.8, 0, 4)
    assert as_schedule(schedule) is schedule
    assert is_traced(jnp.float32(0.5))
    assert not is_traced(0.5)
    assert not is_traced(np.float32(0.5))
    check_fraction(jnp.float32(7.0), "a traced value is not looked at")
