"""AWQ: by hand, against qwix and a search, exact in floating point, never worse, what it gains."""

import importlib
import itertools
import warnings
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix.contrib import awq_core
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import awq, ptq
from experiments.models import vit

SIZES = jnp.array([1.0, 30.0, 0.5, 2.0, 8.0, 1.0])


def apply(params, model_state, batch, key, train):
    return jax.nn.relu(batch @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state


def network(outputs=5):
    """relu(x) of given sizes, into a matrix."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, outputs)), jnp.float32)
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


def test_errors_that_cancel_by_hand():
    # Rounded to steps of 1 the weights are off by 0.05 and -0.45, which 9 and 1 make 0 of: the
    # outputs are right, and alpha = 1, which is better for each weight alone, would change them.
    params = {"a": {"kernel": jnp.eye(3)}, "b": {"kernel": jnp.array([[0.95], [2.45], [7.0]])}}
    after, _ = awq(apply, params, {}, [jnp.array([[9.0, 1.0, 1.0]])], bits=4, ratios=2)
    assert scales(params, after).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("tile", [None, 3])
def test_the_scales_are_qwix(tile):
    params = network(outputs=2)
    batch = jnp.diag(SIZES)  # the moments are diagonal, and in proportion to (mean |x|)²
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


def related():
    """Positive inputs [64, 6] of different sizes that are related to each other."""
    rng = np.random.default_rng(0)
    common, own = np.abs(rng.normal(size=(64, 1))), np.abs(rng.normal(size=(64, 6)))
    return (common + 0.3 * own) * np.asarray(SIZES)


def test_alpha_is_that_of_a_search_over_outputs():
    params = network(outputs=3)
    x, w = related(), np.asarray(params["b"]["kernel"], np.float64)
    after, _ = awq(apply, params, {}, np.split(np.float32(x), 2), bits=3)
    logs = np.log(np.abs(x).mean(0))
    logs -= (logs.max() + logs.min()) / 2
    tried = np.exp(np.linspace(0, 1, 20)[:, None] * logs)

    def lost(s):
        scaled = w * s[:, None]
        step = np.abs(scaled).max(0) / 3
        return np.sum((x @ (np.round(scaled / step) * step / s[:, None] - w)) ** 2)

    best = tried[np.argmin([lost(s) for s in tried])]
    np.testing.assert_allclose(scales(params, after), best, rtol=1e-4)


class Separable(nn.Module):
    """A convolution, a depthwise one, a pointwise one, a flattened dense one."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8, name="deep")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="point")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("front", "reader", "scale", "gain"),
    [
        ("stem", "deep", {}, -1e-3),  # each channel has a scale of its own already
        ("stem", "deep", {"per_channel": False}, 0.1),
        ("deep", "point", {"tile": 8}, 0.1),
        ("point", "head", {"tile": 4}, 0.1),  # of 16 positions of 6 channels
        ("point", "head", {"tile": 4, "per_channel": False}, 0.1),
    ],
)
def test_no_layer_loses_more(front, reader, scale, gain):
    model = ej.from_linen(Separable())
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(8, 4, 4, 3)), jnp.float32)}
    params, state = model.init(jax.random.key(1), batch)
    own = params[front]
    factors = np.exp(2 * rng.normal(size=own["bias"].shape)).astype(np.float32)
    own["kernel"] = own["kernel"] * factors
    quant = ej.chain(q=ej.quantize.qat(3, 32, ranges="static", select=f"^{reader}/", **scale))

    def decibels(params, reference):
        small = ptq(model, params, state, [batch], transform=quant)
        found = ej.quantize.signal_to_noise(
            model.apply, *small, batch, reference=(reference, state)
        )
        return found[f"{reader}/kernel"]

    before = decibels(params, params)
    after, _ = awq(model.apply, params, state, [batch], [front], bits=3, **scale)
    assert decibels(after, params) > before + gain
    clipped, _ = awq(model.apply, params, state, [batch], [front], bits=3, clip=True, **scale)
    assert decibels(clipped, params) >= decibels(after, params) - 1e-3
    assert np.array_equal(clipped[front]["kernel"], after[front]["kernel"])


def test_clipping_by_hand():
    # To -c, 0 or c: (1 - c)² + 3 (0.6 - c)² is least at 0.7. With a second output of ones and one
    # scale for both, 5 (1 - c)² + 3 (0.6 - c)² at 0.85.
    kernel = jnp.array([[1.0, 1.0], [0.6, 1.0], [0.6, 1.0], [0.6, 1.0]])
    params = {"a": {"kernel": jnp.eye(4)}, "b": {"kernel": kernel}}
    own = {"bits": 2, "clip": True}
    after, _ = awq(apply, params, {}, [jnp.eye(4)], **own)
    np.testing.assert_allclose(after["b"]["kernel"], jnp.minimum(kernel, jnp.array([0.7, 1.0])))
    after, _ = awq(apply, params, {}, [jnp.eye(4)], per_channel=False, **own)
    np.testing.assert_allclose(after["b"]["kernel"], jnp.minimum(kernel, 0.85))


