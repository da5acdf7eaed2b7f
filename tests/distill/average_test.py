"""A student taught by the average of its own weights, by hand."""

import jax
import numpy as np
import optax
import pytest

import effjax as ej
from tests import nets

MODEL = nets.raw()


def test_the_teacher_is_the_average_by_hand_and_gets_no_gradient():
    chain = ej.chain(kd=ej.distill.mean_teacher(MODEL.apply, decay=0.6, temperature=2.0, alpha=0.5))
    tx = optax.sgd(0.5)
    state = ej.init_state(jax.random.key(0), MODEL, chain, tx, nets.BATCH)
    step = jax.jit(ej.make_step(MODEL.apply, chain, nets.loss, tx))
    params = average = state.vars.model

    def objective(params, average):
        mine, taught = (MODEL.apply(p, {}, nets.BATCH, None, True)[0] for p in (params, average))
        return nets.loss(mine, nets.BATCH) + 0.5 * ej.distill.kl(mine, taught, 2.0).mean()

    for d in (0.0, 0.5, 0.6, 0.6):
        value, grads = jax.value_and_grad(objective)(params, average)
        state, metrics = step(state, nets.BATCH)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, params)
    assert float(metrics["kd/kl"]) > 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state.vars.model,
        params,
    )
    for path, value in ej.select.leaves(average).items():
        got = state.transform["kd"]["average"][path]
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5)


def test_numbers_out_of_range_are_errors():
    with pytest.raises(ej.errors.SetupError, match=r"decay.*last thousand steps"):
        ej.distill.mean_teacher(MODEL.apply, decay=1.0)
    with pytest.raises(ej.errors.SetupError, match="alpha is -1"):
        ej.distill.mean_teacher(MODEL.apply, alpha=-1)
    with pytest.raises(ej.errors.SetupError, match="temperature is 0"):
        ej.distill.mean_teacher(MODEL.apply, temperature=0)
