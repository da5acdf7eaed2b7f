"""Bias correction: the mean error at every layer is gone afterwards."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize.correct import correct_bias
from tests import nets

RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.exponential(size=(32, 8)).astype(np.float32)} for _ in range(2)]
QUANT = ej.chain(q=ej.quantize.qat(2, 32))


class Net(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16, name="one", use_bias=self.bias)(x))
        return nn.Dense(3, name="two")(x)


def start(model, transform, batch):
    return ej.init_state(jax.random.key(0), model, transform, optax.identity(), batch)


def mean_error(model, transform, state, batches, reference):
    """Of the model's outputs, by output."""
    errors = []
    for batch in batches:
        want = model.apply(*reference, batch, jax.random.key(0), False)[0]
        evaluate = ej.make_eval(model.apply, transform, lambda out, b, w=want: parts(out - w))
        errors.append([float(m.value) for m in evaluate(state, batch).values()])
    return np.mean(errors, axis=0)


def parts(x):
    return {str(i): x[:, i] for i in range(x.shape[1])}


def test_by_hand_and_to_zero():
    model = ej.from_linen(Net(), "x")
    state = start(model, QUANT, BATCHES[0])
    float_ = state.vars.model, state.model_state
    after = correct_bias(model.apply, QUANT, state, BATCHES)
    before = mean_error(model, QUANT, state, BATCHES, float_)
    assert np.abs(before).max() > 0.05
    assert np.abs(mean_error(model, QUANT, after, BATCHES, float_)).max() < 1e-5
    kernel = np.asarray(state.vars.model["one"]["kernel"])
    scale = np.abs(kernel).max(0)
    error = kernel - scale * np.clip(np.round(kernel / scale), -1, 1)
    inputs = np.concatenate([batch["x"] for batch in BATCHES])
    np.testing.assert_allclose(
        after.vars.model["one"]["bias"], inputs.mean(0) @ error, rtol=1e-3, atol=1e-5
    )
    assert np.array_equal(after.vars.model["one"]["kernel"], kernel)


@pytest.mark.parametrize("make", [nets.linen, nets.nnx_])
def test_without_a_bias_it_goes_into_the_running_mean(make):
    model = make()
    state = start(model, QUANT, nets.BATCH)
    float_ = state.vars.model, state.model_state
    after = correct_bias(model.apply, QUANT, state, [nets.BATCH])
    assert np.abs(mean_error(model, QUANT, after, [nets.BATCH], float_)).max() < 1e-5
    old, new = (ej.select.leaves(s.model_state) for s in (state, after))
    changed = {path.rpartition("/")[2] for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {"mean"}


def test_errors():
    model = ej.from_linen(Net(bias=False), "x")
    state = start(model, QUANT, BATCHES[0])
    with pytest.raises(SetupError, match=r"nowhere to put a correction of \['one/kernel'\]"):
        correct_bias(model.apply, QUANT, state, BATCHES)
    with pytest.raises(SetupError, match="no calibration batches"):
        correct_bias(model.apply, QUANT, state, [])
    with pytest.raises(SetupError, match="used up"):
        correct_bias(model.apply, QUANT, state, iter(BATCHES))
    empty = ej.chain()
    with pytest.raises(SetupError, match="no quantized layer"):
        correct_bias(model.apply, empty, start(model, empty, BATCHES[0]), BATCHES)
