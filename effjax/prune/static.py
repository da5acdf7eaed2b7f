"""Masks that are chosen before the first step and stay as they are."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import SelectorError, SetupError
from effjax.prune import masks as masking
from effjax.prune.budgets import Allocation, Budget, Layers
from effjax.prune.engine import Choose, Named, Rule, Scene, pruning
from effjax.prune.gradual import random_scores
from effjax.prune.patterns import Pattern, unstructured
from effjax.prune.timing import Timing, steady
from effjax.schedules import Scalar, Window
from effjax.select import leaves


def static(
    sparsity: Scalar | None = None,
    *,
    masks: Mapping[str, Array] | None = None,
    scores: Mapping[str, Array] | None = None,
    budget: str | Allocation = "erk",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Masks that are chosen before the first step and never move.

    - `static(0.9)` draws them at random: the baseline that dynamic sparse training has to beat.
    - `static(0.9, scores=snip(...))` keeps the largest scores: pruning at initialization.
    - `static(masks=masks)` takes them as they are: a lottery ticket, or the masks of another run.

    The forward pass sees `where(mask, w, 0)`; pruned weights get a gradient of exactly 0, and are 0
    after every step, as are their moments.

    Args:
      sparsity: the fraction of zeros in [0, 1), perhaps traced; None with `masks`, or where the
        pattern fixes it.
      masks: {params path: bool, shaped like the weight}; they decide what is pruned, too.
      scores: {params path: float, shaped like the weight}, of either sign; they decide what is
        pruned unless `select` does.
      budget: how the sparsity is spread over the layers, see `budgets`.
      pattern: what is kept or pruned together; left out, every weight by itself.
      select: a regular expression for the params paths that are pruned. Left out, every kernel but
        those of the model's first and last operation.

    Returns:
      A Transform of kind "prune" with the state of `prune.magnitude`. It reports "sparsity" and
      "sparsest".

    Raises:
      ScheduleError: a sparsity outside [0, 1), or none.
      SetupError: masks together with anything else; an unknown budget; at `init`, masks or scores
        of another shape than the weight, masks that are not bool, a leaf that would be emptied.
      SelectorError (at `init`): nothing is selected, or a path that the params do not have.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.static(0.9))

    Reference: Frankle and Carbin, "The lottery ticket hypothesis", 2019,
    https://arxiv.org/abs/1803.03635 (masks); Evci et al., 2020, https://arxiv.org/abs/1911.11134
    (random masks with the ERK budget).
    """
    if masks is not None:
        others = {"sparsity": sparsity, "scores": scores, "pattern": pattern, "select": select}
        if unused := [name for name, value in others.items() if value is not None]:
            raise SetupError(
                f"static(masks=...) says which weights are kept, so {unused} would mean nothing. "
                "Leave them out, or leave the masks out."
            )
    if (masks is not None and not masks) or (scores is not None and not scores):
        raise SetupError("static got an empty dict, which prunes nothing; give at least one entry.")
    pattern = unstructured() if pattern is None else pattern
    given = {path: jnp.asarray(x) for path, x in (masks or scores or {}).items()}

    def start(key: Array, weights: Named, choose: Choose) -> Named:
        if masks is not None:
            return given
        if scores is None:
            return choose(random_scores(key, weights))
        if missing := [path for path in weights if path not in given]:
            raise SelectorError(
                f"{select!r} selects {missing}, for which there are no scores, only for "
                f"{list(given)}. Leave `select` out to prune what has scores."
            )
        return choose({path: given[path] for path in weights}, signed=True)

    def move(scene: Scene, choose: Choose) -> Named:
        return scene.mask

    if masks is None:
        times = steady(sparsity, 0, 0, 1, pattern)
    else:
        # No mask is chosen, so that there is nothing for a budget to say.
        times = Timing(lambda step: masking.sparsity(given), Window.once(0))
        budget = _nothing
    chosen = select if select is not None or not given else list(given)
    base = pruning(Rule(move, start), times, budget=budget, pattern=pattern, select=chosen)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        _check_given(given, leaves(params), "masks" if scores is None else "scores")
        return base.init(key, params, setup)

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx: Ctx) -> tuple[Vars, PyTree, PyTree]:
        # With gradients of 0 from the first step on, moments of 0 stay so by themselves.
        return vars._replace(model=masking.apply(vars.model, state["mask"])), opt, state

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        return {name: state[name] for name in ("sparsity", "sparsest")}

    return base._replace(init=init, update=update, report=report)


def _nothing(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> Budget:
    return {}


def _check_given(given: Named, named: Named, what: str) -> None:
    """Raises unless there is a weight of the right shape for each."""
    if missing := sorted(set(given) - set(named)):
        raise SelectorError(
            f"there are {what} for {missing}, but the params have {list(named)}. They were made "
            "for another model, or a transform before this one renamed its params."
        )
    for path, x in given.items():
        if x.shape != named[path].shape:
            raise SetupError(
                f"{what} of {path} have shape {x.shape}, but the weight {named[path].shape}."
            )
        if what == "masks" and x.dtype != bool:
            raise SetupError(
                f"the mask of {path} is {x.dtype}; a mask is bool, True where a weight is kept. "
                "Write mask != 0 if that is what it means."
            )
