"""Is it better, or is it the seeds? Hypervolume, paired bootstrap, Welch's t-test and Holm's rule.

Error bars of this package are the sample standard deviation over seeds (n - 1): how much one run
differs from the next. The intervals here are of something else, the mean.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from effjax.errors import ReportError

NORMAL = NormalDist()
ENUMERATED = 5  # seeds up to which all n^n resamples are taken: 3,125 for five


class Interval(NamedTuple):
    """A difference of means over seeds, and where it lies at the given level."""

    difference: float
    low: float
    high: float
    level: float
    n: int


class Welch(NamedTuple):
    """Welch's test: the statistic, its degrees of freedom and the two-sided p-value."""

    t: float
    df: float
    p: float


def hypervolume(
    points: Sequence[Sequence[float]], reference: Sequence[float], larger: Sequence[bool]
) -> float:
    """The volume of what the points dominate, up to a reference point.

    A union of boxes, each between a point and the reference, computed exactly: the points are swept
    along the last criterion, and each slab is as high as it is wide in the others (an area in two
    dimensions, in O(n² log n); in d dimensions O(n^d)). Comparable between fronts only with the
    same units and the same reference; see `worst_corner` for a common choice.

    Args:
      points: [n, criteria]; none gives 0.
      reference: [criteria], worse than what counts. A point that is not better than it in every
        respect adds nothing.
      larger: for each criterion, whether more of it is better.

    Raises:
      ReportError: shapes that do not fit, or values that are not finite.

    Papers: Zitzler and Thiele 1998; While et al. 2006 (slicing).

    Example:
      >>> from effjax.report import hypervolume
      >>> hypervolume([(1, 1), (2, 3)], reference=(4, 0), larger=(False, True))
      7.0
    """
    bound = np.asarray(reference, np.float64)
    if bound.shape != (len(larger),):
        raise ReportError(
            f"the reference point has shape {bound.shape} for {len(larger)} criteria; give one "
            "number a criterion."
        )
    cost, corner = _as_costs(points, larger), np.where(np.asarray(larger), -bound, bound)
    if not np.isfinite(corner).all():
        raise ReportError(f"the reference point {tuple(reference)} is not finite.")
    return _volume(cost[(cost < corner).all(axis=1)], corner) if len(cost) else 0.0


def worst_corner(
    points: Sequence[Sequence[float]], larger: Sequence[bool], margin: float = 0.1
) -> tuple[float, ...]:
    """A reference point for `hypervolume`: the worst value of each criterion among the points, and
    a `margin` of the criterion's range beyond it, so that the extreme points count as well.

    Take it over all the points of all the fronts that are to be compared.

    Example:
      >>> from effjax.report import worst_corner
      >>> worst_corner([(10, 0.5), (20, 1.0)], larger=(False, True), margin=0.5)
      (25.0, 0.25)
    """
    cost = _as_costs(points, larger)
    if not len(cost):
        raise ReportError("there are no points to take the worst of.")
    worst, best = cost.max(axis=0), cost.min(axis=0)
    corner = worst + margin * np.where(worst > best, worst - best, np.abs(worst))
    return tuple(np.where(np.asarray(larger), -corner, corner).tolist())


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of mean(a) - mean(b), where a[i] and b[i] share their seed.

    The differences d_i = a_i - b_i are drawn with replacement. Up to five seeds all n^n resamples
    are taken, and no random number; above that `resamples` of them from `seed`. "percentile" takes
    the quantiles (1 ± level)/2 of the resampled means; "bca" shifts them for bias (z0, from the
    share of resampled means below the observed) and skewness (the acceleration, from leaving one
    out). With three seeds either interval is too short more often than its level says: no
    resampling makes up for runs that were not made.

    Raises:
      ReportError: fewer than two pairs, lengths that differ, or values that are not finite.

    Papers: Efron 1987 (BCa); Efron and Tibshirani 1993.

    Example:
      >>> from effjax.report import paired_bootstrap
      >>> found = paired_bootstrap([0.9, 0.8, 0.7], [0.8, 0.8, 0.6], method="percentile")
      >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3), found.n
      (0.067, 0.0, 0.1, 3)
    """
    first, second = _sample(a, "a", 1), _sample(b, "b", 1)
    if len(first) != len(second) or len(first) < 2:
        raise ReportError(
            f"a paired bootstrap needs the same two seeds or more on both sides, but got "
            f"{len(first)} and {len(second)} values. Run the missing seeds, or use welch()."
        )
    if not 0 < level < 1 or resamples < 1 or method not in ("bca", "percentile"):
        raise ReportError(
            f"level={level}, resamples={resamples}, method={method!r}: the level lies between 0 "
            "and 1, at least one resample is needed, and the method is 'bca' or 'percentile'."
        )
    pairs, n = first - second, len(first)
    if n <= ENUMERATED:
        index = np.asarray(list(itertools.product(range(n), repeat=n)))
    else:
        index = np.random.default_rng(seed).integers(n, size=(resamples, n))
    means, observed = pairs[index].mean(axis=1), float(pairs.mean())
    tails = ((1 - level) / 2, (1 + level) / 2)
    if method == "bca":
        tails = _corrected(tails, pairs, means)
    # Of few values, those that resamples have; from either end, so that swapping a and b mirrors.
    low = float(np.quantile(means, tails[0], method="inverted_cdf"))
    high = -float(np.quantile(-means, 1 - tails[1], method="inverted_cdf"))
    return Interval(observed, low, high, level, n)


def welch(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Welch's t-test of equal means, for samples whose variances need not be equal; two-sided.

        t = (ā - b̄) / sqrt(va + vb),  v = s² / n
        df = (va + vb)² / (va² / (na - 1) + vb² / (nb - 1))

    Where neither sample varies there is nothing to judge the difference by, and all three are NaN.

    Raises:
      ReportError: fewer than two values in a sample, or values that are not finite.

    Paper: Welch 1947.

    Example:
      >>> from effjax.report import welch
      >>> found = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
      >>> round(found.t, 3), round(found.df, 3), round(found.p, 3)
      (-1.549, 2.941, 0.221)
    """
    from scipy.special import stdtr  # jax itself needs scipy, so it is there

    first, second = _sample(a, "a", 2), _sample(b, "b", 2)
    va, vb = (float(x.var(ddof=1)) / len(x) for x in (first, second))
    scale = max(np.abs(first).max(), np.abs(second).max())
    if math.sqrt(va + vb) <= 1e-14 * scale:  # the rounding of equal numbers' mean is no variance
        return Welch(math.nan, math.nan, math.nan)
    t = float(first.mean() - second.mean()) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(first) - 1) + vb**2 / (len(second) - 1))
    return Welch(t, df, float(2 * stdtr(df, -abs(t))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that keep the chance of any false alarm among them.

    Sorted upwards, the i-th of m (from 0) becomes max over j <= i of min(1, (m - j) p_j). NaN, a
    test that could not be made, stays and is not counted.

    Paper: Holm 1979.

    Example:
      >>> from effjax.report import holm
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or ((values < 0) | (values > 1)).any():
        raise ReportError(f"p-values lie between 0 and 1, but got {values.tolist()}.")
    made = np.flatnonzero(~np.isnan(values))
    order = made[np.argsort(values[made], kind="stable")]
    adjusted = values.copy()
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * values[order]))
    return adjusted.tolist()


