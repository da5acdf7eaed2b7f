"""A population of K runs equals K runs: bit for bit when mapped, to rounding side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import effjax as ej
from effjax.jaxprs import Body, While, parts
from effjax.select import leaves

K = 3
BATCH = {
    "image": jax.random.normal(jax.random.key(1), (8, 6, 6, 1)),
    "label": jnp.arange(8) % 4,
}
HYPERS = {
    "lr": jnp.array([0.01, 0.02, 0.05]),
    "sparsity": [0.3, 0.6, 0.9],
    "temperature": [1.0, 2.0, 4.0],
    "alpha": [0.0, 0.5, 1.0],
    "bits": [8, 4, 16],
}


class LinenCnn(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, name="norm")(x))
        x = linen.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return linen.Dense(4, name="head")(x)


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean((1, 2))))


LINEN, NNX = ej.from_linen(LinenCnn()), ej.from_nnx(NnxCnn)
KEYS = jax.random.split(jax.random.key(5), K)


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def correct(outputs, batch):
    return {"accuracy": outputs.argmax(-1) == batch["label"]}


def teacher():
    return {"kd": ej.distill.Teacher(*LINEN.init(jax.random.key(9), BATCH))}


def compressed(model):
    """All four techniques in one run, with traced hyper-parameters."""

    def build(hyper):
        transform = ej.chain(
            kd=ej.distill.logits(
                LINEN.apply, temperature=hyper["temperature"], alpha=hyper["alpha"]
            ),
            nas=ej.nas.width({"conv": ["conv/", "norm/"]}, (0.5, 1.0), samples=1),
            prune=ej.prune.magnitude(hyper["sparsity"], begin=1, end=3, every=2, select="kernel$"),
            quant=ej.quantize.qat(hyper["bits"], hyper["bits"]),
        )
        tx = optax.adam(hyper["lr"])

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch, frozen)

        step = ej.make_step(model.apply, transform, cross_entropy, tx, correct)
        return ej.Run(init, step, ej.make_eval(model.apply, transform, correct))

    return build


def plain(hyper):
    """SGD on a linear model, whose learning rate is its only hyper-parameter."""

    def apply(params, model_state, batch, key, train):
        return batch["image"].reshape(len(batch["image"]), -1) @ params["kernel"], model_state

    def init(key, batch):
        return {"kernel": jax.random.normal(key, (36, 4))}, {}

    tx, none = optax.sgd(hyper["lr"]), ej.chain()
    model = ej.Model(init, apply)
    return ej.Run(
        lambda key, batch, frozen: ej.init_state(key, model, none, tx, batch),
        ej.make_step(apply, none, cross_entropy, tx),
    )


LRS = {"lr": [0.1, 0.2, 0.4, 0.8]}


def follow(runs, frozen, steps=5):
    states = runs.init(KEYS, BATCH, frozen)
    metrics = {}
    for _ in range(steps):
        states, metrics = runs.step(states, BATCH, frozen)
    return states, metrics, runs.evaluate(states, BATCH, frozen)


def alone(build, k, frozen, steps=5):
    """Run k by itself: `build`'s functions, jitted with its hyper-parameters as arguments."""
    hyper = {name: jnp.asarray(values)[k] for name, values in HYPERS.items()}
    state = jax.jit(lambda h, key, b, f: build(h).init(key, b, f))(hyper, KEYS[k], BATCH, frozen)
    step = jax.jit(lambda h, s, b, f: build(h).step(s, b, f))
    metrics = {}
    for _ in range(steps):
        state, metrics = step(hyper, state, BATCH, frozen)
    evaluate = jax.jit(lambda h, s, b, f: build(h).evaluate(s, b, f))
    return state, metrics, evaluate(hyper, state, BATCH, frozen)


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_population_of_k_runs_is_k_runs(mode, flavour):
    build, frozen = compressed(LINEN if flavour == "linen" else NNX), teacher()
    runs = ej.population(build, HYPERS, mode)
    states, *results = follow(runs, frozen)
    for k in range(K):
        expected = alone(build, k, frozen)
        own = runs.member(states, k)
        assert jax.tree.structure(own) == jax.tree.structure(expected[0])
        found = (own, *(jax.tree.map(lambda x, k=k: x[k], r) for r in results))
        for name, leaf in leaves(expected).items():
            mine = leaves(found)[name]
            assert mine.dtype == leaf.dtype
            if mode == "map" or leaf.dtype in (jnp.bool_, jnp.int32):
                np.testing.assert_array_equal(raw(mine), raw(leaf), err_msg=name)
            else:
                np.testing.assert_allclose(raw(mine), raw(leaf), rtol=1e-3, atol=1e-4, err_msg=name)
    masks = runs.stack(states).transform["prune"]["mask"]["conv/kernel"]
    kept = [int(mask.sum()) for mask in masks]
    assert kept == [36 - 11, 36 - 22, 36 - 32]  # round(0.3 * 36), ...


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_step_compiles_once_and_keeps_the_states_form(mode):
    traces = []

    def build(hyper):
        run = plain(hyper)
        return run._replace(step=lambda *args: traces.append(1) or run.step(*args))

    runs = ej.population(build, LRS, mode)
    states = runs.init(jax.random.split(KEYS[0], 4), BATCH)
    after = states
    for _ in range(3):
        after, _ = runs.step(after, BATCH)
    after, _ = runs.step(after, BATCH, hypers={"lr": [1, 2, 3, 4]})
    assert len(traces) == 1
    assert runs.stack(after).step.shape == ()
    assert [int(runs.member(after, k).step) for k in range(4)] == [4] * 4
    assert jax.tree.map(jax.typeof, states) == jax.tree.map(jax.typeof, after)


