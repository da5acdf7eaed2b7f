"""Training steps that multiply integers in the forward pass: `qat(forward="integer")`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import numerics, qat
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X

KEY = jax.random.key(0)


def gradients(f, transform, params, x):
    """The outputs of a training step, and the gradients of one random sum of them."""
    apply = lambda p, s, x, k, t: (f(p, x), s)  # noqa: E731
    state = transform.init(KEY, params, ej.Setup(apply, {}, x))[1]

    def forward(params, model_state, x, key, train):
        return f(params, x), model_state, {}

    def objective(params, x):
        wrapped = transform.wrap(forward, {}, state, ej.Ctx(jnp.int32(0), KEY))
        outputs = wrapped(params, {}, x, KEY, True)[0]
        rng = np.random.default_rng(1)
        total = sum(jnp.sum(rng.normal(size=o.shape) * o) for o in jax.tree.leaves(outputs))
        return total, outputs

    grads, outputs = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
    return outputs, grads


# A while loop has no reverse derivative.
EVERY = sorted(set(PROGRAMS) - {"while", "cond", "condition"})


@pytest.mark.parametrize("name", EVERY)
def test_it_is_what_floats_give_at_every_kind_of_site(name):
    f, params, x, *_ = PROGRAMS[name]
    given = {}
    if name == "embedding":
        given = {"select": "kernel|embedding", "embeddings": True}
    if name == "attention":
        given = {"products": True}
    found, wanted = (
        gradients(f, qat(6, 7, forward=kind, **given), params, jnp.abs(x))
        for kind in ("integer", "float")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"ranges": "static"},
        {"per_token": True},
        {"per_channel": False},
        {"rounding": "stochastic"},
        {"residuals": "float"},
        {"residuals": "float", "ranges": "static", "clipped": True},
        {"gradients": 8},
    ],
)
def test_gradients_are_bit_for_bit_those_of_floats(options):
    """What is multiplied forward does not enter the derivative of a site."""
    params = {"kernel": SQUARE}
    found, wanted = (
        gradients(lambda p, x: x @ p["kernel"], qat(4, 5, forward=kind, **options), params, X)
        for kind in ("integer", "float")
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])


def test_by_hand():
    """7·3 + 2·2 and -2·3 + 1·1 steps of 1 and of 0.7/3, as the integer program has them."""
    w = jnp.array([[3.0, 0.0], [-1.6, 0.7], [0.4, 0.2]])
    x = jnp.array([[7.0, -2.4, 0.6]])
    transform = qat(3, 4, forward="integer")
    outputs, _ = gradients(lambda p, x: x @ p["kernel"], transform, {"kernel": w}, x)
    np.testing.assert_allclose(outputs, [[25.0, -5 * 0.7 / 3]], rtol=1e-6)


def test_the_compiled_step_multiplies_integers_and_nothing_twice():
    def products(kind):
        transform, tx = qat(8, 8, forward=kind), optax.sgd(0.1)
        model = nets.linen()
        state = ej.init_state(KEY, model, transform, tx, nets.BATCH)
        step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
        text = step.lower(state, nets.BATCH).compile().as_text()
        found = re.findall(r" (\w+)\[[\d,]*\]\S* (?:dot|convolution)\(", text)
        sites = len(ej.find_sites(model.apply, state.vars.model, state.model_state, nets.BATCH))
        return sites, found.count("s32"), len(found) - found.count("s32")

    sites, of_integers, of_floats = products("integer")
    _, none, as_before = products("float")
    assert (of_integers, none) == (sites, 0)
    assert of_floats == as_before - sites


def test_in_bfloat16_the_sums_are_exact():
    """One rounding to bfloat16, of the exact sum; the product of floats rounds its operands too."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((64, 8), (16, 64)))

    def on_grid(x, axes):
        g = numerics.grid(8)
        scale = numerics.scale_of(numerics.absmax(x, axes), g)
        return np.asarray(numerics.round_to(x, scale, g), np.int64), scale

    (whole_w, s_w), (whole_x, s_x) = on_grid(w, (1,)), on_grid(x, ())
    exact = (whole_x @ whole_w).astype(np.float32) * (s_x * s_w)
    found, rounded = (
        gradients(lambda p, x: x @ p["kernel"], qat(8, 8, forward=kind), {"kernel": w}, x)[0]
        for kind in ("integer", "float")
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
    assert np.any(np.asarray(rounded) != np.asarray(found))


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_what_is_not_a_number_stays_none(ranges):
    """Integers have no NaN: they must not make one of the activations 0."""
    for kind in ("integer", "float"):
        transform = qat(8, 8, ranges=ranges, forward=kind)
        x = X.at[1, 2].set(jnp.nan)
        outputs, _ = gradients(lambda p, x: x @ p["kernel"], transform, {"kernel": SQUARE}, x)
        assert np.isnan(outputs[1]).all()


def test_evaluation_and_sites_with_one_float_operand_multiply_floats():
    params = {"kernel": SQUARE}
    f = lambda p, x: x @ p["kernel"]  # noqa: E731
    for bits in ((8, 32), (32, 8)):
        found, wanted = (
            gradients(f, qat(*bits, forward=kind), params, X) for kind in ("integer", "float")
        )
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    transform = qat(8, 8, forward="integer", ranges="static")
    apply = lambda p, s, x, k, t: (f(p, x), s)  # noqa: E731
    state = transform.init(KEY, params, ej.Setup(apply, {}, X))[1]

    def evaluate(params, x):
        def forward(params, model_state, x, key, train):
            return f(params, x), model_state, {}

        ctx = ej.Ctx(jnp.int32(0), KEY, train=False)
        return transform.wrap(forward, {}, state, ctx)(params, {}, x, KEY, False)[0]

    text = jax.jit(evaluate).lower(params, X).as_text()
    assert "xi8>" not in text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"forward": "int8"}, "forward is 'int8'"),
        ({"weights": jnp.int32(8)}, "traced bits"),
        ({"weights": 1}, "weights of one bit"),
        ({"start": 10}, "start=10"),
        ({"symmetric": False}, "symmetric=False"),
        ({"tile": 4}, "tile=4"),
        ({"ranges": "static", "freeze": 5}, "freeze=5"),
        ({"rules": [("^head/", ej.quantize.Bits(1, 8))]}, "weights of one bit"),
    ],
)
def test_what_cannot_be_multiplied_in_integers_is_refused(kwargs, message):
    with pytest.raises(SetupError, match=re.escape(message)):
        qat(**{"forward": "integer", **kwargs})


def test_sums_that_may_exceed_int32_are_refused():
    params, x = {"kernel": jnp.ones((140_000, 1))}, jnp.ones((1, 140_000))
    with pytest.raises(SetupError, match="may exceed int32"):
        gradients(lambda p, x: x @ p["kernel"], qat(forward="integer"), params, x)
