"""Averages of weights: by hand, with weights that are pruned and come back, and what is shipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import Ctx, Vars
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune.averages import ema
from tests import nets


def run(values, decay):
    """The averages of a weight that takes these values after each step."""
    average = ema(decay)
    extra, state = average.init(jax.random.key(0), {"w": jnp.array([7.0])}, None)
    found = []
    for step, value in enumerate(values):
        vars = Vars({"w": jnp.array([value], jnp.float32)}, extra)
        ctx = Ctx(jnp.int32(step), jax.random.key(0))
        _, _, state = average.update(vars, (), state, vars, {}, ctx)
        found.append(float(average.export(vars.model, extra, state)["w"][0]))
    return found


def test_an_average_by_hand():
    """1, then (1/2 * 1 + 2) / (1/2 + 1), then (1/4 * 1 + 1/2 * 2 + 4) / (1/4 + 1/2 + 1)."""
    assert run([1.0, 2.0, 4.0], 0.5) == pytest.approx([1.0, 5 / 3, 3.0])


def test_a_weight_that_comes_back_starts_anew():
    assert run([8.0, 6.0, 0.0, 0.0, 1.0, 2.0], 0.5) == pytest.approx([8, 20 / 3, 0, 0, 1, 5 / 3])


def test_it_is_the_bias_corrected_average():
    values = np.random.default_rng(0).normal(size=40) + 3
    plain, expected = 0.0, []
    for n, value in enumerate(values, 1):
        plain = 0.9 * plain + 0.1 * value
        expected.append(plain / (1 - 0.9**n))
    np.testing.assert_allclose(run(values, 0.9), expected, rtol=1e-5)


def test_a_schedule_of_the_decay():
    assert run([1.0, 3.0, 9.0], lambda t: jnp.where(t < 2, 0.0, 0.5)) == pytest.approx([1, 3, 6])


PRUNED = {
    "rigl": lambda: ej.prune.rigl(0.8, 1, 12, 2, select="kernel$"),
    "magnitude": lambda: ej.prune.magnitude(0.8, begin=1, end=9, select="kernel$"),
}


@pytest.mark.parametrize("method", PRUNED)
def test_what_is_pruned_is_zero_in_the_average_at_every_step(method):
    model, tx = nets.raw(), optax.adamw(1e-2)
    transform = ej.chain(prune=PRUNED[method](), average=ema(0.9))
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    evaluate = jax.jit(ej.make_eval(model.apply, transform, lambda out, b: {"first": out[:, 0]}))
    for _ in range(14):
        state, metrics = step(state, nets.BATCH)
        shipped = ej.select.leaves(ej.export(transform, state))
        for path, mask in state.transform["prune"]["mask"].items():
            assert not np.any(np.asarray(shipped[path])[~np.asarray(mask)])
    assert float(metrics["average/distance"]) > 0
    # Evaluation sees the averages, training the weights.
    out = model.apply(ej.export(transform, state), {}, nets.BATCH, None, False)[0]
    seen = evaluate(state, nets.BATCH)["first"].value
    np.testing.assert_allclose(seen, out[:, 0].mean(), rtol=1e-5)
    raw = model.apply(state.vars.model, {}, nets.BATCH, None, False)[0]
    assert abs(float(seen - raw[:, 0].mean())) > 1e-5


def test_in_front_of_masks_that_live_in_the_view():
    model, tx = nets.raw(), optax.adam(1e-2)
    transform = ej.chain(average=ema(0.9), prune=ej.prune.ste(0.7, select="kernel$"))
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    for _ in range(4):
        state, _ = step(state, nets.BATCH)
    shipped = ej.select.leaves(ej.export(transform, state))
    for path, mask in state.transform["prune"]["mask"].items():
        average = state.transform["average"]["average"][path]
        np.testing.assert_array_equal(shipped[path], np.where(mask, average, 0))


def test_a_population_over_decays():
    model, tx = nets.raw(), optax.adam(1e-2)

    def build(hyper):
        transform = ej.chain(average=ema(hyper["decay"], select="kernel$"))

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch)

        return ej.Run(init, ej.make_step(model.apply, transform, nets.loss, tx))

    runs = ej.population(build, {"decay": [0.0, 0.9]}, mode="vmap")
    states = runs.init(jnp.stack([jax.random.key(0)] * 2), nets.BATCH)
    for _ in range(3):
        states, _ = runs.step(states, nets.BATCH)
    first, second = (runs.member(states, i) for i in range(2))
    kernel = first.vars.model["hidden"]["kernel"]
    average = first.transform["average"]["average"]
    assert list(average) == ["head/kernel", "hidden/kernel"]
    np.testing.assert_allclose(average["hidden/kernel"], kernel, rtol=1e-5, atol=1e-7)
    slow = second.transform["average"]["average"]["hidden/kernel"]
    assert not np.allclose(slow, kernel, rtol=1e-4)


def test_what_is_refused():
    with pytest.raises(ScheduleError, match=r"1\.0"):
        ema(1.0)
    with pytest.raises(SetupError, match="int32"):
        ema(0.9).init(jax.random.key(0), {"table": jnp.zeros(3, jnp.int32)}, None)
    with pytest.raises(SelectorError, match="nowhere"):
        ema(0.9, select="nowhere").init(jax.random.key(0), {"w": jnp.zeros(3)}, None)
