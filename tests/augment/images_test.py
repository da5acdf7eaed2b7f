"""Augmentation: each operation against NumPy, in a step, mapped, resumed, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.augment import erasing, flip, images, translate
from effjax.errors import SetupError

KEYS = jax.random.split(jax.random.key(0), 400)
IMAGE = jax.random.normal(jax.random.key(1), (6, 5, 2))


def each(operation, image=IMAGE):
    return np.asarray(jax.jit(jax.vmap(operation, (0, None)))(KEYS, image))


def test_a_flip_mirrors_about_as_often_as_it_should():
    found = each(flip(0.3))
    mirrored = (found == np.asarray(IMAGE)[:, ::-1]).all((1, 2, 3))
    same = (found == np.asarray(IMAGE)).all((1, 2, 3))
    assert np.all(mirrored ^ same)
    assert 0.2 < mirrored.mean() < 0.4
    assert not (each(flip(0.0)) != np.asarray(IMAGE)).any()


@pytest.mark.parametrize(
    ("border", "mode"), [("zero", "constant"), ("edge", "edge"), ("reflect",) * 2]
)
def test_shifts_are_crops_of_the_padded_image(border, mode):
    padded = np.pad(np.asarray(IMAGE), [(2, 2), (2, 2), (0, 0)], mode=mode)
    crops = {(y, x): padded[y : y + 6, x : x + 5] for y in range(5) for x in range(5)}
    seen = set()
    for found in each(translate(2, border)):
        matching = [place for place, crop in crops.items() if np.array_equal(crop, found)]
        assert matching
        seen.update(matching[:1])
    assert len(seen) > 20  # of 25, in 400 draws


def test_erasing_fills_one_rectangle_of_the_area_asked_for():
    image = jnp.ones((20, 30, 1))
    found = each(erasing(0.5, area=(0.1, 0.3), fill=-1.0), image)[..., 0]
    erased = found == -1
    assert np.all((found == 1) | erased)
    hit = erased.any((1, 2))
    assert 0.4 < hit.mean() < 0.6
    for mask in erased[hit]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    area = erased[hit].mean((1, 2))
    assert 0.08 < area.min() < 0.13
    assert 0.25 < area.max() < 0.34
    assert area.mean() == pytest.approx(0.2, abs=0.02)


def test_every_probability_may_be_traced():
    found = jax.vmap(lambda p: flip(p)(KEYS[0], IMAGE))(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(found[0], IMAGE)
    np.testing.assert_array_equal(found[1], IMAGE[:, ::-1])


# In a step.

BATCH = {"image": jax.random.normal(jax.random.key(2), (8, 6, 5, 2)), "label": jnp.arange(8) % 3}


def apply(params, state, batch, key, train):
    return batch["image"].reshape(8, -1) @ params["w"], {"seen": batch["image"]}


def loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


MODEL = ej.Model(lambda key, batch: ({"w": jnp.zeros((60, 3))}, {"seen": batch["image"]}), apply)


def start(**members):
    transform = ej.chain(**members)
    state = ej.init_state(jax.random.key(0), MODEL, transform, optax.sgd(0.1), BATCH)
    return state, jax.jit(ej.make_step(apply, transform, loss, optax.sgd(0.1))), transform


def test_each_image_has_its_own_draw_and_labels_stay():
    state, step, transform = start(augment=images(flip(0.5)))
    draws = []
    for _ in range(6):
        state, _ = step(state, BATCH)
        seen, given = np.asarray(state.model_state["seen"]), np.asarray(BATCH["image"])
        flipped = (seen == given[:, :, ::-1]).all((1, 2, 3))
        assert np.all(flipped | (seen == given).all((1, 2, 3)))
        draws.append(tuple(flipped))
    assert len(set(draws)) > 1
    assert any(0 < sum(draw) < 8 for draw in draws)
    evaluate = ej.make_eval(apply, transform, lambda outputs, batch: {"sum": outputs.sum(-1)})
    plain = BATCH["image"].reshape(8, -1) @ state.vars.model["w"]
    np.testing.assert_allclose(evaluate(state, BATCH)["sum"].value, plain.sum(-1).mean(), rtol=1e-5)


def test_the_same_state_draws_the_same_whatever_else_is_in_the_chain():
    augment = images(flip(), translate(2), erasing())
    state, step, _ = start(augment=augment)
    other, pruned, _ = start(augment=augment, prune=ej.prune.magnitude(0.5, 0, 3, select="w"))
    first, again, beside = step(state, BATCH)[0], step(state, BATCH)[0], pruned(other, BATCH)[0]
    np.testing.assert_array_equal(first.model_state["seen"], again.model_state["seen"])
    np.testing.assert_array_equal(first.model_state["seen"], beside.model_state["seen"])
    assert (first.model_state["seen"] != step(first, BATCH)[0].model_state["seen"]).any()


def test_the_teacher_sees_what_the_student_sees():
    def taught(params, state, batch, key, train):
        return batch["image"].reshape(8, -1) @ params["w"], state

    kd = ej.distill.logits(taught, temperature=1.0)
    frozen = {"kd": ej.distill.Teacher({"w": jax.random.normal(KEYS[0], (60, 3))}, {})}
    transform = ej.chain(augment=images(flip(1.0)), kd=kd)
    state = ej.init_state(jax.random.key(0), MODEL, transform, optax.sgd(0.1), BATCH, frozen)
    step = ej.make_step(apply, transform, loss, optax.sgd(0.1))
    _, metrics = step(state, BATCH, frozen)
    mirrored = {**BATCH, "image": BATCH["image"][:, :, ::-1]}
    plain = ej.chain(kd=kd)
    other = ej.init_state(jax.random.key(0), MODEL, plain, optax.sgd(0.1), BATCH, frozen)
    _, expected = ej.make_step(apply, plain, loss, optax.sgd(0.1))(other, mirrored, frozen)
    np.testing.assert_allclose(metrics["kd/kl"], expected["kd/kl"], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: images(), "no operations"),
        (lambda: flip(1.5), "1.5"),
        (lambda: translate(-1), "-1"),
        (lambda: translate(1, "wrap"), "wrap"),
        (lambda: erasing(area=(0.5, 0.2)), "smallest, largest"),
        (lambda: start(augment=images(flip(), field="pixels")), "pixels"),
        (lambda: start(augment=images(translate(5))), "reflects more"),
        (lambda: start(augment=images(lambda key, image: image[1:])), "keep shape"),
    ],
)
def test_what_is_refused(make, match):
    with pytest.raises(SetupError, match=match):
        make()


def test_integer_images_are_refused_with_what_to_do():
    batch = {**BATCH, "image": jnp.zeros((8, 6, 5, 2), jnp.uint8)}
    transform = ej.chain(augment=images(flip()))
    with pytest.raises(SetupError, match="image / 255"):
        ej.init_state(jax.random.key(0), MODEL, transform, optax.sgd(0.1), batch)
