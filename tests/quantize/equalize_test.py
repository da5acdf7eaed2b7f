"""Cross-layer equalisation: exact in floating point, by hand, and what it gains in 8 bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize.equalize import equalize
from effjax.quantize.follow import follow
from tests import nets

RNG = np.random.default_rng(0)
IMAGES = {"image": RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)}


class Separable(nn.Module):
    """A convolution, a depthwise one, a pointwise one, a flattened dense one."""

    act: object = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        x = self.act(nn.Conv(8, (3, 3), name="stem")(x))
        x = self.act(nn.Conv(8, (3, 3), feature_group_count=8, name="deep")(x))
        x = nn.leaky_relu(nn.Conv(6, (1, 1), name="point")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(x)


def spread(act=nn.relu):
    """A model whose channels have very different ranges, and computes what it did before."""
    model = ej.from_linen(Separable(act))
    params, model_state = model.init(jax.random.key(0), IMAGES)
    factors = np.logspace(-2, 2, 8).astype(np.float32)
    params["stem"]["kernel"] = params["stem"]["kernel"] * factors
    params["deep"]["kernel"] = params["deep"]["kernel"] / factors
    params["stem"]["bias"] = jnp.asarray(RNG.normal(size=8).astype(np.float32)) * factors
    return model, params, model_state


def output(model, params, model_state, batch=IMAGES):
    return np.asarray(model.apply(params, model_state, batch, jax.random.key(0), False)[0])


def test_ranges_are_equal_and_outputs_as_before():
    model, params, state = spread()
    assert [own.reaches for own in follow(model.apply, params, state, IMAGES).values()] == [
        ["deep"],
        ["point"],
        ["head"],
        [],
    ]
    after, _ = equalize(model.apply, params, state, IMAGES, steps=60)
    want, got = output(model, params, state), output(model, after, state)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    kernels = {n: np.abs(after[n]["kernel"]) for n in after}
    out = {n: k.max(axis=(0, 1, 2)) for n, k in kernels.items() if n != "head"}
    np.testing.assert_allclose(out["stem"], out["deep"], rtol=1e-2)
    np.testing.assert_allclose(out["deep"], kernels["point"].max(axis=(0, 1, 3)), rtol=1e-2)
    rows = kernels["head"].reshape(-1, 6, 3).max(axis=(0, 2))
    np.testing.assert_allclose(out["point"], rows, rtol=1e-2)


def test_it_gains_signal_to_noise_with_one_scale_a_weight():
    model, params, state = spread()
    want = output(model, params, state)

    def noise(params):
        quant = ej.chain(q=ej.quantize.qat(8, 32, per_channel=False))
        given = {"params": params, "model_state": state}
        own = ej.init_state(jax.random.key(0), model, quant, optax.identity(), IMAGES, **given)
        evaluate = ej.make_eval(
            model.apply, quant, lambda out, batch: {"error": ((out - want) ** 2).sum(-1)}
        )
        return float(evaluate(own, IMAGES)["error"].total)

    after, _ = equalize(model.apply, params, state, IMAGES)
    assert 10 * np.log10(noise(params) / noise(after)) > 10  # decibels


@pytest.mark.parametrize("make", [nets.linen, nets.nnx_])
def test_batchnorm_is_folded_and_its_shift_goes_along(make):
    model = make()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    params["norm1"]["bias"] = jnp.linspace(-1, 1, 8)
    params["norm1"]["scale"] = jnp.logspace(-1, 1, 8)
    after, moved = equalize(model.apply, params, state, nets.BATCH, ["conv1"])
    want, got = (output(model, *v, nets.BATCH) for v in ((params, state), (after, moved)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    one = np.abs(after["conv1"]["kernel"]).max(axis=(0, 1, 2))
    two = np.abs(after["conv2"]["kernel"]).max(axis=(0, 1, 3))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    assert not np.allclose(after["norm1"]["bias"], params["norm1"]["bias"])


class Residual(nnx.Module):
    """x + two(relu(one(x))), then a layer that two others read."""

    def __init__(self, rngs):
        for name in ("stem", "one", "two", "wide", "left", "right"):
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x):
        x = self.stem(x)
        x = x + self.two(nnx.relu(self.one(x)))
        y = nnx.relu(self.wide(x))
        return self.left(y) * self.right(y)


def test_branches_are_equalised_inside_and_a_layer_may_reach_several():
    model = ej.from_nnx(Residual, "x")
    batch = {"x": RNG.normal(size=(5, 4)).astype(np.float32)}
    params, state = model.init(jax.random.key(0), batch)
    params["wide"]["kernel"] = params["wide"]["kernel"] * jnp.array([10.0, 1.0, 0.1, 0.01])
    found = follow(model.apply, params, state, batch)
    assert {name: own.reaches for name, own in found.items() if not own.blocked} == {
        "one": ["two"],
        "wide": ["left", "right"],
    }
    after, _ = equalize(model.apply, params, state, batch, steps=60)
    want, got = output(model, params, state, batch), output(model, after, state, batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    both = np.maximum(np.abs(after["left"]["kernel"]), np.abs(after["right"]["kernel"])).max(1)
    np.testing.assert_allclose(np.abs(after["wide"]["kernel"]).max(0), both, rtol=1e-3)
    assert np.array_equal(after["two"]["bias"], params["two"]["bias"])
    with pytest.raises(SetupError, match="cannot rescale 'stem'"):
        equalize(model.apply, params, state, batch, ["stem"])


@pytest.mark.parametrize("act", [nn.relu6, nn.gelu, nn.silu, jnp.tanh])
def test_other_functions_are_refused(act):
    model, params, state = spread(act)
    with pytest.raises(SetupError, match="not positively homogeneous"):
        equalize(model.apply, params, state, IMAGES, ["stem"])
    after, _ = equalize(model.apply, params, state, IMAGES)  # what is possible is done
    assert np.array_equal(after["stem"]["kernel"], params["stem"]["kernel"])
    assert not np.array_equal(after["point"]["kernel"], params["point"]["kernel"])


def test_wrong_layers():
    model, params, state = spread()
    with pytest.raises(SetupError, match="'other', but the layers are"):
        equalize(model.apply, params, state, IMAGES, ["other"])
    with pytest.raises(SetupError, match="the model's outputs"):
        equalize(model.apply, params, state, IMAGES, ["head"])
    with pytest.raises(SetupError, match="steps=0"):
        equalize(model.apply, params, state, IMAGES, steps=0)
    dense = ej.from_linen(nn.Dense(2), "x")
    batch = {"x": np.ones((2, 3), np.float32)}
    with pytest.raises(SetupError, match=r"equalize\(\) finds no layer .* model's outputs"):
        equalize(dense.apply, *dense.init(jax.random.key(0), batch), batch)


@pytest.mark.parametrize("shape", [(), (8, 1)])
def test_what_is_added_has_a_number_for_each_channel(shape):
    def apply(params, model_state, batch, key, train):
        x = batch @ params["a"]["kernel"] + params["shift"]
        return jax.nn.relu(x) @ params["b"]["kernel"], model_state

    kernels = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(SetupError, match="add is not positively homogeneous"):
        equalize(apply, {**kernels, "shift": jnp.ones(shape)}, {}, jnp.ones((8, 3)))
