"""Choosing a sub-network, and its BatchNorm statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import effjax as ej

BATCH = {"image": jnp.ones((4, 3))}
GROUPS = {"one": r"(^|/)(one|bn)/"}


class LinenMlp(linen.Module):
    momentum: float = 0.99

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(4, name="one")(x)
        calls = self.variable("counter", "calls", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            calls.value += 1
        norm = linen.BatchNorm(use_running_average=not train, momentum=self.momentum, name="bn")
        return linen.Dense(2, name="head")(linen.relu(norm(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(3, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.one(x))))


def start(model, transform):
    return ej.init_state(jax.random.key(0), model, transform, optax.sgd(0.1), BATCH)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_statistics_are_the_mean_over_batches_whatever_the_momentum(flavour):
    model = ej.from_linen(LinenMlp()) if flavour == "linen" else ej.from_nnx(NnxMlp)
    nas = ej.chain(nas=ej.nas.width(GROUPS, (0.5, 1.0)))
    state = ej.nas.subnet(start(model, nas), jnp.array([0]))
    x = 5 + 3 * jax.random.normal(jax.random.key(3), (6, 16, 3))
    recalibrate = jax.jit(ej.nas.make_recalibrate(model.apply, nas))
    found = recalibrate(state, {"image": x})
    params = ej.export(nas, state)
    hidden = np.asarray(x @ params["one"]["kernel"] + params["one"]["bias"])
    stats = found.model_state["batch_stats"] if flavour == "linen" else found.model_state
    np.testing.assert_allclose(stats["bn"]["mean"], hidden.mean(1).mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["bn"]["var"], hidden.var(1).mean(0), rtol=1e-4, atol=1e-4)
    assert np.asarray(stats["bn"]["var"])[2:].tolist() == [0, 0]
    # All else is as it was, and another architecture compiles nothing again.
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found.vars, state.vars))
    if flavour == "linen":
        assert int(found.model_state["counter"]["calls"]) == 0
    recalibrate(ej.nas.subnet(state, jnp.array([1])), {"image": x})
    assert recalibrate._cache_size() <= 1  # jax may drop entries, in a long process


def test_recalibration_maps_over_architectures():
    model = ej.from_linen(LinenMlp())
    nas = ej.chain(nas=ej.nas.width(GROUPS, (0.25, 0.5, 1.0)))
    state, x = start(model, nas), jax.random.normal(jax.random.key(3), (2, 8, 3))
    space = ej.nas.width_space(state.vars.model, GROUPS, (0.25, 0.5, 1.0))
    recalibrate = ej.nas.make_recalibrate(model.apply, nas)

    def variances(arch):
        found = recalibrate(ej.nas.subnet(state, arch), {"image": x})
        return found.model_state["batch_stats"]["bn"]["var"]

    found = jax.vmap(variances)(space.enumerate())
    assert (np.asarray(found) > 0).sum(1).tolist() == [1, 2, 4]


def test_nothing_to_recalibrate_is_an_error():
    model, nas = ej.from_linen(LinenMlp()), ej.chain()
    with pytest.raises(ej.errors.SelectorError, match="selector 'running' matches no leaf"):
        ej.nas.make_recalibrate(model.apply, nas, "running")(start(model, nas), BATCH)


def test_subnet_finds_its_state_and_changes_nothing_else():
    model = ej.from_linen(LinenMlp())
    state = start(model, ej.chain(nas=ej.nas.width(GROUPS)))
    changed = ej.nas.subnet(state, np.array([1]))
    assert changed.transform["nas"]["width"].tolist() == [1]
    assert changed.transform["nas"]["width"].dtype == jnp.int32
    assert state.transform["nas"]["width"].tolist() == [3]
    assert changed.vars is state.vars
    assert ej.nas.subnet(state.transform["nas"], jnp.array([2]))["width"].tolist() == [2]
    bare = start(model, ej.nas.width(GROUPS))
    assert ej.nas.subnet(bare, jnp.array([2])).transform["width"].tolist() == [2]

    two = start(model, ej.chain(a=ej.nas.width(GROUPS), b=ej.nas.width({"h": "head"})))
    assert ej.nas.subnet(two, jnp.array([0]), "b").transform["b"]["width"].tolist() == [0]
    with pytest.raises(ej.errors.SetupError, match=r"one width search.*\['a', 'b'\]"):
        ej.nas.subnet(two, jnp.array([0]))
    with pytest.raises(ej.errors.SetupError, match="named 'c'"):
        ej.nas.subnet(two, jnp.array([0]), "c")
    with pytest.raises(ej.errors.SetupError, match=r"one width search.*\[\]"):
        ej.nas.subnet(start(model, ej.chain()), jnp.array([0]))
    for wrong in (jnp.array([0, 1]), jnp.array([0.5])):
        with pytest.raises(ej.errors.SetupError, match="one index into"):
            ej.nas.subnet(state, wrong)
