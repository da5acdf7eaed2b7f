"""Freezing: what training left as a function on integers, compared with evaluation in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize.frozen import compare
from tests import nets

IMAGES = {"image": nets.BATCH["image"]}


def trained(model, transform, steps=4, rate=3e-3):
    """A short training, and the ranges of its end."""
    tx = optax.adam(rate)
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    for _ in range(steps):
        state, _ = step(state, nets.BATCH)
    return state


def qat(**options):
    return ej.chain(quant=ej.quantize.qat(8, 8, ranges="static", decay=0.0, **options))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_cnn_with_batchnorm_is_folded_to_integers(library):
    model = nets.linen() if library == "linen" else nets.nnx_()
    transform = qat()
    state = trained(model, transform)
    frozen = ej.quantize.freeze(model.apply, transform, state, [nets.BATCH])
    assert frozen.distance.mean < 0.01 * frozen.distance.scale
    assert frozen.distance.agreement > 0.9
    assert [site.bias for site in frozen.sites] == [True] * 3
    # BatchNorm is gone: nothing but integers and scales is left.
    kinds = {name.rpartition(":")[2]: x.dtype for name, x in frozen.weights.items()}
    assert kinds == {"weight": jnp.int8, "scale": jnp.float32, "bias": jnp.int32}
    assert [n for n in frozen.quantizers if not n.endswith("weight")] == [
        "conv1/kernel:input",
        "conv2/kernel:input",
        "conv2/kernel:output",
        "head/kernel:input",
    ]


def test_marked_and_plain_are_the_same_function_at_any_size():
    model, transform = nets.raw(), qat()
    state = trained(model, transform)
    frozen = ej.quantize.freeze(model.apply, transform, state, [nets.BATCH])
    plain = frozen.apply(frozen.weights, IMAGES)
    np.testing.assert_array_equal(plain, frozen.marked(frozen.floats(), IMAGES))
    few = {"image": IMAGES["image"][:3]}
    np.testing.assert_allclose(plain[:3], frozen.apply(frozen.weights, few), rtol=1e-5, atol=1e-6)
    jaxpr = jax.make_jaxpr(frozen.marked)(frozen.floats(), IMAGES).jaxpr
    names = [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "composite"]
    assert names == ["quant.fake_quant"] * 4  # two inputs, two weights


def test_ranges_that_were_never_seen_are_an_error():
    model, transform = nets.raw(), qat()
    state = ej.init_state(jax.random.key(0), model, transform, optax.identity(), nets.BATCH)
    with pytest.raises(SetupError, match=r"never calibrated.*calibrate"):
        ej.quantize.freeze(model.apply, transform, state, [nets.BATCH])


def test_compare_by_hand():
    found = compare(np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 0.0], [4.0, 3.0]]))
    assert found == (0.5, 2.0, 2.5, 0.5, 2)
