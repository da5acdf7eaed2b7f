"""Teachers whose logits are averaged: one over several views of each example, or several."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax, logsumexp

import effjax as ej
from effjax.distill import Match, Teacher, ensemble, views
from effjax.errors import SetupError

KEY = jax.random.key(0)
BATCH = {"x": jax.random.normal(jax.random.key(1), (6, 8)), "label": jnp.arange(6) % 3}
VIEWS = 5


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train=False):
        x = flax.linen.Dense(16, name="one")(x)
        return flax.linen.Dense(3, name="two")(flax.linen.Dropout(0.5, deterministic=not train)(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.two(self.drop(self.one(x)))


def rolled(batch, i):
    return {**batch, "x": jnp.roll(batch["x"], i, axis=1)}


def linen():
    return ej.from_linen(LinenNet(), "x")


def in_nnx():
    return ej.from_nnx(lambda rngs: NNXNet(rngs), "x")


@pytest.mark.parametrize("library", [linen, in_nnx])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_logits_are_the_mean_over_views(library, combine):
    model = library()
    params, model_state = model.init(KEY, BATCH)
    apply = jax.jit(views(model.apply, rolled, VIEWS, combine=combine), static_argnums=4)
    outputs, state = apply(params, model_state, BATCH, KEY, False)
    seen = [np.roll(BATCH["x"], i, axis=1) for i in range(VIEWS)]
    each = [model.apply(params, model_state, {"x": x}, KEY, False)[0] for x in seen]
    if combine == "logits":
        wanted = np.mean(each, axis=0)
    else:
        wanted = logsumexp(log_softmax(np.float64(each), axis=-1), axis=0) - np.log(VIEWS)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(model_state)
    alone, _ = views(model.apply, rolled, 1, combine="logits")(
        params, model_state, BATCH, KEY, False
    )
    np.testing.assert_allclose(alone, each[0], rtol=1e-6)


def test_the_program_has_one_teacher_whatever_the_number_of_views():
    model = linen()
    params, model_state = model.init(KEY, BATCH)

    def products(count):
        run = jax.jit(views(model.apply, rolled, count), static_argnums=4)
        return run.lower(params, model_state, BATCH, KEY, False).as_text().count("dot_general")

    assert products(2) == products(25) == 2


def test_a_cache_of_it_teaches_as_it_does_itself(tmp_path):
    model = linen()
    teacher = Teacher(*model.init(jax.random.key(2), BATCH))
    many = views(model.apply, rolled, VIEWS, combine="logits")
    cache = ej.distill.write_cache(
        tmp_path / "views", many, teacher, {"x": np.asarray(BATCH["x"])}, dtype="float32"
    )
    found = []
    for kd, batch, frozen in (
        (ej.distill.logits(many), BATCH, {"kd": teacher}),
        (ej.distill.logits(cache.targets), BATCH | cache.batch(np.arange(6)), None),
    ):
        chain, tx = ej.chain(kd=kd), optax.sgd(1.0)
        state = ej.init_state(KEY, model, chain, tx, batch, frozen)
        step = ej.make_step(model.apply, chain, lambda outputs, batch: jnp.zeros(()), tx)
        grads = jax.grad(lambda f, s=step, x=state, b=batch: s(x, b, f)[1]["loss"], allow_int=True)
        assert not any(np.any(g) for g in jax.tree.leaves(grads(frozen)))
        state, metrics = jax.jit(step)(state, batch, frozen)
        assert float(metrics["kd/kl"]) > 1e-3
        found.append(state.vars.model)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_views_that_cannot_be_averaged_are_errors():
    model = linen()
    with pytest.raises(SetupError, match="got a dict as teacher"):
        views({}, rolled, 2)
    for view, count in ((rolled, 0), (rolled, True), (rolled, 2.0), (None, 2)):
        with pytest.raises(SetupError, match="how many views"):
            views(model.apply, view, count)
    with pytest.raises(SetupError, match="'probabilities' or 'logits', not 'votes'"):
        views(model.apply, rolled, 2, combine="votes")


@pytest.mark.parametrize(
    ("combined", "join"),
    [
        (lambda t: views(t, rolled, 2), lambda weights: weights),
        (lambda t: ensemble(t, t), lambda weights: Teacher.join(weights, weights)),
    ],
)
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: jnp.argmax(x, -1), r"a teacher gave int32\[6\]"),
        (lambda x: {"logits": x}, "a teacher gave dict"),
        (jnp.mean, r"a teacher gave float32\[\]"),
    ],
)
def test_outputs_that_are_no_logits_are_errors(combined, join, output, message):
    def teacher(params, model_state, batch, key, train):
        return output(batch["x"] @ params), model_state

    weights = join(Teacher(jnp.ones((8, 3)), {}))
    with pytest.raises(SetupError, match=message):
        combined(teacher)(*weights, BATCH, KEY, False)


def test_teachers_of_other_classes_are_an_error():
    def teacher(params, model_state, batch, key, train):
        return batch["x"] @ params, model_state

    with pytest.raises(SetupError, match=r"teachers' have shapes \[\[6, 3\], \[6, 4\]\]"):
        ensemble(teacher, teacher)(
            (jnp.ones((8, 3)), jnp.ones((8, 4))), ({}, {}), BATCH, KEY, False
        )


def test_features_of_it_are_an_error():
    model = linen()
    teacher = Teacher(*model.init(KEY, BATCH))
    match = Match("one", "one", ej.distill.hint)
    chain = ej.chain(kd=ej.distill.features(views(model.apply, rolled, 2), {"a": match}))
    with pytest.raises(SetupError, match="meets data more than once"):
        ej.init_state(KEY, model, chain, optax.sgd(1.0), BATCH, {"kd": teacher})
