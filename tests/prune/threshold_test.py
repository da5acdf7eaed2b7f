"""The k largest scores: by hand, against NumPy, with ties, sharded, and counted in digits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from effjax.errors import SetupError
from effjax.prune import counts, threshold
from effjax.prune.counts import Count
from effjax.prune.threshold import largest

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2, 3), "d": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def reference(scores, keep):
    """The same by a stable sort of all scores in a row."""
    flat = np.concatenate([np.asarray(x, np.float32).ravel() for x in scores.values()])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    ends = np.cumsum([np.size(x) for x in scores.values()])[:-1]
    parts = np.split(mask, ends)
    return {p: m.reshape(np.shape(x)) for (p, x), m in zip(scores.items(), parts, strict=True)}


def check_same(masks, wanted):
    assert list(masks) == list(wanted)
    for path, mask in masks.items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(np.asarray(mask), wanted[path], err_msg=path)


together = jax.jit(lambda scores, keep: largest(scores, keep))
each = jax.jit(lambda scores, keep: largest(scores, keep))


@pytest.mark.parametrize(
    ("scores", "keep", "wanted"),
    [
        ([3.0, 1.0, 2.0], 2, "101"),
        ([3.0, 1.0, 2.0], 0, "000"),
        ([3.0, 1.0, 2.0], 3, "111"),
        ([1.0, 2.0, 2.0, 2.0], 2, "0110"),  # equal scores: the first ones
        ([0.0, 0.0, 0.0, 0.0], 1, "1000"),
        ([0.0, 0.0, 5.0, 0.0], 3, "1110"),
        ([np.inf, 1e38, 1.0], 1, "100"),
        ([1.0, np.nan, np.inf], 1, "010"),  # NaN stays to be seen
        ([1e-45, 0.0, 3e-45], 1, "001"),  # subnormal numbers are not flushed to 0
        ([1e-45, 0.0, 3e-45], 2, "101"),
        ([1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0], 1, "010"),
    ],
)
def test_by_hand(scores, keep, wanted):
    mask = largest({"w": jnp.array(scores, jnp.float32)}, keep)["w"]
    assert "".join("01"[int(kept)] for kept in mask) == wanted


def test_ties_across_leaves_are_kept_in_the_order_of_the_dict():
    scores = {"z": jnp.array([1.0, 2.0, 1.0]), "a": jnp.array([[1.0, 3.0], [1.0, 1.0]])}
    wanted = {"z": np.array([1, 1, 1], bool), "a": np.array([[1, 1], [0, 0]], bool)}
    check_same(largest(scores, 5), wanted)
    wanted = {"z": np.array([1, 1, 0], bool), "a": np.array([[0, 1], [0, 0]], bool)}
    check_same(largest(scores, 3), wanted)


VALUES = [0.0, 1e-45, 1e-7, 0.5, 0.5000001, 1.0, 1.5, 2.0, 60000.0, 3e38, float("inf")]
ROWS = st.lists(
    st.one_of(st.sampled_from(VALUES), st.floats(0, 4, width=32)), min_size=SIZE, max_size=SIZE
)
DTYPES = {
    "float32": ("float32",) * 4,
    "bfloat16": ("bfloat16",) * 4,
    "float16": ("float16",) * 4,
    "mixed": ("bfloat16", "float32", "float16", "float32"),
}


def build(row, dtypes):
    found, start = {}, 0
    for (path, shape), dtype in zip(SHAPES.items(), dtypes, strict=True):
        size = int(np.prod(shape))
        part = np.asarray(row[start : start + size], np.float32).reshape(shape)
        with np.errstate(over="ignore"):
            found[path] = part.astype(jnp.dtype(dtype))
        start += size
    return found


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@given(row=ROWS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_all_leaves_together_as_a_stable_sort(dtypes, row, data):
    scores = build(row, dtypes)
    keep = data.draw(st.integers(0, SIZE))
    check_same(together(scores, jnp.int32(keep)), reference(scores, keep))


@given(row=ROWS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_leaf_by_itself_as_a_stable_sort(row, data):
    scores = build(row, DTYPES["float32"])
    keep = {p: data.draw(st.integers(0, int(np.prod(shape)))) for p, shape in SHAPES.items()}
    masks = each(scores, {p: jnp.int32(k) for p, k in keep.items()})
    wanted = {p: reference({p: scores[p]}, k)[p] for p, k in keep.items()}
    check_same(masks, wanted)


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_leaves_too_large_for_one_number_are_counted_and_indexed_in_digits(monkeypatch, limit):
    monkeypatch.setattr(counts, "FLOAT32", limit)
    monkeypatch.setattr(counts, "INT32", 2 * limit)
    monkeypatch.setattr(threshold, "UINT32", 2 * limit)
    run = jax.jit(lambda scores, keep: largest(scores, keep))
    rng = np.random.default_rng(limit)
    for keep in (0, 1, 7, 13, 22, SIZE):
        scores = build(rng.integers(0, 3, SIZE), DTYPES["float32"])
        check_same(run(scores, jnp.int32(keep)), reference(scores, keep))


def test_a_search_under_vmap_is_the_search_of_each():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.integers(0, 5, (6, 40)), jnp.float32)
    keep = jnp.array([0, 1, 10, 20, 39, 40])
    masks = jax.vmap(lambda row, k: largest({"w": row}, k)["w"])(rows, keep)
    for row, k, mask in zip(rows, keep, masks, strict=True):
        check_same({"w": mask}, reference({"w": row}, int(k)))


def test_a_keep_in_digits_is_a_keep_in_one_number():
    scores = {"w": jnp.arange(5000.0)}
    check_same(largest(scores, Count.of(3000)), {"w": np.arange(5000) >= 2000})


def test_scores_that_are_no_floats_are_refused():
    with pytest.raises(SetupError, match=r"'layer/w' are int32.*astype"):
        largest({"layer/w": jnp.arange(3)}, 1)


# Scores of any sign.


@pytest.mark.parametrize(
    ("scores", "keep", "wanted"),
    [
        ([-3.0, -1.0, -2.0], 1, "010"),
        ([-3.0, -1.0, -2.0], 2, "011"),
        ([-1.0, 2.0, 0.0, 1.0], 3, "0111"),
        ([-0.0, 0.0, -0.0], 2, "110"),  # equal: the first
        ([0.0, -0.0, -1.0], 1, "100"),
        ([-1e-45, -0.0, -3e-45], 2, "110"),  # subnormal numbers are not flushed to 0
        ([-np.inf, -1e38, np.inf], 2, "011"),
        ([1.0, -np.nan, np.inf, np.nan], 1, "0100"),  # NaN of either sign stays to be seen
        ([-np.inf, -np.inf], 0, "00"),
        ([-np.inf, -np.inf], 2, "11"),
    ],
)
def test_signed_by_hand(scores, keep, wanted):
    mask = largest({"w": jnp.array(scores, jnp.float32)}, keep, signed=True)["w"]
    assert "".join("01"[int(kept)] for kept in mask) == wanted


SIGNED = [*VALUES, *(-value for value in VALUES)]
SIGNED_ROWS = st.lists(
    st.one_of(st.sampled_from(SIGNED), st.floats(-4, 4, width=32)), min_size=SIZE, max_size=SIZE
)
signed = jax.jit(lambda scores, keep: largest(scores, keep, signed=True))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@given(row=SIGNED_ROWS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_signed_scores_as_a_stable_sort(dtypes, row, data):
    scores = build(row, dtypes)
    keep = data.draw(st.integers(0, SIZE))
    check_same(signed(scores, jnp.int32(keep)), reference(scores, keep))
    each_keep = {p: data.draw(st.integers(0, int(np.prod(shape)))) for p, shape in SHAPES.items()}
    wanted = {p: reference({p: scores[p]}, k)[p] for p, k in each_keep.items()}
    check_same(signed(scores, {p: jnp.int32(k) for p, k in each_keep.items()}), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ordered_orders_as_the_floats(dtype):
    values = np.array([-np.inf, -2.0, -1.5, -1e-7, 0.0, 1e-7, 1.5, 2.0, np.inf, np.nan])
    [found], top = threshold.ordered({"w": jnp.asarray(values, dtype)}, signed=True)
    assert np.all(np.diff(np.asarray(found, np.int64)) > 0)
    assert int(found[-1]) < int(top)
    if dtype == "float32":
        np.testing.assert_array_equal(
            threshold.unordered(found)[:-1], np.asarray(values[:-1], np.float32)
        )
        assert np.isnan(threshold.unordered(found)[-1])


# Leaves that are spared.


@pytest.mark.parametrize(
    ("a", "b", "keep", "wanted"),
    [
        ([5.0, 6.0, 7.0], [1.0, 3.0], 2, "001 01"),  # without sparing: 011 00
        ([5.0, 6.0, 7.0], [1.0, 3.0], 3, "011 01"),
        ([5.0, 6.0, 7.0], [1.0, 3.0], 5, "111 11"),
        ([5.0, 7.0, 7.0], [1.0, 1.0], 2, "010 10"),  # ties in both
        ([5.0, 7.0, 7.0], [1.0, 1.0], 3, "011 10"),
        ([2.0, 2.0, 2.0], [2.0, 2.0], 2, "100 10"),  # the first 2 would both be in a
        ([2.0, 2.0, 2.0], [2.0, 2.0], 3, "110 10"),
        ([0.0, 0.0, 0.0], [0.0, 1.0], 3, "110 01"),
        ([5.0, 6.0, 7.0], [1.0, 3.0], 0, "001 01"),  # at least one each
    ],
)
@pytest.mark.parametrize("sign", [False, True])
def test_spared_by_hand(a, b, keep, wanted, sign):
    scores = {"a": jnp.array(a) - 4 * sign, "b": jnp.array(b) - 4 * sign}
    masks = largest(scores, keep, signed=sign, spare=True)
    assert " ".join("".join("01"[int(m)] for m in masks[p]) for p in "ab") == wanted


spared = jax.jit(lambda scores, keep: largest(scores, keep, signed=True, spare=True))


@given(row=SIGNED_ROWS, offset=st.sampled_from([0.0, 10.0]), data=st.data())
@settings(max_examples=100, deadline=None)
def test_spared_is_the_best_of_each_leaf_and_the_best_of_the_rest(row, offset, data):
    scores = build(row, DTYPES["float32"])
    scores["a"] = scores["a"] + np.float32(offset)
    keep = data.draw(st.integers(len(SHAPES), SIZE))
    first = {p: reference({p: x}, 1)[p] for p, x in scores.items()}
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in scores.values()])
    ahead = np.concatenate([np.ravel(x) for x in first.values()])
    order = np.lexsort((np.arange(SIZE), -flat, ~ahead))
    mask = np.zeros(SIZE, bool)
    mask[order[:keep]] = True
    wanted, start = {}, 0
    for path, x in scores.items():
        wanted[path] = mask[start : start + np.size(x)].reshape(np.shape(x))
        start += np.size(x)
    check_same(spared(scores, jnp.int32(keep)), wanted)


def test_a_leaf_by_itself_keeps_what_it_is_told_spared_or_not():
    scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    masks = largest(scores, {"a": 0, "b": 1}, spare=True)
    check_same(masks, {"a": np.array([0, 0], bool), "b": np.array([1], bool)})


# Sharded: over both axes of a mesh, each leaf in its own way.
LARGE = {"a": (256, 512), "b": (3, 3, 64, 128), "c": (256, 64)}
SPECS = {
    "a": PartitionSpec("model", "data"),
    "b": PartitionSpec(None, None, None, ("data", "model")),
    "c": PartitionSpec(("data", "model")),
}


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    found = {path: np.abs(rng.normal(size=s)).astype(np.float32) for path, s in LARGE.items()}
    found["c"] = np.round(found["c"])  # ties at the threshold
    return found


@pytest.mark.parametrize("scope", ["layer", "global", "signed"])
def test_on_8_devices_the_same_masks_and_nothing_is_gathered(scores, scope):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    size = sum(x.size for x in scores.values())
    keep = {p: x.size // 5 for p, x in scores.items()} if scope == "layer" else size // 3
    anything = scope == "signed"
    if anything:
        scores = {path: x - np.float32(0.5) for path, x in scores.items()}
    run = jax.jit(lambda scores: largest(scores, keep, signed=anything, spare=anything))
    sharded = {p: jax.device_put(x, NamedSharding(mesh, SPECS[p])) for p, x in scores.items()}
    compiled = run.lower(sharded).compile()
    masks = compiled(sharded)
    check_same(masks, {p: np.asarray(m) for p, m in run(scores).items()})
    for path, mask in masks.items():
        assert mask.sharding.is_equivalent_to(sharded[path].sharding, mask.ndim)

    text = compiled.as_text()
    assert "all-reduce" in text
    moved = re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    assert not moved
    # What a device holds besides its own shard of the scores is a few times that shard.
    shard = sum(x.nbytes for x in scores.values()) / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * shard
    reduced = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-reduce\(", text)
    entries = [int(np.prod([int(n) for n in re.findall(r"\d+", s.split("[")[1])])) for s in reduced]
    assert entries
    assert max(entries) <= 256  # counts, not weights
