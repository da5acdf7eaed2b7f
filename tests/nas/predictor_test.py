"""The predictor: distances, normal scores, the regression by hand, and expected improvement."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from effjax.errors import SetupError
from effjax.nas import Choice, PredictorSearch, Repeat, Space, When
from effjax.nas.predictor import distance, expected_improvement, fit, normal_scores

SPACE = Space({"e": Repeat(3, {"op": Choice(("a", "b", "c"))})})


def one_hot(space, rows):
    return np.asarray(space.one_hot(jnp.asarray(rows, jnp.int32)))


def test_distance_counts_genes():
    found = distance(one_hot(SPACE, [[0, 1, 2], [0, 0, 0]]), one_hot(SPACE, [[0, 1, 1], [2, 2, 1]]))
    assert found.tolist() == [[1, 3], [2, 3]]
    nested = Space({"k": Choice((0, 1)), "b": When("k", (1,), Choice((2, 4)))})
    assert distance(one_hot(nested, [[0, 0]]), one_hot(nested, [[1, 1]])).tolist() == [[1.5]]


def test_normal_scores_are_quantiles_of_ranks():
    found = normal_scores(np.array([3.0, -100.0, 5.0, 3.0]))
    assert np.allclose(found, norm.ppf([0.5, 0.125, 0.875, 0.5]))


def test_expected_improvement_is_the_integral():
    y = np.linspace(-8, 8, 200_001)
    wanted = np.trapezoid(np.maximum(0, y - 0.5) * norm.pdf(y, 0.2, 0.7), y)
    assert expected_improvement(np.array([0.2]), np.array([0.7]), 0.5) == pytest.approx(wanted)


def test_the_fit_is_the_gaussian_process_of_the_largest_evidence():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (12, 3))
    values = normal_scores(rows.sum(axis=1) + 0.01 * rng.normal(size=12))
    found = fit(one_hot(SPACE, rows), values)
    kernel = found.alike ** distance(found.features, found.features)
    noise = found.factor[0, 0] ** 2 - 1
    whole = kernel + noise * np.eye(12)
    # The evidence up to its constant, and the conditional normal distribution.
    density = multivariate_normal.logpdf(values, cov=whole)
    assert found.evidence == pytest.approx(density + 6 * math.log(2 * math.pi))
    new = one_hot(SPACE, [[2, 2, 2], [0, 0, 0]])
    across = found.alike ** distance(new, found.features)
    mean, std = found.predict(new)
    assert np.allclose(mean, across @ np.linalg.inv(whole) @ values)
    inner = np.einsum("ij,jk,ik->i", across, np.linalg.inv(whole), across)
    assert np.allclose(std, np.sqrt(1 - inner))
    assert mean[0] > 0.5 > -0.5 > mean[1]


def test_settings_that_cannot_be_meant():
    with pytest.raises(SetupError, match="initial=1"):
        PredictorSearch(SPACE, 1)
