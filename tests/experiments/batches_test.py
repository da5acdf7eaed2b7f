"""Batches: every example once an epoch, and a function of the seed and the step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from experiments.harness.batches import evaluator, make_batches, shuffled
from experiments.harness.errors import ConfigError


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31 - 1))
def test_a_shuffle_is_a_permutation(size, seed):
    found = shuffled(jax.random.key(seed), jnp.arange(size), size)
    assert found.dtype == jnp.int32
    assert sorted(found.tolist()) == list(range(size))


def test_shuffles_of_different_keys_are_unrelated_and_every_place_is_equally_likely():
    size, keys = 11, jax.random.split(jax.random.key(0), 6000)
    orders = np.asarray(jax.vmap(lambda k: shuffled(k, jnp.arange(size), size))(keys))
    counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = len(keys) / size
    # Chi-square over the 121 cells, about 100 degrees of freedom: 99.99% lie below 161.
    assert np.sum((counts - expected) ** 2 / expected) < 161
    # Neighbours in the order are neighbours in value as often as by chance: 2 of 11.
    near = np.mean(np.abs(np.diff(orders, axis=1)) == 1)
    assert abs(near - 2 / size) < 0.01


def test_a_large_set_is_shuffled_without_being_listed():
    size = 2_000_000_000
    found = shuffled(jax.random.key(1), jnp.arange(size - 1000, size), size)
    assert len(set(found.tolist())) == 1000
    assert int(found.min()) >= 0
    assert int(found.max()) < size
    assert abs(float(jnp.mean(found / size)) - 0.5) < 0.05


def small(size=4, examples=22, seed=0):
    data = {"image": np.arange(examples * 3).reshape(examples, 1, 1, 3).astype(np.uint8)}
    data["label"] = np.arange(examples, dtype=np.int32)
    return make_batches(data, size, seed, shift=[1.0, 2.0, 3.0], scale=[1.0, 10.0, 0.5])


def test_an_epoch_sees_each_example_at_most_once_and_epochs_differ():
    batches = small()
    assert batches.per_epoch == 5
    labels = jax.lax.map(lambda step: batches(step)["label"], jnp.arange(200))
    epochs = labels.reshape(40, 20).tolist()
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40
    # What fills no batch is another two each epoch, so nothing is left out for good.
    assert set().union(*epochs) == set(range(22))


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    batches = small()
    eager = [batches(step) for step in range(12)]
    jitted = jax.jit(lambda b, step: b(step))
    scanned = jax.lax.map(batches, jnp.arange(12))
    for step in (11, 3, 7, 0):
        for name in ("image", "label"):
            np.testing.assert_array_equal(jitted(batches, step)[name], eager[step][name])
            np.testing.assert_array_equal(scanned[name][step], eager[step][name])
    other = small(seed=1)
    assert any(other(s)["label"].tolist() != eager[s]["label"].tolist() for s in range(3))


def test_images_are_standardized_and_labels_left_alone():
    batch = small()(0)
    index = batch["label"]
    raw = jnp.arange(66.0).reshape(22, 1, 1, 3)[index]
    wanted = (raw - jnp.array([1.0, 2.0, 3.0])) * jnp.array([1.0, 10.0, 0.5])
    np.testing.assert_array_equal(batch["image"], wanted)
    assert batch["image"].dtype == jnp.float32
    assert batch["label"].dtype == jnp.int32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small().example) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch
    )


def test_the_data_is_an_argument_of_the_program_not_a_constant_in_it():
    lower = jax.jit(lambda b, step: b(step)).lower
    few, many = (lower(small(examples=n), 0).as_text() for n in (9000, 16000))
    assert "16000x1x1x3" in many
    assert abs(len(few) - len(many)) < 500


def test_on_a_mesh_each_device_makes_its_part_of_the_same_batch():
    layout = ej.Layout(jax.make_mesh((4, 2), ("data", "model")))
    batches = small(size=8)
    placed = batches.on(layout)
    batch = jax.jit(lambda b, step: b(step))(placed, 1)
    np.testing.assert_array_equal(batch["image"], batches(1)["image"])
    assert {s.data.shape for s in batch["image"].addressable_shards} == {(1, 1, 1, 3)}
    with pytest.raises(ConfigError, match="batch of 4 does not divide among the 8 devices"):
        small().on(layout)


def test_bad_sizes_are_errors():
    with pytest.raises(ConfigError, match="batch size is 23; the data has 22 examples"):
        small(size=23)
    with pytest.raises(ConfigError, match="batch size is 0"):
        small(size=0)
    with pytest.raises(ConfigError, match="different numbers of examples"):
        make_batches({"a": np.ones(3), "b": np.ones(4)}, 1, 0)


@pytest.mark.parametrize("size", [1, 4, 7, 22, 500])
def test_an_evaluator_counts_every_example_once(size):
    labels = np.arange(22, dtype=np.int32)
    data = {"image": np.ones((22, 1, 1, 1), np.uint8), "label": labels}

    def evaluate(state, batch, frozen):
        values = {"label": batch["label"] * state + frozen, "pixel": batch["image"].sum((1, 2, 3))}
        return {n: ej.step.mean(x, batch["valid"]) for n, x in values.items()}

    whole = evaluator(evaluate, data, size=size, shift=0.5, scale=4.0, prefix="v/", frozen=1.0)
    found = whole(jnp.float32(2.0))
    assert found == {"v/label": pytest.approx(2 * labels.mean() + 1), "v/pixel": 2.0}
