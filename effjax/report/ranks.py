"""Agreement of two rankings: Spearman's correlation, and how certain it is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from effjax.errors import ReportError


class Correlation(NamedTuple):
    """Spearman's rho, with a bootstrap interval."""

    rho: float
    low: float
    high: float
    n: int


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """The correlation of the ranks, in [-1, 1]; equal values share the mean of their ranks.

    Infinite values rank at the ends; NaN, where a score does not exist, below all others.

    Raises:
      ReportError: lengths that differ, fewer than two pairs, or one side all alike.

    Example:
      >>> from effjax.report import spearman
      >>> spearman([1, 2, 3, 4], [10, 30, 20, 40]), spearman([1, 2, 3], [float("nan"), 1, 1])
      (0.8, 0.8660254037844387)
    """
    ranks = [_ranks(x) for x in _pairs(a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        raise ReportError("all values of one side are alike: there is no ranking to compare.")
    return float(_rho(*ranks))


def spearman_interval(
    a: ArrayLike,
    b: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Correlation:
    """Spearman's correlation with its percentile bootstrap interval over resampled pairs.

    Raises:
      ReportError: as `spearman`.
    """
    from scipy.stats import rankdata

    ranks = [_ranks(x) for x in _pairs(a, b)]
    size = len(ranks[0])
    drawn = np.random.default_rng([seed, 0x5BEA2]).integers(0, size, (resamples, size))
    # Ranks of ranks are the ranks of the values.
    one, two = (rankdata(r[drawn], axis=1) for r in ranks)
    found = _rho(one, two)
    # A resample in which all values are alike has none.
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(spearman(a, b), float(low), float(high), size)


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ReportError(
            f"rankings of shapes {x.shape} and {y.shape} cannot be compared; each is a list of the "
            "same two values or more."
        )
    return x, y


def _ranks(x: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata  # jax itself needs scipy, so it is there

    # NaN below minus infinity: a rank that nothing else has.
    ranked = rankdata(np.where(np.isnan(x), -np.inf, x))
    missing = np.isnan(x)
    if missing.any():
        rest = rankdata(x[~missing]) + missing.sum()
        ranked[missing], ranked[~missing] = (missing.sum() + 1) / 2, rest
    return ranked


def _rho(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlations along the last axis; NaN where one side is constant."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(norm > 0, (a * b).sum(-1) / np.where(norm > 0, norm, 1), np.nan)
