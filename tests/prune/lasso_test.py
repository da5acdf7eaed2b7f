"""Group lasso: penalty, gradient and proximal step by hand; training; masks of what became 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import Ctx, Setup, Vars
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune.lasso import group_lasso
from effjax.prune.patterns import block, channel, n_m, unstructured
from tests import nets

CTX = Ctx(jnp.int32(0), jax.random.key(0))
# Columns of norm 5, 0 and 13.
PARAMS = {"kernel": jnp.array([[3.0, 0.0, -5.0], [4.0, 0.0, 12.0]])}


def apply(params, model_state, batch, key, train):
    return jnp.sum(params["kernel"] * batch), model_state


def objective(lasso, params, batch=0.0):
    """The loss of one pass through the transform: sum(kernel * batch) and the loss terms."""
    model = ej.Model(lambda key, batch: (PARAMS, {}), apply)
    chained = ej.chain(lasso=lasso)
    state = ej.init_state(jax.random.key(0), model, chained, optax.sgd(1.0), jnp.float32(0))
    args = (state.model_state, state.transform, batch, CTX)
    out = ej.forward(apply, chained, Vars(params, state.vars.extra), *args)
    return out.outputs + out.loss


def test_the_penalty_and_its_gradient_by_hand():
    """0.1 * sqrt(2) * (5 + 0 + 13); each column's gradient is 0.1 * sqrt(2) * w / ||w||."""
    lasso = group_lasso(0.1, select="")
    total, grads = jax.value_and_grad(lambda p: objective(lasso, p))(PARAMS)
    assert float(total) == pytest.approx(0.1 * 2**0.5 * 18, rel=1e-6)
    expected = 0.1 * 2**0.5 * np.array([[0.6, 0, -5 / 13], [0.8, 0, 12 / 13]])
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (unstructured(), 24.0),
        (channel(-2), 3**0.5 * (34**0.5 + 160**0.5)),
        (block((2, 3)), 6**0.5 * 194**0.5),
        # A cut group has its own size: columns 0 and 1 together, and column 2.
        (channel(size=2, pad=True), 4**0.5 * 5 + 2**0.5 * 13),
    ],
)
def test_other_groups(pattern, expected):
    found = objective(group_lasso(1.0, pattern=pattern, select=""), PARAMS)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_proximal_step_by_hand():
    """rate * strength = 0.5 * 8 = 4: the norms 5 and 13 become max(0, n - 4 sqrt(2)): 0 and 7.34;
    and it is no part of the loss."""
    lasso = group_lasso(8.0, rate=0.5, select="")
    assert float(objective(lasso, PARAMS)) == 0.0
    setup = Setup(apply, {}, jnp.float32(0))
    extra, state = lasso.init(jax.random.key(0), PARAMS, setup)
    vars = Vars(PARAMS, extra)
    vars, _, _ = lasso.update(vars, (), state, vars, {}, CTX)
    factor = 1 - 4 * 2**0.5 / 13
    expected = [[0, 0, -5 * factor], [0, 0, 12 * factor]]
    np.testing.assert_allclose(vars.model["kernel"], expected, rtol=1e-6)
    metrics = lasso.report(vars, state, {}, CTX)
    assert float(metrics["groups"]) == pytest.approx(2 / 3)
    assert float(metrics["penalty"]) == pytest.approx(8 * 2**0.5 * 13 * factor, rel=1e-6)


def test_proximal_gradient_descent_finds_the_minimum():
    """min 1/2 ||w - c||² + strength sqrt(2) sum ||w_g|| is c shrunk group by group."""
    model = ej.Model(lambda key, batch: (PARAMS, {}), lambda p, s, b, k, t: (p["kernel"], s))
    transform = ej.chain(lasso=group_lasso(4.0, rate=0.3, select=""))
    tx = optax.sgd(0.3)
    target = PARAMS["kernel"]
    state = ej.init_state(jax.random.key(0), model, transform, tx, target)
    loss = lambda out, b: jnp.sum((out - b) ** 2) / 2  # noqa: E731
    step = jax.jit(ej.make_step(model.apply, transform, loss, tx))
    for _ in range(60):
        state, _ = step(state, target)
    factor = 1 - 4 * 2**0.5 / 13
    expected = [[0, 0, -5 * factor], [0, 0, 12 * factor]]
    np.testing.assert_allclose(state.vars.model["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("model", [nets.linen, nets.nnx_])
def test_filters_of_flax_models_become_exactly_zero(model):
    model, tx = model(), optax.adam(1e-2)
    transform = ej.chain(lasso=group_lasso(0.7, rate=1e-2))
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    for _ in range(30):
        state, metrics = step(state, nets.BATCH)
    kernel = np.asarray(state.vars.model["conv2"]["kernel"])
    zero = np.all(kernel == 0, axis=(0, 1, 2))
    assert zero.sum() > 0
    assert float(metrics["lasso/groups"]) == pytest.approx(zero.mean())
    masks = ej.prune.masks.nonzero(ej.export(transform, state), "^conv2/kernel")
    assert np.all(np.asarray(masks["conv2/kernel"])[..., zero] == 0)


def test_a_population_over_strengths():
    model, tx = nets.raw(), optax.sgd(0.1)

    def build(hyper):
        transform = ej.chain(lasso=group_lasso(hyper["strength"], rate=0.1, select="^hidden/k"))

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch)

        return ej.Run(init, ej.make_step(model.apply, transform, nets.loss, tx))

    runs = ej.population(build, {"strength": [0.0, 0.1, 100.0]}, mode="vmap")
    states = runs.init(jnp.stack([jax.random.key(0)] * 3), nets.BATCH)
    _, metrics = runs.step(states, nets.BATCH)
    np.testing.assert_array_equal(metrics["lasso/groups"], [0, 0, 1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: group_lasso(-1.0), ScheduleError, "strength"),
        (lambda: group_lasso(1.0, rate=-0.1), ScheduleError, "rate"),
        (lambda: group_lasso(1.0, pattern=n_m(2, 4)), SetupError, "N:M"),
        (lambda: objective(group_lasso(1.0, select="no"), PARAMS), SelectorError, "no"),
        (
            lambda: objective(group_lasso(1.0, select="", pattern=channel(size=2)), PARAMS),
            SetupError,
            "2",
        ),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
