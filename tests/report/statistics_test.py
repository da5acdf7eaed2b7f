"""Statistics by hand, against brute force, and against scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from effjax.errors import ReportError
from effjax.report import holm, hypervolume, paired_bootstrap, pareto_front, welch, worst_corner

DOWN_UP = (False, True)


def test_hypervolume_by_hand():
    # Boxes to (4, 0): 3 x 1 and 2 x 3, which share 2 x 1.
    assert hypervolume([(1, 1), (2, 3)], (4, 0), DOWN_UP) == 3 + 6 - 2
    assert hypervolume([(1, 1)], (4, 0), DOWN_UP) == 3
    assert hypervolume([(1, 2, 3)], (0, 0, 0), (True,) * 3) == 6
    assert hypervolume([(1, 2, 3), (2, 1, 1)], (0, 0, 0), (True,) * 3) == 6 + 2 - 1
    assert hypervolume([], (4, 0), DOWN_UP) == 0


def test_points_beyond_the_reference_and_dominated_points_add_nothing():
    front = [(1, 1), (2, 3)]
    whole = hypervolume(front, (4, 0), DOWN_UP)
    assert hypervolume([*front, (5, 9), (1, -1), (3, 2), (1, 1)], (4, 0), DOWN_UP) == whole
    assert hypervolume([(4, 1)], (4, 0), DOWN_UP) == 0  # on the border


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda d: st.lists(st.lists(st.integers(0, 5), min_size=d, max_size=d), max_size=6)
    )
)
def test_hypervolume_counts_the_unit_cells_that_are_dominated(points):
    d = len(points[0]) if points else 2
    cells = itertools.product(range(6), repeat=d)
    dominated = sum(any(all(p[i] <= c[i] for i in range(d)) for p in points) for c in cells)
    assert hypervolume(points, (6,) * d, (False,) * d) == dominated
    front = [points[i] for i in pareto_front(points, (False,) * d)]
    assert hypervolume(front, (6,) * d, (False,) * d) == dominated


def test_the_worst_corner_lies_beyond_all_points():
    points = [(10, 0.5), (20, 1.0)]
    assert worst_corner(points, DOWN_UP) == pytest.approx((21, 0.45))
    assert worst_corner([(10, 0.5)], DOWN_UP) == pytest.approx((11, 0.45))  # no range: of the value
    assert hypervolume(points, worst_corner(points, DOWN_UP), DOWN_UP) > 0
    with pytest.raises(ReportError, match="no points"):
        worst_corner([], DOWN_UP)


@pytest.mark.parametrize(
    ("points", "reference", "says"),
    [
        ([(1, 2)], (1, 2, 3), "one number a criterion"),
        ([(1, 2, 3)], (1, 2), r"shape \(1, 3\) for 2 criteria"),
        ([(1, math.nan)], (1, 2), "finite"),
        ([(1, 2)], (1, math.inf), "is not finite"),
    ],
)
def test_hypervolumes_that_cannot_be_meant(points, reference, says):
    with pytest.raises(ReportError, match=says):
        hypervolume(points, reference, DOWN_UP)


def test_two_pairs_by_hand():
    # Differences 0 and 1: the four resamples have the means 0, .5, .5, 1.
    found = paired_bootstrap([1, 3], [1, 2], level=0.5, method="percentile")
    assert found == (0.5, 0, 1, 0.5, 2)
    # Three: the mean is 0 in one resample of 27 (3.7%), so that 2.5% cut nothing off.
    found = paired_bootstrap([1, 0, 1], [0, 0, 0], method="percentile")
    assert found == pytest.approx((2 / 3, 0, 1, 0.95, 3))


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_bootstrap_is_scipys(method):
    rng = np.random.default_rng(3)
    a = rng.exponential(size=24) + 0.4  # skewed, so that BCa has something to correct
    b = rng.normal(size=24)
    ours = paired_bootstrap(a, b, method=method, resamples=60_000)
    theirs = stats.bootstrap(
        (a - b,), np.mean, method=method, n_resamples=60_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert ours.low == pytest.approx(theirs.low, abs=0.015 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.015 * width)


def test_swapping_the_sides_mirrors_the_interval():
    a, b = [0.9, 0.7, 0.8, 0.95], [0.85, 0.7, 0.6, 0.9]
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_few_seeds_are_enumerated_and_many_drawn_from_the_seed():
    a, b = [0.5, 0.7, 0.9, 0.95], [0.5, 0.6, 0.6, 0.7]
    assert paired_bootstrap(a, b, seed=0) == paired_bootstrap(a, b, seed=1)
    rng = np.random.default_rng(0)
    many = rng.normal(size=(2, 9))
    assert paired_bootstrap(*many, seed=0) == paired_bootstrap(*many, seed=0)
    assert paired_bootstrap(*many, seed=0) != paired_bootstrap(*many, seed=1)


def test_pairing_removes_what_seeds_have_in_common():
    noise = np.random.default_rng(0).normal(size=5)
    found = paired_bootstrap(noise + 0.1, noise)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert welch(noise + 0.1, noise).p > 0.7


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=8),
    st.lists(st.integers(-50, 50), min_size=2, max_size=8),
)
def test_welch_is_scipys(a, b):
    assume(np.std(a) > 0 and np.std(b) > 0)  # scipy warns
    found, theirs = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert (found.t, found.df, found.p) == pytest.approx(
        (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9, abs=1e-12
    )


def test_welch_by_hand_and_without_variance():
    # Means 2 and 4, variances 1 and 4: t = -2 / sqrt(5/3), df = (5/3)² / (1/18 + 16/18).
    found = welch([1, 2, 3], [2, 4, 6])
    assert found.t == pytest.approx(-2 / math.sqrt(5 / 3))
    assert found.df == pytest.approx((25 / 9) / (17 / 18))
    assert all(math.isnan(x) for x in welch([0.1] * 3, [0.3] * 3))


def test_holm_by_hand_and_against_scipys_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    found = holm([math.nan, 0.02, 0.03])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.04, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p):
    found = np.asarray(holm(p))
    assert (found >= np.asarray(p) - 1e-12).all()
    assert (found <= np.minimum(1, len(p) * np.asarray(p)) + 1e-12).all()
    assert (np.diff(found[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: paired_bootstrap([1], [2]), "same two seeds or more"),
        (lambda: paired_bootstrap([1, 2, 3], [1, 2]), "got 3 and 2 values"),
        (lambda: paired_bootstrap([1, 2], [1, 2], level=95), "level=95"),
        (lambda: paired_bootstrap([1, math.inf], [1, 2]), "finite numbers"),
        (lambda: welch([1], [1, 2]), "needs 2 finite numbers"),
        (lambda: holm([1.2]), "between 0 and 1"),
    ],
)
def test_samples_that_cannot_be_tested(call, says):
    with pytest.raises(ReportError, match=says):
        call()
