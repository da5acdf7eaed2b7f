"""Loops of one's own: Linen, NNX and raw JAX with `attach`, against `make_step`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import effjax as ej

BATCH = {
    "image": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),
    "label": np.arange(16) % 4,
}


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(4)(nn.relu(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


def loss(outputs, batch):
    return cross_entropy(outputs, batch["label"])


def prune():
    return ej.chain(prune=ej.prune.magnitude(0.5, select="kernel$"))


def run_make_step(model, params, model_state, tx, steps=3):
    state = ej.init_state(
        jax.random.key(1), model, prune(), tx, BATCH, params=params, model_state=model_state
    )
    step = jax.jit(ej.make_step(model.apply, prune(), loss, tx))
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


def test_attach_in_a_linen_loop_equals_make_step():
    model, tx = ej.from_linen(LinenNet()), optax.adam(1e-2)
    params, model_state = model.init(jax.random.key(0), BATCH)

    @jax.jit
    def train_step(params, run, batch):
        def loss_fn(params):
            out = run.forward(params, batch)
            return cross_entropy(out.outputs, out.batch["label"]) + out.loss, out

        (value, out), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params, run = run.update(grads, params, out)
        return params, run, value

    vars, run = ej.attach(
        jax.random.key(1), model.apply, prune(), params, BATCH, tx=tx, model_state=model_state
    )
    for _ in range(3):
        vars, run, _ = train_step(vars, run, BATCH)
    assert train_step._cache_size() <= 1  # jax may drop entries, in a long process
    want = run_make_step(model, params, model_state, tx)
    jax.tree.map(np.testing.assert_array_equal, vars, want.vars)
    jax.tree.map(np.testing.assert_array_equal, run.model_state, want.model_state)
    assert int(run.step) == 3


def test_attach_with_a_rule_of_ones_own():
    def apply(params, model_state, batch, key, train):
        return batch["image"] @ params["kernel"], model_state

    kernel = jax.random.normal(jax.random.key(0), (8, 4))
    vars, run = ej.attach(jax.random.key(1), apply, prune(), {"kernel": kernel}, BATCH)
    grads = jax.grad(lambda v: loss(run.forward(v, BATCH).outputs, BATCH))(vars)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, vars, grads)
    vars, run = run.after(grads, stepped, run.forward(vars, BATCH))
    assert int(jnp.sum(vars.model["kernel"] == 0)) == 16
    with pytest.raises(ej.errors.SetupError, match="needs the optimizer"):
        run.update(grads, vars, run.forward(vars, BATCH))


def test_nnx_optimizer_equals_make_step():
    net, tx = NNXNet(nnx.Rngs(0)), optax.adam(1e-2)
    model = ej.from_nnx(NNXNet(nnx.Rngs(0)))
    want = run_make_step(model, *model.init(jax.random.key(0), BATCH), tx)
    optimizer = ej.NNXOptimizer(jax.random.key(1), net, tx, prune(), BATCH)

    @nnx.jit
    def train_step(net, optimizer, batch):
        def loss_fn(net):
            out = optimizer.forward(net, batch)
            return cross_entropy(out.outputs, out.batch["label"]) + out.loss, out

        (value, out), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net)
        optimizer.update(net, grads, out)
        return value

    for _ in range(3):
        train_step(net, optimizer, BATCH)
    got = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want.vars.model
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda x: x == 0, got),
        jax.tree.map(lambda x: x == 0, want.vars.model),
    )
    statistics = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        statistics,
        want.model_state,
    )


def test_nnx_optimizer_refuses_transforms_with_trainable_leaves():
    learned = ej.Transform(init=lambda key, params, setup: ({"scale": jnp.ones(3)}, {}))
    with pytest.raises(ej.errors.SetupError, match="leaves of its own"):
        ej.NNXOptimizer(
            jax.random.key(0), NNXNet(nnx.Rngs(0)), optax.sgd(0.1), ej.chain(l=learned), BATCH
        )
