"""Linen and NNX modules as pure functions: state, dropout, modes, and equal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import effjax as ej
from effjax.select import leaves

BATCH = {"image": jax.random.normal(jax.random.key(0), (6, 5)), "extra": jnp.ones((6, 5))}
KEY = jax.random.key(1)


class LinenNet(linen.Module):
    """BatchNorm, dropout, and a collection of the module's own that counts training calls."""

    dropout: float = 0.5

    @linen.compact
    def __call__(self, x, train):
        calls = self.variable("counter", "calls", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            calls.value += 1
        x = linen.Dense(8, name="hidden")(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = linen.Dropout(self.dropout, deterministic=not train)(linen.relu(x))
        return linen.Dense(3, name="head")(x)


class Calls(nnx.Variable):
    """A collection of the module's own."""


class NnxNet(nnx.Module):
    def __init__(self, rngs, dropout=0.5):
        self.calls = Calls(jnp.zeros((), jnp.int32))
        self.hidden = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        if not self.drop.deterministic:
            self.calls[...] += 1
        return self.head(self.drop(nnx.relu(self.norm(self.hidden(x)))))


MODELS = {"linen": ej.from_linen(LinenNet()), "nnx": ej.from_nnx(NnxNet)}


def calls(model_state):
    return int(next(x for name, x in leaves(model_state).items() if "calls" in name))


def statistics(model_state):
    return {n.split("/")[-1]: x for n, x in leaves(model_state).items() if "norm" in n}


@pytest.mark.parametrize("flavour", MODELS)
def test_params_and_state_are_plain_dicts_of_arrays(flavour):
    params, model_state = MODELS[flavour].init(KEY, BATCH)
    assert {n: x.shape for n, x in leaves(params).items()} == {
        "head/bias": (3,),
        "head/kernel": (8, 3),
        "hidden/bias": (8,),
        "hidden/kernel": (5, 8),
        "norm/bias": (8,),
        "norm/scale": (8,),
    }
    assert isinstance(params, dict)
    assert isinstance(model_state, dict)
    assert set(statistics(model_state)) == {"mean", "var"}
    assert calls(model_state) == 0
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((params, model_state)))
    # No random stream is kept: keys come from the caller.
    kinds = {x.dtype.kind for x in jax.tree.leaves(model_state)}
    assert kinds == {"f", "i"}


@pytest.mark.parametrize("flavour", MODELS)
def test_training_updates_the_state_and_evaluation_does_not(flavour):
    model = MODELS[flavour]
    params, model_state = model.init(KEY, BATCH)
    before = jax.tree.map(np.array, (params, model_state))
    apply = jax.jit(model.apply, static_argnums=4)
    trained = apply(params, model_state, BATCH, KEY, True)[1]
    evaluated = apply(params, trained, BATCH, KEY, False)[1]
    hidden = BATCH["image"] @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    np.testing.assert_allclose(statistics(trained)["mean"], 0.1 * hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics(trained)["var"], 0.9 + 0.1 * hidden.var(0), atol=1e-5)
    assert calls(trained) == 1
    assert calls(apply(params, trained, BATCH, KEY, True)[1]) == 2
    assert jax.tree.all(jax.tree.map(jnp.array_equal, evaluated, trained))
    assert jax.tree.structure(trained) == jax.tree.structure(model_state)
    # The caller's trees are untouched.
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (params, model_state)))


@pytest.mark.parametrize("flavour", MODELS)
def test_dropout_follows_the_key_in_training_only(flavour):
    model = MODELS[flavour]
    params, model_state = model.init(KEY, BATCH)
    apply = jax.jit(model.apply, static_argnums=4)

    def out(seed, train):
        return apply(params, model_state, BATCH, jax.random.key(seed), train)[0]

    assert jnp.array_equal(out(0, True), out(0, True))
    assert not jnp.array_equal(out(0, True), out(1, True))
    assert jnp.array_equal(out(0, False), out(1, False))
    # Keys of a step, which differ in one fold, draw anew; and so do examples mapped over.
    folded = [jax.random.fold_in(KEY, i) for i in range(3)]
    drawn = [apply(params, model_state, BATCH, k, True)[0] for k in folded]
    assert len({np.asarray(x).tobytes() for x in drawn}) == 3
    mapped = jax.vmap(lambda k: model.apply(params, model_state, BATCH, k, True)[0])
    np.testing.assert_allclose(mapped(jnp.stack(folded)), jnp.stack(drawn), rtol=1e-5, atol=1e-6)


