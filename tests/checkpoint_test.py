"""Checkpoints: what is saved comes back bit for bit, or the one before does, and it is said."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import effjax as ej
from effjax.checkpoint import Checkpoints, CheckpointWarning
from effjax.digest import digests
from effjax.errors import CheckpointError


def tree(seed: int = 0):
    """One leaf of each kind that a state may have."""
    key = jax.random.key(seed)
    return {
        "key": key,
        "keys": jax.random.split(key, (2, 3)),
        "rbg": jax.random.key(seed, impl="rbg"),
        "step": jnp.int32(seed),
        "mask": jax.random.bernoulli(key, 0.5, (4, 5)),
        "float": jax.random.normal(key, (7, 3)),
        "special": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]),
        "bf16": jax.random.normal(key, (5,), jnp.bfloat16),
        "f8": jnp.ones((3,), jnp.float8_e4m3fn) * seed,
        "i8": jnp.arange(-4, 4, dtype=jnp.int8),
        "i4": jnp.arange(-4, 4, dtype=jnp.int4),
        "u32": jnp.array([2**32 - 1, seed], jnp.uint32),
        "complex": jnp.array([1 + 2j, 3 - 1j], jnp.complex64) * (seed + 1),
        "none here": (optax.EmptyState(), {}, ()),
        "empty": jnp.zeros((0, 3)),
        "no mask": jnp.zeros((3, 0), bool),
        "flag": jnp.bool_(seed % 2),
        "no keys": jax.random.split(key, (0, 2)),
        "nested/name.with (signs)": {"a": [jnp.ones(2), jnp.zeros(())]},
    }


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    saved = tree(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved, {"position": 12, "name": "x"})
        for target in (tree(0), jax.eval_shape(lambda: tree(0))):
            found = checkpoints.restore(target)
            assert found.step == 7
            assert found.metadata == {"position": 12, "name": "x"}
            assert found.skipped == ()
            assert_same_bits(found.tree, saved)
    assert jax.random.key_impl(found.tree["rbg"]) == "rbg"


def test_a_train_state_comes_back_and_a_new_process_object_reads_it(tmp_path):
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    model = ej.Model(lambda k, b: (params, {}), lambda p, s, b, k, t: (b, s))
    batch = {"x": jnp.ones((2, 3))}
    state = ej.init_state(jax.random.key(1), model, ej.chain(), optax.adamw(1e-3), batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(jax.eval_shape(lambda: state)).tree
    assert isinstance(found, ej.TrainState)
    assert_same_bits(found, state)


def test_leaves_come_back_with_their_shardings_and_from_another_layout(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"))

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    saved = {
        "kernel": place(jnp.arange(64.0).reshape(8, 8), "data", "model"),
        "bias": place(jnp.arange(8.0), "model"),
        "key": place(jax.random.key(3)),
        "empty": place(jnp.zeros((0, 4)), None, "model"),
    }
    other = {**saved, "kernel": place(jnp.zeros((8, 8)), "model", None)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        for target in (
            saved,
            other,
            jax.tree.map(lambda x: jax.device_put(x, jax.devices()[5]), saved),
        ):
            found = checkpoints.restore(target).tree
            assert_same_bits(found, saved)
            for name, leaf in found.items():
                assert leaf.sharding == target[name].sharding, name


def test_the_newest_are_kept_and_are_in_order(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.steps() == []
        for step in (2, 10, 9 + 2, 100, 1000):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        assert checkpoints.steps() == [11, 100, 1000]
        assert checkpoints.restore(tree(), step=100).step == 100
        assert_same_bits(checkpoints.restore(tree(), step=11).tree, tree(11))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100", "1000", "11"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(300_000)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(6):
            checkpoints.save(step, {"x": x})
            for _ in range(3):
                x = bump(x)
            checkpoints.wait()
            found = checkpoints.restore({"x": x}).tree["x"]
            np.testing.assert_array_equal(found, np.full(300_000, 3.0 * step))


def two_checkpoints(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree(1), {"n": 1})
        checkpoints.save(2, tree(2), {"n": 2})


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def delete(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_damage_to_any_file_of_the_newest_takes_the_one_before(tmp_path, damage):
    two_checkpoints(tmp_path / "whole")
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*")]
    files = [p for p in files if (tmp_path / "whole" / p).is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file, random.Random(number))
        if file.name == "files.json" and damage is delete:
            # A process killed just after the checkpoint: its leaves' digests vouch for it.
            with Checkpoints(folder) as checkpoints:
                assert_same_bits(checkpoints.restore(tree()).tree, tree(2))
            continue
        said = pytest.warns(CheckpointWarning, match="step 2 is damaged: .* going back to step 1")
        with Checkpoints(folder) as checkpoints, said:
            found = checkpoints.restore(tree())
        assert [step for step, _ in found.skipped] == [2]
        assert found.metadata == {"n": 1}
        assert_same_bits(found.tree, tree(1))


# The storage library's threads complain about the damage on stderr, after we have noticed.
@pytest.mark.filterwarnings("ignore")
def test_damage_in_a_checkpoint_that_a_kill_left_without_file_hashes_is_noticed(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "2" / "files.json").unlink()
    data = max((tmp_path / "2" / "leaves" / "d").iterdir(), key=lambda p: p.stat().st_size)
    whole = data.read_bytes()
    rng = random.Random(0)
    fallen_back = 0
    for _ in range(8):
        data.write_bytes(whole)
        flip(data, rng)
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(tree())
        assert_same_bits(found.tree, tree(found.step))
        fallen_back += found.step == 1
    assert fallen_back >= 4


def test_values_changed_behind_a_valid_storage_checksum_are_noticed_by_the_digest(tmp_path):
    two_checkpoints(tmp_path)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(2, tree(5), {"n": 2})
    (tmp_path / "2" / "files.json").unlink()
    shutil.rmtree(tmp_path / "2" / "leaves")
    shutil.copytree(tmp_path / "other" / "2" / "leaves", tmp_path / "2" / "leaves")
    said = pytest.warns(CheckpointWarning, match="are not what was written")
    with Checkpoints(tmp_path) as checkpoints, said:
        assert checkpoints.restore(tree()).step == 1


def test_a_changed_record_is_noticed(tmp_path):
    two_checkpoints(tmp_path)
    record = tmp_path / "2" / "record" / "metadata"
    (tmp_path / "2" / "files.json").unlink()
    assert '"n": 2' in record.read_text()
    record.write_text(record.read_text().replace('"n": 2', '"n": 9'))
    said = pytest.warns(CheckpointWarning, match="its record is not what was written")
    with Checkpoints(tmp_path) as checkpoints, said:
        assert checkpoints.restore(tree()).metadata == {"n": 1}


def test_half_written_folders_are_not_taken_for_checkpoints(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "3").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "4.orbax-checkpoint-tmp-123")
    shutil.copytree(tmp_path / "1", tmp_path / "5")  # another step's content under this name
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 5]
        with pytest.warns(CheckpointWarning, match="step 5 is damaged.*step 3 is damaged"):
            found = checkpoints.restore(tree())
        assert found.step == 2
        assert [step for step, _ in found.skipped] == [5, 3]
        checkpoints.save(3, tree(3))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore(tree()).step == 3
    # What was damaged is kept aside, and what a killed process left half-written is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "3.unreadable", "5.unreadable"]


def test_none_readable_is_an_error_that_lists_them(tmp_path):
    two_checkpoints(tmp_path)
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "leaves")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(tree())
    assert "no checkpoint in" in str(error.value)
    assert "step 1 is damaged" in str(error.value)
    assert "step 2 is damaged" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"float": jnp.zeros((7, 4))},
            r"'float' is float32\[7, 3\] in the checkpoint and float32\[7, 4\]",
        ),
        ({"step": jnp.float32(0)}, r"'step' is int32\[\] in the checkpoint and float32\[\]"),
        ({"rbg": jax.random.key(0)}, "'rbg' is key<rbg>"),
        ({"more": jnp.ones(1)}, "'more' is only in the target"),
        ({"empty": {}}, "'empty' is only in the checkpoint"),
    ],
)
def test_another_models_checkpoint_is_an_error_that_names_leaves(tmp_path, change, message):
    two_checkpoints(tmp_path)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=message) as error,
    ):
        checkpoints.restore({**tree(), **change})
    assert "another model, transform or optimizer" in str(error.value)


def test_misuse_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="keep=1"):
        Checkpoints(tmp_path, keep=1)
    with Checkpoints(tmp_path / "x") as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoints in"):
            checkpoints.restore(tree())
        with pytest.raises(CheckpointError, match="is not JSON"):
            checkpoints.save(1, tree(), {"bad": object()})
        checkpoints.save(5, tree())
        checkpoints.wait()
        for step in (3, 5):
            with pytest.raises(CheckpointError, match=f"cannot save step {step}: .* has step 5"):
                checkpoints.save(step, tree())
        with pytest.raises(CheckpointError, match=r"has no step 4; it has \[5\]"):
            checkpoints.restore(tree(), step=4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_digest_changes_with_any_bit_and_any_exchange(data):
    words = np.array(
        data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6)), np.uint32
    )
    place, bit = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 31))
    flipped = words.copy()
    flipped[place] ^= np.uint32(1 << bit)
    i, j = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    exchanged = words.copy()
    exchanged[[i, j]] = exchanged[[j, i]]
    a, b, c = digests([jnp.asarray(x.reshape(2, 3)) for x in (words, flipped, exchanged)])
    assert a != b
    assert (a == c) == (words[i] == words[j])


def test_a_digest_is_the_same_under_every_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    specs = [(), ("data",), (None, "data", "model"), (("data", "model"),)]
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]
    assert len(set(digests([x, *placed]))) == 1
