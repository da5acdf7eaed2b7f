"""Self-distillation: the teacher is a moving average of the student's own weights."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, Forward, Metrics, PyTree, Setup, Transform, Vars
from effjax.distill.losses import check_logits, kl
from effjax.distill.settings import temperature_schedule, weight_schedule
from effjax.distill.teachers import check_apply
from effjax.errors import SetupError
from effjax.schedules import Scalar, Schedule, is_traced
from effjax.select import leaves, replace


def mean_teacher(
    apply: Apply,
    *,
    decay: Scalar = 0.999,
    temperature: Scalar | Schedule = 1.0,
    alpha: Scalar | Schedule = 1.0,
) -> Transform:
    """Distils the model's own average over time into it.

    Adds "kl" = alpha * mean of T^2 KL(teacher / T || student / T), see `kl`, where the teacher is
    `apply` in evaluation mode with the average a of the weights w, without gradient and without the
    views of other transforms. After step t (from 0), a <- d a + (1 - d) w, d = min(decay,
    1 - 1 / (t + 1)), so that the first steps give the plain mean. Its BatchNorm statistics are
    the student's. The student's outputs are its logits. The paper adds noise by augmenting student
    and teacher apart; here both see one batch. Export and evaluation are the student's.

    Args:
      apply: the model's own `model.apply`.
      decay: in [0, 1), perhaps traced.
      temperature: T > 0; a number, a traced value, or a schedule.
      alpha: weight of the term >= 0; likewise. Let it rise from 0 in the first steps.

    Returns:
      A Transform of kind "distill" with state {"average": {path: float32, like the weight}}.

    Raises:
      SetupError: no function, a number out of range; at `init`, outputs that are no logits.

    Reference: Tarvainen and Valpola, "Mean teachers are better role models", 2017,
      https://arxiv.org/abs/1703.01780.
    """
    check_apply("distill.mean_teacher", apply)
    if not is_traced(decay) and not 0.0 <= decay < 1.0:
        raise SetupError(
            f"the decay of the average is {decay}; it is in [0, 1): 0.999 averages over the last "
            "thousand steps or so."
        )
    temperature_at, alpha_at = temperature_schedule(temperature), weight_schedule(alpha)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        outputs = setup.trace(params)[0]
        check_logits(outputs, outputs)
        floating = {
            p: x for p, x in leaves(params).items() if jnp.issubdtype(x.dtype, jnp.floating)
        }
        return {}, {"average": {p: jnp.asarray(x, jnp.float32) for p, x in floating.items()}}

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        if not ctx.train:
            return forward

        def taught_forward(params, model_state, batch, key, train):
            outputs, new_state, aux = forward(params, model_state, batch, key, train)
            named = leaves(params)
            own = {p: a.astype(named[p].dtype) for p, a in state["average"].items()}
            teacher = jax.lax.stop_gradient(replace(params, own))
            taught = jax.lax.stop_gradient(apply(teacher, model_state, batch, key, False)[0])
            return outputs, new_state, {**aux, "teacher": taught}

        return taught_forward

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        distance = kl(outputs, aux["teacher"], temperature_at(ctx.step))
        return {"kl": alpha_at(ctx.step) * jnp.mean(distance)}

    def update(vars: Vars, opt, state, grads, aux, ctx) -> tuple[Vars, PyTree, PyTree]:
        d = jnp.minimum(decay, 1.0 - 1.0 / (ctx.step.astype(jnp.float32) + 1.0))
        named = leaves(vars.model)
        moved = {
            p: d * a + (1.0 - d) * named[p].astype(jnp.float32) for p, a in state["average"].items()
        }
        return vars, opt, {"average": moved}

    return Transform(init=init, wrap=wrap, loss=loss, update=update, kind="distill")
