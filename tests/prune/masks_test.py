"""Masks: what they do to weights, to gradients, and how sparse they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import SelectorError
from effjax.prune import budgets, masks, scores

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


def test_unstructured_keeps_the_largest_magnitudes():
    weights = {"a": jnp.array([-3.0, 0.5, 1.0, -0.1]), "b": jnp.array([[4.0, -5.0], [0.2, 0.3]])}
    sizes = {path: w.size for path, w in weights.items()}
    found = {path: scores.magnitude(w) for path, w in weights.items()}
    layer = masks.unstructured(found, budgets.per_layer(sizes, 0.75))
    assert layer["a"].tolist() == [True, False, False, False]
    assert layer["b"].tolist() == [[False, True], [False, False]]
    together = masks.unstructured(found, budgets.overall(sizes, 0.75))
    assert together["a"].tolist() == [False] * 4
    assert together["b"].tolist() == [[True, True], [False, False]]
