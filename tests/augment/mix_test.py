"""Mixed batches and token sequences: by hand, by counts, in a step, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax import augment
from effjax.errors import SetupError

# Every image is of one level, its own, so that what it was mixed with can be read off.
LEVELS = 2.0 ** jnp.arange(8)
BATCH = {
    "image": jnp.broadcast_to(LEVELS[:, None, None, None], (8, 16, 12, 1)),
    "label": jnp.arange(8),
}


def mixed(transform, seed, batch=BATCH):
    ctx = ej.Ctx(jnp.int32(0), jax.random.key(seed), None, train=True)
    return transform.batch(batch, {}, ctx)


@pytest.mark.parametrize("seed", range(3))
def test_mixup_mixes_labels_as_images(seed):
    found = mixed(augment.mixup(1.0, classes=8), seed)
    # An image of level sum_c y_c 2^c has the label y.
    np.testing.assert_allclose(found["image"][:, 3, 5, 0], found["label"] @ LEVELS, rtol=1e-5)
    assert np.ptp(found["image"], axis=(1, 2, 3)).max() == 0
    np.testing.assert_allclose(found["label"].sum(1), 1, rtol=1e-6)
    assert ((found["label"] > 0).sum(1) <= 2).all()
    assert ((found["label"] > 0).sum(1) == 2).any()


@pytest.mark.parametrize("seed", range(3))
def test_cutmix_mixes_labels_by_the_areas_left(seed):
    found = mixed(augment.cutmix(1.0, classes=8), seed)
    for i in range(8):
        image = np.asarray(found["image"][i, ..., 0])
        areas = np.array([(image == float(level)).mean() for level in LEVELS])
        np.testing.assert_allclose(areas, found["label"][i], atol=1e-6)
        other = image != float(LEVELS[i])
        rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
        if len(rows):
            assert other[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_shares_follow_beta():
    few = [mixed(augment.mixup(0.1, classes=8), s)["label"].max(1) for s in range(40)]
    many = [mixed(augment.mixup(8.0, classes=8), s)["label"].max(1) for s in range(40)]
    assert np.mean(np.stack(few) > 0.95) > 0.5
    assert np.mean(np.stack(many) > 0.95) < 0.2  # those whose other is themselves


def test_soft_labels_are_mixed_as_they_are():
    soft = {**BATCH, "label": jax.nn.one_hot(BATCH["label"], 8)}
    a, b = mixed(augment.mixup(1.0), 0, soft), mixed(augment.mixup(1.0, classes=8), 0)
    np.testing.assert_array_equal(a["label"], b["label"])


def apply(params, state, batch, key, train):
    return batch["image"].reshape(8, -1) @ params["kernel"], state


def test_it_composes_with_distillation_and_pruning_in_a_step():
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    batch = {"image": images, "label": BATCH["label"]}
    model = ej.Model(lambda key, batch: ({"kernel": jnp.zeros((16, 8))}, {}), apply)
    frozen = {"kd": ej.distill.Teacher({"kernel": jnp.ones((16, 8))}, {})}
    transform = ej.chain(
        mix=augment.cutmix(classes=8),
        kd=ej.distill.logits(apply),
        prune=ej.prune.magnitude(0.5, 0, 4, select="kernel"),
    )
    tx = optax.adam(0.01)
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch, frozen)

    def loss(outputs, batch):
        return optax.softmax_cross_entropy(outputs, batch["label"]).mean()

    step = jax.jit(ej.make_step(apply, transform, loss, tx))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < losses[0]


@pytest.mark.parametrize(
    ("transform", "batch", "says"),
    [
        (augment.mixup(), BATCH, "classes=10"),
        (augment.cutmix(classes=8), {"image": BATCH["image"]}, "'label'"),
        (augment.mixup(classes=8), {**BATCH, "image": jnp.zeros((8, 4, 4, 1), int)}, "floating"),
        (augment.mixup(classes=8), {**BATCH, "label": jnp.zeros((8, 3))}, "soft labels"),
        (augment.tokens(augment.swap(1)), BATCH, "tokens"),
    ],
)
def test_batches_that_do_not_fit(transform, batch, says):
    model = ej.Model(lambda key, batch: ({"kernel": jnp.zeros((16, 8))}, {}), apply)
    with pytest.raises(SetupError, match=says):
        ej.init_state(jax.random.key(0), model, ej.chain(a=transform), optax.sgd(0.1), batch)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: augment.mixup(0.0), "alpha > 0"),
        (lambda: augment.cutmix(classes=1), "2 classes"),
        (lambda: augment.tokens(), "no operations"),
        (lambda: augment.swap(0), "at least once"),
        (lambda: augment.token_dropout(1.5, 0), "probability"),
        (lambda: augment.span_mask(1.0, 0), r"\[0, 1\)"),
        (lambda: augment.span_mask(0.1, 0, longest=0), "longest >= 1"),
    ],
)
def test_arguments_that_cannot_be(make, says):
    with pytest.raises(SetupError, match=says):
        make()


# Tokens: 0 is padding, 1 the mask.

SEQUENCE = jnp.concatenate([jnp.arange(2, 98), jnp.zeros(4, jnp.int32)])
KEYS = jax.random.split(jax.random.key(3), 400)


def drawn(operation):
    return np.asarray(jax.jit(jax.vmap(operation, (0, None)))(KEYS, SEQUENCE))


def test_token_dropout_masks_a_fraction_and_spares_what_is_protected():
    found = drawn(augment.token_dropout(0.2, mask=1, protect=(0,)))
    assert ((found == 1) | (found == np.asarray(SEQUENCE))).all()
    assert (found == 1)[:, :96].mean() == pytest.approx(0.2, abs=0.01)
    assert (found[:, 96:] == 0).all()


def test_swaps_exchange_pairs():
    found = drawn(augment.swap(1, protect=(0,)))
    moved = found != np.asarray(SEQUENCE)
    assert (moved.sum(1) == 2).all()
    assert not moved[:, 96:].any()
    assert (np.sort(found, axis=1) == np.sort(SEQUENCE)).all()
    assert (moved[:, :96].sum(0) > 0).all()
    short = augment.swap(3, protect=(0,))(KEYS[0], jnp.array([5, 0, 0]))
    assert short.tolist() == [5, 0, 0]


def test_spans_have_the_lengths_and_the_fraction_asked_for():
    found = drawn(augment.span_mask(0.15, mask=1, stop=0.25, longest=6, protect=(0,)))
    gone = (found == 1)[:, :96]
    assert gone[:, 12:].mean() == pytest.approx(0.15, abs=0.02)
    runs = [
        len(run) for row in gone for run in "".join(".x"[int(g)] for g in row).split(".") if run
    ]
    assert 2.2 < np.mean(runs) < 4.2  # (1 - 0.75^6) / 0.25 = 3.3, and some overlap
    assert not (found[:, 96:] == 1).any()
    one = drawn(augment.span_mask(0.3, mask=1, stop=1.0))
    assert (one == 1).mean() == pytest.approx(0.3, abs=0.01)
