"""Leaves that are not floating point are left alone where nothing needs them changed, and refused
where something does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import adaround, awq, correct_bias, equalize, fold_batchnorm, gptq, ptq, smooth

RNG = np.random.default_rng(0)
X = [jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)]
NAMES = ("a", "b", "c")
RESCALERS = {
    "equalize": lambda apply, params, *names: equalize(apply, params, {}, X[0], *names),
    "smooth": lambda apply, params, *names: smooth(apply, params, {}, X, *names),
    "awq": lambda apply, params, *names: awq(apply, params, {}, X, *names, bits=3),
}
ROUNDERS = {
    "gptq": gptq,
    "adaround": lambda *args: adaround(*args, steps=3),
}


def apply(params, model_state, batch, key, train):
    """Three layers, and an integer that shifts the outputs."""
    x = batch
    for name in NAMES:
        own = params[name]
        x = x @ own["kernel"].astype(jnp.float32) + own["bias"]
        x = x if name == "c" else jax.nn.relu(x)
    return x * params["factor"], model_state


def network(**integers):
    """Floats, but for a factor and what is named: {layer: "kernel" or "bias"}."""
    params = {
        name: {
            "kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for name, shape in zip(NAMES, ((3, 4), (4, 5), (5, 2)), strict=True)
    }
    for name, leaf in integers.items():
        params[name][leaf] = jnp.round(2 * params[name][leaf]).astype(jnp.int8)
    return {**params, "factor": jnp.int32(3)}


def same(tree, other):
    """Which leaves are the same, dtypes too."""
    equal = lambda a, b: bool(jnp.array_equal(a, b)) and a.dtype == b.dtype  # noqa: E731
    return jax.tree.map(equal, tree, other)


def start(params, transform):
    """A state with these params, where the transform was made for floats."""
    model = ej.Model(lambda *_: (network(), {}), apply)
    state = ej.init_state(jax.random.key(0), model, transform, optax.identity(), X[0])
    return state._replace(vars=state.vars._replace(model=params))


@pytest.mark.parametrize("name", RESCALERS)
def test_rescaling_passes_over_layers_of_integers(name):
    params = network(a="kernel")  # leaves b and c
    after, _ = RESCALERS[name](apply, params)
    kept = same(params, after)
    assert kept["a"] == {"kernel": True, "bias": True}
    assert kept["factor"]
    assert not kept["b"]["kernel"]
    assert not kept["c"]["kernel"]
    params = network(b="bias")  # leaves a and b
    after, _ = RESCALERS[name](apply, params)
    kept = same(params, after)
    assert kept["c"]["kernel"]
    assert kept["b"]["bias"]
    assert not kept["a"]["kernel"]


@pytest.mark.parametrize("name", RESCALERS)
def test_rescaling_refuses_layers_of_integers_that_are_named(name):
    with pytest.raises(SetupError, match=r"'a': its outputs.*a/kernel is int8, not floating point"):
        RESCALERS[name](apply, network(a="kernel"), ["a"])
    with pytest.raises(SetupError, match=r"'a': its outputs.*b/kernel is int8, not floating point"):
        RESCALERS[name](apply, network(b="kernel"), ["a"])
    with pytest.raises(SetupError, match=r"finds no layer.*b/kernel is int8.*in floating point"):
        RESCALERS[name](apply, network(b="kernel"))


@pytest.mark.parametrize("name", ROUNDERS)
def test_learned_rounding_passes_over_integers_and_refuses_integer_kernels(name):
    quant = ej.chain(quant=ej.quantize.qat(4, 32))
    params = network(b="bias")
    after = ROUNDERS[name](apply, quant, start(params, quant), X).vars.model
    kept = same(params, after)
    assert kept["factor"]
    assert kept["b"] == {"kernel": False, "bias": True}
    with pytest.raises(SetupError, match="chooses b/kernel, which is int8"):
        ROUNDERS[name](apply, quant, start(network(b="kernel"), quant), X)


def test_ptq_passes_over_integers_and_refuses_integer_kernels():
    def model(params):
        return ej.Model(lambda *_: (params, {}), apply), params, {}, X

    params = network()
    small = ptq(*model(params), 4, 8, equalize=True, method="gptq", bias_correction=True)
    assert same(params, small.state.vars.model)["factor"]
    params = network(b="bias")
    assert same(params, ptq(*model(params), 4, 8).state.vars.model)["b"]["bias"]
    with pytest.raises(SetupError, match="chooses b/kernel, which is int8"):
        ptq(*model(network(b="kernel")))


def test_biases_of_integers_take_no_correction():
    quant = ej.chain(quant=ej.quantize.qat(4, 32))
    after = correct_bias(apply, quant, start(network(), quant), X)
    assert after.vars.model["factor"].dtype == jnp.int32
    with pytest.raises(SetupError, match=r"nowhere to put a correction of \['b/kernel'\]"):
        correct_bias(apply, quant, start(network(b="bias"), quant), X)


@pytest.mark.parametrize("odd", ["dense/kernel", "dense/bias", "norm/scale"])
def test_folding_refuses_integers(odd):
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    }
    layer, leaf = odd.split("/")
    params[layer][leaf] = params[layer][leaf].astype(jnp.int8)
    stats = {"batch_stats": {"norm": {"mean": jnp.ones(2), "var": jnp.ones(2)}}}
    with pytest.raises(SetupError, match=rf"{odd} is int8.*restore the float weights"):
        fold_batchnorm(params, stats)
