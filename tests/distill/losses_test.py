"""Hinton's KL against NumPy and SciPy in float64, and at the limits of its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

import effjax as ej


def reference(student, teacher, t):
    log_p = log_softmax(np.asarray(teacher, np.float64) / t, axis=-1)
    log_q = log_softmax(np.asarray(student, np.float64) / t, axis=-1)
    p = np.exp(log_p)
    return t**2 * np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0).sum(-1)


def test_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812...
    teacher = jnp.log(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(ej.distill.kl(jnp.zeros(2), teacher, 1.0), 0.1308120, rtol=1e-5)
    # Logits twice as large at T = 2 give the same distributions, and the factor is 4.
    np.testing.assert_allclose(
        ej.distill.kl(jnp.zeros(2), 2 * teacher, 2.0), 4 * 0.1308120, rtol=1e-5
    )


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 20.0])
def test_equals_scipy(t):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 5, 4, 7)).astype(np.float32)
    found = ej.distill.kl(jnp.asarray(student), jnp.asarray(teacher), t)
    assert found.shape == (5, 4)
    np.testing.assert_allclose(found, reference(student, teacher, t), rtol=2e-5, atol=1e-6)


def test_gradient_is_t_times_the_difference_of_the_distributions():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(0, 3, (2, 6)).astype(np.float32)
    found = jax.grad(ej.distill.kl)(jnp.asarray(student), jnp.asarray(teacher), 3.0)
    expected = 3.0 * (softmax(student / 3.0) - softmax(teacher / 3.0))
    np.testing.assert_allclose(found, expected, atol=2e-6)


@given(
    st.lists(st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4]), min_size=6, max_size=6),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
@settings(max_examples=40, deadline=None)
def test_finite_at_extreme_logits_with_gradients_in_every_dtype(values, t, dtype):
    student, teacher = jnp.array(values, dtype).reshape(2, 3)
    value = ej.distill.kl(student, teacher, t)
    assert value.dtype == jnp.float32
    grads = jax.grad(lambda s, p: ej.distill.kl(s, p, t).sum(), argnums=(0, 1))(student, teacher)
    assert grads[0].dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        value, reference(student.astype(float), teacher.astype(float), t), rtol=1e-3, atol=1e-3
    )
    # The teacher's gradient T p (log p/q - KL) itself exceeds float16's range; the rest must not.
    assert np.isfinite(np.asarray(value)).all()
    assert np.isfinite(np.asarray(grads[0], np.float32)).all()
    if dtype != "float16":
        assert np.isfinite(np.asarray(grads[1], np.float32)).all()


def test_a_class_the_teacher_excludes_adds_nothing():
    student, teacher = jnp.array([0.3, -0.2, 0.9]), jnp.array([1.0, 0.5, -jnp.inf])
    value, grad = jax.value_and_grad(ej.distill.kl)(student, teacher, 2.0)
    np.testing.assert_allclose(value, reference(student, teacher, 2.0), rtol=1e-5)
    assert bool(jnp.all(jnp.isfinite(grad)))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        found = ej.distill.kl(jnp.zeros(3, jnp.float64), jnp.arange(3, dtype=jnp.float32), 1.5)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, reference(np.zeros(3), np.arange(3), 1.5), rtol=1e-12)


def test_temperature_may_be_traced():
    student, teacher = jnp.zeros(3), jnp.arange(3.0)
    found = jax.vmap(ej.distill.kl, (None, None, 0))(student, teacher, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [reference(student, teacher, t) for t in (1, 2)], rtol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (jnp.zeros((2, 3)), jnp.zeros((2, 4)), r"\[2, 3\].*\[2, 4\].*classes"),
        (jnp.zeros((3,)), jnp.zeros((2, 3)), r"shape"),
        (jnp.zeros((3,), int), jnp.zeros((3,)), r"int32.*before softmax"),
        (jnp.zeros(()), jnp.zeros(()), r"last axis"),
        (jnp.zeros((3,)), (jnp.zeros((3,)),), r"tuple.*teacher_logits"),
    ],
)
def test_what_does_not_fit_is_an_error(student, teacher, says):
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        ej.distill.kl(student, teacher)