@pytest.mark.parametrize(("groups", "inputs"), [(1, 6), (3, 4)])
def test_clipping_sees_the_inputs_as_they_are_scaled(groups, inputs):
    divided = importlib.import_module("effjax.quantize.awq")._divided
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, groups, inputs))
    s = rng.uniform(1, 3, 3)  # of a vector's channels, repeated; of groups, one each
    scaled = x / (s[:, None] if groups > 1 else np.tile(s, 2))

    def moments(x):
        return np.einsum("ngi,ngj->gij", x, x)

    found = divided(jnp.asarray(moments(x)), jnp.asarray(s))
    np.testing.assert_allclose(found, moments(scaled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_less_is_lost(bits, per_channel):
    params = network(outputs=16)
    batch = jnp.asarray(np.abs(np.random.default_rng(1).normal(size=(64, 6))), jnp.float32) * SIZES
    model = ej.Model(lambda key, batch: (params, {}), apply)
    want = apply(params, {}, batch, None, False)[0]

    quant = ej.quantize.qat(bits, 32, ranges="static", per_channel=per_channel, select="^b/")

    def lost(params):
        small = ptq(model, params, {}, [batch], transform=ej.chain(quant=quant))
        metrics = ej.make_eval(apply, small.transform, lambda out, b: {"lost": (out - want) ** 2})
        return float(metrics(small.state, batch)["lost"].value)

    after, _ = awq(apply, params, {}, [batch], bits=bits, per_channel=per_channel)
    assert lost(after) < (0.3 if per_channel else 0.6) * lost(params)


def test_a_trained_network_with_outlier_channels_keeps_its_accuracy():
    digits = load_digits()
    x, labels = digits.data.astype(np.float32) / 16, digits.target
    fitted = MLPClassifier((32, 32), max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(x[:1200], labels[:1200])
    names = ("one", "two", "head")
    params = {
        name: {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(b, jnp.float32)}
        for name, w, b in zip(names, fitted.coefs_, fitted.intercepts_, strict=True)
    }
    for name, after in itertools.pairwise(names):  # which computes the same
        factor = jnp.asarray(np.exp(np.random.default_rng(0).normal(size=32)), jnp.float32)
        params[name] = jax.tree.map(lambda leaf, f=factor: leaf * f, params[name])
        params[after]["kernel"] = params[after]["kernel"] / factor[:, None]

    def network(params, x):
        for name in names:
            x = x @ params[name]["kernel"] + params[name]["bias"]
            x = x if name == "head" else jax.nn.relu(x)
        return x

    model = ej.Model(lambda *_: (params, {}), ej.from_function(network, "x"))
    batches = [{"x": part} for part in np.split(x[:400], 4)]

    def accuracy(params, bits):
        small = ptq(model, params, {}, batches, bits, 32)
        right = ej.make_eval(
            model.apply, small.transform, lambda out, b: {"": out.argmax(-1) == labels[1200:]}
        )
        return float(right(small.state, {"x": x[1200:]})[""].value)

    float_ = accuracy(params, 16)
    after, _ = awq(model.apply, params, {}, batches, bits=3)
    clipped, _ = awq(model.apply, params, {}, batches, bits=3, clip=True)
    assert float_ > 0.85
    assert accuracy(params, 3) < float_ - 0.2
    assert accuracy(after, 3) > float_ - 0.05
    assert accuracy(clipped, 3) > float_ - 0.05


def test_transformers_compute_what_they_did():
    spec = vit.Spec(features=8, heads=(2,), dim=4, hidden=(16,), size=8, patch=4)
    model = vit.model(spec)
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 8, 8, 3))}
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
    with pytest.raises(SetupError, match=r"tile=4.*'b' sums over 6 inputs"):
        awq(apply, params, {}, [jnp.ones((1, 6))], tile=4)
    with pytest.raises(SetupError, match="bits"):
        awq(apply, params, {}, [jnp.ones((1, 6))], bits=0)
    with pytest.raises(SetupError, match="not finite"):
        awq(apply, params, {}, [jnp.full((1, 6), jnp.nan)])
    with pytest.raises(SetupError, match="ratios"):
        awq(apply, params, {}, [jnp.ones((1, 6))], ratios=0)
    with pytest.raises(SetupError, match="'tile': 0"):
        awq(apply, params, {}, [jnp.ones((1, 6))], tile=0)
