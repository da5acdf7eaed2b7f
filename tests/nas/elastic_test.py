"""Training of supernets: the sandwich rule by hand, shrinking, one compilation, one alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax import nas
from effjax.errors import EffjaxError
from effjax.select import leaves

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(6, 8)).astype(np.float32),
    "label": np.array([0, 1, 2, 0, 1, 2], np.int32),
}


def apply(params, model_state, batch, key, train):
    x = jax.nn.relu(batch["image"] @ params["a"])
    for name in ("b", "c"):  # residual blocks of a branch without a bias
        x = x + jax.nn.relu(x @ params[name]["in"]) @ params[name]["out"]
    return x @ params["head"], model_state


def params_of():
    def matrix(*shape):
        return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    blocks = {name: {"in": matrix(6, 4), "out": matrix(4, 6)} for name in ("b", "c")}
    return {"a": matrix(8, 6), **blocks, "head": matrix(6, 3)}


PARAMS = params_of()
MODEL = ej.Model(lambda key, batch: (PARAMS, {}), apply)
DIMENSIONS = {
    "width": nas.Width("^a$", (0.5, 1.0)),
    "depth": nas.Depth(["^b/", "^c/"], (0, 1, 2)),
    "inner": nas.When("depth", (2,), nas.Width("^c/in$", (0.25, 0.5, 1.0))),
}
NET = nas.Supernet(MODEL, BATCH, DIMENSIONS)


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def start(transform, net=NET):
    tx = optax.sgd(1.0)
    model = MODEL if net is NET else net.model
    state = ej.init_state(jax.random.key(0), model, transform, tx, BATCH)
    return state, jax.jit(ej.make_step(model.apply, transform, cross_entropy, tx))


def outputs(params, arch):
    """The network of an architecture, written out."""
    width, depth, inner = NET.decode(np.asarray(arch)), None, None
    n = 3 if width["width"] == 0.5 else 6
    x = jax.nn.relu(BATCH["image"] @ params["a"][:, :n])
    depth, inner = width["depth"], int(4 * width.get("inner", 1.0))
    for name, size in (("b", 4), ("c", inner))[:depth]:
        own = params[name]
        x = x + jax.nn.relu(x @ own["in"][:n, :size]) @ own["out"][:size, :n]
    return x @ params["head"][:n]


def test_a_step_is_the_sandwich_rule_written_by_hand():
    transform = ej.chain(nas=nas.elastic(NET, samples=1, alpha=0.7))
    state, step = start(transform)
    after, metrics = step(state, BATCH)
    assert NET.smallest.tolist() == [0, 0, 0]

    def by_hand(params, drawn):
        full = outputs(params, NET.largest)
        target = jax.lax.stop_gradient(full)
        subnets = [outputs(params, arch) for arch in ([0, 0, 0], drawn)]
        distance = sum(ej.distill.kl(s, target).mean() for s in subnets) / 2
        return cross_entropy(full, BATCH) + 0.7 * distance

    # Which sub-network was drawn shows in the loss alone: try them all.
    every = {tuple(a): float(by_hand(PARAMS, a)) for a in NET.enumerate()}
    drawn = min(every, key=lambda a: abs(every[a] - float(metrics["loss"])))
    np.testing.assert_allclose(metrics["loss"], every[drawn], rtol=1e-5)
    for path, grad in leaves(jax.grad(by_hand)(PARAMS, drawn)).items():
        moved = leaves(PARAMS)[path] - leaves(after.vars.model)[path]
        np.testing.assert_allclose(moved, grad, atol=1e-5, err_msg=path)
    agree = outputs(PARAMS, [0, 0, 0]).argmax(-1) == outputs(PARAMS, NET.largest).argmax(-1)
    np.testing.assert_allclose(metrics["nas/agreement"], agree.mean())


def test_architectures_are_values_in_evaluation_and_export():
    transform = ej.chain(nas=nas.elastic(NET, samples=0))
    state, _ = start(transform)
    evaluate = jax.jit(ej.make_eval(apply, transform, lambda out, batch: {"x": out}))
    for arch in NET.enumerate():
        own = nas.subnet(state, arch)
        wanted = outputs(PARAMS, arch)
        np.testing.assert_allclose(evaluate(own, BATCH)["x"].total, wanted.sum(), rtol=1e-4)
        found = apply(ej.export(transform, own), {}, BATCH, None, False)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert evaluate._cache_size() <= 1
    facts = transform.describe(own.vars.model, own.vars.extra, own.transform)
    assert facts["a"] == {"channels": 6}
    with pytest.raises(EffjaxError, match=r"it is int32\[3\]"):
        nas.subnet(state, jnp.zeros(2, jnp.int32))


def test_shrinking_opens_one_choice_after_the_other():
    shrink = {"depth": (2, 4), "width": (6,), "inner": (0, 8)}
    transform = ej.chain(nas=nas.elastic(NET, samples=0, shrink=shrink))
    state, step = start(transform)
    lowest = {0: [1, 2, 1], 2: [1, 1, 0], 4: [1, 0, 0], 6: [0, 0, 0], 8: [0, 0, 0]}
    for at, arch in lowest.items():
        _, metrics = step(state._replace(step=jnp.int32(at)), BATCH)
        full = outputs(PARAMS, NET.largest)
        wanted = ej.distill.kl(outputs(PARAMS, arch), full).mean()
        np.testing.assert_allclose(metrics["nas/kl"], wanted, rtol=1e-4, err_msg=str(at))
    assert step._cache_size() <= 1
    plan = nas.progressive(NET, 120)
    assert plan == {"depth": (0, 30), "width": (60,), "inner": (60, 90)}
    nas.elastic(NET, shrink=plan)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"samples": -1}, "samples=-1"),
        ({"shrink": {"other": (1,)}}, r"shrink names \['other'\]"),
        ({"shrink": {"depth": (1,)}}, "it has 2 choices below the largest"),
        ({"shrink": {"depth": (3, 1)}}, "do not decrease"),
    ],
)
def test_wrong_arguments_are_errors(given, says):
    with pytest.raises(EffjaxError, match=says):
        nas.elastic(NET, **given)


def test_other_params_are_an_error():
    other = ej.Model(lambda key, batch: ({**PARAMS, "head": jnp.ones((6, 4))}, {}), apply)
    with pytest.raises(EffjaxError, match=r"not those of the supernet's model: \['head'\]"):
        ej.init_state(
            jax.random.key(0), other, ej.chain(nas=nas.elastic(NET)), optax.sgd(1.0), BATCH
        )


def test_one_network_alone_trains_as_the_extracted_one():
    transform = ej.chain(nas=nas.fixed(NET, NET.architecture({"width": 0.5, "depth": 1})))
    state, step = start(transform)
    after, metrics = step(state, BATCH)
    arch = [0, 1, 0]

    def loss(params):
        return cross_entropy(outputs(params, arch), BATCH)

    value, grads = jax.value_and_grad(loss)(PARAMS)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    for path, grad in leaves(grads).items():
        moved = leaves(PARAMS)[path] - leaves(after.vars.model)[path]
        np.testing.assert_allclose(moved, grad, atol=1e-6, err_msg=path)
    assert np.array_equal(after.vars.model["c"]["in"], PARAMS["c"]["in"])


@pytest.mark.slow
def test_bits_and_sparsity_change_without_compiling():
    """All in one supernet: what is counted are the compilations of the step and of evaluation."""
    net = nas.Supernet(
        MODEL,
        BATCH,
        DIMENSIONS
        | {
            "bits": nas.Bits("^(a|b/in)$", (2, 4, 8), "same"),
            "zeros": nas.Sparsity("^[abc]", (0.0, 0.5)),
        },
    )
    transform = ej.chain(nas=nas.elastic(net, samples=1))
    state, step = start(transform, net)
    evaluate = jax.jit(ej.make_eval(apply, transform, lambda out, batch: {"x": out.sum(-1)}))
    with (
        ej.testing.compilations("step") as steps,
        ej.testing.compilations("evaluate") as evaluations,
    ):
        for _ in range(3):
            state, _ = step(state, BATCH)
        search = nas.Search(net, nas.Evolution(net, population=4, tournament=2))
        seen = set()
        for _ in range(8):
            trial = search.ask()
            value = float(evaluate(nas.subnet(state, trial.genes), BATCH)["x"].value)
            search.tell(trial, value)
            seen.add(value)
    assert len(seen) > 3
    assert (len(steps), len(evaluations)) == (1, 1)
