"""How many units are kept: the formula, its rounding, allocations, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SelectorError, SetupError
from effjax.prune import budgets
from effjax.prune.budgets import Layer
from effjax.prune.counts import Count


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


def test_a_layer_that_would_be_emptied_is_refused():
    with pytest.raises(SetupError, match=r"head has 4 weights, and a sparsity of 0.9 would"):
        budgets.check_not_emptied({"body": 100, "head": 4}, 0.9)
    budgets.check_not_emptied({"body": 100, "head": 6}, 0.9)


# Allocations.

RNG = np.random.default_rng(0)
LENET = {
    "conv1": Layer((5, 5, 1, 6), 150, 150 * 784),
    "conv2": Layer((5, 5, 6, 16), 2400, 2400 * 100),
    "dense1": Layer((400, 120), 48000, 48000),
    "dense2": Layer((120, 10), 1200, 1200),
}


def random_scores(layers):
    return {p: jnp.asarray(RNG.random(x.units) + 0.1, jnp.float32) for p, x in layers.items()}


def allocate(allocation, layers, scores, sparsity):
    """{path: int}, the sparsity traced."""
    found = jax.jit(lambda s, x: allocation(layers, x, s))(jnp.float32(sparsity), scores)
    return {path: int(Count(*kept)) for path, kept in found.items()}


def erk_reference(layers, sparsity):
    """Densities as in the code of the RigL paper: layers become dense until eps fits the rest."""
    dense = set()
    while True:
        others = [p for p in layers if p not in dense]
        raw = {p: sum(layers[p].shape) / np.prod(layers[p].shape) for p in others}
        kept = sum(x.size for x in layers.values()) * (1 - sparsity)
        eps = (kept - sum(layers[p].size for p in dense)) / sum(
            raw[p] * layers[p].size for p in others
        )
        worst = max(raw.values())
        if eps * worst <= 1:
            return {p: 1.0 if p in dense else eps * raw[p] for p in layers}
        dense |= {p for p in others if raw[p] == worst}


def test_uniform_and_global_by_hand():
    layers = {"a": Layer((10,), 10), "b": Layer((30,), 30)}
    assert allocate(budgets.uniform, layers, {}, 0.8) == {"a": 2, "b": 6}
    assert int(budgets.global_(layers, {}, 0.8)) == 8
    assert int(budgets.global_(layers, {}, 0.99)) == 2  # one unit for each layer


def test_erk_by_hand():
    # Raw densities 20/100 and 80/1600; eps = 0.1 * 1700 / (20 + 80) = 1.7.
    layers = {"a": Layer((10, 10), 100), "b": Layer((40, 40), 1600)}
    assert allocate(budgets.erk, layers, {}, 0.9) == {"a": 34, "b": 136}
    # At half: eps = 8.5 makes the small layer 1.7 dense. It is dense, and 750 are left for 1600.
    assert allocate(budgets.erk, layers, {}, 0.5) == {"a": 100, "b": 750}
    # A convolution's kernel counts its window: 3 + 3 + 4 + 8 of 288.
    layers = {"a": Layer((3, 3, 4, 8), 288), "b": Layer((72, 288), 20736)}
    eps = 0.02 * (288 + 20736) / (18 + 360)
    wanted = {"a": round(eps * 18), "b": round(eps * 360)}
    assert allocate(budgets.erk, layers, {}, 0.98) == wanted


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.98])
def test_erk_is_the_papers_loop(sparsity):
    wanted = erk_reference(LENET, sparsity) if sparsity else dict.fromkeys(LENET, 1.0)
    found = allocate(budgets.erk, LENET, {}, sparsity)
    for path, layer in LENET.items():
        assert abs(found[path] - wanted[path] * layer.size) <= 0.51


LAYERS = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=60)
@given(LAYERS, st.floats(0, 0.984375, width=32))
def test_erk_meets_the_total_within_a_unit_for_each_layer(shapes, sparsity):
    layers = {str(i): Layer(s, int(np.prod(s))) for i, s in enumerate(shapes)}
    kept = {p: int(c) for p, c in budgets.erk(layers, {}, sparsity).items()}
    size = sum(x.size for x in layers.values())
    # Rounding half a unit for each, a unit for a layer that would be emptied, float32's resolution.
    assert abs(sum(kept.values()) - (1 - sparsity) * size) <= len(layers) + 2e-7 * size
    assert all(1 <= kept[p] <= x.units for p, x in layers.items())


def test_erk_of_power_0_is_uniform():
    for sparsity in (0.1, 0.9):
        found = budgets.erk(LENET, {}, sparsity, power=0.0)
        for path, layer in LENET.items():
            assert abs(int(found[path]) - int(budgets.keep(layer.units, sparsity))) <= 1


def test_by_path_multiplies_or_replaces():
    rules = {"conv1": 0.0, "conv": 0.5, "dense1": lambda s: 0.25, "": 2.0}
    found = allocate(budgets.by_path(rules), LENET, {}, 0.6)
    # 2 * 0.6 is more than all: one is left.
    assert found == {"conv1": 150, "conv2": 1680, "dense1": 36000, "dense2": 1}


@pytest.mark.parametrize("name", ["macs", "bytes"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
def test_costs_are_met_within_half_a_unit_of_each_layer(name, sparsity):
    scores = random_scores(LENET)
    found = allocate(budgets.resolve(name), LENET, scores, sparsity)
    each = {p: x.macs / x.units if name == "macs" else 1.0 for p, x in LENET.items()}
    total = sum(each[p] * x.units for p, x in LENET.items())
    cost = sum(each[p] * found[p] for p in LENET)
    assert abs(cost - (1 - sparsity) * total) <= sum(each.values()) / 2 + 1e-6 * total


def test_macs_keep_what_is_worth_most_for_its_cost():
    layers = {"a": Layer((4,), 4, 40), "b": Layer((4,), 4, 4)}
    scores = {"a": jnp.array([12.0, 8.0, 30.0, 1.0]), "b": jnp.array([1.0, 2.5, 0.1, 0.5])}
    # Scores for each MAC: a 1.2 0.8 3 0.1, b 1 2.5 0.1 0.5. In order they cost 10, 1, 10, 1, 10, 1.
    assert allocate(budgets.macs, layers, scores, 0.75) == {"a": 1, "b": 1}
    assert allocate(budgets.macs, layers, scores, 0.5) == {"a": 2, "b": 2}
    assert allocate(budgets.macs, layers, scores, 0.25) == {"a": 3, "b": 3}


def test_equal_and_signed_scores_are_shared_out():
    layers = {"a": Layer((100,), 100), "b": Layer((300,), 300)}
    equal = {"a": jnp.ones(100), "b": jnp.ones(300)}
    assert allocate(budgets.bytes, layers, equal, 0.75) == {"a": 25, "b": 75}
    lower = {"a": jnp.arange(100.0) - 400, "b": jnp.arange(300.0) - 300}
    assert allocate(budgets.bytes, layers, lower, 0.5) == {"a": 1, "b": 199}


def test_channels_are_counted_with_their_size():
    layers = {"wide": Layer((90, 10), 10), "narrow": Layer((10, 10), 10)}
    scores = {"wide": jnp.arange(10.0), "narrow": jnp.arange(10.0) + 10}
    # Half of 1000 weights: 10 narrow channels and 400 / 90 = 4.4 wide ones.
    assert allocate(budgets.bytes, layers, scores, 0.5) == {"wide": 4, "narrow": 10}
    bits = budgets.cost({"wide": 2.0, "": 18.0})  # 1800 each: half is the better layer
    assert sum(allocate(bits, layers, scores, 0.5).values()) == 10


@pytest.mark.parametrize("name", budgets.ALLOCATIONS)
def test_a_layer_never_loses_all_and_nothing_counts_more_than_there_is(name):
    scores = {**random_scores(LENET), "conv1": jnp.zeros(150)}
    for sparsity in (0.0, 0.5, 0.999, 1.0):
        budget = budgets.ALLOCATIONS[name](LENET, scores, sparsity)
        if isinstance(budget, Count):
            assert len(LENET) <= int(budget) <= sum(x.units for x in LENET.values())
        else:
            assert all(1 <= int(budget[p]) <= x.units for p, x in LENET.items())


@pytest.mark.parametrize("name", budgets.ALLOCATIONS)
def test_under_vmap_over_sparsities(name):
    scores, allocation = random_scores(LENET), budgets.ALLOCATIONS[name]
    sparsities = jnp.array([0.2, 0.7, 0.97])
    found = jax.jit(jax.vmap(lambda s: allocation(LENET, scores, s)))(sparsities)
    for i, sparsity in enumerate(sparsities):
        one = allocation(LENET, scores, sparsity)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), found, one)


def test_names_and_functions():
    assert budgets.resolve("erk") is budgets.erk
    assert budgets.resolve(budgets.erk) is budgets.erk
    with pytest.raises(SetupError, match=r"budget is 'ERK'; it is one of \['uniform', 'erk'"):
        budgets.resolve("ERK")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: budgets.by_path({"a": -0.5}), SetupError, "multiplied by -0.5"),
        (lambda: budgets.cost({"a": 0.0}), SetupError, "costs 0.0"),
        (lambda: budgets.by_path({"conv": 1.0})(LENET, {}, 0.5), SelectorError, "'dense1'.*for ''"),
        (
            lambda: budgets.by_path({"": 1.0, "conv": 0.5})(LENET, {}, 0.5),
            SelectorError,
            r"\['conv'\] are the first match of no layer",
        ),
        (
            lambda: budgets.macs({"a": Layer((4,), 4)}, {}, 0.5),
            SetupError,
            r"know those of \['a'\]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
