"""Gradual magnitude pruning: the smallest weights are removed while the model trains."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import ScheduleError, SetupError
from effjax.prune import budgets, masks, scores
from effjax.prune.counts import count
from effjax.schedules import Scalar, Schedule, Window, as_schedule, check_fraction, cubic
from effjax.select import KERNELS, leaves, owners, replace
from effjax.select import select as select_leaves

Scope = Literal["layer", "global"]
_BUDGETS: dict[str, Callable[[Mapping[str, int], Scalar], budgets.Budget]] = {
    "layer": budgets.per_layer,
    "global": budgets.overall,
}


def magnitude(
    sparsity: Scalar | Schedule,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    *,
    initial: Scalar = 0.0,
    scope: Scope = "layer",
    select: str = KERNELS,
) -> Transform:
    """Magnitude pruning, at once or gradually.

    - `magnitude(0.8)` prunes 80% of each layer's weights at the end of step `begin`, once.
    - `magnitude(0.8, begin=100, end=1000, every=50)` goes there along the cubic schedule.
    - `magnitude(schedule, ...)` follows any function from the step to a sparsity.

    The masks move at the end of steps begin, begin + every, ... up to and including `end`: the
    weights as the optimizer left them (the pruned ones are 0) are ranked by magnitude, and exactly
    n - round(s_t * n) of n are kept, of equal ones the first. The product is rounded in float32,
    see `budgets.keep`. Where the sparsity only rises, what is pruned stays pruned; where it falls,
    weights come back at 0.

    The forward pass sees `where(mask, w, 0)`. Its gradient is exactly 0 for pruned weights, and for
    kept ones that of w. After every step the pruned weights themselves are 0. When the masks move,
    so are the optimizer's moments, traces and averages of them, which with gradients of 0 then stay
    0, in any optax optimizer that treats each weight by itself.

    Args:
      sparsity: the final fraction of zeros in [0, 1), perhaps traced; or a schedule.
      begin: the first step at which masks move.
      end: the last one. Left out, a number prunes once, and a schedule is followed for ever.
      every: steps from one move of the masks to the next.
      initial: the sparsity at `begin`, where the cubic schedule starts.
      scope: "layer" prunes each layer to the sparsity; "global" all of them together, by one
        threshold.
      select: a regular expression for the params paths that are pruned.

    Returns:
      A Transform of kind "prune" with state {"mask": {path: bool}, "sparsity": float32 [],
      "sparsest": float32 []}. It reports "sparsity", the fraction of the selected weights that is
      pruned; "sparsest", that of the layer with the largest one (1 if a global threshold has
      emptied a layer); and "target", the schedule's value at this step, which the masks meet when
      they move.

    Raises:
      ScheduleError: a sparsity outside [0, 1), a window that ends before it begins, `initial` or
        `every` without a window.
      SelectorError (at `init`): nothing is selected.
      SetupError: an unknown scope; at `init`, a leaf that is not floating point, or one that would
        be emptied.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.magnitude(0.9, begin=0, end=1000, every=100))

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.
    """
    if scope not in _BUDGETS:
        raise SetupError(f"scope is {scope!r}; it is one of {list(_BUDGETS)}.")
    schedule, window = _plan(sparsity, begin, end, every, initial)
    budget = _BUDGETS[scope]

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        chosen = select_leaves(params, select)
        sizes = {path: math.prod(leaf.shape) for path, leaf in chosen.items()}
        for path, leaf in chosen.items():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise SetupError(
                    f"the selector {select!r} chooses {path}, which is {leaf.dtype}; magnitudes "
                    "are compared among floating-point weights. Leave it out of the selector."
                )
        if (final := _known(schedule, begin if end is None else end)) is not None:
            together = {"the whole selection": sum(sizes.values())}
            budgets.check_not_emptied(sizes if scope == "layer" else together, final)
        whole = {path: jnp.ones(leaf.shape, bool) for path, leaf in chosen.items()}
        return {}, {"mask": whole, **_measured(whole)}

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        return masks.apply(params, state["mask"])

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx: Ctx) -> tuple[Vars, PyTree, PyTree]:
        mask = state["mask"]
        named, moments = leaves(vars.model), leaves(opt)
        belongs = {n: p for n, p in owners(opt, vars.model).items() if p in mask}
        # This much in every step: XLA makes it part of the optimizer's own arithmetic. All that
        # goes over the weights once more is left to the steps that move the masks.
        weights = {path: masks.masked(named[path], m) for path, m in mask.items()}

        def move(operands):
            _, weights, moments = operands
            sizes = {path: w.size for path, w in weights.items()}
            ranked = {path: scores.magnitude(w) for path, w in weights.items()}
            new = masks.unstructured(ranked, budget(sizes, schedule(ctx.step)))
            weights = {path: masks.masked(w, new[path]) for path, w in weights.items()}
            moments = {name: masks.masked(x, new[belongs[name]]) for name, x in moments.items()}
            return {"mask": new, **_measured(new)}, weights, moments

        operands = (state, weights, {name: moments[name] for name in belongs})
        state, weights, owned = lax.cond(
            window.contains(ctx.step), move, lambda operands: operands, operands
        )
        return vars._replace(model=replace(vars.model, weights)), replace(opt, owned), state

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return masks.apply(params, state["mask"])

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        target = jnp.where(ctx.step < begin, 0.0, schedule(ctx.step))
        found = {name: state[name] for name in ("sparsity", "sparsest")}
        return {**found, "target": target}

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        named: Mapping[str, Array] = state["mask"]
        pruned = {path: mask.size - int(count(mask)) for path, mask in named.items()}
        return {path: {"sparsity": pruned[path] / mask.size} for path, mask in named.items()}

    return Transform(
        init=init,
        view=view,
        update=update,
        export=export,
        report=report,
        describe=describe,
        kind="prune",
    )


def _plan(
    sparsity: Scalar | Schedule, begin: int, end: int | None, every: int, initial: Scalar
) -> tuple[Schedule, Window]:
    """The schedule and the window that `magnitude`'s arguments mean, checked."""
    plain = not isinstance(initial, Array) and initial == 0.0
    if callable(sparsity):
        if not plain:
            raise ScheduleError(
                f"initial={initial} goes with a final sparsity and the cubic schedule; a schedule "
                "of your own says itself where it starts."
            )
        schedule, window = sparsity, Window(begin, end, every)
    elif end is not None:
        schedule, window = cubic(sparsity, begin, end, initial), Window(begin, end, every)
    elif every == 1 and plain:
        check_fraction(sparsity, "the sparsity")
        schedule, window = as_schedule(sparsity), Window.once(begin)
    else:
        raise ScheduleError(
            f"pruning once, at step {begin}, has no use for every={every} and initial={initial}. "
            "For gradual pruning say when it is done: end=..."
        )
    window.check("pruning")
    for step in (begin, begin if end is None else end):
        if (value := _known(schedule, step)) is not None:
            check_fraction(value, f"the sparsity at step {step}")
    return schedule, window


def _known(schedule: Schedule, step: int) -> float | None:
    """The schedule's value at a step, or None where it depends on a traced value."""
    with jax.ensure_compile_time_eval():
        value = schedule(jnp.int32(step))
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _measured(mask: Mapping[str, Array]) -> dict[str, Array]:
    """What is reported of masks: counted when they move, as a count a step would cost more than all
    else in a step in which they don't."""
    layers = [masks.sparsity({path: m}) for path, m in mask.items()]
    return {"sparsity": masks.sparsity(mask), "sparsest": jnp.max(jnp.stack(layers))}
