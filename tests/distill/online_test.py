"""Peers that teach each other, against a step written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.distill import each, mutual, peers
from tests import nets

MODEL = nets.raw()


def run(kd, model, steps=3, others=None, tx=None):
    chain, tx = ej.chain(kd=kd, **(others or {})), tx or optax.sgd(0.3)
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chain, each(nets.loss), tx))
    start, found = state, []
    for _ in range(steps):
        state, metrics = step(state, nets.BATCH)
        found.append(metrics)
    return start, state, found


@pytest.mark.parametrize("count", [2, 3])
def test_each_peer_takes_the_step_of_its_own_objective(count):
    alpha = optax.linear_schedule(0.5, 0.7, 2)
    kd = mutual(temperature=lambda step: 2.0 + step, alpha=alpha)
    start, state, found = run(kd, peers(*[MODEL] * count))
    names = [f"peer_{i}" for i in range(count)]
    params = {n: start.vars.model[n] for n in names}
    for at, metrics in enumerate(found):
        t, logits = (
            2.0 + at,
            {n: MODEL.apply(p, {}, nets.BATCH, None, True)[0] for n, p in params.items()},
        )

        def objective(p, name, t=t, logits=logits, at=at):
            mine = MODEL.apply(p, {}, nets.BATCH, None, True)[0]
            log_q, total = jax.nn.log_softmax(mine / t), 0.0
            for other in names:
                if other != name:
                    p_other = jax.nn.softmax(logits[other] / t)
                    rows = jnp.sum(p_other * (jnp.log(p_other) - log_q), axis=-1)
                    total += t**2 * rows.mean() / (count - 1)
            return nets.loss(mine, nets.BATCH) + alpha(at) * total

        value = sum(objective(params[n], n) for n in names)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        choices = [logits[n].argmax(-1) for n in names]
        same = [np.mean(choices[a] == choices[b]) for a in range(count) for b in range(a)]
        np.testing.assert_allclose(metrics["kd/agreement"], np.mean(same), rtol=1e-6)
        params = {
            n: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(objective)(p, n))
            for n, p in params.items()
        }
    got = jax.tree.leaves(state.vars.model)
    for x, y in zip(got, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_peers_of_two_kinds_with_statistics_pruned_and_quantized_in_the_step():
    models = (nets.linen(features=4), nets.nnx_(features=8))
    others = {
        "prune": ej.prune.magnitude(0.5, 0, 2, select="kernel$"),
        "quant": ej.quantize.qat(),
    }
    start, state, found = run(mutual(), peers(*models), others=others, tx=optax.adam(1e-2))
    assert all(np.isfinite(m["loss"]) for m in found)
    for name in ("peer_0", "peer_1"):
        kernel = state.vars.model[name]["conv2"]["kernel"]
        assert float(jnp.mean(kernel == 0)) == 0.5
        before, after = (jax.tree.leaves(s.model_state[name]) for s in (start, state))
        assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
    # A peer that is taken out computes what it computed among the others.
    shipped = ej.export(ej.chain(), state)["peer_1"]
    key = jax.random.key(0)
    outputs = models[1].apply(shipped, state.model_state["peer_1"], nets.BATCH, key, False)[0]
    together, _ = peers(*models).apply(state.vars.model, state.model_state, nets.BATCH, key, False)
    np.testing.assert_array_equal(outputs, together[1])


def test_mistakes():
    with pytest.raises(ej.errors.SetupError, match="two Models or more"):
        peers(MODEL)
    with pytest.raises(ej.errors.SetupError, match="function"):
        peers(MODEL, MODEL.apply)
    with pytest.raises(ej.errors.SetupError, match="temperature is 0"):
        mutual(temperature=0)
    with pytest.raises(ej.errors.SetupError, match="alpha is -1"):
        mutual(alpha=-1)
    tx, key = optax.sgd(0.1), jax.random.key(0)
    with pytest.raises(ej.errors.SetupError, match=r"peers\(model, model\)"):
        ej.init_state(key, MODEL, ej.chain(kd=mutual()), tx, nets.BATCH)

    def narrow(params, model_state, batch, key, train):
        outputs, model_state = MODEL.apply(params, model_state, batch, key, train)
        return outputs[:, :5], model_state

    both = peers(MODEL, MODEL._replace(apply=narrow))
    with pytest.raises(ej.errors.SetupError, match=r"\[24, 8\].*\[24, 5\]"):
        ej.init_state(key, both, ej.chain(kd=mutual()), tx, nets.BATCH)