def test_linen_and_nnx_with_the_same_weights_give_the_same_numbers():
    linen_model = ej.from_linen(LinenNet(dropout=0.0))
    nnx_model = ej.from_nnx(lambda rngs: NnxNet(rngs, dropout=0.0))
    params, nnx_state = nnx_model.init(KEY, BATCH)
    linen_state = {
        "batch_stats": {"norm": nnx_state["norm"]},
        "counter": {"calls": nnx_state["calls"]},
    }
    states = {"linen": linen_state, "nnx": nnx_state}
    for train in (True, True, False):
        found = {}
        for name, model in (("linen", linen_model), ("nnx", nnx_model)):

            def loss(params, model=model, state=states[name], train=train):
                outputs, state = model.apply(params, state, BATCH, KEY, train)
                return jnp.sum(outputs**2), (outputs, state)

            grads, (outputs, states[name]) = jax.grad(loss, has_aux=True)(params)
            found[name] = (outputs, grads, statistics(states[name]))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found.values()
        )
    assert calls(states["linen"]) == calls(states["nnx"]) == 2


@pytest.mark.parametrize("flavour", MODELS)
def test_models_work_under_eval_shape_grad_and_vmap(flavour):
    model = MODELS[flavour]
    shapes = jax.eval_shape(model.init, KEY, jax.eval_shape(lambda: BATCH))
    params, model_state = model.init(KEY, BATCH)
    assert jax.eval_shape(lambda: (params, model_state)) == shapes
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(model.init, (0, None))(keys, BATCH)
    one = model.init(keys[1], BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-6), many, one)
    outputs = jax.vmap(model.apply, (0, 0, None, 0, None))(*many, BATCH, keys, True)[0]
    assert outputs.shape == (3, 6, 3)


