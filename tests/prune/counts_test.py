"""Counts in two digits: arithmetic against Python's integers, and sums past every limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.prune import counts
from effjax.prune.counts import Count, count

NUMBERS = st.one_of(st.integers(0, 2**41), st.integers(0, 5000))


def number(c: Count) -> int:
    assert c.high.dtype == c.low.dtype == jnp.int32
    assert 0 <= int(c.low) < 2**11
    return int(c)


@settings(deadline=None, max_examples=40)
@given(NUMBERS, NUMBERS)
def test_arithmetic_is_that_of_integers(a, b):
    x, y = Count.of(a), Count.of(b)
    assert number(x) == a
    assert number(x.minus(y)) == max(a - b, 0)
    assert number(x.minimum(y)) == min(a, b)
    assert bool(x.at_least(y)) == (a >= b)
    assert bool(x.equals(y)) == (a == b)
    assert number(x.where(jnp.bool_(False), y)) == b
    assert float(x.value()) == pytest.approx(a, rel=2**-23)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_totals_beyond_int32(numbers):
    stacked = Count.stack([Count.of(n) for n in numbers])
    assert number(stacked.sum()) == sum(numbers)
    after = stacked.after()
    found = [int(Count(h, lo)) for h, lo in zip(after.high, after.low, strict=True)]
    assert found == [sum(numbers[i + 1 :]) for i in range(len(numbers))]


@pytest.mark.parametrize("x", [0.0, 0.4, 0.5, 1.5, 2.5, 2047.6, 2**24, 3e9, 2**40])
def test_rounded_goes_to_the_nearest_and_halves_to_the_even(x):
    assert number(Count.rounded(jnp.float32(x))) == int(np.round(np.float32(x)))


@pytest.mark.parametrize("limits", [(2**24, 2**31), (64, 2**31), (16, 128), (2, 4)])
@pytest.mark.parametrize("shape", [(), (1,), (300,), (7, 40), (3, 3, 8, 16), (65, 2, 1)])
def test_count_is_exact_on_every_way_of_splitting_the_axes(monkeypatch, limits, shape):
    monkeypatch.setattr(counts, "FLOAT32", limits[0])
    monkeypatch.setattr(counts, "INT32", limits[1])
    flags = np.random.default_rng(1).random(shape) < 0.6
    assert number(count(jnp.asarray(flags))) == flags.sum()


def test_a_leaf_of_more_than_2_to_the_31_weights_is_counted_without_overflow():
    # Too large to make, so the sums are followed on shapes: each holds what it may have to hold.
    shape = (2**21, 2**12)
    jaxpr = jax.make_jaxpr(count)(jax.ShapeDtypeStruct(shape, bool)).jaxpr
    sums = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "reduce_sum"]
    summed = [
        (e.invars[0].aval, np.prod([e.invars[0].aval.shape[a] for a in e.params["axes"]]))
        for e in sums
    ]
    assert [(aval.dtype.name, int(entries)) for aval, entries in summed] == [
        ("float32", 2**21),  # below 2^24: exact
        ("int32", 2**21 // 2**21 * 1),
        ("int32", 2**12),
        ("int32", 2**12),
    ]
