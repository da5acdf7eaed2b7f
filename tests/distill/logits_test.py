"""Logit distillation in a step: its gradients by hand, and a teacher that is only an argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import effjax as ej
from effjax.distill import Teacher

CLASSES, FEATURES = 5, 7


def linear(params, model_state, batch, key, train):
    return batch["x"] @ params["kernel"] + params["bias"], model_state


def weights(seed, classes=CLASSES):
    kernel = jax.random.normal(jax.random.key(seed), (FEATURES, classes))
    return {"kernel": kernel, "bias": jnp.zeros(classes)}


MODEL = ej.Model(lambda key, batch: (weights(0), {}), linear)
BATCH = {
    "x": jax.random.normal(jax.random.key(3), (6, FEATURES)),
    "label": jnp.array([0, 1, 2, 3, 4, 0]),
}


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def nothing(outputs, batch):
    return jnp.zeros(())


def run(kd, frozen, *, loss=cross_entropy, lr=1.0, others=None, batch=BATCH, steps=1):
    transform = ej.chain(kd=kd, **(others or {}))
    tx = optax.sgd(lr)
    state = ej.init_state(jax.random.key(0), MODEL, transform, tx, batch, frozen)
    step = jax.jit(ej.make_step(linear, transform, loss, tx))
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, batch, frozen)
    return state, metrics


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_gradients_are_those_of_cross_entropy_with_soft_targets(t):
    teacher = weights(1)
    soft = jax.nn.softmax(linear(teacher, {}, BATCH, None, False)[0] / t)

    def by_hand(params):
        log_q = jax.nn.log_softmax(linear(params, {}, BATCH, None, True)[0] / t)
        return cross_entropy(linear(params, {}, BATCH, None, True)[0], BATCH) + 0.3 * t**2 * (
            -jnp.sum(soft * log_q, -1).mean()
        )

    expected = jax.grad(by_hand)(weights(0))
    kd = ej.distill.logits(linear, temperature=t, alpha=0.3)
    state, metrics = run(kd, {"kd": Teacher(teacher, {})})
    for name, start in weights(0).items():
        np.testing.assert_allclose(start - state.vars.model[name], expected[name], atol=2e-6)
    np.testing.assert_allclose(metrics["loss"], metrics["task"] + metrics["kd/kl"], rtol=1e-6)


def test_a_student_equal_to_its_teacher_agrees_and_does_not_move():
    state, metrics = run(ej.distill.logits(linear), {"kd": Teacher(weights(0), {})}, loss=nothing)
    assert float(metrics["kd/agreement"]) == 1.0
    assert abs(float(metrics["kd/kl"])) < 1e-5
    np.testing.assert_allclose(state.vars.model["kernel"], weights(0)["kernel"], atol=1e-5)


def test_agreement_counts_equal_choices():
    near = jax.tree.map(lambda a, b: a + b, weights(0), weights(1))
    student = linear(weights(0), {}, BATCH, None, False)[0].argmax(-1)
    teacher = linear(near, {}, BATCH, None, False)[0].argmax(-1)
    _, metrics = run(ej.distill.logits(linear), {"kd": Teacher(near, {})})
    assert 0 < float(np.mean(student == teacher)) < 1
    np.testing.assert_allclose(metrics["kd/agreement"], np.mean(student == teacher))


def test_temperature_and_alpha_follow_schedules_and_traced_values():
    frozen = {"kd": Teacher(weights(1), {})}

    def loss(temperature, alpha):
        kd = ej.distill.logits(linear, temperature=temperature, alpha=alpha)
        _, metrics = run(kd, frozen, lr=0.0, steps=3)
        return float(metrics["kd/kl"]), float(metrics["kd/temperature"])

    at_two = loss(3.0, 0.5)
    assert at_two[0] > 0
    assert loss(lambda step: 1.0 + step, lambda step: step / 4) == pytest.approx(at_two, rel=1e-5)
    assert loss(jnp.float32(3.0), jnp.float32(0.5)) == pytest.approx(at_two, rel=1e-5)


def test_the_teacher_is_an_argument_of_the_program_and_gets_no_gradient():
    frozen = {"kd": Teacher(weights(1), {})}
    transform = ej.chain(kd=ej.distill.logits(linear))
    tx = optax.sgd(0.1)
    state = ej.init_state(jax.random.key(0), MODEL, transform, tx, BATCH, frozen)
    step = ej.make_step(linear, transform, cross_entropy, tx)
    closed = jax.make_jaxpr(step)(state, BATCH, frozen)
    assert max([np.size(c) for c in closed.consts], default=0) <= 1
    # Forward: x W of student and teacher; backward: one product, for the student's W.
    assert str(closed).count("dot_general") == 3

    def changed(teacher):
        return step(state, BATCH, {"kd": teacher})[1]["loss"]

    grads = jax.grad(changed)(frozen["kd"])
    assert all(not np.any(g) for g in jax.tree.leaves(grads))

    jitted = jax.jit(step)
    first = jitted(state, BATCH, frozen)[1]["kd/kl"]
    second = jitted(state, BATCH, {"kd": Teacher(weights(2), {})})[1]["kd/kl"]
    assert float(first) != float(second)
    assert jitted._cache_size() <= 1  # jax may drop entries, in a long process


def test_the_teacher_sees_the_augmented_batch_and_runs_in_evaluation_mode():
    seen = []

    def teacher(params, model_state, batch, key, train):
        seen.append(train)
        return batch["x"] @ params["kernel"], model_state

    flip = ej.Transform(batch=lambda batch, state, ctx: {**batch, "x": -batch["x"]})
    kernel = weights(1)["kernel"]
    _, metrics = run(
        ej.distill.logits(teacher), {"kd": ({"kernel": kernel}, {})}, others={"flip": flip}
    )
    expected = ej.distill.kl(-BATCH["x"] @ weights(0)["kernel"], -BATCH["x"] @ kernel, 4.0).mean()
    np.testing.assert_allclose(metrics["kd/kl"], expected, rtol=1e-5)
    assert set(seen) == {False}


def test_evaluation_runs_no_teacher():
    def teacher(params, model_state, batch, key, train):
        raise AssertionError("the teacher ran")

    transform = ej.chain(kd=ej.distill.logits(teacher))
    state = ej.init_state(jax.random.key(0), MODEL, ej.chain(), optax.sgd(0.1), BATCH)
    state = state._replace(vars=ej.Vars(state.vars.model, {"kd": {}}), transform={"kd": {}})
    evaluate = ej.make_eval(linear, transform, lambda out, batch: {"mean": out.mean(-1)})
    expected = linear(state.vars.model, {}, BATCH, None, False)[0].mean()
    np.testing.assert_allclose(evaluate(state, BATCH)["mean"].value, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_teacher_is_sharded_with_the_batch(dtype):
    found = []

    def teacher(params, model_state, batch, key, train):
        logits, model_state = linear(params, model_state, batch, key, train)
        jax.debug.inspect_array_sharding(logits, callback=found.append)
        return logits, model_state

    layout = ej.Layout(jax.make_mesh((8,), ("data",)))
    batch = layout.put_batch(jax.tree.map(lambda x: jnp.tile(x, (4,) + (1,) * (x.ndim - 1)), BATCH))
    frozen, tx = {"kd": Teacher(weights(1), {})}, optax.sgd(0.1)
    chain = ej.chain(kd=ej.distill.logits(teacher, dtype=dtype))
    state = ej.init_state(jax.random.key(0), MODEL, chain, tx, batch, frozen, layout=layout)
    found.clear()
    compiled = jax.jit(ej.make_step(linear, chain, cross_entropy, tx)).lower(state, batch, frozen)
    text = compiled.compile().as_text()
    assert [s.shard_shape((24, CLASSES)) for s in found] == [(3, CLASSES)]
    assert "all-gather" not in text  # neither the batch nor the teacher's logits


class NnxTeacher(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return {"logits": self.out(self.drop(self.norm(x)))}


class LinenTeacher(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return {"logits": linen.Dense(CLASSES)(x)}


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_flax_teachers_with_state_in_float32_and_bfloat16(flavour):
    teacher = (
        ej.from_linen(LinenTeacher(), "x") if flavour == "linen" else ej.from_nnx(NnxTeacher, "x")
    )
    frozen = {"kd": Teacher(*teacher.init(jax.random.key(5), BATCH))}
    settings = {"teacher_logits": lambda out: out["logits"], "temperature": 2.0}
    _, full = run(ej.distill.logits(teacher.apply, **settings), frozen)
    outputs, _ = teacher.apply(*frozen["kd"], BATCH, jax.random.key(0), False)
    student = linear(weights(0), {}, BATCH, None, True)[0]
    expected = ej.distill.kl(student, outputs["logits"], 2.0).mean()
    np.testing.assert_allclose(full["kd/kl"], expected, rtol=1e-5)
    _, half = run(ej.distill.logits(teacher.apply, dtype=jnp.bfloat16, **settings), frozen)
    assert float(half["kd/kl"]) != float(full["kd/kl"])
    np.testing.assert_allclose(half["kd/kl"], full["kd/kl"], rtol=2e-2)


@pytest.mark.parametrize("name", ["mse", "dist", "dkd", "hard", "cosine", "kl"])
def test_any_loss_of_logits_plugs_in(name):
    loss, teacher = getattr(ej.distill, name), weights(1)
    kd = ej.distill.logits(linear, loss, temperature=2.0, alpha=lambda step: 0.5)
    _, metrics = run(kd, {"kd": Teacher(teacher, {})})
    given = [linear(w, {}, BATCH, None, True)[0] for w in (weights(0), teacher)]
    given += [BATCH["label"]] if name == "dkd" else []
    given += [2.0] if name in ("dist", "dkd", "kl") else []
    np.testing.assert_allclose(metrics[f"kd/{name}"], 0.5 * jnp.mean(loss(*given)), rtol=1e-5)


def test_a_loss_with_labels_needs_them_before_the_first_step():
    frozen = {"kd": Teacher(weights(1), {})}
    with pytest.raises(ej.errors.SetupError, match=r"dkd needs the labels.*label.*labels="):
        run(ej.distill.logits(linear, ej.distill.dkd), frozen, batch={"x": BATCH["x"]})


def wide(params, model_state, batch, key, train):
    return jnp.zeros((len(batch["x"]), CLASSES + 1)), model_state


@pytest.mark.parametrize(
    ("kd", "frozen", "says"),
    [
        (lambda: ej.distill.logits(linear), None, "got no teacher.*frozen="),
        (lambda: ej.distill.logits(linear), {"kd": weights(1)}, r"dict.*Teacher\(params"),
        (lambda: ej.distill.logits(wide), {"kd": ({}, {})}, r"\[6, 5\].*\[6, 6\]"),
        (
            lambda: ej.distill.logits(linear, teacher_logits=lambda out: {"a": out}),
            {"kd": (weights(1), {})},
            "teacher's logits are a dict",
        ),
        (lambda: ej.distill.logits(MODEL), None, "Model as teacher.*model.apply"),
        (lambda: ej.distill.logits(linear, temperature=0.0), None, "temperature is 0.0"),
        (lambda: ej.distill.logits(linear, alpha=-1.0), None, "alpha is -1.0"),
    ],
)
def test_mistakes_are_errors_before_the_first_step(kd, frozen, says):
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        ej.init_state(jax.random.key(0), MODEL, ej.chain(kd=kd()), optax.sgd(0.1), BATCH, frozen)
