"""Population-based training: selection, exploration and copies, alone and on populations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import SetupError
from effjax.nas import pbt
from effjax.nas.pbt import Prior

PRIORS = {"lr": Prior(1e-3, 1.0, log=True), "decay": Prior(0.0, 0.5)}
K = 5
truncation = jax.jit(pbt.truncation, static_argnums=2)


def test_the_worst_copy_the_best():
    scores = jnp.array([0.5, 0.9, 0.1, jnp.nan, 0.8, 0.6, 0.7, 0.2, 0.3, 0.4])
    seen = set()
    for seed in range(20):
        parents = np.asarray(truncation(jax.random.key(seed), scores, 0.2))
        assert np.flatnonzero(parents != np.arange(10)).tolist() == [2, 3]
        seen |= set(parents[[2, 3]].tolist())
    assert seen == {1, 4}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=6, max_size=6),
    st.sampled_from([0.1, 0.34, 0.5]),
    st.integers(0, 100),
)
def test_nobody_copies_a_worse_one(scores, fraction, seed):
    parents = np.asarray(truncation(jax.random.key(seed), jnp.array(scores, float), fraction))
    scores = np.array(scores)
    assert (scores[parents] >= scores).all()
    assert (parents != np.arange(6)).sum() == {0.1: 1, 0.34: 2, 0.5: 3}[fraction]


def test_half_of_the_population_may_copy_the_other_half():
    parents = np.asarray(pbt.truncation(jax.random.key(0), jnp.arange(4.0), 0.5))
    assert set(parents[:2]) <= {2, 3}
    assert parents[2:].tolist() == [2, 3]


def test_exploring_perturbs_or_draws_anew_within_the_priors():
    size = 4000
    hypers = {"lr": jnp.full(size, 0.9), "decay": jnp.full(size, 0.2), "seed": jnp.arange(size)}
    moved = jnp.arange(size) % 2 == 0
    found = pbt.explore(jax.random.key(0), hypers, moved, PRIORS, (0.5, 2.0), 0.25)
    lr, decay = np.asarray(found["lr"])[::2], np.asarray(found["decay"])[::2]
    assert (found["lr"][1::2] == hypers["lr"][1::2]).all()
    assert (found["seed"] == hypers["seed"]).all()
    assert lr.min() >= np.float32(1e-3)
    assert lr.max() <= 1.0  # 1.8 is outside of the prior
    for values, low, high in ((lr, 0.45, 1.0), (decay, 0.1, 0.4)):
        share = [(np.isclose(values, x)).mean() for x in (low, high)]
        assert share == pytest.approx([0.375, 0.375], abs=0.04)
    fresh = lr[~(np.isclose(lr, 0.45) | np.isclose(lr, 1.0))]
    assert np.log10(fresh).mean() == pytest.approx(-1.5, abs=0.15)
    # One hyper-parameter is drawn anew without the other.
    other = ~(np.isclose(decay, 0.1) | np.isclose(decay, 0.4))
    both = other & ~(np.isclose(lr, 0.45) | np.isclose(lr, 1.0))
    assert both.mean() == pytest.approx(1 / 16, abs=0.02)


def loss(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"]).mean()


def accuracy(out, batch):
    return {"accuracy": (out.argmax(-1) == batch["label"]).astype(float)}


def build(hyper):
    tx = optax.chain(optax.add_decayed_weights(hyper["decay"]), optax.sgd(hyper["lr"], 0.9))
    model = ej.from_linen(Net())

    def init(key, batch, frozen):
        return ej.init_state(key, model, ej.chain(), tx, batch)

    return ej.Run(
        init,
        ej.make_step(model.apply, ej.chain(), loss, tx),
        ej.make_eval(model.apply, ej.chain(), accuracy),
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    return {"image": image, "label": jnp.argmax(image[:, :3], -1)}


@functools.cache
def made(mode):
    """A population, compiled once for all tests, its first hypers and a round's end."""
    hypers = pbt.draw(jax.random.key(7), PRIORS, K)

    @jax.jit
    def evolve(key, states, hypers, scores):
        return pbt.evolve(key, states, hypers, scores, priors=PRIORS, fraction=0.4)

    return ej.population(build, hypers, mode), hypers, evolve


