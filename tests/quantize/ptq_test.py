"""Post-training quantization in one call, with its options."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import ptq
from tests import nets

RNG = np.random.default_rng(0)
IMAGES = {"image": RNG.normal(size=(8, 6, 6, 3)).astype(np.float32)}


class LinenDepthwise(nn.Module):
    """An inverted residual block between a stem and a head."""

    @nn.compact
    def __call__(self, image, train=False):
        def norm(x, name):
            return nn.BatchNorm(not train, name=f"{name}_norm")(x)

        def conv(x, name, features, size=1, groups=1):
            own = nn.Conv(
                features, (size, size), feature_group_count=groups, use_bias=False, name=name
            )
            return norm(own(x), name)

        x = nn.relu(conv(image, "stem", 6, 3))
        y = nn.relu(conv(x, "expand", 12))
        y = nn.relu(conv(y, "deep", 12, 3, 12))
        x = x + conv(y, "project", 6)
        return nn.Dense(4, name="head")(x.mean(axis=(1, 2)))


class NNXDepthwise(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        for name, *shape in (("stem", 3, 6, 3), ("expand", 6, 12), ("project", 12, 6)):
            self.conv(name, *shape, rngs=rngs)
        self.conv("deep", 12, 12, 3, 12, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def conv(self, name, features, out, size=1, groups=1, *, rngs):
        own = nnx.Conv(
            features, out, (size, size), feature_group_count=groups, use_bias=False, rngs=rngs
        )
        setattr(self, name, own)
        setattr(self, f"{name}_norm", nnx.BatchNorm(out, rngs=rngs))

    def __call__(self, image):
        def run(x, name):
            return getattr(self, f"{name}_norm")(getattr(self, name)(x))

        x = nnx.relu(run(image, "stem"))
        y = nnx.relu(run(nnx.relu(run(x, "expand")), "deep"))
        return self.head((x + run(y, "project")).mean(axis=(1, 2)))


NORMS = ("stem", "expand", "deep", "project")


def trained(library):
    """A depthwise residual network whose depthwise channels have very different ranges, as trained
    ones do."""
    model = ej.from_linen(LinenDepthwise())
    params, state = model.init(jax.random.key(0), IMAGES)
    if library == "nnx":
        model = ej.from_nnx(NNXDepthwise, "image")
    stats, rng = state["batch_stats"], np.random.default_rng(1)
    for name in NORMS:
        size = params[f"{name}_norm"]["scale"].size
        spread = np.logspace(-2, 2, size, dtype=np.float32) if name == "deep" else np.ones(size)
        params[f"{name}_norm"]["bias"] = jnp.asarray(rng.normal(size=size), jnp.float32)
        stats[f"{name}_norm"]["mean"] = jnp.asarray(spread * rng.normal(size=size), jnp.float32)
        stats[f"{name}_norm"]["var"] = jnp.asarray(spread**2, jnp.float32)
        params[name]["kernel"] = params[name]["kernel"] * jnp.asarray(spread, jnp.float32)
    return model, params, state if library == "linen" else stats


def decibels(model, params, model_state, small, batch=IMAGES):
    """Signal to noise at the outputs."""
    want = model.apply(params, model_state, batch, jax.random.key(0), False)[0]

    def error(out, batch):
        return {"noise": ((out - want) ** 2).sum(-1), "signal": (want**2).sum(-1)}

    seen = jax.jit(ej.make_eval(model.apply, small.transform, error))(small.state, batch)
    return float(10 * jnp.log10(seen["signal"].total / seen["noise"].total))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_equalised_and_corrected_depthwise_networks_keep_their_signal(library):
    model, params, state = trained(library)
    own = {"per_channel": False, "activations": 32}
    plain = ptq(model, params, state, [IMAGES], 8, **own)
    equal = ptq(model, params, state, [IMAGES], 8, equalize=True, **own)
    both = ptq(model, params, state, [IMAGES], 8, equalize=True, bias_correction=True, **own)
    before, after, last = (decibels(model, params, state, s) for s in (plain, equal, both))
    assert before + 10 < after < last


def test_activations_are_calibrated_between_equalisation_and_correction():
    model, params, state = trained("linen")
    small = ptq(model, params, state, [IMAGES], 8, 8, equalize=True, bias_correction=True)
    assert decibels(model, params, state, small) > 25
    table = ej.inspect(
        model.apply, params, IMAGES, state, transform=small.transform, state=small.state
    )
    assert str(table).count(" 8 ") >= 5  # every site


def test_empty_calibration_sets_and_wrong_bits():
    model, params, state = trained("linen")
    with pytest.raises(SetupError, match="no batches"):
        ptq(model, params, state, [])
    with pytest.raises(SetupError, match="9 bits"):
        ptq(model, params, state, [IMAGES], 9)
    gelu = nets.raw()
    weights = gelu.init(jax.random.key(0), nets.BATCH)[0]
    tanh = gelu._replace(
        apply=lambda p, s, b, k, t: (
            jnp.tanh(b["image"].reshape(-1, 64) @ p["hidden"]["kernel"]) @ p["head"]["kernel"],
            s,
        )
    )
    with pytest.raises(SetupError, match="tanh is not positively homogeneous"):
        ptq(tanh, weights, {}, [nets.BATCH], equalize=True)


def test_signal_to_noise_by_hand():
    params = {"kernel": jnp.array([[1.0], [0.4]])}
    apply = ej.from_function(lambda p, x: x @ p["kernel"], "x")
    model = ej.Model(lambda *_: (params, {}), apply)
    batch = {"x": jnp.eye(2)}
    small = ptq(model, params, {}, [batch], 2, 32)  # 0.4 becomes 0
    found = ej.quantize.signal_to_noise(apply, *small, batch)
    want = 10 * np.log10((1 + 0.16) / 0.16)
    assert found == {name: pytest.approx(want, rel=1e-5) for name in found}
    assert list(found) == ["kernel", "outputs of the model"]
    with pytest.raises(SetupError, match="no quantized layer"):
        ej.quantize.signal_to_noise(apply, ej.chain(), small.state._replace(transform={}), batch)
