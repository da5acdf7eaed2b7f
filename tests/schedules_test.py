"""Schedules: the cubic one against its formula at every step, windows, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ScheduleError
from effjax.schedules import Window, as_schedule, check_fraction, cubic, is_traced


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
