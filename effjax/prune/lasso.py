"""Group lasso: a penalty under which whole channels or blocks go to zero together."""

import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import ScheduleError, SetupError
from effjax.prune.engine import Named, selected
from effjax.prune.masks import masked
from effjax.prune.patterns import Pattern, channel
from effjax.schedules import Scalar, Schedule, as_schedule, is_traced
from effjax.select import leaves, replace


def group_lasso(
    strength: Scalar,
    *,
    pattern: Pattern | None = None,
    rate: Scalar | Schedule | None = None,
    select: str | None = None,
) -> Transform:
    """Pulls groups of weights towards zero by their norms.

    The penalty is

        strength * (sum over groups of sqrt(n_g) * ||w_g||_2)

    with n_g the number of weights of group g. It comes in one of two ways:

    - Left out, `rate`: as a loss term "lasso". Its gradient, strength * sqrt(n_g) * w_g / ||w_g||
      (0 where w_g is 0), makes groups small, but never exactly 0: prune them afterwards, for
      example with `magnitude(pattern=channel())`.
    - With `rate`: as a proximal step after the optimizer's,

          w_g <- max(0, 1 - rate * strength * sqrt(n_g) / ||w_g||) * w_g,

      which makes groups exactly 0, and is no part of the loss and its gradients. A group that is 0
      comes back if its gradient is larger than strength * sqrt(n_g). With plain SGD at that
      learning rate this is proximal gradient descent; with other optimizers `rate` is a step size
      of its own.

    Weights are seen by the model as they are. For what became 0, `masks.nonzero(params)` gives the
    masks that `prune.compact` and `static(masks=...)` take.

    Args:
      strength: of the penalty, perhaps traced.
      pattern: what the groups are; left out, output channels, `channel()`.
      rate: the learning rate of the proximal step, or a schedule of it.
      select: a regular expression for the params paths that are penalized. Left out, every kernel
        but those of the model's first and last operation.

    Returns:
      A Transform with state {"groups": {path: float32 []}}, how many there are. It reports
      "penalty", and "groups", the fraction of them that is 0.

    Raises:
      ScheduleError: a negative strength or rate.
      SetupError: an N:M pattern; at `init`, a leaf that the pattern does not fit or that is not
        floating point.
      SelectorError (at `init`): nothing is selected.

    Example:
      >>> import effjax as ej
      >>> lasso = ej.chain(lasso=ej.prune.group_lasso(1e-4, rate=0.1))

    Reference: Yuan and Lin, "Model selection and estimation in regression with grouped variables",
    2006, https://doi.org/10.1111/j.1467-9868.2005.00532.x; in networks: Wen et al., "Learning
    structured sparsity in deep neural networks", 2016, https://arxiv.org/abs/1608.03665.
    """
    for name, value in (("strength", strength), ("rate", rate)):
        if value is not None and not callable(value) and not is_traced(value) and value < 0:
            raise ScheduleError(f"the {name} of the group lasso is {value}; it is a number >= 0.")
    groups = channel() if pattern is None else pattern
    if groups.sparsity is not None:
        raise SetupError(
            "the groups of an N:M pattern are single weights, which are no groups to pull to zero "
            "together. Use channel(), block(...), or unstructured() for a plain lasso."
        )

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        found = selected(params, setup, select)
        for path, leaf in found.items():
            groups.check(path, leaf.shape)
        return {}, {"groups": {p: jnp.float32(groups.units(x.shape)) for p, x in found.items()}}

    def penalty(named: Named) -> Array:
        # sqrt(n) * ||w|| is n * rms, the root mean square counted once for each of the n weights.
        return sum(
            (jnp.sum(groups.expand(_rms(w, groups), w.shape)) for w in named.values()),
            jnp.zeros(()),
        )

    def mine(params: PyTree, state: PyTree) -> Named:
        named = leaves(params)
        return {path: named[path] for path in state["groups"]}

    def wrap(forward, extra, state, ctx):
        def measured(params, model_state, batch, key, train):
            outputs, model_state, aux = forward(params, model_state, batch, key, train)
            value = strength * penalty(mine(params, state))
            return outputs, model_state, {**aux, "penalty": value}

        return measured if rate is None and ctx.train else forward

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        return {"lasso": aux["penalty"]} if rate is None else {}

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx: Ctx) -> tuple[Vars, PyTree, PyTree]:
        if rate is None:
            return vars, opt, state
        bound = as_schedule(rate)(ctx.step) * strength
        new = {path: _shrunk(w, bound, groups) for path, w in mine(vars.model, state).items()}
        return vars._replace(model=replace(vars.model, new)), opt, state

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        named = mine(vars.model, state)
        zero = [jnp.sum(_rms(w, groups) == 0) for w in named.values()]
        empty = jnp.sum(jnp.stack(zero)).astype(jnp.float32) / sum(state["groups"].values())
        return {"penalty": strength * penalty(named), "groups": empty}

    return Transform(init=init, wrap=wrap, loss=loss, update=update, report=report)


def _rms(weight: Array, groups: Pattern) -> Array:
    """The root mean square of each group, float32 [grid]; its gradient where that is 0 is 0."""
    square = groups.pool(jnp.square(weight.astype(jnp.float32)))
    return masked(jnp.sqrt(jnp.where(square > 0, square, 1.0)), square > 0)


def _shrunk(weight: Array, bound: Array, groups: Pattern) -> Array:
    """The weight with the norm of each group smaller by sqrt(n) * bound, and 0 where it was less.

    ||w|| = sqrt(n) * rms, so that the factor 1 - bound * sqrt(n) / ||w|| is 1 - bound / rms.
    """
    rms = _rms(weight, groups)
    factor = jnp.maximum(1.0 - bound / jnp.maximum(rms, jnp.finfo(jnp.float32).tiny), 0.0)
    full = groups.expand(factor, weight.shape).astype(weight.dtype)
    return masked(weight * full, full > 0)
