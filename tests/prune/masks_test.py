"""Masks: what they do to weights, to gradients, and how sparse they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import SelectorError
from effjax.prune import masks

MASK = jnp.array([True, False, True])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_pruned_weights_are_exactly_zero_and_keep_their_dtype(dtype):
    x = jnp.array([1, -2, 3], dtype)
    found = masks.masked(x, MASK)
    assert found.dtype == dtype
    assert found.tolist() == [1, 0, 3]
    assert not np.signbit(np.asarray(found, np.float32))[1]


def test_the_gradient_is_zero_for_pruned_weights_whatever_they_or_it_are():
    x = jnp.array([2.0, jnp.nan, 3.0])
    weights = jnp.array([5.0, jnp.inf, 7.0])
    value, grad = jax.value_and_grad(lambda x: jnp.sum(masks.masked(x, MASK)))(x)
    assert value == 5.0
    assert grad.tolist() == [1.0, 0.0, 1.0]
    _, pull = jax.vjp(lambda x: masks.masked(x, MASK), x)
    assert pull(weights)[0].tolist() == [5.0, 0.0, 7.0]


def test_apply_changes_only_the_masked_leaves():
    params = {"a": {"kernel": jnp.arange(1.0, 4.0), "bias": jnp.ones(3)}}
    found = masks.apply(params, {"a/kernel": MASK})
    assert found["a"]["kernel"].tolist() == [1.0, 0.0, 3.0]
    assert found["a"]["bias"] is params["a"]["bias"]
    with pytest.raises(SelectorError, match="b/kernel"):
        masks.apply(params, {"b/kernel": MASK})


def test_sparsity_and_kept():
    found = {"a": MASK, "b": jnp.array([[False, False], [True, False], [False, False]])}
    assert int(masks.kept(found)) == 3
    assert float(masks.sparsity(found)) == pytest.approx(2 / 3)


def test_the_straight_through_view_hides_weights_and_not_their_gradients():
    x, mask = jnp.arange(1.0, 5.0).reshape(2, 2), jnp.array([[True, False], [False, True]])
    given = jnp.array([[10.0, 20.0], [30.0, 40.0]])
    for everywhere, wanted in ((True, given), (False, jnp.where(mask, given, 0))):
        seen, pull = jax.vjp(lambda x, e=everywhere: masks.straight_through(x, mask, e), x)
        np.testing.assert_array_equal(seen, jnp.where(mask, x, 0))
        np.testing.assert_array_equal(pull(given)[0], wanted)
        traced = jax.jit(jax.grad(lambda x, e: jnp.sum(given * masks.straight_through(x, mask, e))))
        np.testing.assert_array_equal(traced(x, jnp.bool_(everywhere)), wanted)
