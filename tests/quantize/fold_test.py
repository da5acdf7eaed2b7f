"""Tests of folding BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import fold_batchnorm, folded, qat
from tests import nets

KEY = jax.random.key(0)
PAIRS = {"conv1": "norm1", "conv2": "norm2"}


def trained(model):
    """Params and statistics that are no longer at their initial values."""
    params, state = model.init(KEY, nets.BATCH)
    rng = np.random.default_rng(0)
    noisy = lambda x: jnp.asarray(x + 0.3 * np.abs(rng.normal(size=x.shape)), x.dtype)  # noqa: E731
    return jax.tree.map(noisy, params), jax.tree.map(noisy, state)


def evaluate(model, params, state):
    return jax.jit(lambda p, s: model.apply(p, s, nets.BATCH, KEY, False)[0])(params, state)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["found", "given"])
@pytest.mark.parametrize("make", [nets.linen, nets.nnx_], ids=["linen", "nnx"])
def test_the_same_model_computes_the_same(make, pairs):
    model = make()
    before = trained(model)
    params, state = fold_batchnorm(*before, pairs, apply=model.apply, batch=nets.BATCH)
    assert jax.tree.structure((params, state)) == jax.tree.structure(before)
    close(evaluate(model, params, state), evaluate(model, *before))
    assert np.all(np.asarray(params["norm1"]["scale"]) == 1)
    assert np.any(params["conv1"]["kernel"] != before[0]["conv1"]["kernel"])


def test_by_hand():
    params = {
        "dense": {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([1.0, 0.0])},
        "norm": {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.5, -1.0])},
    }
    stats = {"norm": {"mean": jnp.array([3.0, 1.0]), "var": jnp.array([3.75, 0.0])}}
    new, state = fold_batchnorm(params, stats, epsilon=0.25)
    # Factors 2/2 and 1/0.5; shifts (1 - 3) 1 + 0.5 and (0 - 1) 2 - 1.
    np.testing.assert_allclose(new["dense"]["kernel"], [[1.0, 4.0]])
    np.testing.assert_allclose(new["dense"]["bias"], [-1.5, -3.0])
    np.testing.assert_array_equal(new["norm"]["bias"], [0, 0])
    np.testing.assert_array_equal(state["norm"]["var"], [0.75, 0.75])


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_every_combination_of_biases_and_scales(use_bias, affine):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(4, (3, 3), use_bias=use_bias)(x)
            kwargs = {"use_scale": affine, "use_bias": affine, "epsilon": 1e-3}
            x = nn.BatchNorm(use_running_average=not train, **kwargs)(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=use_bias)(nn.relu(x))
            x = nn.BatchNorm(use_running_average=not train, **kwargs)(x)
            return nn.Dense(8)(x.mean(axis=(1, 2)))

    model = ej.from_linen(Net())
    before = trained(model)
    after = fold_batchnorm(*before, epsilon=1e-3, apply=model.apply, batch=nets.BATCH)
    close(evaluate(model, *after), evaluate(model, *before))


def test_folded_training_rounds_folded_weights_and_keeps_statistics():
    model = nets.linen(dropout=0.0)
    params, stats = trained(model)
    tx = optax.sgd(0.05)
    transform = ej.chain(fold=folded(PAIRS), quant=qat(4, 32))
    state = ej.init_state(KEY, model, transform, tx, nets.BATCH, params=params, model_state=stats)
    outputs = lambda outputs, batch: {"sum": (outputs * jnp.arange(8)).sum(-1)}  # noqa: E731
    got = ej.make_eval(model.apply, transform, outputs)(state, nets.BATCH)["sum"].total

    fixed = fold_batchnorm(params, stats, PAIRS)
    alone = ej.chain(quant=qat(4, 32))
    plain = ej.init_state(KEY, model, alone, tx, nets.BATCH, params=fixed[0], model_state=fixed[1])
    want = ej.make_eval(model.apply, alone, outputs)(plain, nets.BATCH)["sum"].total
    np.testing.assert_allclose(got, want, rtol=1e-4)

    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    losses = []
    for _ in range(6):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.model_state, stats)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.vars.model, params)
    assert all(jax.tree.leaves(moved))


def test_wrong_pairs():
    params, state = jax.eval_shape(nets.linen().init, KEY, nets.BATCH)
    for pairs, message in (
        ({"conv1": "norm9"}, r"no BatchNorm.*norm1.*conv1"),
        ({"conv9": "norm1"}, "no layer with a kernel"),
        ({"conv1": "norm2"}, "normalises 16 features.*8 output features"),
        ({}, "pairs is empty"),
    ):
        with pytest.raises(SetupError, match=message):
            fold_batchnorm(params, state, pairs)
    with pytest.raises(SetupError, match="no BatchNorm to fold"):
        fold_batchnorm(params, {})


def test_layers_that_cannot_be_told_by_name():
    square = {"kernel": jnp.ones((2, 2))}
    stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(SetupError, match=r"before norm cannot be told.*\['a1', 'b1'\]"):
        fold_batchnorm({"a1": square, "b1": square}, stats)


def test_a_batchnorm_that_does_not_follow_its_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(8)(x.mean(axis=(1, 2)))

    model = ej.from_linen(Net())
    with pytest.raises(SetupError, match="does not directly follow"):
        fold_batchnorm(*trained(model), apply=model.apply, batch=nets.BATCH)
