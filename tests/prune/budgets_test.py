"""How many weights are kept: the formula, its rounding, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SetupError
from effjax.prune import budgets


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [
        (10, 0.0, 10),
        (10, 0.5, 5),
        (10, 0.25, 8),  # 2.5 is rounded to 2
        (10, 0.75, 2),  # 7.5 is rounded to 8
        (3, 0.9, 1),  # 2.7 would be rounded to 3: one is left
        (1, 0.9, 1),
        (10**7, 0.8, 2 * 10**6),
        (5 * 10**9, 0.5, 25 * 10**8),  # more than int32 holds
        (10, 1.5, 1),  # traced values are not refused: the nearest that can be
        (10, -0.5, 10),
    ],
)
def test_kept_by_hand(size, sparsity, kept):
    assert int(budgets.keep(size, sparsity)) == kept
    assert int(budgets.keep(size, jnp.float32(sparsity))) == kept


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 2**24), st.floats(0, 0.984375, width=32))
def test_kept_is_the_documented_formula(size, sparsity):
    zeros = int(np.round(np.float32(sparsity) * np.float32(size)))
    assert int(budgets.keep(size, sparsity)) == max(size - zeros, 1)


def test_traced_sparsities_keep_what_written_ones_keep():
    sparsities = np.linspace(0, 0.99, 100, dtype=np.float32)
    traced = jax.jit(jax.vmap(lambda s: budgets.keep(1001, s)))(jnp.asarray(sparsities))
    assert [int(h) * 2**11 + int(low) for h, low in zip(*traced, strict=True)] == [
        int(budgets.keep(1001, float(s))) for s in sparsities
    ]


def test_per_layer_and_overall():
    sizes = {"a": 10, "b": 30}
    assert {p: int(k) for p, k in budgets.per_layer(sizes, 0.8).items()} == {"a": 2, "b": 6}
    assert int(budgets.overall(sizes, 0.8)) == 8


def test_a_layer_that_would_be_emptied_is_refused():
    with pytest.raises(SetupError, match=r"head has 4 weights, and a sparsity of 0.9 would"):
        budgets.check_not_emptied({"body": 100, "head": 4}, 0.9)
    budgets.check_not_emptied({"body": 100, "head": 6}, 0.9)
