"""Comparisons with a baseline, by hand and with scipy."""

import math

import pytest
from scipy import stats

from effjax.errors import ReportError
from effjax.report import Column, compare, comparison_grid, holm

ACC = Column("acc", "accuracy (%)", ".1f", "max", 100)
VALUES = {"dense": [0.90, 0.92, 0.91], "sparse": [0.88, 0.91, 0.89], "tiny": [0.5, 0.52, 0.54]}
ROWS = [{"name": n, "seed": s, "acc": a} for n, all_ in VALUES.items() for s, a in enumerate(all_)]


def test_differences_intervals_and_p_values():
    sparse, tiny = compare(ROWS, "dense", ACC)
    assert sparse.name == "sparse"
    assert sparse.difference == pytest.approx(-5 / 3)
    assert -2 - 1e-9 <= sparse.interval.low <= sparse.interval.high <= -1 + 1e-9
    raw = [
        stats.ttest_ind(VALUES[n], VALUES["dense"], equal_var=False).pvalue
        for n in ("sparse", "tiny")
    ]
    assert [sparse.p, tiny.p] == pytest.approx(raw)
    assert [sparse.p_holm, tiny.p_holm] == pytest.approx(holm(raw))
    assert sparse.seeds == (3, 3)


def test_pairs_are_made_by_seed_not_by_order():
    [found] = compare(
        [{"name": "b", "seed": s, "acc": s / 10} for s in (1, 2, 3)]
        + [{"name": "a", "seed": s, "acc": s / 10 + 0.01} for s in (3, 1, 2, 4)],
        "b",
        ACC,
    )
    assert (found.interval.low, found.interval.high) == pytest.approx((1, 1))
    assert found.interval.n == 3
    assert found.seeds == (4, 3)


def test_few_seeds_give_dashes_not_numbers():
    [found] = compare([{"name": "a", "acc": 1}, {"name": "b", "acc": 0.5}], "a", ACC)
    assert found.interval is None
    assert math.isnan(found.p)
    assert comparison_grid([found], "a", ACC).rows == [["b", "-50.0", "-", "-", "-", "1 / 1"]]


def test_the_grid_says_what_was_done():
    grid = comparison_grid(compare(ROWS, "dense", ACC), "dense", ACC)
    assert grid.head[:3] == ["accuracy (%), minus dense", "difference", "95% interval"]
    name, difference, interval, p, _, seeds = grid.rows[1]
    assert (name, difference, seeds) == ("tiny", "-39.0", "3 / 3")
    assert interval.startswith("[-40")
    assert p == "<0.0001"
    assert "Welch" in grid.caption
    assert "$<$0.0001" in grid.latex()


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ReportError, match=r"no baseline 'dens' .* \['dense', 'sparse', 'tiny'\]"):
        compare(ROWS, "dens", ACC)


def test_the_difference_is_over_the_seeds_of_its_interval():
    rows = [{"name": "dense", "seed": s, "acc": 0.5 + s} for s in range(4)]
    rows += [{"name": "sparse", "seed": s, "acc": 0.4 + s} for s in (2, 3)]
    [found] = compare(rows, "dense", ACC._replace(scale=1))
    assert found.difference == pytest.approx(-0.1)
    assert found.interval.low <= found.difference <= found.interval.high
    assert found.seeds == (2, 4)