def _corrected(tails: tuple[float, float], pairs: np.ndarray, means: np.ndarray) -> Any:
    """The quantiles of BCa: Φ(z0 + (z0 + z) / (1 - a (z0 + z)))."""
    observed = pairs.mean()
    if np.ptp(pairs) <= 1e-14 * np.abs(pairs).max():
        return tails  # all resamples are alike
    # Half of the ties count as below, or a grid of few values would look biased.
    same = np.isclose(means, observed, rtol=1e-12, atol=1e-15)
    share = float(((means < observed) & ~same).mean() + same.mean() / 2)
    bias = NORMAL.inv_cdf(share)
    left_out = (pairs.sum() - pairs) / (len(pairs) - 1)
    off = left_out.mean() - left_out
    acceleration = float((off**3).sum() / (6 * (off**2).sum() ** 1.5))

    def moved(tail: float) -> float:
        z = bias + NORMAL.inv_cdf(tail)
        return NORMAL.cdf(bias + z / (1 - acceleration * z))

    return tuple(moved(tail) for tail in tails)


def _volume(cost: np.ndarray, corner: np.ndarray) -> float:
    if not len(cost):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - cost[:, 0].min())
    order = cost[np.argsort(cost[:, -1], kind="stable")]
    ends = [*order[1:, -1], corner[-1]]
    slabs = (
        (end - row[-1]) * _volume(order[: i + 1, :-1], corner[:-1])
        for i, (row, end) in enumerate(zip(order, ends, strict=True))
        if end > row[-1]
    )
    return float(sum(slabs))


def _as_costs(points: Sequence[Sequence[float]], larger: Sequence[bool]) -> np.ndarray:
    values = np.asarray(points, np.float64)
    if values.size == 0:
        return np.zeros((0, len(larger)))
    if values.ndim != 2 or values.shape[1] != len(larger) or not np.isfinite(values).all():
        raise ReportError(
            f"the points have shape {values.shape} for {len(larger)} criteria; give [n, criteria] "
            "of finite numbers."
        )
    return np.where(np.asarray(larger), -values, values)


def _sample(values: Sequence[float], name: str, least: int) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or len(found) < least or not np.isfinite(found).all():
        raise ReportError(
            f"{name} has shape {found.shape}; a test needs {least} finite numbers or more, one a "
            "seed."
        )
    return found