def rounds(jaxpr):
    """Every while loop in a program, those inside other functions too."""
    for eqn in jaxpr.eqns:
        inner = parts(eqn)
        if isinstance(inner, While):
            yield inner
        for body in () if inner is None else [b for b in inner if isinstance(b, Body)]:
            yield from rounds(body.jaxpr)


def test_what_depends_on_the_step_alone_stays_a_branch_under_vmap():
    """Work that is done at some steps only costs nothing in the others, also side by side."""
    frozen = teacher()
    runs = ej.population(compressed(LINEN), HYPERS, "vmap")
    states = runs.init(KEYS, BATCH, frozen)
    loops = list(rounds(jax.make_jaxpr(runs.step)(states, BATCH, frozen).jaxpr))
    # Masks move in a loop of at most one round. Had its condition become a batched value, the
    # loop would reduce it over the runs, and select between whole masks in its body.
    alone = [loop for loop in loops if not loop.condition.jaxpr.eqns]
    moving = [x for loop in alone for x in loop.body.jaxpr.outvars if x.aval.dtype == bool]
    assert {(K, *shape) for shape in ((3, 3, 1, 4), (4, 4))} <= {x.aval.shape for x in moving}
    branch = ej.Transform(
        update=lambda vars, opt, state, grads, aux, ctx: (
            vars,
            opt,
            jax.lax.cond(ctx.step % 2 == 0, lambda s: s + 1, lambda s: s, state),
        ),
        init=lambda key, params, setup: ({}, jnp.zeros(())),
    )
    tx = optax.sgd(0.1)
    model = LINEN

    def build(hyper):
        transform = ej.chain(branch=branch)
        return ej.Run(
            lambda key, batch, frozen: ej.init_state(key, model, transform, tx, batch),
            ej.make_step(model.apply, transform, cross_entropy, tx),
        )

    runs = ej.population(build, {"seed": [0, 1, 2]}, "vmap")
    states = runs.init(KEYS, BATCH)
    assert " cond[" in str(jax.make_jaxpr(runs.step)(states, BATCH))
    for _ in range(3):
        states, _ = runs.step(states, BATCH)
    assert states.transform["branch"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_batches_of_their_own(mode):
    runs = ej.population(plain, LRS, mode, batch_axis=0)
    keys = jax.random.split(KEYS[0], 4)
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1], 2 * x, 0 * x]), BATCH)
    states = runs.init(keys, batches)
    after, metrics = runs.step(states, batches)
    kernels = runs.stack(after).vars.model["kernel"]
    for k in range(4):
        own = jax.tree.map(lambda x, k=k: x[k], batches)
        shared = ej.population(plain, LRS, mode)
        expected, loss = shared.step(states, own)
        np.testing.assert_allclose(metrics["loss"][k], loss["loss"][k], rtol=1e-5)
        alone = shared.member(expected, k).vars.model["kernel"]
        np.testing.assert_allclose(kernels[k], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_donated_states_are_gone_and_the_rest_is_not(mode):
    runs = ej.population(plain, LRS, mode, donate=True)
    states = runs.init(jax.random.split(KEYS[0], 4), BATCH)
    after, _ = runs.step(states, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(states) if x.ndim > 1)
    assert not BATCH["image"].is_deleted()
    assert not runs.hypers["lr"].is_deleted()
    runs.step(after, BATCH)


def test_other_hyper_parameters_at_a_step():
    runs = ej.population(plain, LRS, "map")
    states = runs.init(jax.random.split(KEYS[0], 4), BATCH)

    def kernels(hypers=None):
        return runs.stack(runs.step(states, BATCH, hypers=hypers)[0]).vars.model["kernel"]

    usual, swapped = kernels(), kernels({"lr": [0.1, 0.4, 0.2, 0.8]})
    assert [bool(jnp.array_equal(*pair)) for pair in zip(usual, swapped, strict=True)] == [
        True,
        False,
        False,
        True,
    ]
    before = runs.stack(states).vars.model["kernel"]
    assert jnp.array_equal(kernels({"lr": jnp.zeros(4)}), before)


def test_runs_are_dealt_out_over_devices():
    mesh = jax.make_mesh((2,), ("runs",), devices=jax.devices()[:2])
    frozen, build = teacher(), compressed(LINEN)
    hypers = {name: [*values, values[0]] for name, values in HYPERS.items()}
    keys = jax.random.split(jax.random.key(5), 4)
    results = []
    for where in (mesh, None):
        runs = ej.population(build, hypers, "vmap", mesh=where)
        states = runs.init(keys, BATCH, frozen)
        before = jax.tree.map(lambda x: x.sharding, states)
        for _ in range(4):
            states, metrics = runs.step(states, BATCH, frozen)
        assert before == jax.tree.map(lambda x: x.sharding, states)
        results.append((states, metrics, runs.evaluate(states, BATCH, frozen)))
        if where is not None:
            assert states.vars.model["conv"]["kernel"].sharding.spec[0] == "runs"
            assert states.step.sharding.is_fully_replicated
            assert runs.member(states, 1).vars.model["head"]["bias"].shape == (4,)
            text = jax.jit(runs.step).lower(states, BATCH, frozen).compile().as_text()
            assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
    for name, leaf in leaves(results[1]).items():
        found = raw(leaves(results[0])[name])
        np.testing.assert_allclose(found, raw(leaf), rtol=1e-3, atol=1e-4, err_msg=name)


def test_auto_maps_on_cpu_and_runs_side_by_side_elsewhere(monkeypatch):
    assert ej.population(plain, LRS).mode == ("map" if jax.default_backend() == "cpu" else "vmap")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert ej.population(plain, LRS).mode == "vmap"


def test_a_population_is_called_inside_jit():
    runs = ej.population(plain, LRS, "map")
    states = runs.init(jax.random.split(KEYS[0], 4), BATCH)
    expected = ej.population(plain, LRS, "map").step(states, BATCH)[0]
    found = jax.jit(lambda s: runs.step(s, BATCH)[0])(states)
    mine, kernels = (runs.stack(s).vars.model["kernel"] for s in (found, expected))
    np.testing.assert_allclose(mine, kernels, rtol=1e-5, atol=1e-6)


def test_grid_is_the_product():
    found = ej.grid(lr=[0.1, 0.2], seed=[0, 1, 2])
    assert found["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(found["lr"], [0.1] * 3 + [0.2] * 3)
    assert found["seed"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("hypers", "says"),
    [
        ({"lr": [0.1, 0.2], "seed": [1]}, r"\['lr'\]\": 2.*\['seed'\]\": 1.*grid"),
        ({"lr": []}, "0"),
        ({"lr": 0.1}, "single value 0.1"),
        ({"tx": ["adam", "sgd"]}, "not an array of numbers"),
        ({}, "no hyper-parameters"),
    ],
)
def test_wrong_hyper_parameters_are_errors(hypers, says):
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        ej.population(plain, hypers)


def test_wrong_use_is_an_error():
    with pytest.raises(ej.errors.SetupError, match="mode is 'pmap'"):
        ej.population(plain, LRS, "pmap")
    runs = ej.population(plain, LRS, "map")
    with pytest.raises(ej.errors.SetupError, match=r"\[3\] for 4 runs"):
        runs.init(KEYS, BATCH)
    states = runs.init(jax.random.split(KEYS[0], 4), BATCH)
    with pytest.raises(ej.errors.SetupError, match="gives no evaluate"):
        runs.evaluate(states, BATCH)
    for wrong in ({"lr": [0.1] * 3}, {"rate": [0.1] * 4}):
        with pytest.raises(ej.errors.SetupError, match="only their values may change"):
            runs.step(states, BATCH, hypers=wrong)
    for mode, wrong in (("map", runs.stack(states)), ("map", states[:3]), ("vmap", states)):
        with pytest.raises(ej.errors.SetupError, match="come from another population"):
            ej.population(plain, LRS, mode).step(wrong, BATCH)
    three = jax.make_mesh((3,), ("runs",), devices=jax.devices()[:3])
    with pytest.raises(ej.errors.ShardingError, match="4 runs on a mesh"):
        ej.population(plain, LRS, mesh=three)
    two = jax.make_mesh((2,), ("runs",), devices=jax.devices()[:2])
    with pytest.raises(ej.errors.ShardingError, match="mode='vmap'"):
        ej.population(plain, LRS, "map", mesh=two)
