"""Learned sparsity: values and gradients by hand, the penalty, what is shipped, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import Ctx
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune.learned import hard_concrete, soft_threshold
from effjax.prune.patterns import channel, n_m
from tests import nets

TRAIN = Ctx(jnp.int32(0), jax.random.key(0))
EVAL = TRAIN._replace(train=False)


def train(transform, steps, tx=None, model=None):
    model, tx = model or nets.raw(), tx or optax.adam(2e-2)
    chained = ej.chain(prune=transform)
    state = ej.init_state(jax.random.key(0), model, chained, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chained, nets.loss, tx))
    history = []
    for _ in range(steps):
        state, metrics = step(state, nets.BATCH)
        history.append({name: float(value) for name, value in metrics.items()})
    assert step._cache_size() <= 1  # jax may drop entries, in a long process
    return chained, state, history


# Soft thresholds.

WEIGHTS = {"kernel": jnp.array([[2.0, -0.75, 0.25, -0.5]])}


def test_soft_thresholds_and_their_gradients_by_hand():
    """sigmoid(0) = 1/2, sigmoid'(0) = 1/4; |w| = 1/2 is not above the threshold."""
    prune = soft_threshold(select="")
    slopes = jnp.array([[10.0, 20.0, 30.0, 40.0]])

    def total(weights, s):
        return jnp.sum(
            slopes * prune.view(weights, {"threshold": {"kernel": s}}, {}, TRAIN)["kernel"]
        )

    seen = prune.view(WEIGHTS, {"threshold": {"kernel": jnp.float32(0)}}, {}, EVAL)["kernel"]
    np.testing.assert_array_equal(seen, [[1.5, -0.25, 0, 0]])
    dw, ds = jax.grad(total, (0, 1))(WEIGHTS, jnp.float32(0))
    np.testing.assert_array_equal(dw["kernel"], [[10, 20, 0, 0]])
    assert float(ds) == pytest.approx(-0.25 * (10 - 20))


def test_weights_below_the_threshold_come_back():
    prune = soft_threshold(select="")
    seen = [
        prune.view(WEIGHTS, {"threshold": {"kernel": jnp.float32(s)}}, {}, EVAL)["kernel"]
        for s in (3.0, -3.0)
    ]
    assert [int(jnp.sum(x != 0)) for x in seen] == [1, 4]


def test_decay_of_the_thresholds_makes_the_network_sparse():
    prune = soft_threshold(-5.0, decay=1.0, select="kernel$")
    rates = {"thresholds": optax.adam(4e-2), "weights": optax.adam(1e-3)}
    labels = [("threshold", "thresholds"), ("", "weights")]
    tx = optax.partition(rates, lambda vars: ej.select.label_tree(vars, labels))
    transform, state, history = train(prune, 100, tx)
    assert history[0]["prune/threshold"] == pytest.approx(1.0 / 2 * 2 * 25)
    assert history[0]["prune/sparsity"] < 0.1 < 0.4 < history[-1]["prune/sparsity"]
    assert history[-1]["prune/sparsest"] >= history[-1]["prune/sparsity"]
    shipped = ej.select.leaves(ej.export(transform, state))
    zeros = sum(int(jnp.sum(shipped[p] == 0)) for p in ("hidden/kernel", "head/kernel"))
    assert history[-1]["prune/sparsity"] == pytest.approx(zeros / 2304)
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    assert facts["head/kernel"]["sparsity"] == float(jnp.mean(shipped["head/kernel"] == 0))


def test_half_precision_weights_stay_so():
    prune = soft_threshold(0.0, select="")
    params = {"kernel": WEIGHTS["kernel"].astype(jnp.bfloat16)}
    extra, _ = prune.init(jax.random.key(0), params, None)
    seen = prune.view(params, extra, {}, EVAL)["kernel"]
    assert seen.dtype == jnp.bfloat16
    assert extra["threshold"]["kernel"].dtype == jnp.float32


# Hard concrete gates.


def gates(*values):
    return {"gate": {"kernel": jnp.array([values], jnp.float32)}}


def test_gates_in_evaluation_by_hand():
    """sigmoid(0) = 1/2 gives z = 1/2; sigmoid(-3) = 0.047 gives -0.043, so 0; sigmoid(3) 1.043."""
    prune = hard_concrete(0.1, select="")
    seen = prune.view(WEIGHTS, gates(0.0, -3.0, 3.0, 1.0), {}, EVAL)["kernel"]
    z = 1.2 / (1 + np.exp(-1)) - 0.1
    np.testing.assert_allclose(seen, [[1.0, 0.0, 0.25, -0.5 * z]], rtol=1e-6)
    shipped = prune.export(WEIGHTS, gates(0.0, -3.0, 3.0, 1.0), {})["kernel"]
    np.testing.assert_array_equal(seen, shipped)


