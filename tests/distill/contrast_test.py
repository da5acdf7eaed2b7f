"""NT-Xent against NumPy, and two views of a batch in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.distill import nt_xent, twice
from tests import nets

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 5, 4))


def reference(a, b, t):
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(z)):
        other = (i + len(a)) % len(z)
        terms = [np.exp(z[i] @ z[j] / t) for j in range(len(z)) if j != i]
        total -= np.log(np.exp(z[i] @ z[other] / t) / np.sum(terms))
    return total / len(z)


@pytest.mark.parametrize("t", [0.1, 0.5, 2.0])
def test_equals_the_reference_with_its_gradients(t):
    found, grads = jax.value_and_grad(nt_xent, argnums=(0, 1))(jnp.float32(A), jnp.float32(B), t)
    np.testing.assert_allclose(found, reference(A, B, t), rtol=2e-5)
    h = 1e-6
    for which, grad in enumerate(grads):
        expected = np.zeros_like(A)
        for at in np.ndindex(A.shape):
            step = np.zeros_like(A)
            step[at] = h
            up, down = ([A, B], [A, B])
            up[which], down[which] = up[which] + step, down[which] - step
            expected[at] = (reference(*up, t) - reference(*down, t)) / (2 * h)
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-5)


def test_by_hand():
    # Two examples at right angles, both views equal: each has 1 at e^(1/T) and 2 at 1.
    views = jnp.eye(2)
    expected = -np.log(np.e**2 / (np.e**2 + 2))
    np.testing.assert_allclose(nt_xent(views, views, 0.5), expected, rtol=1e-6)


def test_sizes_do_not_matter_and_views_are_alike():
    expected = reference(A, B, 0.5)
    np.testing.assert_allclose(
        nt_xent(jnp.float32(7 * A), jnp.float32(B), 0.5), expected, rtol=1e-5
    )
    np.testing.assert_allclose(nt_xent(jnp.float32(B), jnp.float32(A), 0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("t", [0.01, 0.5])
def test_finite_with_its_gradients_at_extremes(dtype, t):
    large = RNG.choice([-1e4, 0.0, 1.0, 1e4], (5, 4))
    for a, b in ((large, large[::-1]), (0 * large, 0 * large), (large, 0 * large)):
        given = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        value, grad = jax.value_and_grad(lambda a, b: nt_xent(a, b, t))(*given)
        assert value.dtype == jnp.float32
        assert grad.dtype == jnp.dtype(dtype)
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ej.errors.SetupError, match="differ in features"):
        nt_xent(jnp.zeros((3, 4)), jnp.zeros((3, 5)))
    with pytest.raises(ej.errors.SetupError, match="needs 2 of them"):
        nt_xent(jnp.zeros((1, 4)), jnp.zeros((1, 4)))
    batch, chain = {**nets.BATCH, "scale": np.float32(1)}, ej.chain(twice=twice())
    with pytest.raises(ej.errors.SetupError, match="a single number"):
        ej.init_state(jax.random.key(0), nets.raw(), chain, optax.sgd(0.1), batch)


def test_two_views_in_a_step():
    """Every example beside its copy, each augmented by a key of its own."""
    seen = []

    def loss(outputs, batch):
        jax.debug.callback(lambda b: seen.append(jax.tree.map(np.array, b)), batch)
        return nt_xent(outputs[::2], outputs[1::2])

    model, tx = nets.raw(), optax.adam(3e-3)
    chain = ej.chain(twice=twice(), augment=ej.augment.images(ej.augment.erasing(1.0)))
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chain, loss, tx))
    losses = []
    for _ in range(30):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["loss"]))
    jax.effects_barrier()
    images, labels = seen[0]["image"], seen[0]["label"]
    np.testing.assert_array_equal(labels, np.repeat(nets.BATCH["label"], 2))
    for i, x in enumerate(nets.BATCH["image"]):
        first, second = images[2 * i], images[2 * i + 1]
        assert np.any(first != second)
        for view in (first, second):
            assert np.any(view == x)
            np.testing.assert_array_equal(view[view != x], 0)
    assert losses[-1] < losses[0] - 0.3
