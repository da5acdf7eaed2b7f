"""GPTQ and AdaRound: by hand, against qwix and an exhaustive search, and on a trained network."""

import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from qwix.contrib import gptq_core
from sklearn.datasets import load_digits

import effjax as ej
from effjax.errors import SetupError, SiteError
from effjax.quantize import adaround, gptq, numerics, ptq, qat
from effjax.quantize.adaround import _solve, output_error, rectified_sigmoid
from effjax.quantize.gptq import gptq_matrix
from effjax.quantize.layerwise import ON_GRID, Problem

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6))  # related to each other
MOMENTS = jnp.asarray(INPUTS.T @ INPUTS / 200, jnp.float32)
X = [{"x": jnp.asarray(part, jnp.float32)} for part in np.split(INPUTS, 2)]


def test_gptq_by_hand():
    # H = [[2, 1], [1, 2]], its inverse [[2, -1], [-1, 2]] / 3 = UᵀU with U = [[a, -a/2], [0, ..]]:
    # the error 0.4 of the first weight moves the second by 0.4 / 2 up, from 1.4 to 1.6.
    moments = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    codes = gptq_matrix(jnp.array([[1.4, 1.4]]), moments, jnp.ones((1, 2)), 7, damping=1e-6)
    assert codes.tolist() == [[1, 2]]


def test_gptq_is_qwix():
    weight = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)
    how = SimpleNamespace(
        qtype=jnp.int8,
        channelwise_axes=(0,),
        tiled_axes={1: 3},
        calibration_method="absmax,1.2",  # nothing is clipped: qwix's grid has -128 too
        noise_fn=None,
    )
    want, _ = gptq_core.quantize_weight(weight, MOMENTS, how)
    scale = jnp.repeat(want.scale, 3, axis=1)
    assert gptq_matrix(weight, MOMENTS, scale, 127).tolist() == want.qvalue.tolist()


def test_the_rectified_sigmoid_by_hand():
    assert rectified_sigmoid(jnp.array([-9.0, 0.0, 9.0])).tolist() == [0, 0.5, 1]
    assert float(rectified_sigmoid(jnp.log(3.0))) == pytest.approx(1.2 * 0.75 - 0.1)


def test_adaround_finds_what_a_search_over_all_roundings_finds():
    weight = jnp.asarray(RNG.normal(size=(1, 8, 6)), jnp.float32)
    scale = jnp.full(weight.shape, 0.8)
    fixed = jnp.zeros(weight.shape, bool).at[0, :, 2].set(True)
    weight = jnp.where(fixed, 1.6, weight)
    problem = Problem(weight, MOMENTS[None], scale, jnp.asarray(7.0), fixed)
    found = _solve(problem, steps=1000, rate=0.02, regulariser=10.0)

    def error(codes):
        return np.asarray(output_error(scale * codes - weight, MOMENTS[None]))[0]

    ups = np.array(list(itertools.product((0, 1), repeat=6)))
    all_ = [error(jnp.floor(weight / scale) + jnp.asarray(up) * ~fixed) for up in ups]
    best, nearest = np.min(all_, axis=0), error(jnp.round(weight / scale))
    assert (np.asarray(found)[0, :, 2] == 2).all()
    steps = np.asarray(found - jnp.floor(weight / scale))
    assert set(np.unique(steps)) <= {0, 1}
    assert (error(found) <= nearest + 1e-6).all()
    assert error(found).sum() - best.sum() < 0.1 * (nearest.sum() - best.sum())
    assert nearest.sum() > 2 * best.sum()


class CNN(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(12, (3, 3), strides=2, name="one")(x))
        x = nn.relu(nn.Dense(32, name="two")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="head")(x)


