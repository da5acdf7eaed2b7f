"""Tests of the choice of bits within a budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import SelectorError, SetupError
from effjax.quantize import allocate, bit_costs, by_leaf, qat
from tests import nets

WIDTHS = (2, 4, 8)


def brute_force(sensitivity, costs, budget):
    """The least loss within the budget, and its least cost."""
    best = (np.inf, np.inf)
    for bits in itertools.product(*(own.items() for own in costs.values())):
        cost = sum(c for _, c in bits)
        loss = sum(sensitivity[p][b] for p, (b, _) in zip(costs, bits, strict=True))
        if cost <= budget:
            best = min(best, (loss, cost))
    return best


def tables(numbers):
    one = st.lists(st.tuples(st.integers(1, 30), numbers), min_size=1, max_size=4)
    return st.lists(one, min_size=1, max_size=5)


# Eighths: sums are exact, so that ties are ties. Neither costs nor losses are in any order.
@settings(max_examples=300, deadline=None)
@given(tables(st.integers(-40, 80).map(lambda n: n / 8)), st.integers(0, 100))
def test_the_allocation_is_the_best_there_is(rows, budget):
    costs = {f"w{i}": {b: c for b, (c, _) in enumerate(row)} for i, row in enumerate(rows)}
    losses = {f"w{i}": {b: v for b, (_, v) in enumerate(row)} for i, row in enumerate(rows)}
    loss, cost = brute_force(losses, costs, budget)
    if not np.isfinite(loss):
        with pytest.raises(SetupError, match="no choice of bits meets the budget"):
            allocate(losses, costs, budget)
        return
    found = allocate(losses, costs, budget)
    assert (found.loss, found.cost) == (loss, cost)
    assert sum(costs[p][b] for p, b in found.bits.items()) == cost
    assert sum(losses[p][b] for p, b in found.bits.items()) == loss


def test_a_hundred_layers_take_no_time():
    rng = np.random.default_rng(0)
    sizes = {f"w{i}": int(n) for i, n in enumerate(rng.integers(1_000, 2_000_000, 100))}
    costs = {p: {b: n * b for b in range(2, 9)} for p, n in sizes.items()}
    losses = {
        p: {b: rng.uniform(0.1, 10) * n * 4.0**-b for b in range(2, 9)} for p, n in sizes.items()
    }
    budget = 3 * sum(sizes.values())
    found = allocate(losses, costs, budget)
    assert 0.99 * budget < found.cost <= budget
    uniform = sum(own[3] for own in losses.values())
    assert found.loss < 0.9 * uniform


def test_greedy_is_not_enough():
    losses = {"a": {2: 10.0, 4: 0.0}, "b": {2: 6.0, 4: 0.0}, "c": {2: 6.0, 4: 0.0}}
    costs = {"a": {2: 0, 4: 6}, "b": {2: 0, 4: 5}, "c": {2: 0, 4: 5}}
    assert allocate(losses, costs, 10).bits == {"a": 2, "b": 4, "c": 4}


def sites_of(model, batch):
    params, state = model.init(jax.random.key(0), batch)
    return params, state, ej.find_sites(model.apply, params, state, batch)


def test_costs_are_those_of_the_footprint():
    model = nets.linen()
    one = jax.tree.map(lambda x: x[:1], nets.BATCH)
    params, state, sites = sites_of(model, one)
    transform = qat(4, 8)
    setup = ej.Setup(model.apply, state, one)
    own = transform.init(jax.random.key(0), params, setup)[1]
    rows = {
        r.path: r for r in ej.footprint(params, sites, transform.describe(params, {}, own)).leaves
    }
    in_bytes = bit_costs(params, sites, WIDTHS, "bytes")
    in_bitops = bit_costs(params, sites, WIDTHS, "bitops", activations=8)
    assert set(in_bytes) == {"conv1/kernel", "conv2/kernel", "head/kernel"}
    for path, cost in in_bytes.items():
        # As stored densely: a code of 4 bits that rounds to 0 may be stored as a mask instead.
        assert cost[4] == rows[path].sizes["dense"]
        assert in_bitops[path][4] == rows[path].bitops


def test_costs_by_hand():
    params = {"kernel": jnp.ones((2, 3, 5), jnp.bfloat16), "bias": jnp.ones(5)}

    def apply(params, model_state, x, key, train):
        return jax.lax.scan(lambda x, w: (x[:, :3] @ w, None), x, params["kernel"])[0], model_state

    x = jnp.ones((1, 5), jnp.bfloat16)
    sites = ej.find_sites(apply, params, {}, x)
    assert bit_costs(params, sites, (3, 16)) == {"kernel": {3: 90, 16: 480}}
    assert bit_costs(params, sites, (3, 16), "bytes") == {"kernel": {3: 12 + 40, 16: 60}}
    shared = bit_costs(params, sites, (3,), "bytes", per_channel=False)
    assert shared == {"kernel": {3: 12 + 8}}
    assert bit_costs(params, sites, (3,), "bitops", activations=8) == {"kernel": {3: 30 * 3 * 8}}


def test_an_allocation_is_bits_of_qat():
    model = nets.linen()
    one = jax.tree.map(lambda x: x[:1], nets.BATCH)
    params, state, sites = sites_of(model, one)
    costs = bit_costs(params, sites, WIDTHS)
    losses = {p: {b: 4.0**-b for b in WIDTHS} for p in costs}
    found = allocate(losses, costs, 2.5 * sum(own[2] for own in costs.values()))
    transform = ej.chain(q=qat(8, 8, rules=by_leaf(found.bits, 8)))
    table = ej.inspect(model.apply, params, one, state, transform=transform)
    assert {row.path: row.weight_bits for row in table.rows} == found.bits
    assert len(set(found.bits.values())) > 1


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ({"a": {2: 1.0}}, {"b": {2: 1}}, "the same leaves"),
        ({}, {}, "the same leaves"),
        ({"a": {2: 1.0}}, {"a": {2: 1, 4: 2}}, "the same widths"),
        ({"a": {}}, {"a": {}}, "the same widths"),
        ({"a": {2: np.nan}}, {"a": {2: 1}}, "not all finite"),
        ({"a": {2: 1.0}}, {"a": {2: 11}}, "cheapest costs 11"),
    ],
)
def test_wrong_tables(losses, costs, message):
    with pytest.raises(SetupError, match=message):
        allocate(losses, costs, 10)


def test_wrong_costs():
    one = jax.tree.map(lambda x: x[:1], nets.BATCH)
    params, _, sites = sites_of(nets.raw(), one)
    with pytest.raises(SetupError, match="'kilos'"):
        bit_costs(params, sites, WIDTHS, "kilos")
    with pytest.raises(SetupError, match="no widths"):
        bit_costs(params, sites, ())
    with pytest.raises(SetupError, match="reaches a site"):
        bit_costs(params, (), WIDTHS)
    with pytest.raises(SelectorError, match="matches no leaf"):
        bit_costs(params, sites, WIDTHS, pattern="weights")
