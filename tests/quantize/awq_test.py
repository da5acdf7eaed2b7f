"""AWQ: by hand, against qwix, exact in floating point, and what it gains."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix.contrib import awq_core

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import awq, ptq
from experiments.models import vit

RNG = np.random.default_rng(0)
SIZES = jnp.array([1.0, 30.0, 0.5, 2.0, 8.0, 1.0])


def apply(params, model_state, batch, key, train):
    return jax.nn.relu(batch @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state


def network(outputs=5):
    """relu(x) of given sizes, into a matrix."""
    kernel = jnp.asarray(RNG.normal(size=(6, outputs)), jnp.float32)
    return {"a": {"kernel": jnp.eye(6)}, "b": {"kernel": kernel}}


def scales(params, after):
    return np.diag(params["a"]["kernel"]) / np.diag(after["a"]["kernel"])


def test_by_hand():
    # Steps of 1: alpha = 0 loses 0.4 of the weight that meets 9, and nothing of the other's. With
    # alpha = 1, s = 3, 1/3: 4.2 / 3 and 7 / 3 are on steps of 1/3, all but 0.2 / 3 of the first.
    params = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.array([[1.4], [7.0]])}}
    after, _ = awq(apply, params, {}, [jnp.array([[9.0, 1.0]])], bits=4, ratios=2)
    np.testing.assert_allclose(scales(params, after), [3.0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(after["b"]["kernel"], [[4.2], [7 / 3]], rtol=1e-6)
    # Where the first is on the grid and the second is not, it is left as it is.
    params["b"]["kernel"] = jnp.array([[7.0], [3.0]])
    after, _ = awq(apply, params, {}, [jnp.array([[9.0, 1.0]])], bits=4, ratios=2)
    assert scales(params, after).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("tile", [None, 3])
def test_the_scales_are_qwix(tile):
    params = network(outputs=2)
    signs = jnp.asarray(RNG.integers(0, 2, (50, 1)), jnp.float32) * 2 - 1
    # Inputs are 0 or of one size, half of the time: mean x^2 is in proportion to (mean |x|)^2.
    batch = jnp.maximum(signs * SIZES, 0)
    after, _ = awq(apply, params, {}, [batch], bits=4, tile=tile)
    how = SimpleNamespace(
        qtype=jnp.int4,
        channelwise_axes=(0,),
        tiled_axes={1: tile} if tile else {},
        calibration_method=f"absmax,{7.5 / 7!r}",  # effjax's grid
        noise_fn=None,
    )
    size = awq_core.compute_act_scale(batch)
    want = awq_core.search_optimal_scales(params["b"]["kernel"].T, size, how)
    np.testing.assert_allclose(scales(params, after), want[0], rtol=1e-4)
    assert np.ptp(want) > 0.1


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_less_is_lost(bits, per_channel):
    params = network(outputs=16)
    batch = jnp.asarray(np.abs(RNG.normal(size=(64, 6))), jnp.float32) * SIZES
    model = ej.Model(lambda key, batch: (params, {}), apply)
    want = apply(params, {}, batch, None, False)[0]

    quant = ej.quantize.qat(bits, 32, ranges="static", per_channel=per_channel, select="^b/")

    def lost(params):
        small = ptq(model, params, {}, [batch], transform=ej.chain(quant=quant))
        metrics = ej.make_eval(apply, small.transform, lambda out, b: {"lost": (out - want) ** 2})
        return float(metrics(small.state, batch)["lost"].value)

    after, _ = awq(apply, params, {}, [batch], bits=bits, per_channel=per_channel)
    assert lost(after) < 0.6 * lost(params)


def test_transformers_compute_what_they_did():
    spec = vit.Spec(features=8, heads=(2,), dim=4, hidden=(16,), size=8, patch=4)
    model = vit.model(spec)
    batch = {"image": jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)}
    params, state = model.init(jax.random.key(0), batch)
    norm = params["block_0"]["norm_0"]
    norm["scale"] = norm["scale"].at[2].set(100.0)
    want = model.apply(params, state, batch, jax.random.key(0), False)[0]
    after, moved = awq(model.apply, params, state, [batch], bits=3)
    got = model.apply(after, moved, batch, jax.random.key(0), False)[0]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert after["block_0"]["norm_0"]["scale"][2] < 90


def test_errors():
    params = network()
    with pytest.raises(SetupError, match="no calibration batches"):
        awq(apply, params, {}, [])
    with pytest.raises(SetupError, match="'a' has 6 outputs, and the tiles"):
        awq(apply, params, {}, [jnp.ones((1, 6))], tile=4)
    with pytest.raises(SetupError, match="bits"):
        awq(apply, params, {}, [jnp.ones((1, 6))], bits=0)
    with pytest.raises(SetupError, match="not finite"):
        awq(apply, params, {}, [jnp.full((1, 6), jnp.nan)])
    with pytest.raises(SetupError, match="ratios"):
        awq(apply, params, {}, [jnp.ones((1, 6))], ratios=0)
