"""Masks as bits: every shape and sharding comes back, nothing moves, and files are small."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import effjax as ej
from effjax import bits
from effjax.checkpoint import Checkpoints


def random_mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.5


def placed(x, *spec):
    return jax.device_put(
        x, NamedSharding(jax.make_mesh((4, 2), ("data", "model")), PartitionSpec(*spec))
    )


def test_bytes_worked_by_hand():
    x = jnp.array([[1, 0, 0], [1, 1, 0]], bool)
    assert bits.pack(x, bits.Packing(0, 1)).tolist() == [[3, 2, 0]]
    assert bits.pack(x, bits.Packing(1, 1)).tolist() == [[1], [3]]
    # Two parts: the first and the second row have bytes of their own.
    assert bits.pack(x, bits.Packing(0, 2)).tolist() == [[1, 0, 0], [1, 1, 0]]


def test_the_packing_with_the_fewest_bytes_is_chosen():
    def chosen(shape, sharding=None):
        return bits.packing(shape, sharding or jnp.zeros(()).sharding)

    assert chosen((16, 16)) == (0, 1)
    assert chosen((3, 3, 5, 64)) == (3, 1)
    assert chosen((9,)) == (0, 1)
    assert chosen(()) is None
    assert chosen((1, 1)) is None
    assert chosen((4, 0)) is None
    # An axis that is split only where no other does as well.
    assert chosen((16, 16), placed(jnp.zeros((16, 16)), "data").sharding) == (1, 1)
    assert chosen((64, 16), placed(jnp.zeros((64, 16)), "data", "model").sharding) == (0, 4)
    assert chosen((8, 16), placed(jnp.zeros((8, 16)), "data", "model").sharding) == (1, 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=4), st.integers(0, 99))
def test_any_shape_comes_back(shape, seed):
    mask = random_mask(tuple(shape), seed)
    x = jnp.asarray(mask)
    for axis in range(len(shape)):
        packing = bits.Packing(axis, 1)
        packed = bits.pack(x, packing)
        assert packed.dtype == jnp.uint8
        assert packed.shape == packing.shape(x.shape)
        np.testing.assert_array_equal(packed, np.packbits(mask, axis=axis, bitorder="little"))
        back = bits.unpack(packed, packing, x.shape, x.sharding)
        assert back.dtype == bool
        np.testing.assert_array_equal(back, mask)


SPECS = [("data", "model"), (None, "model"), (("data", "model"),), (None, ("model", "data")), ()]


@pytest.mark.parametrize("shape", [(64, 32), (8, 8), (24, 40), (8, 16, 3)])
@pytest.mark.parametrize("spec", SPECS)
def test_shards_pack_what_they_have(shape, spec):
    x = placed(random_mask(shape), *spec)
    packing = bits.packing(x.shape, x.sharding)
    if packing is None:
        assert x.sharding.shard_shape(shape)[:2] == (1, 1)
        return
    packed = bits.pack(x, packing)
    # Every shard of the bytes is what its device makes of its own shard of the mask.
    shards = {s.device: np.asarray(s.data) for s in x.addressable_shards}
    for shard in packed.addressable_shards:
        own = np.packbits(shards[shard.device], axis=packing.axis, bitorder="little")
        np.testing.assert_array_equal(shard.data, own)
    back = bits.unpack(packed, packing, x.shape, x.sharding)
    assert back.sharding == x.sharding
    np.testing.assert_array_equal(back, x)


def test_packing_moves_nothing_between_devices():
    x = placed(random_mask((64, 32)), "data", "model")
    packing, layout = bits.packing(x.shape, x.sharding), bits.automatic(x.sharding)
    packed = bits.pack(x, packing)
    assert packing == (0, 4)
    for function, value in ((bits._pack, jax.device_put(x, layout)), (bits._unpack, packed)):
        compiled = bits._compiled(function, packing, x.shape, layout).lower(value).compile()
        assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", compiled.as_text())


def test_masks_in_checkpoints_keep_their_shardings_and_go_to_other_layouts(tmp_path):
    shapes = {"a": (64, 32), "b": (24, 40), "c": (8, 8), "d": (8, 2, 6)}
    targets = [
        {n: placed(jnp.zeros(s, bool), *spec) for n, s in shapes.items()}
        for spec in [("data", "model"), ("model",), (("data", "model"),), ()]
    ]
    with Checkpoints(tmp_path) as checkpoints:
        for step, layout in enumerate(targets):
            saved = {
                n: jax.device_put(random_mask(s, step), layout[n].sharding)
                for n, s in shapes.items()
            }
            checkpoints.save(step, saved)
            one = {n: jnp.zeros(s, bool) for n, s in shapes.items()}
            for target in [*targets, one, jax.eval_shape(lambda one=one: one)]:
                found = checkpoints.restore(target).tree
                for name, leaf in found.items():
                    np.testing.assert_array_equal(leaf, saved[name])
                    assert leaf.dtype == bool
                    if target[name].sharding is not None:
                        assert leaf.sharding == target[name].sharding


def test_the_mask_on_disk_is_an_eighth_of_a_byte_a_weight(tmp_path):
    def stored(folder, tree):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, tree)
        return sum(p.stat().st_size for p in (folder / "1" / "leaves").rglob("*") if p.is_file())

    mask = random_mask((1000, 1003))
    empty = stored(tmp_path / "empty", {"mask": jnp.ones((1, 1), bool)})
    # Half of the weights at random: no compression makes that smaller.
    packed = stored(tmp_path / "bits", {"mask": jnp.asarray(mask)}) - empty
    whole = stored(tmp_path / "random", {"x": jax.random.bits(jax.random.key(0), mask.shape, "u1")})
    assert packed < 1.02 * mask.size / 8
    assert 7.8 < (whole - empty) / packed < 8.2


def test_a_pruned_run_resumes_bit_for_bit(tmp_path):
    def apply(params, model_state, batch, key, train):
        hidden = jax.nn.relu(batch["x"] @ params["a"]["kernel"])
        return hidden @ params["b"]["kernel"], model_state

    def init(key, batch):
        a, b = jax.random.split(key)
        shapes = {"a": (a, (7, 13)), "b": (b, (13, 3))}
        return {n: {"kernel": jax.random.normal(k, s)} for n, (k, s) in shapes.items()}, {}

    model, tx = ej.Model(init, apply), optax.adam(1e-2)
    transform = ej.chain(prune=ej.prune.magnitude(0.7, begin=1, end=9, every=2, select="kernel"))
    batch = {"x": jax.random.normal(jax.random.key(1), (5, 7))}
    step = jax.jit(ej.make_step(apply, transform, lambda y, batch: jnp.mean(y**2), tx))
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch)
    for _ in range(4):
        state, _ = step(state, batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state)
        resumed = checkpoints.restore(jax.eval_shape(lambda: state)).tree
    for _ in range(6):
        (state, _), (resumed, _) = step(state, batch), step(resumed, batch)
    mask = resumed.transform["prune"]["mask"]["a/kernel"]
    assert mask.dtype == bool
    assert int(mask.sum()) == round(0.3 * 91)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
