"""Averages of the weights that know what is pruned."""

import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import ScheduleError
from effjax.prune.masks import masked
from effjax.schedules import Scalar, Schedule, as_schedule, is_traced
from effjax.select import check_floating, leaves, replace
from effjax.select import select as select_leaves

# Under any transform that prunes by masks a pruned weight is exactly 0, and one that has just come
# back is, too. So a weight's being 0 says that its average has nothing to remember.


def ema(decay: Scalar | Schedule = 0.999, *, select: str = "") -> Transform:
    """An exponential moving average of the weights, used in evaluation and export.

    After each step, with w the weight, a its average and m the weight (mass) of what it averages:

        m <- d * m + (1 - d),    a <- a + (1 - d) / m * (w - a)     where w != 0,
        m <- 0,                  a <- 0                             where w == 0.

    That is the mean of the values since the weight was last 0, each weighted with d^(its age): the
    bias correction 1 / (1 - d^n) of n steps, for each weight by itself. A pruned weight has an
    average of exactly 0, at once; one that is grown again starts anew, and what it was before it
    was pruned has no part in it. The average of weights that are never 0 is the usual
    bias-corrected one.

    Training sees the weights, evaluation and export see the averages: they take the place of the
    params that come in. So give it a place in the chain

    - after transforms that prune (magnitude, RigL, ...), so that it sees what they have set to 0;
    - before transforms whose view changes what is seen (quantization, width; `ste`, `movement`,
      `hard_concrete`, whose zeros are in the view alone), so that they see the averages.

    With both `prune` and `quant`: chain(prune=..., average=..., quant=...). Statistics that a model
    keeps itself (BatchNorm's) are those of the weights, not of the averages.

    Args:
      decay: d in [0, 1), perhaps traced; or a schedule of it.
      select: a regular expression for the params paths that are averaged; all by default. Others
        are as they are.

    Returns:
      A Transform with state {"average": {path: float32, shaped like the weight}, "mass": the same}.
      It reports "distance", the root mean square of w - a over the averaged weights.

    Raises:
      ScheduleError: a decay outside [0, 1).
      SelectorError (at `init`): nothing is selected.
      SetupError (at `init`): a leaf that is not floating point.

    Example:
      >>> import effjax as ej
      >>> both = ej.chain(prune=ej.prune.rigl(0.9, end=7500), average=ej.prune.ema(0.999))

    Reference: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992;
    the bias correction is that of Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980.
    """
    if not callable(decay) and not is_traced(decay) and not 0.0 <= decay < 1.0:
        raise ScheduleError(
            f"the decay of the average is {decay}; it is a number in [0, 1), for example 0.999."
        )
    schedule = as_schedule(decay)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        found = select_leaves(params, select)
        check_floating(found, select, "integers have no average")
        # What is evaluated before the first step is the weights as they are.
        start = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in found.items()}
        empty = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in found.items()}
        return {}, {"average": start, "mass": empty}

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        named = leaves(params)
        return replace(params, {p: a.astype(named[p].dtype) for p, a in state["average"].items()})

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        return params if ctx.train else export(params, extra, state)

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx: Ctx) -> tuple[Vars, PyTree, PyTree]:
        named, d = leaves(vars.model), schedule(ctx.step)
        averages, masses = {}, {}
        for path, a in state["average"].items():
            w = named[path].astype(jnp.float32)
            mass = masked(d * state["mass"][path] + (1.0 - d), w != 0)
            moved = a + (1.0 - d) / jnp.where(w != 0, mass, 1.0) * (w - a)
            # The first value is taken as it is: 1 - d and m are then the same number.
            averages[path] = masked(jnp.where(state["mass"][path] > 0, moved, w), w != 0)
            masses[path] = mass
        return vars, opt, {"average": averages, "mass": masses}

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        named = leaves(vars.model)
        gaps = [named[p].astype(jnp.float32) - a for p, a in state["average"].items()]
        total = sum((jnp.sum(gap**2) for gap in gaps), jnp.zeros(()))
        return {"distance": jnp.sqrt(total / sum(gap.size for gap in gaps))}

    return Transform(init=init, view=view, update=update, export=export, report=report)
