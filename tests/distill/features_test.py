"""Features of Linen, NNX and plain JAX models by one kind of tap, and what is learned from them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.distill import (
    Match,
    Teacher,
    embedded,
    ensemble,
    features,
    hint,
    layer_to_layer,
    projected,
)
from effjax.distill.taps import tap
from tests import nets

KEY = jax.random.key(0)
BATCH = jax.tree.map(lambda x: jnp.asarray(x[:6]), nets.BATCH)


def found(model, taps, params, model_state, train=False):
    run = jax.jit(lambda p, s, b: tap(model.apply, taps, "student")(p, s, b, KEY, train))
    return run(params, model_state, BATCH)


def test_linen_taps_are_what_flax_captures_and_nnx_gives_the_same():
    nnx_model, linen_model = nets.nnx_(), nets.linen()
    given = nnx_model.init(KEY, BATCH)
    params, stats = nets.from_nnx_state(*given)
    taps = ("conv1", "conv2/kernel", "conv2:in", "head:in", "@outputs")
    (outputs, _), ours = found(linen_model, taps, params, stats)
    logits, captured = nets.LinenCNN().apply(
        {"params": params, **stats}, BATCH["image"], False, capture_intermediates=True
    )
    inner = captured["intermediates"]
    expected = {
        "conv1": inner["conv1"]["__call__"][0],
        "conv2/kernel": inner["conv2"]["__call__"][0],
        "conv2:in": nn.relu(inner["norm1"]["__call__"][0]),
        "head:in": nn.relu(inner["norm2"]["__call__"][0]).mean((1, 2)),
        "@outputs": logits,
    }
    np.testing.assert_allclose(outputs, logits, rtol=1e-5, atol=1e-6)
    assert set(ours) == set(taps)
    _, theirs = found(nnx_model, taps, *given)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-5)


def test_plain_jax_by_hand():
    params, _ = nets.raw().init(KEY, BATCH)
    _, got = found(nets.raw(), ("hidden", "head:in"), params, {})
    before_bias = BATCH["image"].reshape(-1, 64) @ params["hidden"]["kernel"]
    np.testing.assert_allclose(got["hidden"], before_bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["head:in"], jax.nn.relu(before_bias), rtol=1e-5, atol=1e-6)


def stacked(params, model_state, batch, key, train):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, batch["x"], params["layers"])[0], model_state


def test_layers_of_a_scan_take_a_number():
    layers = jax.random.normal(KEY, (3, 4, 4))
    batch = {"x": jnp.ones((2, 4))}
    run = tap(stacked, ("layers[1]", "layers[-1]:in"), "student")
    got = run({"layers": layers}, {}, batch, KEY, False)[1]
    first = jnp.tanh(batch["x"] @ layers[0])
    np.testing.assert_allclose(got["layers[1]"], first @ layers[1], rtol=1e-5)
    np.testing.assert_allclose(
        got["layers[-1]:in"], jnp.tanh(first @ layers[1]), rtol=1e-5, atol=1e-6
    )


def repeated(params, model_state, batch, key, train):
    body = lambda i, x: jnp.tanh(x @ params["w"])  # noqa: E731
    return jax.lax.fori_loop(0, 3, body, batch["x"]), model_state


@pytest.mark.parametrize(
    ("apply", "name", "says"),
    [
        (stacked, "layers", r"one of \[3\] stacked layers.*layers\[0\]"),
        (stacked, "layers[3]", "has 3 layers"),
        (stacked, "conv9", r"names no module.*student.*\['layers'\]"),
        (repeated, "w", "more than once"),
        (repeated, "w[0]", "more than once|is no stack"),
    ],
)
def test_taps_that_mean_nothing_are_errors(apply, name, says):
    params = {"layers": jnp.ones((3, 4, 4))} if apply is stacked else {"w": jnp.ones((4, 4))}
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        tap(apply, (name,), "student")(params, {}, {"x": jnp.ones((2, 4))}, KEY, False)


def two(params, model_state, batch, key, train):
    return jax.nn.relu(batch["x"] @ params["one"]) @ params["two"], model_state


def weights(seed, width):
    a, b = jax.random.split(jax.random.key(seed))
    return {"one": jax.random.normal(a, (4, width)), "two": jax.random.normal(b, (width, 2))}


STUDENT = ej.Model(lambda key, batch: (weights(0, 3), {}), two)
DATA = {"x": jax.random.normal(jax.random.key(5), (6, 4))}


def start(matches, teacher=two, width=8, frozen=None, **others):
    chain = ej.chain(kd=features(teacher, matches), **others)
    frozen = {"kd": frozen or Teacher(weights(1, width), {})}
    tx = optax.sgd(1.0)
    state = ej.init_state(KEY, STUDENT, chain, tx, DATA, frozen)
    step = ej.make_step(two, chain, lambda outputs, batch: jnp.zeros(()), tx)
    return state, step, frozen


def test_loss_and_gradients_of_weights_and_projection_by_hand():
    matches = {"hint": Match("two:in", "two:in", projected(hint), alpha=0.3)}
    state, step, frozen = start(matches)
    model, extra = state.vars.model, state.vars.extra["kd"]["hint"]

    def by_hand(model, extra):
        mine = jax.nn.relu(DATA["x"] @ model["one"]) @ extra["kernel"] + extra["bias"]
        return 0.3 * jnp.mean((mine - jax.nn.relu(DATA["x"] @ weights(1, 8)["one"])) ** 2)

    value, grads = jax.value_and_grad(by_hand, argnums=(0, 1))(model, extra)
    after, metrics = jax.jit(step)(state, DATA, frozen)
    np.testing.assert_allclose(metrics["kd/hint"], value, rtol=1e-5)
    moved = jax.tree.map(
        lambda a, b: a - b, (model, extra), (after.vars.model, after.vars.extra["kd"]["hint"])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, grads)


def test_the_teacher_is_an_argument_and_gets_no_gradient():
    state, step, frozen = start({"r": Match("one", "one", ej.distill.rkd_distance)})
    closed = jax.make_jaxpr(step)(state, DATA, frozen)
    assert max([np.size(c) for c in closed.consts], default=0) <= 1
    grads = jax.grad(lambda t: step(state, DATA, {"kd": t})[1]["loss"])(frozen["kd"])
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
    jitted = jax.jit(step)
    jitted(state, DATA, frozen)
    jitted(state, DATA, {"kd": Teacher(weights(2, 8), {})})
    assert jitted._cache_size() <= 1  # jax may drop entries, in a long process


def test_one_run_of_the_teacher_serves_features_and_logits():
    kl = Match("@outputs", "@outputs", ej.distill.kl, alpha=lambda step: 2.0 * step)
    state, step, frozen = start({"kl": kl, "similar": Match("one", "one", ej.distill.similarity)})
    assert float(step(state, DATA, frozen)[1]["kd/kl"]) == 0.0
    metrics = step(state._replace(step=jnp.int32(3)), DATA, frozen)[1]
    mine, taught = (two(w, {}, DATA, KEY, False)[0] for w in (weights(0, 3), weights(1, 8)))
    np.testing.assert_allclose(metrics["kd/kl"], 6 * ej.distill.kl(mine, taught).mean(), rtol=1e-5)


def test_several_teachers_are_tapped_by_their_number():
    both = Teacher.join(Teacher(weights(1, 8), {}), Teacher(weights(2, 5), {}))
    matches = {"a": Match("one", "0/one", embedded(size=3)), "b": Match("one", "1/one", embedded())}
    state, step, frozen = start(matches, ensemble(two, two), frozen=both)
    assert state.vars.extra["kd"]["b"]["teacher"]["kernel"].shape == (5, 128)
    metrics = jax.jit(step)(state, DATA, frozen)[1]
    assert np.isfinite(float(metrics["kd/a"] + metrics["kd/b"]))
    outputs = ensemble(two, two, weights=[1, 3])(*both, DATA, KEY, False)[0]
    p = [jax.nn.softmax(two(w, {}, DATA, KEY, False)[0]) for w in both.params]
    np.testing.assert_allclose(jax.nn.softmax(outputs), (p[0] + 3 * p[1]) / 4, rtol=1e-5)


def test_the_teacher_runs_in_bfloat16_where_asked():
    found = {}
    for dtype in (None, jnp.bfloat16):
        chain = ej.chain(
            kd=features(two, {"r": Match("one", "one", embedded(size=3))}, dtype=dtype)
        )
        frozen, tx = {"kd": Teacher(weights(1, 8), {})}, optax.sgd(1.0)
        state = ej.init_state(KEY, STUDENT, chain, tx, DATA, frozen)
        step = jax.jit(ej.make_step(two, chain, lambda outputs, batch: jnp.zeros(()), tx))
        lowered = step.lower(state, DATA, frozen)
        found[dtype] = float(lowered.compile()(state, DATA, frozen)[1]["kd/r"])
        assert ("bf16" in lowered.as_text()) is (dtype is not None)
    assert found[None] != found[jnp.bfloat16]
    np.testing.assert_allclose(found[None], found[jnp.bfloat16], rtol=5e-2)


@pytest.mark.parametrize(
    ("mapping", "students", "wanted"),
    [
        ("uniform", 4, [3, 6, 9, 12]),  # TinyBERT's, of BERT's twelve
        ("uniform", 5, [2, 5, 7, 10, 12]),
        ("uniform", 12, list(range(1, 13))),
        ("top", 4, [9, 10, 11, 12]),
        ("bottom", 4, [1, 2, 3, 4]),
    ],
)
def test_layers_are_mapped_to_a_deeper_teachers(mapping, students, wanted):
    names = [f"mine_{i}" for i in range(students)], [f"its_{n}" for n in range(1, 13)]
    found = layer_to_layer(*names, ej.distill.similarity, mapping=mapping, alpha=0.2)
    assert list(found) == [f"layer_{m}" for m in range(1, students + 1)]
    assert [m.student for m in found.values()] == names[0]
    assert [m.teacher for m in found.values()] == [f"its_{n}" for n in wanted]
    assert {(m.loss, m.alpha) for m in found.values()} == {(ej.distill.similarity, 0.2)}


def test_maps_of_layers_that_cannot_be():
    with pytest.raises(ej.errors.SetupError, match=r"3 taps of the student and 2 of the teacher"):
        layer_to_layer(["a", "b", "c"], ["a", "b"])
    with pytest.raises(ej.errors.SetupError, match="mapping='last'"):
        layer_to_layer(["a"], ["a"], mapping="last")


def test_first_in_the_chain_it_sees_what_quantized_operations_compute():
    matches = {"m": Match("one", "one", ej.distill.similarity)}
    quant = ej.quantize.qat(weights=2, activations=16, select="one")
    state, step, frozen = start(matches, quant=quant)
    w = weights(0, 3)["one"]
    scale = jnp.abs(w).max(0)  # 2 bits: -1, 0, 1
    expected = ej.distill.similarity(
        DATA["x"] @ (jnp.round(w / scale) * scale), DATA["x"] @ weights(1, 8)["one"]
    )
    np.testing.assert_allclose(step(state, DATA, frozen)[1]["kd/m"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("matches", "says"),
    [
        ({"h": Match("one", "one", hint)}, r"\[6, 3\].*\[6, 8\].*projected"),
        ({"h": Match("three", "one")}, r"'three' names no module.*student.*'one', 'two'"),
        ({"h": Match("one", "four")}, r"'four' names no module.*teacher"),
        ({}, "at least one match"),
        ({"h": ("one", "one")}, "tuple, not a Match"),
        ({"h": Match("one", "one", alpha=-1.0)}, "alpha of 'h' is -1.0"),
    ],
)
def test_mistakes_are_errors_before_the_first_step(matches, says):
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        start(matches)
