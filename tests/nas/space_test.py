"""Search spaces: vectors and configurations, uniform draws, single moves, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from effjax.errors import SetupError
from effjax.nas import Choice, Float, Integer, Repeat, Space, When

PLAIN = Space({"a": Choice(("x", "y", "z")), "bits": Integer(2, 8, 2), "s": Float(0.1, 0.9, 3)})
NESTED = Space(
    {
        "kind": Choice(("none", "q", "p")),
        "bits": When("kind", ("q", "p"), Integer(2, 4)),
        "grid": When("bits", (3,), Choice((True, False))),
        "cell": Repeat(2, {"op": Choice(("c", "m")), "k": When("op", ("c",), Choice((3, 5)))}),
    }
)
LIMITED = Space({"a": Integer(0, 3), "b": Integer(0, 3)}, lambda genes: genes[0] + genes[1] <= 3)
SPACES = {"plain": PLAIN, "nested": NESTED, "limited": LIMITED}


@pytest.fixture(params=list(SPACES))
def space(request):
    return SPACES[request.param]


def test_sizes_are_exact():
    assert PLAIN.size == 3 * 4 * 3
    assert LIMITED.size == 10
    assert NESTED.size == (1 + 2 * (1 + 2 + 1)) * 3**2
    assert Space({"c": Repeat(100, {"op": Integer(1, 10)})}).size == 10**100


def test_every_vector_is_a_configuration_and_back(space):
    every = space.enumerate()
    assert len(every) == space.size == len({tuple(row) for row in every.tolist()})
    for row in every:
        assert np.array_equal(space.encode(space.decode(row)), row)
    assert len({str(space.decode(row)) for row in every}) == space.size


def test_samples_are_uniform(space):
    drawn = np.asarray(jax.jit(lambda k: space.sample(k, (20_000,)))(jax.random.key(1)))
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    assert np.array_equal(rows, space.enumerate())
    assert chisquare(counts).pvalue > 1e-3


def test_a_mutation_is_valid_and_moves_one_gene_and_what_hangs_on_it(space):
    genes = space.sample(jax.random.key(2), (2000,))
    moved = jax.jit(space.mutate)(jax.random.key(3), genes)
    assert bool(jnp.all(space.valid(moved)))
    both = np.asarray(space.active(genes) & space.active(moved))
    changed = np.asarray(genes != moved) & both
    assert np.array_equal(changed.sum(axis=1), np.ones(2000))


def test_mutations_of_one_vector_are_uniform_over_its_neighbours():
    genes = jnp.tile(jnp.array([1, 2, 0], jnp.int32), (20_000, 1))
    moved = np.asarray(PLAIN.mutate(jax.random.key(4), genes))
    rows, counts = np.unique(moved, axis=0, return_counts=True)
    assert {tuple(r) for r in rows} == {tuple(r) for r in PLAIN.neighbours([1, 2, 0])}
    # A gene of n values is chosen with probability 1/3, each of its others with 1/(3 (n - 1)).
    at = np.argmax(rows != np.array([1, 2, 0]), axis=1)
    assert chisquare(counts, 20_000 / 3 / np.array([2, 3, 2])[at]).pvalue > 1e-3


def test_a_child_has_its_parents_genes(space):
    a, b = space.sample(jax.random.key(5), (2, 1000))
    child = np.asarray(jax.jit(space.crossover)(jax.random.key(6), a, b))
    assert bool(jnp.all(space.valid(child)))
    inherited = (child == np.asarray(a)) | (child == np.asarray(b)) | (child == 0)
    assert inherited.all()
    assert np.array_equal(space.crossover(jax.random.key(7), a, a), a)


def test_neighbours_by_hand():
    found = NESTED.neighbours(NESTED.encode({"kind": "none", "cell": [{"op": "m"}, {"op": "m"}]}))
    assert found.tolist() == [
        [1, 0, 0, 1, 0, 1, 0],
        [2, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0, 0, 0],
    ]
    assert LIMITED.neighbours([0, 3]).tolist() == [[0, 0], [0, 1], [0, 2]]


def test_features_and_numbers():
    assert PLAIN.one_hot(jnp.array([1, 3, 0])).tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    numbers = jax.jit(PLAIN.numbers)(jnp.array([1, 3, 1]))
    assert set(numbers) == {"bits", "s"}
    assert float(numbers["bits"]) == 8
    assert float(numbers["s"]) == pytest.approx(0.5)
    off = NESTED.one_hot(jnp.zeros(7, jnp.int32))
    assert off[3:8].tolist() == [0] * 5


def test_logarithmic_floats_are_equally_far_apart_in_logarithms():
    space = Space({"rate": Float(1e-4, 1e-1, 4, log=True)})
    assert np.allclose(space.values[0], [1e-4, 1e-3, 1e-2, 1e-1])


def test_json_and_digest():
    again = Space.from_json(NESTED.to_json())
    assert again.digest == NESTED.digest
    assert np.array_equal(again.enumerate(), NESTED.enumerate())
    assert PLAIN.digest != NESTED.digest
    assert LIMITED.digest != Space(LIMITED.dimensions).digest
    assert "bits: 2, 3, 4 (3) if kind in ['q', 'p']" in repr(NESTED)


@st.composite
def dimensions(draw):
    """Some dimensions, some of which wait for an earlier one, and perhaps cells of them."""
    found = {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        low = draw(st.integers(-2, 2))
        kinds = [Integer(low, low + 2), Choice(("x", None, True)), Float(0.5, 1.5, 2), Choice((7,))]
        dimension = draw(st.sampled_from(kinds))
        if found and draw(st.booleans()):
            on = draw(st.sampled_from(sorted(found)))
            values = Space(found).values[list(found).index(on)]
            kept = draw(st.lists(st.sampled_from(values), min_size=1, unique_by=repr))
            dimension = When(on, tuple(kept), dimension)
        found[name] = dimension
    return {"cell": Repeat(2, found)} if draw(st.booleans()) else found


@settings(max_examples=6, deadline=None)
@given(dimensions())
def test_of_any_space(found):
    space = Space(found)
    every = space.enumerate()
    assert space.size == len(every) == len({row.tobytes() for row in every})
    picked = every[:: max(1, len(every) // 8)]
    assert all(np.array_equal(space.encode(space.decode(row)), row) for row in picked)
    assert bool(space.valid(jnp.asarray(every)).all())
    assert Space.from_json(space.to_json()).digest == space.digest
    near = space.neighbours(picked[-1])
    assert {row.tobytes() for row in near} <= {row.tobytes() for row in every}
    assert picked[-1].tobytes() not in {row.tobytes() for row in near}
    assert str(space).startswith(f"Space of {space.size:,} configurations")


@pytest.mark.parametrize(
    ("dimensions", "says"),
    [
        ({}, "no dimensions"),
        ({"a": Choice(())}, "no values"),
        ({"a": Choice((1, 1))}, "twice"),
        ({"a": Integer(3, 2)}, "no values"),
        ({"a": Integer(0, 2, 0)}, "step"),
        ({"a": Float(0.0, 1.0, 3, log=True)}, "low > 0"),
        ({"a": [1, 2]}, "a dimension is"),
        ({"a.b": Choice((1,))}, "dot"),
        ({"a": Repeat(0, {"b": Choice((1,))})}, "1 or more"),
        ({"b": When("a", (1,), Choice((1,)))}, "no dimension before it"),
        ({"a": Choice((1,)), "b": When("a", (2,), Choice((1,)))}, "waits for"),
    ],
)
def test_wrong_spaces(dimensions, says):
    with pytest.raises(SetupError, match=says):
        Space(dimensions)


@pytest.mark.parametrize("high", [3, 10**7])
def test_a_constraint_that_nothing_satisfies(high):
    with pytest.raises(SetupError, match="nothing satisfies"):
        Space({"a": Integer(0, 3), "b": Integer(0, min(high, 10**5))}, lambda genes: genes[0] > 5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"a": 1}, "missing"),
        ({"a": 1, "b": 9}, "not one of"),
        ({"a": 1, "b": 1, "c": 1}, "no dimensions"),
        ({"a": 3, "b": 3}, "refuses"),
    ],
)
def test_wrong_configurations(config, says):
    with pytest.raises(SetupError, match=says):
        LIMITED.encode(config)
    with pytest.raises(SetupError, match="no configuration"):
        LIMITED.decode([3, 3])
