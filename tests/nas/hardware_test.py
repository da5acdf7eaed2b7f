"""Rewards, limits and strategies that propose only what is cheap enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SetupError
from effjax.nas import (
    Constrained,
    Evolution,
    Integer,
    LocalSearch,
    RandomSearch,
    Search,
    Space,
    mnasnet_reward,
    within,
)

SPACE = Space({"width": Integer(1, 16), "depth": Integer(1, 4)})


def cheap(genes):
    return (genes[0] + 1) * (genes[1] + 1) <= 8


def test_the_reward_by_hand():
    cost = jnp.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(
        mnasnet_reward(jnp.float32(0.5), cost, 2.0), 0.5 * np.array([2**0.07, 1, 2**-0.07]), 1e-6
    )
    np.testing.assert_allclose(mnasnet_reward(0.5, cost, 2.0, 0.0, -1.0), [0.5, 0.5, 0.25], 1e-6)
    # The paper's reading of -0.07: twice the latency for 5% more accuracy is an even trade.
    even = mnasnet_reward(0.5 * 1.05, 4.0, 2.0) / mnasnet_reward(0.5, 2.0, 2.0)
    assert float(even) == pytest.approx(1.0, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1), st.floats(1e-6, 1e6), st.floats(1.001, 100), st.floats(1e-6, 1e6))
def test_a_larger_cost_is_never_better(accuracy, cost, factor, target):
    small, large = mnasnet_reward(accuracy, jnp.array([cost, cost * factor]), target)
    assert large <= small


def test_limits_are_kept_elementwise_inside_programs():
    costs = {"macs": jnp.array([1.0, 3.0, 1.0]), "bytes": jnp.array([5.0, 5.0, 7.0])}
    kept = jax.jit(lambda costs: within(costs, {"macs": 2, "bytes": 5}))(costs)
    assert kept.tolist() == [True, False, False]
    with pytest.raises(SetupError, match="byte"):
        within(costs, {"byte": 5})


@pytest.mark.parametrize("make", [RandomSearch, LocalSearch, lambda s: Evolution(s, 8, 3)])
def test_only_what_is_accepted_is_proposed_and_a_search_goes_on(make, tmp_path):
    def opened():
        return Search(SPACE, Constrained(make(SPACE), cheap), tmp_path / "trials", seed=3)

    search = opened()
    for _ in range(20):
        trial = search.ask()
        assert cheap(trial.genes)
        search.tell(trial, float(trial.genes.sum()))
    again = opened()
    assert [t.genes.tolist() for t in again.trials] == [t.genes.tolist() for t in search.trials]
    assert again.ask().genes.tolist() == search.ask().genes.tolist()


def test_a_search_goes_on_with_the_strategy_that_was_wrapped(tmp_path):
    Search(SPACE, Constrained(RandomSearch(SPACE), cheap), tmp_path / "trials").ask()
    with pytest.raises(SetupError, match=r"Constrained\(RandomSearch\).*Constrained\(LocalSearch"):
        Search(SPACE, Constrained(LocalSearch(SPACE), cheap), tmp_path / "trials")


def test_what_cannot_be_meant():
    with pytest.raises(SetupError, match="of 5 configurations that RandomSearch proposed, none"):
        Constrained(RandomSearch(SPACE), lambda genes: False, tries=5).ask(jax.random.key(0))
    with pytest.raises(SetupError, match="tries=0"):
        Constrained(RandomSearch(SPACE), cheap, tries=0)
    with pytest.raises(SetupError, match="never worse"):
        mnasnet_reward(0.5, 1.0, 1.0, above=0.1)
    with pytest.raises(SetupError, match="positive"):
        mnasnet_reward(0.5, 1.0, 0.0)