@pytest.fixture(scope="module")
def trained():
    """A CNN trained on the digits, calibration batches, and examples that it has not seen."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    data = {
        "x": (digits.images[order, ..., None] / 16).astype(np.float32),
        "label": digits.target[order].astype(np.int32),
    }
    model, tx, plain = ej.from_linen(CNN(), "x"), optax.adam(3e-3), ej.chain()

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    def part(start, size):
        return {name: leaf[start : start + size] for name, leaf in data.items()}

    state = ej.init_state(jax.random.key(0), model, plain, tx, part(0, 100))
    step = jax.jit(ej.make_step(model.apply, plain, loss, tx))
    for i in range(150):
        state, _ = step(state, part(100 * i % 1200, 100))
    return model, state, [part(100 * i, 100) for i in range(4)], part(1200, 597)


def decibels(trained, small):
    """Signal to noise at the logits of examples not seen in training or calibration."""
    model, state, _, test = trained
    want = model.apply(state.vars.model, state.model_state, test, jax.random.key(0), False)[0]

    def error(out, batch):
        return {"noise": ((out - want) ** 2).sum(-1), "signal": (want**2).sum(-1)}

    seen = jax.jit(ej.make_eval(model.apply, small.transform, error))(small.state, test)
    return float(10 * jnp.log10(seen["signal"].total / seen["noise"].total))


@pytest.mark.slow
def test_learned_rounding_beats_rounding_to_nearest_on_a_trained_network(trained):
    model, state, batches, _ = trained
    given = model, state.vars.model, state.model_state, batches, 3, 32
    nearest = decibels(trained, ptq(*given))
    small = {name: ptq(*given, method=name) for name in ("gptq", "adaround")}
    for found in small.values():
        assert decibels(trained, found) > nearest + 5
        # What was learned is in the weights, which rounding to nearest leaves where they are.
        old, new = state.vars.model, found.state.vars.model
        for name in old:
            w, moved = (np.asarray(p[name]["kernel"]) for p in (old, new))
            over = tuple(range(w.ndim - 1))
            largest = np.abs(w).max(over)
            assert np.array_equal(np.abs(moved).max(over), largest)
            codes = moved * 3 / largest
            np.testing.assert_allclose(codes, np.round(codes), atol=3 * ON_GRID)
    moved = small["adaround"].state.vars.model["two"]["kernel"]
    w = state.vars.model["two"]["kernel"]
    step = numerics.scale_of(numerics.absmax(w, (1,)), numerics.grid(3))
    assert float(jnp.max(jnp.abs(moved - w) / step)) < 1  # up or down, no further


def test_zeros_stay_and_what_is_rounded_stays():
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32).at[::2].set(0)}
    model = ej.Model(
        lambda key, batch: (params, {}), ej.from_function(lambda p, x: x @ p["kernel"], "x")
    )
    for method in ("gptq", "adaround"):
        first = ptq(model, params, {}, X, 4, 32, method=method)
        kernel = first.state.vars.model["kernel"]
        assert not jnp.any(kernel[::2])
        assert not jnp.array_equal(kernel, params["kernel"])
        again = ptq(model, first.state.vars.model, {}, X, 4, 32, method=method)
        np.testing.assert_allclose(again.state.vars.model["kernel"], kernel, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"per_channel": False}, {"tile": 3}])
def test_scales_for_a_tensor_and_for_tiles(kwargs):
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)}
    apply = ej.from_function(lambda p, x: jnp.tanh(x @ p["kernel"].T), "x")  # another layout
    params = {"kernel": params["kernel"].T}
    quant = qat(4, 32, **kwargs)
    state = ej.init_state(
        jax.random.key(0), ej.Model(lambda *_: (params, {}), apply), quant, optax.identity(), X[0]
    )
    moved = gptq(apply, quant, state, X).vars.model["kernel"]
    w = np.asarray(params["kernel"])
    largest = np.abs(w).max() if "tile" not in kwargs else np.abs(w.reshape(4, 2, 3)).max(-1)
    codes = np.asarray(moved).reshape(4, 2, 3) * 7 / np.reshape(largest, (*np.shape(largest), 1))
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert not np.array_equal(moved, w)


def test_errors():
    def start(quant, apply, shape=(6, 4), dtype=jnp.float32):
        params = {"kernel": jnp.ones(shape, dtype), "other": jnp.ones(3)}
        model = ej.Model(lambda *_: (params, {}), ej.from_function(apply, "x"))
        return (
            model.apply,
            quant,
            ej.init_state(jax.random.key(0), model, quant, optax.identity(), X[0]),
        )

    plain = start(qat(4, 32), lambda p, x: x @ p["kernel"])
    for run in (gptq, adaround):
        with pytest.raises(SetupError, match="no calibration batches"):
            run(*plain, [])
        with pytest.raises(SetupError, match="used up after once"):
            run(*plain, iter(X))
        with pytest.raises(SetupError, match=r"no quantized weight that 'other'.*\['kernel'\]"):
            run(*plain, X, select="other")
        with pytest.raises(SetupError, match="inputs of kernel are not finite"):
            run(*plain, [{"x": jnp.full((4, 6), jnp.nan)}])
    with pytest.raises(SetupError, match="damping"):
        gptq(*plain, X, damping=0)
    with pytest.raises(SetupError, match="'steps': 0"):
        adaround(*plain, X, steps=0)
    with pytest.raises(SetupError, match="grids"):
        gptq(*start(ej.quantize.lsq(4, 32), lambda p, x: x @ p["kernel"]), X)
    with pytest.raises(SiteError, match="several times in different layouts"):
        gptq(*start(qat(4, 32), lambda p, x: x @ p["kernel"] @ p["kernel"].T), X)
    with pytest.raises(SetupError, match="method is 'best'"):
        ptq(ej.Model(None, None), {}, {}, X, method="best")
