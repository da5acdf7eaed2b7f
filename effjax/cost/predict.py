"""The latency of a network from what is known before it is compiled: a fitted linear model."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from effjax.core import Apply, PyTree
from effjax.cost.lookup import LatencyTable
from effjax.errors import SetupError

TABLE = "table"  # the sum of the table's entries
FEATURES = (TABLE, "sites", "bytes", "macs")


def latency_features(
    table: LatencyTable,
    apply: Apply,
    params: PyTree,
    batch: PyTree,
    model_state: PyTree = None,
) -> dict[str, float]:
    """What a network's latency is predicted from; see `LatencyTable.sites` for the arguments.

    Returns:
      table: seconds, the sum over sites of the table's entries.
      sites: how many operations the sites are.
      bytes: of the sites' operands and outputs.
      macs: multiply-accumulates.
    """
    entries = table.sites(apply, params, batch, model_state)
    size = 0
    for site, _, times in entries:
        shapes = zip(site.shapes, site.dtypes, strict=True)
        size += times * sum(np.prod(s, dtype=float) * np.dtype(d).itemsize for s, d in shapes)
    return {
        TABLE: sum(entry.seconds * entry.times for entry in entries),
        "sites": float(sum(entry.times for entry in entries)),
        "bytes": float(size),
        "macs": float(sum(entry.site.macs for entry in entries)),
    }


class LatencyModel(NamedTuple):
    """seconds = base + Σ coefficients · features, none of them negative. Made by `fit_latency`."""

    base: float
    coefficients: dict[str, float]

    def __call__(self, features: Mapping[str, float]) -> float:
        """Predicted seconds."""
        own = (value * features[name] for name, value in self.coefficients.items())
        return self.base + sum(own)

    def error(self, features: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> "Error":
        """How far off the model is, for networks that it was not fitted to."""
        wanted = np.asarray(seconds, float)
        off = np.array([self(one) for one in features]) / wanted - 1
        rank = _correlation(_ranks(off * wanted + wanted), _ranks(wanted))
        return Error(float(np.abs(off).mean()), float(np.abs(off).max()), float(off.mean()), rank)


class Error(NamedTuple):
    """mean: of |predicted / measured - 1|. worst: the largest of these. bias: of
    predicted / measured - 1. spearman: correlation of the ranks; NaN where all are equal."""

    mean: float
    worst: float
    bias: float
    spearman: float


def fit_latency(
    features: Sequence[Mapping[str, float]],
    seconds: Sequence[float],
    use: Sequence[str] = (TABLE, "sites", "bytes"),
) -> LatencyModel:
    """The linear model of the smallest squared relative error, Σ (predicted / measured - 1)².

    Coefficients are not negative: a larger network is never predicted to be faster. Exact: of every
    subset of the features the least-squares solution is found, and the best one that is not
    negative is taken.

    Args:
      features: of each network, see `latency_features`.
      seconds: measured, of each network.
      use: the features to fit, at most 8.

    Raises:
      SetupError: fewer networks than coefficients, times that are not positive, unknown features.

    Example:
      >>> from effjax.cost import fit_latency
      >>> model = fit_latency([{"table": t} for t in (1.0, 2.0, 4.0)], [3.0, 5.0, 9.0], ["table"])
      >>> round(model.base, 6), round(model.coefficients["table"], 6)
      (1.0, 2.0)
    """
    wanted = np.asarray(seconds, float)
    if len(wanted) != len(features) or len(wanted) <= len(use) or not 1 <= len(use) <= 8:
        raise SetupError(
            f"{len(features)} networks with {len(wanted)} times for {len(use)} features and a "
            "base; give one time a network, 1 to 8 features, and more networks than features."
        )
    if lost := [name for name in use if any(name not in one for one in features)]:
        raise SetupError(f"{lost} are not among the features {list(features[0])}.")
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise SetupError("the times are not all positive; give the measured seconds.")
    columns = np.array([[1.0, *(one[name] for name in use)] for one in features])
    scale = np.abs(columns).max(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    relative = columns / scale / wanted[:, None]
    best, found = np.inf, np.zeros(columns.shape[1])
    for size in range(1, columns.shape[1] + 1):
        for kept in itertools.combinations(range(columns.shape[1]), size):
            own = np.linalg.lstsq(relative[:, kept], np.ones(len(wanted)), rcond=None)[0]
            off = float(np.square(relative[:, kept] @ own - 1).sum())
            if (own >= 0).all() and off < best * (1 - 1e-12):
                best, found = off, np.zeros(columns.shape[1])
                found[list(kept)] = own
    base, *rest = (found / scale).tolist()
    return LatencyModel(base, dict(zip(use, rest, strict=True)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    order = np.sort(values)
    low, high = (np.searchsorted(order, values, side=side) for side in ("left", "right"))
    return (low + high - 1) / 2


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float(a @ b) / norm if norm else float("nan")
