"""What freezing makes of each kind of layer, on small functions worked out by hand or in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import effjax as ej
from effjax.errors import SetupError, SiteError
from effjax.quantize.affine import folded
from effjax.quantize.grids import integers
from effjax.quantize.marker import Quantizer, fake_quant

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype(np.float32)
BATCH = {"x": X}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def frozen(f, params, transform=None, *, batch=None, bits=(8, 8), **options):
    """A plain function, its ranges the largest values of one batch."""
    batch = BATCH if batch is None else batch

    def apply(params, model_state, batch, key, train):
        return f(params, batch["x"]), model_state

    model = ej.Model(lambda key, batch: (params, {}), apply)
    small = ej.quantize.ptq(
        model, params, {}, [batch], *bits, estimator="minmax", transform=transform
    )
    return ej.quantize.freeze(apply, small.transform, small.state, [batch], **options)


def grid(x, bound=127):
    s = np.abs(x).max() / bound
    return np.round(x / s), s


def test_what_follows_a_layer_goes_into_its_integers_scales_and_bias():
    w, g, b = normal(6, 2), jnp.array([-2.0, 0.5]), jnp.array([0.3, -0.7])
    found = frozen(lambda p, x: (x @ p["kernel"] - 1.0) * p["g"] + p["b"], _tree(w, g=g, b=b))
    codes, scales = zip(*(grid(np.asarray(w)[:, i]) for i in range(2)), strict=True)
    np.testing.assert_array_equal(
        found.weights["kernel:weight"], np.stack([-codes[0], codes[1]], 1)
    )
    steps = np.array([2.0 * scales[0], 0.5 * scales[1]])
    np.testing.assert_allclose(found.weights["kernel:scale"], steps, rtol=1e-6)
    _, s_x = grid(X)
    shift = np.array([2.0 + 0.3, -0.5 - 0.7])
    np.testing.assert_array_equal(found.weights["kernel:bias"], np.round(shift / (s_x * steps)))
    names = {"kernel:weight", "kernel:scale", "kernel:bias", "kernel:input:scale"}
    assert set(found.weights) == names
    # The bias is rounded by half a step at most, and nothing else differs from evaluation.
    assert found.distance.largest <= 0.5 * (s_x * steps).max() + 1e-5


def _tree(kernel, **others):
    return {"kernel": kernel, **others}


def test_a_channel_that_vanishes_keeps_its_shift():
    factor, shift = np.array([0.0, 1e-20]), np.array([0.5, -3.0])
    codes, scale, bias = folded(
        np.array([[5, 5]]), np.full(2, 0.1), factor, shift, np.float32(0.01)
    )
    assert codes.tolist() == [[0, 0]]
    np.testing.assert_allclose(bias * (np.float32(0.01) * scale), shift, rtol=1e-6)


def test_a_residual_shares_the_grid_of_the_next_layer():
    def f(p, x):
        x = jax.nn.relu(x @ p["a"]["kernel"])
        for name in "bc":
            x = jax.nn.relu(x + x @ p[name]["kernel"])
        return x.reshape(x.shape[0], 2, 3).mean(1) @ p["d"]["kernel"]

    params = {name: {"kernel": 0.3 * normal(6, 6)} for name in "abc"}
    params["d"] = {"kernel": normal(3, 4)}
    found = frozen(f, params)
    activations = {n: q for n, q in found.quantizers.items() if not n.endswith(":weight")}
    assert list(activations) == [
        "a/kernel:input",
        "b/kernel:input",  # the ReLU's result, also what is added to
        "b/kernel:output",
        "c/kernel:input",
        "c/kernel:output",
        "sum#1:output",  # before pooling
        "d/kernel:input",
    ]
    unsigned = {
        n for n, q in activations.items() if (q.low, q.high, q.zero_point) == (0, 255, -128)
    }
    assert unsigned == {"b/kernel:input", "c/kernel:input", "sum#1:output", "d/kernel:input"}
    assert found.distance.mean < 0.02 * found.distance.scale


def test_outputs_are_rounded_where_asked():
    params = _tree(normal(6, 2))
    float_, rounded = (
        frozen(lambda p, x: x @ p["kernel"], params, outputs=how) for how in ("float", "rounded")
    )
    assert "kernel:output" not in float_.quantizers
    y = np.asarray(float_.apply(float_.weights, BATCH))
    s = np.float32((y.max() - y.min()) / 255)
    first = round(float(y.min() / s))
    want = np.clip(np.round(y / s), first, first + 255) * s
    np.testing.assert_allclose(rounded.apply(rounded.weights, BATCH), want, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_matrices_of_heads_are_flattened(side):
    w = normal(6, 2, 3)

    def f(p, x):
        numbers = ((1,), (0,)) if side == 1 else ((0,), (1,))
        pair = (x, p["kernel"]) if side == 1 else (p["kernel"], x)
        y = lax.dot_general(*pair, (numbers, ((), ())))
        y = y if side == 1 else y.transpose(2, 0, 1)
        return y + p["bias"]

    found = frozen(f, _tree(w, bias=normal(2, 3)))
    assert found.weights["kernel:weight"].shape == (6, 6)
    assert found.quantizers["kernel:weight"].axis == 1
    assert found.distance.largest < 1e-3 * found.distance.scale or side == 0
    assert found.distance.mean < 0.01 * found.distance.scale


def test_layers_of_a_scan_are_written_out():
    params = _tree(0.5 * normal(3, 6, 6), bias=normal(3, 6))

    def f(p, x):
        def layer(x, own):
            return jax.nn.relu(x @ own["kernel"] + own["bias"]), None

        return lax.scan(layer, x, p)[0]

    found = frozen(f, params)
    assert [site.path for site in found.sites] == [f"kernel[{i}]" for i in range(3)]
    assert found.distance.mean < 0.01 * found.distance.scale


def test_four_bits_are_clipped_to_their_range():
    params = {"a": {"kernel": normal(6, 6)}, "b": {"kernel": normal(6, 2)}}
    found = frozen(
        lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"], params, bits=(4, 4)
    )
    assert found.distance.largest < 1e-5 * found.distance.scale
    more = {"x": 10 * X}
    codes = found.codes(found.weights, more)
    assert (int(codes["a/kernel:input"].min()), int(codes["a/kernel:input"].max())) == (-7, 7)
    assert (int(codes["b/kernel:input"].min()), int(codes["b/kernel:input"].max())) == (0, 7)
    plain = found.apply(found.weights, more)
    np.testing.assert_allclose(found.marked(found.floats(), more), plain, atol=1e-5)
    assert found.nbytes == (36 + 12) // 2


def test_asymmetric_ranges_have_a_zero_point():
    transform = ej.chain(quant=ej.quantize.qat(8, 8, ranges="static", symmetric=False))
    shifted = {"x": X + 2}
    found = frozen(lambda p, x: x @ p["kernel"], _tree(normal(6, 2)), transform, batch=shifted)
    own = found.quantizers["kernel:input"]
    assert own.high - own.low == 255
    assert own.low + own.zero_point == -128
    assert found.distance.largest < 1e-4 * found.distance.scale


@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "pact"])
def test_learned_steps_are_those_of_training(quantizer):
    make = {"lsq": ej.quantize.lsq, "lsq_plus": ej.quantize.lsq_plus, "pact": ej.quantize.pact}
    transform = ej.chain(quant=make[quantizer](4, 4))
    params = {"a": {"kernel": normal(6, 6)}, "b": {"kernel": normal(6, 2)}}

    def apply(params, model_state, batch, key, train):
        x = jax.nn.relu(batch["x"] @ params["a"]["kernel"])
        return x @ params["b"]["kernel"], model_state

    model = ej.Model(lambda key, batch: (params, {}), apply)
    tx = optax.sgd(0.01)
    state = ej.init_state(jax.random.key(0), model, transform, tx, BATCH)
    step = jax.jit(ej.make_step(apply, transform, lambda y, batch: jnp.mean(y**2), tx))
    for _ in range(2):
        state, _ = step(state, BATCH)
    found = ej.quantize.freeze(apply, transform, state, [BATCH])
    assert found.distance.largest < 1e-5 * found.distance.scale
    own = found.quantizers["b/kernel:input"]
    assert (own.low, own.high) == (0, 15)


def test_masks_are_zeros_among_the_integers():
    transform = ej.chain(
        prune=ej.prune.magnitude(0.5, select="kernel$"),
        quant=ej.quantize.qat(8, 8, ranges="static", decay=0.0),
    )
    params = _tree(normal(6, 4))

    def apply(params, model_state, batch, key, train):
        return batch["x"] @ params["kernel"], model_state

    model = ej.Model(lambda key, batch: (params, {}), apply)
    tx = optax.sgd(0.0)
    state = ej.init_state(jax.random.key(0), model, transform, tx, BATCH)
    state, _ = jax.jit(ej.make_step(apply, transform, lambda y, b: jnp.mean(y**2), tx))(
        state, BATCH
    )
    found = ej.quantize.freeze(apply, transform, state, [BATCH])
    assert int((found.weights["kernel:weight"] == 0).sum()) == 12


def test_integers_of_any_uniform_grid():
    values = np.array([[0.3, -0.2, 0.0], [0.1, 0.2, 0.0]], np.float32)
    codes, scales = integers("w", values, (1,), 8)
    np.testing.assert_allclose(codes * scales, values, rtol=1e-6)
    assert codes.dtype == np.int8
    assert scales.shape == (1, 3)
    with pytest.raises(SetupError, match="no grid of equal steps"):
        integers("w", RNG.normal(size=(40, 1)).astype(np.float32), (1,), 8)


def test_quantizers_by_hand():
    x = jnp.array([-1.0, 0.24, 0.26, 40.0])
    four = Quantizer("x", np.float32(0.5), 0, 15)
    assert four.clips
    assert fake_quant(x, four).tolist() == [0.0, 0.0, 0.5, 7.5]
    assert fake_quant(x, four, marked=False).tolist() == [0.0, 0.0, 0.5, 7.5]
    whole = Quantizer("x", np.float32(0.5), 0, 255)
    assert not whole.clips
    assert whole.zero_point == -128
    assert not Quantizer("x", np.float32(0.5), -127, 127).clips
    with pytest.raises(SetupError, match="float32"):
        fake_quant(x.astype(jnp.bfloat16), whole)


def test_what_cannot_be_frozen_says_why():
    params = _tree(normal(6, 6))

    def f(p, x):
        return x @ p["kernel"]

    def over_time(p, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ p["kernel"]), None), x, None, length=2)[0]

    with pytest.raises(SiteError, match="every iteration of a loop"):
        frozen(over_time, params)
    with pytest.raises(SetupError, match=r"outputs is 'int8'"):
        frozen(f, params, outputs="int8")
    with pytest.raises(SiteError, match="weight in floating point"):
        frozen(f, params, bits=(32, 8))

    def apply(params, model_state, batch, key, train):
        return f(params, batch["x"]), model_state

    model = ej.Model(lambda key, batch: (params, {}), apply)
    for transform, match in (
        (ej.chain(quant=ej.quantize.qat(8, 8)), "takes their range from each batch"),
        (ej.chain(prune=ej.prune.magnitude(0.5, select="kernel$")), "found 0 quantizers"),
    ):
        state = ej.init_state(jax.random.key(0), model, transform, optax.identity(), BATCH)
        with pytest.raises(SetupError, match=match):
            ej.quantize.freeze(apply, transform, state, [BATCH])
    with pytest.raises(SetupError, match="no batches"):
        ej.quantize.freeze(apply, transform, state, [])
