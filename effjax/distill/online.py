"""Mutual learning: peers that are trained in one step and teach each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform
from effjax.distill.losses import check_logits, kl
from effjax.distill.settings import temperature_schedule, weight_schedule
from effjax.errors import SetupError
from effjax.model import Model
from effjax.schedules import Scalar, Schedule


def peers(*models: Model) -> Model:
    """Several models as one, trained in one step: `peers(model, model)`, of one kind or several.

    Params and model_state are {"peer_0": ..., "peer_1": ...}: every leaf keeps its own shape and
    has a path of its own, so that selectors, budgets, masks and scales are each peer's, and any
    peer can be taken out: `ej.export(transform, state)["peer_0"]` are params of `models[0]`. The
    peers begin with weights of their own and draw dropout of their own.

    Args:
      *models: two or more, which read one batch.

    Returns:
      A Model whose outputs are the tuple of the peers' outputs.

    Raises:
      SetupError: fewer than two, or something that is no Model.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import effjax as ej
      >>> one = ej.from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs), inputs="x")
      >>> both = ej.distill.peers(one, one)
      >>> params, _ = both.init(jax.random.key(0), {"x": jnp.ones((1, 3))})
      >>> sorted(params), bool((params["peer_0"]["kernel"] == params["peer_1"]["kernel"]).all())
      (['peer_0', 'peer_1'], False)
    """
    if len(models) < 2 or not all(isinstance(m, Model) for m in models):
        raise SetupError(
            f"peers() joins two Models or more; it got {[type(m).__name__ for m in models]}."
        )
    named = {f"peer_{i}": m for i, m in enumerate(models)}

    def init(key: Array, batch: PyTree) -> tuple[PyTree, PyTree]:
        made = {
            n: m.init(jax.random.fold_in(key, i), batch) for i, (n, m) in enumerate(named.items())
        }
        return {n: p for n, (p, _) in made.items()}, {n: s for n, (_, s) in made.items()}

    def apply(params, model_state, batch, key, train):
        outputs, states = [], {}
        for i, (name, model) in enumerate(named.items()):
            own = (params[name], model_state[name], batch, jax.random.fold_in(key, i), train)
            found, states[name] = model.apply(*own)
            outputs.append(found)
        return tuple(outputs), states

    return Model(init, apply)


def each(loss: Callable[[Any, PyTree], Array]) -> Callable[[tuple[Any, ...], PyTree], Array]:
    """A loss of one model's outputs as that of peers: the sum of each one's.

    The sum, not the mean: every peer then gets the gradient it would get alone.

    Args:
      loss: `(outputs, batch) -> scalar`.
    """

    def total(outputs: tuple[Any, ...], batch: PyTree) -> Array:
        return sum(
            (loss(one, batch) for one in outputs[1:]), start=jnp.asarray(loss(outputs[0], batch))
        )

    return total


def mutual(
    *,
    temperature: Scalar | Schedule = 1.0,
    alpha: Scalar | Schedule = 1.0,
    logits: Callable[[Any], Array] = lambda outputs: outputs,
) -> Transform:
    """Deep mutual learning: peers without a teacher, each learning from what the others say now.

    Adds "kl" = alpha * sum over peers k of the mean over the other peers l and over examples of
    T^2 KL(peer l / T || peer k / T), where peer l gets no gradient. The model is `peers(...)`, and
    your loss is `each(loss)`. The paper updates one peer after another in each step; here all move
    at once, from the same batch.

    Args:
      temperature: T > 0 (1 in the paper); a number, a traced value, or a schedule (step -> value).
      alpha: weight of the term >= 0; likewise.
      logits: from one peer's outputs to its logits, floating [..., classes], of one shape for all.

    Returns:
      A Transform of kind "distill" without trainable leaves or state. It reports "agreement", the
      fraction of (pair of peers, example) that choose one class.

    Raises:
      SetupError: a number out of range; at `init`, a model that is not of peers, or peers whose
        logits have different shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["w"], model_state
      >>> one = ej.Model(lambda key, batch: ({"w": jax.random.normal(key, (4, 2))}, {}), apply)
      >>> both, kd = ej.distill.peers(one, one), ej.chain(kd=ej.distill.mutual())
      >>> tx = optax.sgd(1.0)
      >>> loss = ej.distill.each(lambda outputs, batch: jnp.zeros(()))
      >>> batch = {"x": jnp.eye(4)}
      >>> state = ej.init_state(jax.random.key(0), both, kd, tx, batch)
      >>> step = jax.jit(ej.make_step(both.apply, kd, loss, tx))
      >>> losses = [float((out := step(state, batch))[1]["kd/kl"])]
      >>> float(step(out[0], batch)[1]["kd/kl"]) < losses[0]
      True

    Reference: Zhang et al., "Deep mutual learning", 2018, https://arxiv.org/abs/1706.00384.
    """
    temperature_at, alpha_at = temperature_schedule(temperature), weight_schedule(alpha)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        outputs = setup.trace(params)[0]
        if not isinstance(outputs, tuple) or len(outputs) < 2:
            raise SetupError(
                f"distill.mutual got a model whose outputs are a {type(outputs).__name__}, not a "
                "tuple of two peers' or more. Join models by peers(model, model)."
            )
        first, *others = [jax.eval_shape(logits, one) for one in outputs]
        for other in others:
            check_logits(first, other)
        return {}, {}

    def loss(outputs, batch, aux, extra, state, ctx: Ctx) -> Metrics:
        given = [logits(one) for one in outputs]
        t = temperature_at(ctx.step)
        pairs = [
            jnp.mean(kl(mine, jax.lax.stop_gradient(other), t))
            for k, mine in enumerate(given)
            for l, other in enumerate(given)
            if k != l
        ]
        return {"kl": alpha_at(ctx.step) * sum(pairs[1:], start=pairs[0]) / (len(given) - 1)}

    def wrap(forward, extra, state, ctx: Ctx):
        if not ctx.train:
            return forward

        def measured(params, model_state, batch, key, train):
            outputs, model_state, aux = forward(params, model_state, batch, key, train)
            choices = [jnp.argmax(logits(one), axis=-1) for one in outputs]
            same = [
                jnp.mean(a == b, dtype=jnp.float32)
                for k, a in enumerate(choices)
                for b in choices[k + 1 :]
            ]
            return outputs, model_state, {**aux, "agreement": jnp.mean(jnp.stack(same))}

        return measured

    def report(vars, state, aux, ctx: Ctx) -> Metrics:
        return {"agreement": aux["agreement"]}

    return Transform(init=init, wrap=wrap, loss=loss, report=report, kind="distill")
