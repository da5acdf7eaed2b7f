"""The same numbers as qwix's own provider, which patches JAX while a Flax module runs.

qwix is asked for effjax's grid (ranges over 127, not 127.5). Its convolutions have one scale for
each image, which with one image is one scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import effjax as ej
from effjax.quantize.integer import integer

# qwix asks flax for a name that flax has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

GRID = f"absmax,{127.5 / 127!r}"
RNG = np.random.default_rng(0)


class Dense(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(32, name="hidden")(x)))


class Conv(nn.Module):
    """Two convolutions, one strided, and a dense layer. (qwix has no gradient of grouped ones.)"""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="second")(x))
        return nn.Dense(8, name="head")(x.reshape(x.shape[0], -1))


def provided(module, **config):
    """The module under qwix: one scale for the activations, one per channel of the weights."""
    rule = qwix.QtRule(
        weight_qtype=jnp.int8,
        act_qtype=jnp.int8,
        weight_calibration_method=GRID,
        act_calibration_method=GRID,
        additional_qt_config={"lhs_disable_channelwise_axes": True, **config},
    )
    return qwix.quantize_model(module, qwix.QtProvider([rule]))


def loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


MODELS = {"dense": (Dense(), (16, 24)), "conv": (Conv(), (1, 8, 8, 4))}


@pytest.fixture(params=MODELS)
def model(request):
    module, shape = MODELS[request.param]
    batch = {
        "image": jnp.asarray(RNG.normal(size=shape), jnp.float32),
        "label": jnp.asarray(RNG.integers(0, 8, shape[0])),
    }
    variables = module.init(jax.random.key(1), batch["image"])
    return module, variables["params"], batch


def started(model, tx, **options):
    module, params, batch = model
    ours, transform = ej.from_linen(module), ej.chain(quant=ej.quantize.qat(**options))
    state = ej.init_state(
        jax.random.key(0), ours, transform, tx, batch, params=params, model_state={}
    )
    return ours, transform, state


def test_the_integer_program_is_qwix_in_integers(model):
    """Both sum the same integers; the scales' last bits differ by qwix's factor 127.5 / 127."""
    module, params, batch = model
    ours, transform, state = started(model, optax.sgd(1.0))
    program = integer(ours.apply, transform, state, batch)
    outputs, _ = program.apply(program.weights, {}, batch, None, False)
    theirs = provided(module).apply({"params": params}, batch["image"])
    np.testing.assert_allclose(outputs, theirs, rtol=1e-5, atol=2e-6)
    plain = module.apply({"params": params}, batch["image"])
    assert np.abs(plain - theirs).max() > 1e-3  # qwix did quantize


@pytest.mark.parametrize("forward", ["float", "integer"])
@pytest.mark.parametrize("residuals", ["rounded", "float"])
def test_gradients_are_qwix_with_the_same_residuals(model, residuals, forward):
    """Plain gradient descent at rate 1 moves the weights by their gradient.

    qwix's convolutions know rounded residuals only: of a network with them, what its last layer
    gets is compared under the other choice, which nothing but its own residuals decides."""
    module, params, batch = model
    tx = optax.sgd(1.0)
    ours, transform, state = started(model, tx, residuals=residuals, forward=forward)
    after, metrics = jax.jit(ej.make_step(ours.apply, transform, loss, tx))(state, batch)

    def gradients(original):
        theirs = provided(module, use_original_residuals=original)

        def objective(params):
            return loss(theirs.apply({"params": params}, batch["image"]), batch)

        return jax.value_and_grad(objective)(params)

    value, grads = gradients(residuals == "float")
    _, others = gradients(residuals != "float")
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    asked = "^head/" if residuals == "float" and "first" in params else ""
    for path, grad in ej.select.select(grads, asked).items():
        moved = ej.select.leaves(params)[path] - ej.select.leaves(after.vars.model)[path]
        # Differences of weights have the weights' rounding.
        np.testing.assert_allclose(moved, grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max())
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), grads, others)
    assert max(jax.tree.leaves(apart)) > 1e-3  # the choice makes a difference


def test_qwix_keeps_float_residuals_by_default(model):
    module, params, batch = model

    def gradient(module):
        return jax.grad(lambda p: loss(module.apply({"params": p}, batch["image"]), batch))(params)

    ours = gradient(provided(module, use_original_residuals=True))
    jax.tree.map(np.testing.assert_array_equal, gradient(provided(module)), ours)
