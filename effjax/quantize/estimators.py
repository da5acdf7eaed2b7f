"""Ranges from what was seen in calibration: the maths, on histograms.

An estimator is `(Seen, Grid) -> (low, high)`, with low <= 0 <= high: values outside are clipped. It
runs once, on the host, in NumPy.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from effjax.errors import SetupError

Floats = NDArray[np.float64]


class Seen(NamedTuple):
    """One activation over the calibration set.

    lows, highs: [batches], each batch's smallest and largest value, with 0 between.
    counts: [bins], how many values lie in each of the equal bins from min(lows) to max(highs); of
      magnitudes from 0 to the largest where the grid is symmetric.
    """

    lows: Floats
    highs: Floats
    counts: Floats

    def edges(self, symmetric: bool) -> Floats:
        """[bins + 1]."""
        low, high = float(self.lows.min()), float(self.highs.max())
        ends = (0.0, max(high, -low)) if symmetric else (low, high)
        return np.linspace(*ends, len(self.counts) + 1)


class Levels(NamedTuple):
    """The grid to come: `bits`, and whether it is symmetric (its low is minus its high)."""

    bits: int
    symmetric: bool

    def rounded(self, x: Floats, low: float, high: float) -> Floats:
        """Values on the grid of a range, as `qat` rounds them."""
        if self.symmetric:
            bound = 2 ** (self.bits - 1) - 1
            scale = high / bound
            return scale * np.clip(np.round(x / scale), -bound, bound)
        steps = 2**self.bits - 1
        scale = (high - low) / steps
        first = np.round(low / scale)
        return scale * np.clip(np.round(x / scale), first, first + steps)


Estimator = Callable[[Seen, Levels], tuple[float, float]]


def minmax(seen: Seen, levels: Levels) -> tuple[float, float]:
    """The smallest and the largest value of all (symmetric: absmax)."""
    return _ends(seen.lows.min(), seen.highs.max(), levels)


def moving_average(decay: float = 0.9) -> Estimator:
    """The batches' ends, averaged with weights that fall by `decay` a batch, corrected for bias."""
    if not 0 <= decay < 1:
        raise SetupError(f"the decay of a moving average is {decay}; it is in [0, 1).")

    def estimate(seen: Seen, levels: Levels) -> tuple[float, float]:
        weights = decay ** np.arange(len(seen.lows))[::-1]
        weights /= weights.sum()
        if levels.symmetric:
            return _ends(0.0, float(weights @ np.maximum(seen.highs, -seen.lows)), levels)
        return _ends(float(weights @ seen.lows), float(weights @ seen.highs), levels)

    return estimate


def percentile(share: float = 0.9999) -> Estimator:
    """The range that a share of the values lies in: where not symmetric, as many beyond each end.

    Reference: Wu et al., "Integer quantization for deep learning inference", 2020,
    https://arxiv.org/abs/2004.09602.
    """
    if not 0.5 < share <= 1:
        raise SetupError(f"percentile({share}): give the share of values inside, in (0.5, 1].")

    def estimate(seen: Seen, levels: Levels) -> tuple[float, float]:
        edges = seen.edges(levels.symmetric)
        below = np.cumsum(seen.counts) / seen.counts.sum()
        beyond = (1 - share) / (1 if levels.symmetric else 2)
        high = edges[1 + int(np.searchsorted(below, 1 - beyond - 1e-12))]
        low = edges[int(np.searchsorted(below, beyond + 1e-12))]
        return _ends(low, high, levels)

    return estimate


def mse(seen: Seen, levels: Levels) -> tuple[float, float]:
    """The range, of 100 shares of the largest at each end, with the least squared rounding error.

    Where not symmetric, the upper end is chosen first and the lower one then.
    """
    edges = seen.edges(levels.symmetric)
    middles = (edges[1:] + edges[:-1]) / 2

    def error(low: float, high: float) -> float:
        return float(seen.counts @ (middles - levels.rounded(middles, low, high)) ** 2)

    low, high = edges[0], edges[-1]
    shares = np.linspace(0.01, 1, 100)
    if high > 0:
        high = min(
            (high * s for s in shares), key=lambda h: error(-h if levels.symmetric else low, h)
        )
    if low < 0 and not levels.symmetric:
        low = min((low * s for s in shares), key=lambda x: error(x, high))
    return _ends(low, high, levels)


def entropy(seen: Seen, levels: Levels) -> tuple[float, float]:
    """The range whose histogram after rounding has the least Kullback-Leibler divergence.

    For a clipping at i bins, P is the histogram's first i bins with all that lies beyond added to
    the last, and Q the same bins without it, averaged over their non-empty ones in as many groups
    as the grid has levels; KL(P || Q) is least at the range sought. The bin of 0, which a ReLU
    fills and every grid has exactly, counts as its neighbour does. Where not symmetric, bins are
    clipped at the upper end alone.

    Reference: Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    edges = seen.edges(levels.symmetric)
    groups = 2 ** (levels.bits - 1) if levels.symmetric else 2**levels.bits
    best, chosen = np.inf, len(seen.counts)
    zero = max(int(np.searchsorted(edges, 0.0, side="right")) - 1, 0)
    counts = seen.counts.copy()
    counts[zero] = counts[zero + 1] if zero + 1 < len(counts) else counts[zero - 1]
    for i in range(min(groups, len(counts)), len(counts) + 1):
        divergence = _divergence(counts, i, groups)
        if divergence < best:
            best, chosen = divergence, i
    return _ends(edges[0], edges[chosen], levels)


def _divergence(counts: Floats, i: int, groups: int) -> float:
    """KL(P || Q) of a histogram clipped at i bins; infinite where Q lacks what P has."""
    inside = counts[:i]
    p = inside.copy()
    p[-1] += counts[i:].sum()
    group = np.arange(i) * groups // i
    filled = inside > 0
    total = np.bincount(group, inside, groups)
    number = np.bincount(group, filled, groups)
    q = np.where(filled, (total / np.maximum(number, 1))[group], 0.0)
    some = p > 0
    if not q.sum() or np.any(q[some] == 0):
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def _ends(low: float, high: float, levels: Levels) -> tuple[float, float]:
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    return (-max(high, -low), max(high, -low)) if levels.symmetric else (low, high)


ESTIMATORS: dict[str, Estimator] = {
    "minmax": minmax,
    "moving average": moving_average(),
    "percentile": percentile(),
    "mse": mse,
    "entropy": entropy,
}
