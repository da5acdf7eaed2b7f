"""SmoothQuant: by hand, exact in floating point, and what it gains where a channel is large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SetupError
from effjax.quantize import ptq, smooth
from experiments.models import vit

RNG = np.random.default_rng(0)


def test_by_hand():
    def apply(params, model_state, batch, key, train):
        return jax.nn.relu(batch @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state

    params = {"a": {"kernel": jnp.array([[8.0, 1.0]])}, "b": {"kernel": jnp.array([[0.5], [1.0]])}}
    after, _ = smooth(apply, params, {}, [jnp.array([[1.0], [2.0]])])
    # The inputs of b reach 16 and 2: s = sqrt(16 / 0.5), sqrt(2 / 1).
    s = np.sqrt([32, 2])
    np.testing.assert_allclose(after["a"]["kernel"], [[8 / s[0], 1 / s[1]]], rtol=1e-6)
    np.testing.assert_allclose(after["b"]["kernel"][:, 0], [0.5 * s[0], s[1]], rtol=1e-6)


@pytest.mark.parametrize("library", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_a_transformers_large_channels_move_into_weights(library):
    spec = vit.Spec(features=8, heads=(2,), dim=4, hidden=(16,), size=8, patch=4)
    model = vit.model(spec, library)
    batch = {"image": jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)}
    params, state = model.init(jax.random.key(0), batch)
    block = params["block_0"]
    for norm in ("norm_0", "norm_1"):  # outliers, as large language models have
        block[norm]["scale"] = block[norm]["scale"].at[2].set(100.0)
    want = model.apply(params, state, batch, jax.random.key(0), False)[0]
    after, moved = smooth(model.apply, params, state, [batch])
    assert after["block_0"]["norm_0"]["scale"][2] < 30
    got = model.apply(after, moved, batch, jax.random.key(0), False)[0]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)

    def decibels(params, state):
        small = ptq(model, params, state, [batch], 8, 8, estimator="minmax")
        found = ej.quantize.signal_to_noise(model.apply, *small, batch)
        return found["block_0/dense_0/kernel"]

    assert decibels(after, moved) > decibels(params, state) + 3


def test_errors():
    def apply(params, model_state, batch, key, train):
        return jnp.tanh(batch @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state

    params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    with pytest.raises(SetupError, match="tanh is not positively homogeneous"):
        smooth(apply, params, {}, [jnp.ones((1, 1))])
    with pytest.raises(SetupError, match="no calibration batches"):
        smooth(apply, params, {}, [])
    with pytest.raises(ScheduleError, match="alpha"):
        smooth(apply, params, {}, [jnp.ones((1, 1))], alpha=1.5)