def rounds(mode, batch, count, start=None):
    """States, hypers and events after so many rounds of 3 steps, from round `start` on."""
    key = jax.random.key(7)
    runs, hypers, evolve = made(mode)
    at, states = 0, runs.init(jax.random.split(key, K), batch)
    if start is not None:
        at, states, hypers = start
    events = []
    with ej.testing.compilations("evolve") as compiled:
        for number in range(at, count):
            for _ in range(3):
                states, _ = runs.step(states, batch, hypers=hypers)
            scores = runs.evaluate(states, batch, hypers=hypers)["accuracy"].value
            states, hypers, event = evolve(jax.random.fold_in(key, number), states, hypers, scores)
            events.append(event)
    assert len(compiled) <= 1
    return runs, states, hypers, events


def weights(runs, states):
    return jax.tree.leaves(runs.stack(states).vars)


def test_side_by_side_and_mapped_decide_alike_and_a_resumed_one_the_same(batch):
    mapped, states, hypers, events = rounds("map", batch, 3)
    whole = rounds("vmap", batch, 3)
    for one, other in zip(events, whole[3], strict=True):
        assert one.parent.tolist() == other.parent.tolist()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), one.after, other.after)
    for a, b in zip(weights(mapped, states), weights(whole[0], whole[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    _, half, middle, _ = rounds("map", batch, 2)
    _, again, then, _ = rounds("map", batch, 3, (2, half, middle))
    for a, b in zip(weights(mapped, states), weights(mapped, again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {n: x.tolist() for n, x in then.items()} == {n: x.tolist() for n, x in hypers.items()}
    moved = [int((e.parent != jnp.arange(K)).sum()) for e in events]
    assert moved == [2, 2, 2]


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_copy_has_its_parents_weights_and_its_own_random_numbers(batch, mode):
    runs, states, _, _ = rounds(mode, batch, 1)
    parents = jnp.array([0, 0, 2, 4, 4])
    found = jax.jit(pbt.copied)(states, parents)
    for k, parent in enumerate(parents.tolist()):
        mine, theirs, own = (
            runs.member(found, k),
            runs.member(states, parent),
            runs.member(states, k),
        )
        jax.tree.map(np.testing.assert_array_equal, mine.vars, theirs.vars)
        jax.tree.map(np.testing.assert_array_equal, mine.opt, theirs.opt)
        assert (jax.random.key_data(mine.key) == jax.random.key_data(own.key)).all()
        assert int(mine.step) == 3
    found, _ = runs.step(found, batch)
    assert not np.allclose(*(runs.member(found, k).vars.model["Dense_0"]["kernel"] for k in (0, 1)))


@pytest.mark.parametrize(
    ("priors", "match"),
    [
        ({}, "at least one"),
        ({"lr": Prior(1.0, 0.1)}, "low < high"),
        ({"lr": Prior(0.0, 0.1, log=True)}, "logarithmic"),
        ({"lr": Prior(0.0, float("inf"))}, "low < high"),
    ],
)
def test_priors_that_cannot_be_meant(priors, match):
    with pytest.raises(SetupError, match=match):
        pbt.draw(jax.random.key(0), priors, 4)


def test_what_else_cannot_be_meant():
    with pytest.raises(SetupError, match="'seed'"):
        pbt.explore(jax.random.key(0), {"seed": jnp.ones(2)}, jnp.ones(2, bool), PRIORS)
    for scores, fraction in ((jnp.ones(1), 0.2), (jnp.ones(4), 0.6), (jnp.ones(4), 0.0)):
        with pytest.raises(SetupError, match="truncation selection"):
            pbt.truncation(jax.random.key(0), scores, fraction)
