"""Patterns: by hand, against NumPy, cut edges, errors, vmap, and devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from effjax.errors import SetupError
from effjax.prune.patterns import block, channel, n_m, unstructured

RNG = np.random.default_rng(0)


def rows(mask):
    return ["".join("01"[int(x)] for x in row) for row in np.asarray(mask)]


def choose(pattern, scores, keep, signed=False):
    """One array, under jit."""
    run = jax.jit(lambda s: pattern.choose({"w": s}, lambda units: {"w": keep}, signed=signed)["w"])
    mask = run(scores)
    assert mask.dtype == bool
    assert mask.shape == scores.shape
    return np.asarray(mask)


# By hand.

BY_HAND = jnp.array(
    [
        [9.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 2.0, 1.0, 1.0, 1.0],
        [0.0, 1.0, 2.0, 3.0, 0.0, 0.0],
        [0.0, 1.0, 2.0, 3.0, 0.0, 8.0],
    ]
)


@pytest.mark.parametrize(
    ("pattern", "units", "keep", "wanted"),
    [
        (unstructured(), 24, 2, ["100000", "000000", "000000", "000001"]),
        # Means of the 2 x 3 blocks: 11/6, 1, 1, 14/6.
        (block((2, 3)), 4, 2, ["111000", "111000", "000111", "000111"]),
        (block((2, 3)), 4, 3, ["111111", "111111", "000111", "000111"]),  # tie: the first
        # Means of pairs of rows in each column: 4.5 0 1 1 1 1 and 0 1 2 3 0 4.
        (block((2,), axes=(-2,)), 12, 3, ["100000", "100000", "000101", "000101"]),
        (block((2,), axes=(0,)), 12, 3, ["100000", "100000", "000101", "000101"]),
        # Sums of the columns: 9 2 6 8 2 10; of the rows: 12 5 6 14; of pairs of columns: 11 14 12.
        (channel(), 6, 2, ["100001"] * 4),
        (channel(0), 4, 2, ["111111", "000000", "000000", "111111"]),
        (channel(-1, size=2), 3, 1, ["001100"] * 4),
        (channel(-2, size=2), 2, 1, ["000000", "000000", "111111", "111111"]),
        # Columns 0-3 have 25/16, columns 4-5 have 12/8: the cut group counts by its mean.
        (channel(-1, size=4, pad=True), 2, 1, ["111100"] * 4),
        (channel((0, 1)), 24, 1, ["100000", "000000", "000000", "000000"]),
        # Blocks of 3 x 4, cut to 3 x 2 right, 1 x 4 below, 1 x 2 in the corner: means 19/12, 4/6,
        # 6/4, 8/2.
        (block((3, 4), pad=True), 4, 1, ["000000", "000000", "000000", "000011"]),
        (block((3, 4), pad=True), 4, 2, ["111100", "111100", "111100", "000011"]),
    ],
)
def test_by_hand(pattern, units, keep, wanted):
    pattern.check("w", (4, 6))
    assert pattern.units((4, 6)) == units
    assert rows(choose(pattern, BY_HAND, keep)) == wanted


@pytest.mark.parametrize(
    ("n", "m", "axis", "scores", "wanted"),
    [
        (2, 4, -1, [[1.0, 4.0, 3.0, 2.0, 0.0, 5.0, 0.0, 6.0]], ["01100101"]),
        (2, 4, -1, [[1.0, 1.0, 1.0, 1.0]], ["1100"]),  # ties: the first
        (2, 4, -1, [[1.0, 1.0, 2.0, 1.0]], ["1010"]),
        (1, 2, -2, [[1.0, 4.0], [3.0, 2.0], [0.0, 0.0], [0.0, 7.0]], ["01", "10", "10", "01"]),
        (1, 2, 0, [[1.0, 4.0], [3.0, 2.0], [0.0, 0.0], [0.0, 7.0]], ["01", "10", "10", "01"]),
        (3, 3, -1, [[1.0, 0.0, 2.0]], ["111"]),
        (1, 3, -1, [[np.inf, np.nan, 3e38]], ["010"]),  # NaN stays to be seen
        (1, 3, -1, [[0.0, 1e-45, 0.0]], ["010"]),
    ],
)
def test_n_m_by_hand(n, m, axis, scores, wanted):
    mask = n_m(n, m, axis).choose({"w": jnp.array(scores)})["w"]
    assert rows(mask) == wanted


def test_n_m_signed_and_cut():
    scores = jnp.array([[-1.0, -4.0, -0.0, 0.0, -5.0, -6.0]])
    assert rows(choose(n_m(2, 4, -1, pad=True), scores, None, signed=True)) == ["001111"]
    assert rows(choose(n_m(1, 4, -1, pad=True), scores, None, signed=True)) == ["001010"]
    zeros = jnp.zeros((1, 6))
    assert rows(choose(n_m(1, 4, -1, pad=True), zeros, None)) == ["100010"]
    lowest = jnp.full((1, 6), -jnp.inf)
    assert rows(choose(n_m(2, 4, -1, pad=True), lowest, None, signed=True)) == ["110011"]


def test_n_m_has_its_own_sparsity_and_the_others_none():
    assert n_m(2, 4).sparsity == 0.5
    assert n_m(1, 16).sparsity == 0.9375
    assert [p.sparsity for p in (unstructured(), block((2, 2)), channel())] == [None] * 3


def test_heads():
    # Attention's kernel [in, heads, head_dim] and its output [heads, head_dim, out].
    query = jnp.asarray(RNG.random((6, 4, 3)), jnp.float32)
    mask = choose(channel(-2), query, 2)
    best = np.argsort(-np.asarray(query).mean((0, 2)))[:2]
    np.testing.assert_array_equal(mask, np.isin(np.arange(4), best)[None, :, None] & mask)
    assert mask.sum() == 2 * 18
    flat = choose(channel(-1, size=3), query.reshape(6, 12), 2)
    np.testing.assert_array_equal(flat.reshape(6, 4, 3), mask)


# Against NumPy.


def mean_of_each(scores, lengths):
    """{corner of the tile: mean} in row-major order, and each weight's tile."""
    owner = np.zeros(scores.shape, int)
    grid = [-(-n // t) for n, t in zip(scores.shape, lengths, strict=True)]
    for index in np.ndindex(scores.shape):
        tile = [i // t for i, t in zip(index, lengths, strict=True)]
        owner[index] = np.ravel_multi_index(tile, grid)
    means = [scores[owner == i].astype(np.float64).mean() for i in range(math.prod(grid))]
    return np.array(means), owner


SHAPES = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
@settings(max_examples=12, deadline=None)
def test_tiles_of_any_size_as_numpy_finds_them(shape, data):
    sizes = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    scores = RNG.integers(0, 4, shape).astype(np.float32)
    pattern = block(sizes, pad=True)
    lengths = (*[1] * (len(shape) - 2), *sizes)
    means, owner = mean_of_each(scores, lengths)
    assert pattern.units(shape) == len(means)
    pooled = pattern.pool(jnp.asarray(scores))
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(np.ravel(pooled), means, rtol=1e-6)
    keep = data.draw(st.integers(1, len(means)))
    kept = np.zeros(len(means), bool)
    kept[np.argsort(-np.ravel(pooled), kind="stable")[:keep]] = True
    mask = pattern.choose({"w": jnp.asarray(scores)}, lambda units: {"w": keep})["w"]
    np.testing.assert_array_equal(np.asarray(mask), kept[owner])
    np.testing.assert_array_equal(pattern.expand(kept.reshape(pooled.shape), shape), kept[owner])


@given(shape=SHAPES, data=st.data())
@settings(max_examples=12, deadline=None)
def test_n_m_keeps_the_first_of_a_stable_sort_in_each_group(shape, data):
    m = data.draw(st.integers(1, 8))
    n, axis = data.draw(st.integers(1, m)), data.draw(st.integers(-len(shape), len(shape) - 1))
    scores = RNG.integers(-2, 3, shape).astype(np.float32)
    mask = n_m(n, m, axis, pad=True).choose({"w": jnp.asarray(scores)}, signed=True)["w"]
    lines, found = np.moveaxis(scores, axis, -1), np.moveaxis(np.asarray(mask), axis, -1)
    for start in range(0, lines.shape[-1], m):
        group, kept = lines[..., start : start + m], found[..., start : start + m]
        rank = np.argsort(np.argsort(-group, axis=-1, kind="stable"), axis=-1)
        np.testing.assert_array_equal(kept, rank < n)


@pytest.mark.parametrize("length", [2, 16, 17, 40])
def test_long_and_short_tiles_pool_alike(length):
    scores = RNG.random((2 * length, 3 * length)).astype(np.float32)
    found = block((length, length)).pool(jnp.asarray(scores))
    wanted = scores.reshape(2, length, 3, length).mean((1, 3), dtype=np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (6, 2), (32, 32), (1, 7)])
def test_equal_tiles_have_equal_scores_to_the_last_bit(sizes):
    """Wherever they lie, or ties would not be broken by position."""
    tile = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
    scores = np.tile(tile, (7, 9))
    pool = block(sizes).pool
    for found in (pool(scores), jax.jit(pool)(scores), jax.vmap(pool)(scores[None])):
        assert np.unique(found).size == 1


def test_an_infinite_score_stays_in_its_tile():
    scores = jnp.zeros((8, 8)).at[1, 2].set(jnp.inf)
    found = block((4, 4)).pool(scores)
    np.testing.assert_array_equal(found, [[np.inf, 0], [0, 0]])


def test_half_precision_scores_are_pooled_in_float32():
    scores = jnp.full((64, 64), 60000.0, jnp.float16)  # the sum overflows float16
    assert float(channel().pool(scores)[0, 0]) == 60000 - 60000 % 32
    assert float(block((64, 64)).pool(scores)[0, 0]) == 60000 - 60000 % 32


PATTERNS = {
    "unstructured": unstructured(),
    "2:4": n_m(2, 4),
    "2:4 out": n_m(2, 4, -1),
    "block": block((4, 4)),
    "channel": channel(),
    "input": channel(-2),
    "group": channel(-1, size=4),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_several_arrays_of_several_ranks_and_one_threshold(pattern):
    shapes = {"conv": (3, 3, 4, 8), "dense": (16, 16)}
    scores = {p: jnp.asarray(RNG.random(s) + (p == "conv"), jnp.float32) for p, s in shapes.items()}
    units = {p: pattern.units(s) for p, s in shapes.items()}
    each = pattern.choose(scores, lambda pooled: {p: units[p] // 2 for p in pooled})
    together = pattern.choose(scores, lambda pooled: 2)
    for path, shape in shapes.items():
        assert each[path].sum() * 2 == math.prod(shape)
        if pattern.sparsity is None:
            # The dense layer's scores are all smaller, and yet it keeps one unit.
            assert together[path].sum() * units[path] == math.prod(shape)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_under_vmap_as_one_by_one(pattern):
    scores = jnp.asarray(RNG.random((3, 8, 12)), jnp.float32)
    keep = jnp.array([1, 2, 3])

    def run(s, k):
        return pattern.choose({"w": s}, lambda units: {"w": k})["w"]

    found = jax.jit(jax.vmap(run))(scores, keep)
    for i in range(3):
        np.testing.assert_array_equal(found[i], run(scores[i], keep[i]))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("spec", [("data", "model"), ("model", "data"), (None, ("data", "model"))])
def test_on_8_devices_the_same_masks_and_no_weights_move(pattern, spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    scores = jnp.asarray(RNG.random((128, 256)), jnp.float32)
    keep = pattern.units(scores.shape) // 3

    def run(s):
        return pattern.choose({"w": s}, lambda units: {"w": keep})["w"]

    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    placed = jax.device_put(scores, sharding)
    compiled = jax.jit(run, out_shardings=sharding).lower(placed).compile()
    np.testing.assert_array_equal(compiled(placed), jax.jit(run)(scores))
    text = compiled.as_text()
    assert not re.findall(r"all-to-all|collective-permute|\bgather\(|\bsort\(", text)
    for entries in re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", text):
        # Scores of channels may meet; there are as many as outputs, not as weights.
        assert math.prod(int(n) for n in entries.split(",")) <= 256


# What is refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: block(()), "block of sizes"),
        (lambda: block((0, 4)), r"sizes \(0, 4\)"),
        (lambda: block((4, 4), axes=(0,)), r"axes \(0,\); give one positive length"),
        (lambda: channel(size=0), "in groups of 0"),
        (lambda: channel(()), "name an axis"),
        (lambda: n_m(0, 4), "0:4 sparsity"),
        (lambda: n_m(5, 4), "5:4 sparsity keeps 5 of 4"),
        (
            lambda: block((4, 4)).check("a/kernel", (8, 6)),
            r"a/kernel has shape \(8, 6\).*axis 1 is",
        ),
        (lambda: block((4, 4)).check("a/kernel", (6, 8)), r"6 long, which 4 does not .*pad=True"),
        (lambda: block((4, 4)).check("a/bias", (8,)), r"a/bias has shape \(8,\).*no axis -2"),
        (lambda: channel(-1, 4).check("k", (8, 6)), "4 does not divide, so groups of 4 channels"),
        (lambda: channel(2).check("k", (8, 6)), "no axis 2 for channels along 2"),
        (lambda: n_m(2, 4).check("k", (6, 8)), "axis 0 is 6 long, which 4.*2:4 sparsity"),
        (lambda: n_m(2, 4).check("k", (6,)), "no axis -2 for 2:4 sparsity"),
        (lambda: n_m(2, 4).choose({"k": jnp.ones((6, 8))}), "k has shape"),
        (lambda: block((4, 4)).pool(jnp.ones((6, 8))), "the array has shape"),
        (lambda: block((2, 2), axes=(0, -2)).check("k", (4, 4)), "k has shape.*twice"),
        (lambda: channel((1, -1)).check("k", (4, 4)), "k has shape.*twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(SetupError, match=words):
        make()


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_divides_is_accepted_by_name_and_shape_alone(pattern):
    pattern.check("conv/kernel", (3, 3, 8, 16))
    assert pattern.units((3, 3, 8, 16)) >= 1