def test_gates_in_training_follow_the_hard_concrete_distribution():
    """P(z = 0) and P(z = 1) are those of the paper, over 20000 gates of log a = 0.3."""
    prune = hard_concrete(0.1, select="")
    params = {"kernel": jnp.ones((100, 200))}
    extra = {"gate": {"kernel": jnp.full((100, 200), 0.3)}}
    z = np.asarray(prune.view(params, extra, {}, TRAIN)["kernel"])
    assert z.min() == 0
    assert z.max() == 1

    def below(x):  # P(stretched s <= x)
        inner = (x + 0.1) / 1.2
        return 1 / (1 + np.exp(-(2 / 3 * np.log(inner / (1 - inner)) - 0.3)))

    assert np.mean(z == 0) == pytest.approx(below(0.0), abs=0.01)
    assert np.mean(z < 1) == pytest.approx(below(1.0), abs=0.01)
    assert np.mean(z <= 0.5) == pytest.approx(below(0.5), abs=0.01)
    other = prune.view(params, extra, {}, TRAIN._replace(key=jax.random.key(1)))["kernel"]
    assert not np.array_equal(z, other)


def test_the_penalty_is_the_expected_fraction_of_weights_that_are_left():
    prune = hard_concrete(2.0, select="", pattern=channel())
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((1, 2))}
    _, state = prune.init(jax.random.key(0), params, None)
    extra = {"gate": {"a": jnp.array([[0.0, 1.0]]), "b": jnp.array([[-1.0, 2.0]])}}
    p = 1 / (1 + np.exp(-(np.array([0.0, 1.0, -1.0, 2.0]) - 2 / 3 * np.log(0.1 / 1.1))))
    expected = 2.0 * (3 * p[0] + 3 * p[1] + p[2] + p[3]) / 8
    found = prune.loss(None, None, {}, extra, state, TRAIN)["l0"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_channels_vanish_whole_and_the_rest_learns():
    prune = hard_concrete(4.0, pattern=channel(), select="^hidden/kernel")
    transform, state, history = train(prune, 120)
    shipped = np.asarray(ej.export(transform, state)["hidden"]["kernel"])
    off = np.all(shipped == 0, axis=0)
    assert 3 <= off.sum() < 32
    assert np.all(shipped[:, ~off] != 0)
    assert history[-1]["prune/sparsity"] == pytest.approx(off.mean())
    masks = ej.prune.masks.nonzero(ej.export(transform, state), "^hidden/kernel")
    np.testing.assert_array_equal(np.asarray(masks["hidden/kernel"])[0], ~off)


@pytest.mark.parametrize("model", [nets.linen, nets.nnx_])
@pytest.mark.parametrize("make", [soft_threshold, lambda: hard_concrete(0.1)])
def test_flax_models(make, model):
    _, state, history = train(make(), 3, model=model())
    assert [list(x) for x in state.vars.extra["prune"].values()] == [["conv2/kernel"]]
    assert np.isfinite(history[-1]["loss"])


def test_a_population_over_strengths():
    model, tx = nets.raw(), optax.adam(2e-2)

    def build(hyper):
        gates = hard_concrete(hyper["strength"], select="^hidden/kernel", pattern=channel())
        transform = ej.chain(prune=gates)

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch)

        return ej.Run(init, ej.make_step(model.apply, transform, nets.loss, tx))

    runs = ej.population(build, {"strength": [0.0, 50.0]}, mode="vmap")
    states = runs.init(jnp.stack([jax.random.key(0)] * 2), nets.BATCH)
    for _ in range(10):
        states, metrics = runs.step(states, nets.BATCH)
    assert float(metrics["prune/l0"][0]) == 0.0
    means = [
        float(runs.member(states, i).vars.extra["prune"]["gate"]["hidden/kernel"].mean())
        for i in range(2)
    ]
    assert means[1] < means[0] - 0.05


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: soft_threshold(decay=-1.0), ScheduleError, "-1"),
        (lambda: hard_concrete(-0.1), ScheduleError, "-0.1"),
        (lambda: hard_concrete(0.1, droprate=1.0), ScheduleError, "droprate"),
        (lambda: hard_concrete(0.1, pattern=n_m(2, 4)), SetupError, "movement"),
        (lambda: train(soft_threshold(select="nowhere"), 0), SelectorError, "nowhere"),
        (
            lambda: train(hard_concrete(0.1, select="kernel", pattern=channel(size=5)), 0),
            SetupError,
            "5",
        ),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
