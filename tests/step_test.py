"""The train step: equal to one written by hand, metrics, and the state that it carries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

import effjax as ej
from effjax.select import leaves
from effjax.testing import compilations

BATCH = {
    "image": jax.random.normal(jax.random.key(0), (8, 6)),
    "label": jnp.arange(8) % 4,
}


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(16, name="hidden")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.Dropout(0.3, deterministic=not train)(linen.relu(x))
        return linen.Dense(4, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.hidden(x)))))


LINEN, NNX = ej.from_linen(LinenNet()), ej.from_nnx(NnxNet)


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def by_example(outputs, batch):
    correct = outputs.argmax(-1) == batch["label"]
    return {"accuracy": correct.astype(jnp.float32), "largest": outputs.max(-1)}


def plain_step(model, tx):
    """The same step without effjax."""

    def step(step, key, params, opt, model_state, batch):
        def objective(params):
            step_key = jax.random.fold_in(key, step)
            outputs, changed = model.apply(params, model_state, batch, step_key, True)
            return cross_entropy(outputs, batch), changed

        (loss, changed), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return step + 1, optax.apply_updates(params, updates), opt, changed, loss

    return step


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9)])
def test_chain_of_nothing_is_the_plain_step_bit_for_bit_and_in_flops(flavour, tx):
    model = LINEN if flavour == "linen" else NNX
    state = ej.init_state(jax.random.key(2), model, ej.chain(), tx, BATCH)
    step = jax.jit(ej.make_step(model.apply, ej.chain(), cross_entropy, tx))
    plain = jax.jit(plain_step(model, tx))
    own = (state.step, state.vars.model, tx.init(state.vars.model), state.model_state)
    count, params, opt, model_state = own
    compiled = step.lower(state, BATCH).compile()
    by_hand = plain.lower(count, state.key, params, opt, model_state, BATCH).compile()
    assert compiled.cost_analysis()["flops"] == by_hand.cost_analysis()["flops"]
    for _ in range(4):
        state, metrics = step(state, BATCH)
        count, params, opt, model_state, loss = plain(
            count, state.key, params, opt, model_state, BATCH
        )
        mine = (state.step, state.vars.model, state.model_state, metrics["loss"])
        same = jax.tree.map(jnp.array_equal, mine, (count, params, model_state, loss))
        assert jax.tree.all(same)
    for found, expected in zip(jax.tree.leaves(state.opt), jax.tree.leaves(opt), strict=True):
        assert jnp.array_equal(found, expected)


def term(value):
    """A transform with one loss term: a trainable number times `value`."""
    return ej.Transform(
        init=lambda key, params, setup: ({"scale": jnp.ones(())}, {"sum": jnp.zeros(())}),
        loss=lambda out, batch, aux, extra, state, ctx: {"term": value * extra["scale"]},
        update=lambda vars, opt, state, grads, aux, ctx: (
            vars,
            opt,
            {"sum": state["sum"] + grads.extra["scale"]},
        ),
        report=lambda vars, state, aux, ctx: {"scale": vars.extra["scale"], **state},
    )


def test_metrics_are_the_objective_the_task_the_terms_and_the_reports():
    two = ej.chain(a=term(2.0), b=term(0.5))
    tx = optax.sgd(0.1)
    state = ej.init_state(jax.random.key(2), LINEN, two, tx, BATCH)
    step = jax.jit(ej.make_step(LINEN.apply, two, cross_entropy, tx, by_example))
    _, none = jax.jit(ej.make_step(LINEN.apply, ej.chain(), cross_entropy, tx, by_example))(
        ej.init_state(jax.random.key(2), LINEN, ej.chain(), tx, BATCH), BATCH
    )
    state, first = step(state, BATCH)
    names = {"loss", "task", "a/term", "b/term", "a/scale", "b/scale", "a/sum", "b/sum"}
    assert set(first) == names | {"accuracy", "largest"}
    assert all(x.shape == () for x in first.values())
    np.testing.assert_allclose(first["loss"], first["task"] + 2.5, rtol=1e-6)
    np.testing.assert_allclose(first["task"], none["task"], rtol=1e-6)
    np.testing.assert_allclose(first["accuracy"], none["accuracy"])
    # The extra leaves are trained: d loss / d scale = value, and reports see what the step made.
    np.testing.assert_allclose([first["a/scale"], first["b/scale"]], [0.8, 0.95], rtol=1e-6)
    np.testing.assert_allclose([first["a/sum"], first["b/sum"]], [2.0, 0.5])
    _, second = step(state, BATCH)
    np.testing.assert_allclose([second["a/term"], second["b/term"]], [1.6, 0.475], rtol=1e-6)


def test_the_loss_sees_the_batch_as_the_model_saw_it():
    shift = ej.chain(
        shift=ej.Transform(batch=lambda batch, state, ctx: {**batch, "label": batch["label"] * 0})
    )
    tx = optax.sgd(0.1)
    state = ej.init_state(jax.random.key(2), LINEN, shift, tx, BATCH)
    metrics = ej.make_step(
        LINEN.apply, shift, lambda out, batch: batch["label"].sum() + 0.0 * out.sum(), tx
    )(state, BATCH)[1]
    assert float(metrics["loss"]) == 0
    # Evaluation leaves the batch alone.
    evaluate = ej.make_eval(LINEN.apply, shift, lambda out, batch: {"label": batch["label"]})
    assert int(evaluate(state, BATCH)["label"].total) == int(BATCH["label"].sum())


def test_evaluation_counts_valid_examples_and_merges():
    state = ej.init_state(jax.random.key(2), LINEN, ej.chain(), optax.sgd(0.1), BATCH)
    evaluate = jax.jit(ej.make_eval(LINEN.apply, ej.chain(), by_example))
    whole = evaluate(state, BATCH)
    first = evaluate(state, jax.tree.map(lambda x: x[:5], BATCH))
    rest = jax.tree.map(lambda x: jnp.concatenate([x[5:], x[:2] * 0 + 77]), BATCH)
    rest = evaluate(state, {**rest, "valid": jnp.arange(5) < 3})
    assert float(rest["accuracy"].weight) == 3
    for name, mean in whole.items():
        merged = first[name].merge(rest[name])
        assert float(merged.weight) == 8
        np.testing.assert_allclose(merged.value, mean.value, rtol=1e-6)
    outputs = LINEN.apply(state.vars.model, state.model_state, BATCH, state.key, False)[0]
    np.testing.assert_allclose(whole["largest"].value, outputs.max(-1).mean(), rtol=1e-6)


def test_padding_may_be_nan():
    values = jnp.array([1.0, jnp.nan, 3.0])
    found = ej.step.mean(values, jnp.array([True, False, True]))
    assert (float(found.total), float(found.weight), float(found.value)) == (4, 2, 2)


def test_a_metric_that_is_no_value_an_example_is_an_error():
    state = ej.init_state(jax.random.key(2), LINEN, ej.chain(), optax.sgd(0.1), BATCH)
    evaluate = ej.make_eval(LINEN.apply, ej.chain(), lambda out, batch: {"m": out.mean()})
    with pytest.raises(ej.errors.SetupError, match=r"\(\).*\(8,\).*one value an example"):
        evaluate(state, {**BATCH, "valid": jnp.ones(8, bool)})


def test_start_from_given_params_without_touching_them():
    params, model_state = NNX.init(jax.random.key(7), BATCH)
    tx = optax.adam(1e-2)
    state = ej.init_state(
        jax.random.key(2), NNX, ej.chain(), tx, BATCH, params=params, model_state=model_state
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.vars.model, params))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.model_state, model_state))
    step = jax.jit(ej.make_step(NNX.apply, ej.chain(), cross_entropy, tx), donate_argnums=0)
    after, _ = step(state, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.vars.model))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, model_state)))
    other, _ = NNX.init(jax.random.key(2), BATCH)
    assert not jnp.array_equal(after.vars.model["head"]["kernel"], other["head"]["kernel"])
    stateless = ej.Model(lambda key, batch: ({}, {}), lambda *args: (args[0]["w"], args[1]))
    made = ej.init_state(
        jax.random.key(0), stateless, ej.chain(), tx, BATCH, params={"w": jnp.ones(2)}
    )
    assert made.model_state == {}


def test_donating_the_state_deletes_neither_the_key_nor_the_batch():
    key, tx = jax.random.key(2), optax.adam(1e-2)
    state = ej.init_state(key, LINEN, ej.chain(), tx, BATCH)
    step = jax.jit(ej.make_step(LINEN.apply, ej.chain(), cross_entropy, tx), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert not key.is_deleted()
    assert not any(x.is_deleted() for x in BATCH.values())
    again = ej.init_state(key, LINEN, ej.chain(), tx, BATCH)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((again.vars, again.opt))]
    assert len(set(pointers)) == len(pointers)


def test_init_reads_shapes_only_and_works_abstractly():
    tx = optax.adam(1e-2)
    shapes = jax.eval_shape(lambda: BATCH)
    state = ej.init_state(jax.random.key(2), LINEN, ej.chain(a=term(1.0)), tx, shapes)
    concrete = ej.init_state(jax.random.key(2), LINEN, ej.chain(a=term(1.0)), tx, BATCH)
    same = jax.tree.map(
        lambda a, b: (
            np.array_equal(*map(jax.random.key_data, (a, b)))
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
            else np.array_equal(a, b)
        ),
        state,
        concrete,
    )
    assert jax.tree.all(same)
    abstract = jax.eval_shape(
        lambda k, b: ej.init_state(k, LINEN, ej.chain(a=term(1.0)), tx, b),
        jax.random.key(2),
        BATCH,
    )
    assert abstract == jax.eval_shape(lambda: concrete)
    assert state.step.dtype == jnp.int32


def test_the_seed_decides_and_the_streams_differ():
    tx = optax.sgd(0.1)
    a, b, c = (ej.init_state(jax.random.key(s), LINEN, ej.chain(), tx, BATCH) for s in (0, 0, 1))
    assert jnp.array_equal(a.vars.model["head"]["kernel"], b.vars.model["head"]["kernel"])
    assert not jnp.array_equal(a.vars.model["head"]["kernel"], c.vars.model["head"]["kernel"])
    # The run's key is not the one that the weights were drawn with.
    assert a.key != jax.random.key(0)
    step = jax.jit(ej.make_step(LINEN.apply, ej.chain(), lambda out, batch: out.sum(), tx))
    frozen_weights = a._replace(vars=a.vars)
    first = step(frozen_weights, BATCH)[1]["loss"]
    later = step(frozen_weights._replace(step=a.step + 1), BATCH)[1]["loss"]
    assert float(first) != float(later)


@pytest.mark.parametrize(
    ("extra", "state", "says"),
    [
        ({}, {"mask": {"w": None}}, r"state has None at .*mask.*w"),
        ({"scale": None}, {}, r"extra has None at .*scale"),
    ],
)
def test_a_none_leaf_is_an_error(extra, state, says):
    bad = ej.chain(bad=ej.Transform(init=lambda key, params, setup: (extra, state)))
    with pytest.raises(ej.errors.SetupError, match=says):
        ej.init_state(jax.random.key(0), LINEN, bad, optax.sgd(0.1), BATCH)


def test_weak_types_of_a_transform_do_not_compile_twice():
    weak = ej.Transform(
        init=lambda key, params, setup: ({"e": jnp.asarray(1.0)}, {"s": jnp.asarray(0.0) * 1.0}),
        loss=lambda out, batch, aux, extra, state, ctx: {"e": extra["e"]},
        update=lambda vars, opt, state, grads, aux, ctx: (
            vars,
            opt,
            {"s": state["s"] + jnp.float32(1)},
        ),
    )
    tx = optax.sgd(0.1)
    state = ej.init_state(jax.random.key(0), LINEN, ej.chain(weak=weak), tx, BATCH)
    numbers = [x for x in jax.tree.leaves(state) if x.dtype != state.key.dtype]
    assert not any(x.weak_type for x in numbers)
    step = jax.jit(ej.make_step(LINEN.apply, ej.chain(weak=weak), cross_entropy, tx))
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert step._cache_size() <= 1  # jax may drop entries, in a long process


@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_sharded_state_is_made_in_place_and_the_step_compiles_once(shape, tx):
    mesh = jax.make_mesh(shape, ("data", "model"))
    layout = ej.Layout(mesh, [("kernel$", PartitionSpec(None, "model"))], batch=("data",))
    prune = ej.chain(prune=ej.prune.magnitude(0.5, select="kernel$"), t=term(1.0))
    one = ej.init_state(jax.random.key(0), LINEN, prune, tx, BATCH)
    state = ej.init_state(jax.random.key(0), LINEN, prune, tx, BATCH, layout=layout)
    shardings = ej.state_shardings(state, layout)
    named, placed = leaves(state), leaves(shardings)
    assert all(named[n].sharding.is_equivalent_to(placed[n], named[n].ndim) for n in named)
    split = NamedSharding(layout.mesh, PartitionSpec(None, "model"))
    moments = [x for n, x in named.items() if n.endswith("hidden/kernel")]
    # The kernel, its moments (Adam has two, momentum one) and its mask.
    assert len(moments) == (4 if len(jax.tree.leaves(one.opt)) > 8 else 3)
    assert all(x.sharding.is_equivalent_to(split, 2) for x in moments)

    step = jax.jit(
        ej.make_step(LINEN.apply, prune, cross_entropy, tx), out_shardings=(shardings, None)
    )
    alone = jax.jit(ej.make_step(LINEN.apply, prune, cross_entropy, tx))
    batch = layout.put_batch(BATCH)
    with compilations("step") as compiled:
        for _ in range(3):
            state, metrics = step(state, batch)
    assert len(compiled) == 1
    for _ in range(3):
        one, expected = alone(one, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)
    for name, leaf in leaves(state.vars.model).items():
        # A bias before BatchNorm has a gradient of rounding errors only, which Adam blows up.
        if name != "hidden/bias":
            np.testing.assert_allclose(
                leaf, leaves(one.vars.model)[name], rtol=1e-3, atol=1e-3, err_msg=name
            )


def test_export_is_the_view_of_evaluation():
    double = ej.Transform(
        view=lambda params, extra, state, ctx: jax.tree.map(lambda w: 2 * w, params),
        export=lambda params, extra, state: jax.tree.map(lambda w: 2 * w, params),
    )
    twice = ej.chain(a=double, b=double)
    state = ej.init_state(jax.random.key(0), NNX, twice, optax.sgd(0.1), BATCH)
    shipped = ej.export(twice, state)
    assert jnp.array_equal(shipped["head"]["kernel"], 4 * state.vars.model["head"]["kernel"])
    evaluate = ej.make_eval(NNX.apply, twice, lambda out, batch: {"x": out.sum(-1)})
    outputs = NNX.apply(shipped, state.model_state, BATCH, state.key, False)[0]
    np.testing.assert_allclose(evaluate(state, BATCH)["x"].total, outputs.sum(), rtol=1e-5)


def test_forward_is_what_is_differentiated():
    """For a loop of one's own: the same hooks, called directly."""
    t = ej.chain(t=term(3.0))
    state = ej.init_state(jax.random.key(0), NNX, t, optax.sgd(0.1), BATCH)
    ctx = ej.Ctx(state.step, jax.random.fold_in(state.key, state.step))

    def objective(vars):
        out = ej.forward(NNX.apply, t, vars, state.model_state, state.transform, BATCH, ctx)
        return cross_entropy(out.outputs, out.batch) + sum(out.losses.values())

    value, grads = jax.value_and_grad(objective)(state.vars)
    step = ej.make_step(NNX.apply, t, cross_entropy, optax.sgd(1.0))
    after, metrics = step(state._replace(opt=optax.sgd(1.0).init(state.vars)), BATCH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert float(grads.extra["t"]["scale"]) == 3.0
    jax.tree.map(
        lambda w, g, new: np.testing.assert_allclose(w - g, new, rtol=1e-4, atol=1e-5),
        state.vars,
        grads,
        after.vars,
    )
