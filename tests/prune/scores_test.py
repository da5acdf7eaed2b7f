"""Tests of the scores of one array of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SetupError
from effjax.prune import scores
from effjax.prune.threshold import largest

W = jnp.array([[0.5, -2.0], [0.0, 4.0]])
G = jnp.array([[-4.0, 0.5], [7.0, 0.25]])
PAIRS = {
    "saliency": [[2.0, 1.0], [0.0, 1.0]],
    "snip": [[2.0, 1.0], [0.0, 1.0]],
    "grasp": [[-2.0, -1.0], [0.0, 1.0]],
    "synflow": [[2.0, 1.0], [0.0, 1.0]],
    "movement": [[2.0, 1.0], [0.0, -1.0]],
    "taylor": [[4.0, 1.0], [0.0, 1.0]],
    "fisher": [[2.0, 0.5], [0.0, 0.5]],
    "obd": [[-0.5, 1.0], [0.0, 2.0]],
    "obs": [[-0.03125, 4.0], [0.0, 32.0]],
}


@pytest.mark.parametrize("name", PAIRS)
def test_worked_by_hand(name):
    found = getattr(scores, name)(W, G)
    np.testing.assert_array_equal(found, PAIRS[name])


@pytest.mark.parametrize("name", PAIRS)
def test_another_shape_is_an_error(name):
    with pytest.raises(SetupError, match=r"\(2, 3\).*\(2, 2\)"):
        getattr(scores, name)(W, jnp.ones((2, 3)))


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_multiplied_in_single(name):
    w, g = jnp.array([1.0078125, 1.0]), jnp.array([1.0, 1.0078125])
    square = getattr(scores, name)(w.astype(jnp.bfloat16), g.astype(jnp.bfloat16))
    assert square.dtype == jnp.float32
    np.testing.assert_array_equal(square, getattr(scores, name)(w, g))


@pytest.mark.parametrize("name", PAIRS)
def test_under_vmap_and_jit(name):
    f = getattr(scores, name)
    found = jax.jit(jax.vmap(f))(W, G)
    for i in range(2):
        np.testing.assert_allclose(found[i], f(W[i], G[i]), rtol=1e-6)


def test_magnitude():
    np.testing.assert_array_equal(scores.magnitude(W), [[0.5, 2.0], [0.0, 4.0]])


def test_random_depends_on_the_key_alone():
    key = jax.random.key(3)
    a, b = scores.random(key, jnp.zeros((40, 50))), scores.random(key, jnp.ones((40, 50)))
    np.testing.assert_array_equal(a, b)
    assert abs(float(a.mean()) - 0.5) < 0.02
    assert np.any(a != scores.random(jax.random.key(4), a))
    assert 0 <= float(a.min()) < float(a.max()) < 1


def test_snip_is_the_derivative_by_the_connections_normalized():
    x, w = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, -0.25, 2.0])

    def loss(w, c):
        return jnp.square(jnp.dot(c * w, x) - 1)

    by_connections = np.abs(jax.grad(loss, 1)(w, jnp.ones(3)))
    grad = jax.grad(loss)(w, jnp.ones(3))
    total = jnp.sum(jnp.abs(grad * w))

    np.testing.assert_allclose(
        scores.snip(w, grad, total), by_connections / by_connections.sum(), rtol=1e-6
    )


def test_grasp_is_the_change_of_the_gradients_norm():
    a = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    hessian, w = a @ a.T, np.array([0.5, -1.0, 2.0, 0.25], np.float32)
    # L = ½ wᵀHw, g = Hw. Removing weight i by a small fraction e changes |g|² by -2 e s_i.
    found = scores.grasp(jnp.asarray(w), jnp.asarray(hessian @ hessian @ w))
    for i in range(4):
        e = 1e-3
        moved = w.astype(np.float64).copy()
        moved[i] *= 1 - e
        change = np.sum(np.square(hessian @ moved)) - np.sum(np.square(hessian @ w))
        np.testing.assert_allclose(change / e, -2 * found[i], rtol=2e-2, atol=1e-2)


def test_obs_is_the_increase_of_a_quadratic_refitted_without_the_weight():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(4, 6))
    hessian, w = a @ a.T, rng.normal(size=4)
    found = scores.obs(
        jnp.asarray(w, jnp.float32), jnp.asarray(np.diag(np.linalg.inv(hessian)), jnp.float32)
    )
    for j in range(4):
        rest = [i for i in range(4) if i != j]
        # The minimum over the other weights of ½ dᵀHd with d_j = -w_j.
        d = np.zeros(4)
        d[j] = -w[j]
        d[rest] = np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest, j] * w[j])
        np.testing.assert_allclose(found[j], d @ hessian @ d / 2, rtol=1e-5)


def test_obs_of_a_diagonal_hessian_is_obd():
    h = jnp.array([[0.5, 2.0], [3.0, 1.0]])
    np.testing.assert_allclose(scores.obs(W, 1 / h), scores.obd(W, h), rtol=1e-6)


def test_obs_and_wanda_take_one_value_for_each_input():
    norm = jnp.array([2.0, 3.0])
    np.testing.assert_array_equal(scores.wanda(W, norm[:, None]), [[1.0, 4.0], [0.0, 12.0]])
    np.testing.assert_allclose(scores.obs(W, norm[:, None]), [[0.0625, 1.0], [0.0, 8 / 3]])
    with pytest.raises(SetupError, match=r"\(2, 2, 1\).*append an axis"):
        scores.wanda(W, jnp.ones((2, 2, 1)))
    with pytest.raises(SetupError, match=r"\(3,\).*does not broadcast"):
        scores.wanda(W, jnp.ones(3))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=24, max_size=24),
    st.integers(1, 8),
)
def test_within_compares_in_each_output(values, kept):
    score = jnp.asarray(values, jnp.float32).reshape(4, 2, 3)  # [.., in, out], with many ties
    found = scores.within(score, jnp.arange(3))

    mask = largest({"w": found}, 3 * kept)["w"]

    for out in range(3):
        column = np.asarray(score[..., out]).ravel()
        best = np.argsort(-column, kind="stable")[:kept]
        np.testing.assert_array_equal(np.flatnonzero(mask[..., out]), np.sort(best))


def test_within_groups_of_different_sizes():
    groups = jnp.array([7, 7, -1, 7])
    found = scores.within(jnp.array([-1.0, 3.0, -9.0, 2.0]), groups)
    np.testing.assert_allclose(found, [1 / 3, 1.0, 1.0, 2 / 3], rtol=1e-6)
    with pytest.raises(SetupError, match="groups"):
        scores.within(jnp.ones((2, 3)), jnp.arange(2))