def test_a_built_nnx_module_keeps_its_weights_and_is_left_alone():
    module = NnxNet(nnx.Rngs(3))
    model = ej.from_nnx(module)
    params, model_state = model.init(KEY, BATCH)
    assert jnp.array_equal(params["head"]["kernel"], module.head.kernel[...])
    again, _ = model.init(jax.random.key(99), BATCH)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, again))
    model.apply(params, model_state, BATCH, KEY, True)
    assert int(module.calls[...]) == 0
    module.eval()
    expected = module(BATCH["image"])
    found = model.apply(params, model_state, BATCH, KEY, False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Mode(linen.Module):
    """Says which mode it was called in, through a keyword of any name."""

    def report(self, train):
        scale = self.param("scale", lambda key: jnp.ones(()))
        return scale * jnp.asarray(train, jnp.float32)


class Train(Mode):
    @linen.compact
    def __call__(self, x, train):
        return self.report(train)


class Training(Mode):
    @linen.compact
    def __call__(self, x, *, training):
        return self.report(training)


class IsTraining(Mode):
    @linen.compact
    def __call__(self, x, is_training):
        return self.report(is_training)


class Deterministic(Mode):
    @linen.compact
    def __call__(self, x, deterministic=True):
        return self.report(not deterministic)


class UseRunningAverage(Mode):
    @linen.compact
    def __call__(self, x, use_running_average=True):
        return self.report(not use_running_average)


class Other(Mode):
    @linen.compact
    def __call__(self, x, phase):
        return self.report(phase == "fit")


@pytest.mark.parametrize(
    "module", [Train(), Training(), IsTraining(), Deterministic(), UseRunningAverage()]
)
def test_linen_modules_are_told_the_mode_by_their_own_keyword(module):
    model = ej.from_linen(module)
    params, state = model.init(KEY, BATCH)
    for train in (True, False):
        assert float(model.apply(params, state, BATCH, KEY, train)[0]) == train


def test_the_mode_may_be_any_keywords():
    model = ej.from_linen(Other(), mode=lambda train: {"phase": "fit" if train else "use"})
    params, state = model.init(KEY, BATCH)
    assert [float(model.apply(params, state, BATCH, KEY, t)[0]) for t in (True, False)] == [1, 0]


class Noisy(linen.Module):
    """Asks for two random streams in training."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(2)(x)
        if train:
            a, b = (jax.random.normal(self.make_rng(n), ()) for n in ("dropout", "noise"))
            x = x + a + 100 * (a == b)
        return x


def test_linen_streams_each_have_a_key_of_their_own():
    model = ej.from_linen(Noisy(), rngs=("dropout", "noise"))
    params, state = model.init(KEY, BATCH)
    found = model.apply(params, state, BATCH, KEY, True)[0]
    plain = model.apply(params, state, BATCH, KEY, False)[0]
    assert not jnp.array_equal(found, plain)
    assert float(jnp.abs(found - plain).max()) < 50


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_inputs_by_entry_by_function_and_as_several_arguments(flavour):
    class LinenSum(linen.Module):
        @linen.compact
        def __call__(self, x, y):
            return linen.Dense(2, name="d")(x + 2 * y)

    class NnxSum(nnx.Module):
        def __init__(self, rngs):
            self.d = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x, y):
            return self.d(x + 2 * y)

    def both(batch):
        return batch["image"], batch["extra"]

    model = (
        ej.from_linen(LinenSum(), inputs=both) if flavour == "linen" else ej.from_nnx(NnxSum, both)
    )
    params, state = model.init(KEY, BATCH)
    x = BATCH["image"] + 2 * BATCH["extra"]
    expected = x @ params["d"]["kernel"] + params["d"]["bias"]
    found = model.apply(params, state, BATCH, KEY, True)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_plain_function_as_apply():
    apply = ej.from_function(lambda params, x: params * x, "extra")
    outputs, state = apply(jnp.float32(3), {"kept": 1}, BATCH, KEY, True)
    assert jnp.array_equal(outputs, 3 * BATCH["extra"])
    assert state == {"kept": 1}


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_an_entry_that_the_batch_lacks_is_an_error(flavour):
    model = (
        ej.from_linen(linen.Dense(2), "pixels")
        if flavour == "linen"
        else ej.from_nnx(lambda rngs: nnx.Linear(5, 2, rngs=rngs), "pixels")
    )
    params, state = (
        model.init(KEY, {"pixels": BATCH["image"]})
        if flavour == "linen"
        else model.init(KEY, BATCH)
    )
    with pytest.raises(ej.errors.SetupError, match=r"batch\['pixels'\].*\['image', 'extra'\]"):
        model.apply(params, state, BATCH, KEY, True)


def test_mistakes_with_nnx_are_errors():
    with pytest.raises(ej.errors.SetupError, match="got a dict"):
        ej.from_nnx({})
    model = MODELS["nnx"]
    params, state = model.init(KEY, BATCH)
    with pytest.raises(ej.errors.SetupError, match=r"params has 2 leaves.*has 6"):
        model.apply(params["head"], state, BATCH, KEY, True)
    with pytest.raises(ej.errors.SetupError, match="model_state has 0 leaves"):
        model.apply(params, {}, BATCH, KEY, True)
    renamed = {**params, "tail": params["head"]}
    del renamed["head"]
    with pytest.raises(ej.errors.SetupError, match=r"tail/kernel.*head/kernel"):
        model.apply(renamed, state, BATCH, KEY, True)


def test_nnx_weights_are_matched_by_path_also_with_layer_numbers_as_strings():
    """As files keep them; as strings, "10" would be sorted before "2"."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(11)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = ej.from_nnx(Deep)
    params, state = model.init(KEY, BATCH)
    named = {"layers": {str(number): layer for number, layer in params["layers"].items()}}
    expected, found = (model.apply(p, state, BATCH, KEY, True)[0] for p in (params, named))
    assert jnp.array_equal(expected, found)
