"""Spearman's correlation: by hand, against SciPy, and its interval."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from effjax.errors import ReportError
from effjax.report import spearman, spearman_interval


def test_against_scipy_with_equal_values():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.normal(size=40)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, -np.exp(a)) == pytest.approx(-1)


def test_what_has_no_score_ranks_last():
    nan, inf = float("nan"), float("inf")
    assert spearman([nan, -inf, 0.0, inf], [1, 2, 3, 4]) == pytest.approx(1)
    assert spearman([nan, 1, nan, 2], [2, 3, 1, 4]) == pytest.approx(
        spearmanr([0, 1, 0, 2], [2, 3, 1, 4]).statistic
    )


def test_the_interval_covers_what_it_says():
    """The rho of a bivariate normal of correlation 0.6 is 6/π asin(0.3) = 0.58."""
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(60):
        x = rng.normal(size=80)
        y = 0.6 * x + 0.8 * rng.normal(size=80)
        found = spearman_interval(x, y, level=0.8, resamples=200, seed=seed)
        assert found.low <= found.rho <= found.high
        assert found.n == 80
        inside += found.low <= 6 / np.pi * np.arcsin(0.3) <= found.high
    assert 38 <= inside <= 58


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ReportError, match="all values of one side are alike"):
        spearman([1, 1, 1], [1, 2, 3])
    with pytest.raises(ReportError, match="same two values or more"):
        spearman([1, 2], [1, 2, 3])
