"""Pruning while the model trains, by a criterion: at once, gradually, or along any schedule."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import PyTree, Transform
from effjax.prune import scores
from effjax.prune.budgets import Allocation
from effjax.prune.engine import Choose, Named, Rule, Scene, nothing, pruning
from effjax.prune.patterns import Pattern, unstructured
from effjax.prune.timing import timing
from effjax.schedules import Scalar, Schedule


class Criterion(NamedTuple):
    """What weights are ranked by when masks move; what is pruned has to score lowest.

    score: `(scene) -> {path: float, shaped like the weight}`.
    signed: whether scores may be negative.
    memory, observe, forgets: what it keeps of the steps between; see `Rule`.
    """

    score: Callable[[Scene], Named]
    signed: bool = False
    memory: Callable[[Named], PyTree] = nothing
    observe: Callable[[Scene], PyTree] | None = None
    forgets: bool = False


class Options(TypedDict, total=False):
    """What every function here takes by keyword; see `magnitude`."""

    initial: Scalar
    budget: str | Allocation
    pattern: Pattern | None
    select: str | None


def custom(
    criterion: Criterion,
    sparsity: Scalar | Schedule | None = None,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    *,
    initial: Scalar = 0.0,
    budget: str | Allocation = "uniform",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Pruning by a criterion of one's own; see `magnitude` for the other arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def score(scene):  # the weights that moved most since the last move
      ...     return {path: jnp.abs(w - scene.memory[path]) for path, w in scene.weights.items()}
      >>> moved = ej.prune.Criterion(score, memory=dict, forgets=True)
      >>> prune = ej.chain(prune=ej.prune.custom(moved, 0.9, begin=100, end=1000, every=100))
    """
    pattern = unstructured() if pattern is None else pattern

    def move(scene: Scene, choose: Choose) -> Named:
        return choose(criterion.score(scene), signed=criterion.signed)

    rule = Rule(
        move=move,
        memory=criterion.memory,
        observe=criterion.observe,
        forgets=criterion.forgets,
    )
    times = timing(sparsity, begin, end, every, initial, pattern)
    return pruning(rule, times, budget=budget, pattern=pattern, select=select)


def magnitude(
    sparsity: Scalar | Schedule | None = None,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    *,
    initial: Scalar = 0.0,
    budget: str | Allocation = "uniform",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Magnitude pruning, at once or gradually.

    - `magnitude(0.8)` prunes 80% of each layer's weights at the end of step `begin`, once.
    - `magnitude(0.8, begin=100, end=1000, every=50)` goes there along the cubic schedule.
    - `magnitude(schedule, ...)` follows any function from the step to a sparsity.
    - `magnitude(pattern=n_m(2, 4))` keeps 2 of every 4 weights; N:M has a sparsity of its own.

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
      budget: how the sparsity is spread over layers: "uniform" prunes each layer to it, "global"
        all of them together by one threshold, "erk" less where a layer is small, "macs" and "bytes"
        take it as the fraction of cost that is removed; or a `budgets.Allocation`.
      pattern: what is kept or pruned together; see `patterns`. Left out, every weight by itself.
      select: a regular expression for the params paths that are pruned. Left out, every kernel but
        those of the model's first and last operation, which usually stay dense.

    Returns:
      A Transform of kind "prune" with state {"mask": {path: bool}, "sparsity": float32 [],
      "sparsest": float32 [], ...}. It reports "sparsity", the fraction of the selected weights that
      is pruned; "sparsest", that of the layer with the largest one; and "target", the schedule's
      value at this step.

    Raises:
      ScheduleError: a sparsity outside [0, 1), or none; a window that ends before it begins;
        `initial` or `every` without a window.
      SelectorError (at `init`): nothing is selected.
      SetupError: an unknown budget; at `init`, a leaf that is not floating point, that the pattern
        does not fit, or that would be emptied.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.magnitude(0.9, begin=0, end=1000, every=100))

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.
    """
    given = Options(initial=initial, budget=budget, pattern=pattern, select=select)
    return custom(Criterion(_magnitudes), sparsity, begin, end, every, **given)


def saliency(
    sparsity: Scalar | Schedule | None = None,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    **options: Unpack[Options],
) -> Transform:
    """Pruning by |g w|, with the gradient g of the step in which the masks move.

    Arguments, gradients and state as in `magnitude`; the score is `scores.saliency`.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.saliency(0.9, begin=0, end=1000, every=100))
    """

    def score(scene: Scene) -> Named:
        return {p: scores.saliency(w, scene.grads[p]) for p, w in scene.weights.items()}

    return custom(Criterion(score), sparsity, begin, end, every, **options)


def taylor(
    sparsity: Scalar | Schedule | None = None,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    **options: Unpack[Options],
) -> Transform:
    """Pruning by (g w)² added up over all steps since the masks last moved.

    Arguments, gradients and state as in `magnitude`, and state["memory"], the float32 sums. With
    g² w² of single examples it is the Fisher score; with batches, as here, their gradients are
    averaged before the square. The score is `scores.taylor`.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.taylor(0.9, begin=100, end=1000, every=100))

    Reference: Molchanov et al., "Importance estimation for neural network pruning", 2019,
    https://arxiv.org/abs/1906.10771.
    """

    def memory(weights: Named) -> Named:
        return {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}

    def observe(scene: Scene) -> Named:
        terms = {p: scores.taylor(w, scene.grads[p]) for p, w in scene.weights.items()}
        return {path: scene.memory[path] + term for path, term in terms.items()}

    criterion = Criterion(lambda scene: scene.memory, False, memory, observe, forgets=True)
    return custom(criterion, sparsity, begin, end, every, **options)


def random(
    sparsity: Scalar | Schedule | None = None,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    **options: Unpack[Options],
) -> Transform:
    """Pruning at random among the weights that are left: the baseline any criterion has to beat.

    Arguments, gradients and state as in `magnitude`.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.random(0.9, begin=0, end=1000, every=100))
    """

    def score(scene: Scene) -> Named:
        found = random_scores(scene.key, scene.weights)
        # Above 0 for what is left, so that it comes before what is pruned.
        return {path: jnp.where(scene.mask[path], 1 + s, 0.0) for path, s in found.items()}

    return custom(Criterion(score), sparsity, begin, end, every, **options)


def random_scores(key: Array, weights: Named) -> Named:
    """A uniform score for every weight, of a key of its own for each leaf."""
    keys = jax.random.split(key, len(weights))
    return {path: scores.random(k, w) for k, (path, w) in zip(keys, weights.items(), strict=True)}


def _magnitudes(scene: Scene) -> Named:
    return {path: scores.magnitude(w) for path, w in scene.weights.items()}
