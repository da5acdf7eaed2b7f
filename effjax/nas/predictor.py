"""Search guided by a predictor: a Gaussian process over configurations, and what it expects."""

import math
from statistics import NormalDist
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.space import Space

# The hyper-parameters that are compared: how alike two configurations are that differ in one gene
# of all, and which part of the variance is noise.
_ALIKE = (0.2, 0.4, 0.6, 0.8, 0.9)
_NOISE = (0.01, 0.1, 0.3)
_NORMAL = NormalDist()


class Predictor(NamedTuple):
    """A Gaussian process of mean 0 and variance 1: what `fit` found."""

    features: np.ndarray  # [n, features]
    alike: float
    factor: np.ndarray  # Cholesky factor of the kernel with noise, [n, n]
    weights: np.ndarray  # its inverse times the values, [n]
    evidence: float  # logarithm of the marginal likelihood

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations (of the noiseless value), each [m]."""
        across = self.alike ** distance(features, self.features)
        solved = np.linalg.solve(self.factor, across.T)
        variance = 1 - np.square(solved).sum(axis=0)
        return across @ self.weights, np.sqrt(np.maximum(variance, 1e-12))


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In how many genes configurations differ, from their features: float [m, n].

    Half the L1 distance of one-hot features: a gene that only one of them has counts a half.
    """
    # For features of 0 and 1, |a - b| = a + b - 2 a b.
    return 0.5 * (a.sum(axis=1)[:, None] + b.sum(axis=1) - 2 * a @ b.T)


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Values replaced by normal quantiles of their ranks, [n]: outliers and skew leave no trace.

    The i-th of n becomes the quantile of (i - 1/2) / n; equal values get the mean of theirs.
    """
    values = np.asarray(values, np.float64)
    order = np.sort(values)
    low = np.searchsorted(order, values, side="left")
    high = np.searchsorted(order, values, side="right")
    return np.array([_NORMAL.inv_cdf(p) for p in (low + high) / (2 * len(values))])


def fit(features: np.ndarray, values: np.ndarray) -> Predictor:
    """The Gaussian process whose kernel is alike^(genes that differ), by the largest evidence.

    A Gaussian process is ridge regression in the space of the kernel, which here holds products of
    any number of one-hot features.

    Args:
      features: one-hot, [n, features], see `Space.one_hot`.
      values: [n], of about mean 0 and variance 1.

    Reference: Rasmussen and Williams, "Gaussian processes for machine learning", 2006, chapter 2.
    """
    apart = distance(features, features)
    every = []
    for alike in _ALIKE:
        kernel = alike**apart
        for noise in _NOISE:
            factor = np.linalg.cholesky(kernel + noise * np.eye(len(values)))
            half = np.linalg.solve(factor, values)
            evidence = float(-0.5 * half @ half - np.log(np.diag(factor)).sum())
            every.append((evidence, alike, factor, half))
    evidence, alike, factor, half = max(every, key=lambda found: found[0])
    return Predictor(features, alike, factor, np.linalg.solve(factor.T, half), evidence)


def expected_improvement(mean: np.ndarray, std: np.ndarray, best: float) -> np.ndarray:
    """E[max(0, y - best)] for y ~ N(mean, std²).

    It is (mean - best) Φ(z) + std φ(z), with z = (mean - best) / std.
    """
    z = (mean - best) / std
    below = np.array([_NORMAL.cdf(x) for x in z])
    return (mean - best) * below + std * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


class PredictorSearch:
    """Proposes what a predictor of all trials so far expects to improve most.

    A Gaussian process over the genes, fitted to the ranks of the values, is asked for the expected
    improvement over its own best mean of candidates that no trial has had yet: mutations of the
    best trials, and uniform draws. Ordered dimensions are treated as if they were not.

    Args:
      space: of the search.
      initial: uniform draws before the first fit.
      candidates: scored at each step, half of them mutations.
      parents: how many of the best trials are mutated.

    References: Snoek et al., "Practical Bayesian optimization of machine learning algorithms",
      2012, https://arxiv.org/abs/1206.2944; White et al., "BANANAS", 2021, for mutated candidates,
      https://arxiv.org/abs/1910.11858.
    """

    def __init__(self, space: Space, initial: int = 10, candidates: int = 200, parents: int = 10):
        if initial < 2 or candidates < 2 or parents < 1:
            raise SetupError(
                f"initial={initial}, candidates={candidates}, parents={parents}: a predictor needs "
                "2 draws, 2 candidates and a parent, or more."
            )
        self.initial, self.parents = initial, parents
        self._half = candidates // 2
        self._sample = jax.jit(space.sample, static_argnums=1)
        self._mutate, self._encode = jax.jit(space.mutate), jax.jit(space.one_hot)
        self._rows: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._values: list[float] = []
        self._asked = 0

    def ask(self, key: Array) -> np.ndarray:
        """A uniform draw at first, then the candidate of the largest expected improvement."""
        self._asked += 1
        if self._asked <= self.initial or len(self._rows) < 2:
            return np.asarray(self._sample(key, ()))
        first, second = jax.random.split(key)
        values = np.array(self._values)
        # The last of equal ones first: what was seen late is nearer to where the search is.
        best = np.argsort(values[::-1], kind="stable")[: -self.parents - 1 : -1]
        parents = np.stack(self._rows)[::-1][best]
        parents = parents[np.arange(self._half) % len(parents)]
        pool = np.concatenate([self._mutate(first, parents), self._sample(second, (self._half,))])
        known = {row.tobytes() for row in self._rows}
        fresh = np.array([row.tobytes() not in known for row in pool])
        fresh |= not fresh.any()
        predictor = fit(np.stack(self._features), normal_scores(values))
        mean, std = predictor.predict(np.asarray(self._encode(pool)))
        seen, _ = predictor.predict(predictor.features)
        improvement = expected_improvement(mean, std, float(seen.max()))
        return pool[int(np.argmax(np.where(fresh, improvement, -np.inf)))]

    def tell(self, genes: np.ndarray, value: float) -> None:
        """One more trial to learn from."""
        self._rows.append(np.asarray(genes, np.int32))
        self._features.append(np.asarray(self._encode(self._rows[-1])))
        self._values.append(float(value))
