"""Pruning that keeps what it hides: pruned weights are zero in the forward pass and in what is
shipped, and go on living behind their mask, so that they can come back."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, PyTree, Setup, Transform
from effjax.prune import scores
from effjax.prune.budgets import Allocation
from effjax.prune.engine import Choose, Named, Rule, Scene, pruning
from effjax.prune.masks import masked
from effjax.prune.patterns import Pattern, unstructured
from effjax.prune.timing import steady, timing
from effjax.schedules import Scalar, Schedule
from effjax.select import leaves, replace


def ste(
    sparsity: Scalar | Schedule | None = None,
    every: int = 1,
    *,
    begin: int = 0,
    end: int | None = None,
    budget: str | Allocation = "uniform",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Top-k weights with a straight-through gradient.

    The forward pass sees the weights with the largest magnitudes, and 0 for the others. The
    gradient passes as if nothing had been pruned: hidden weights train too, and come back when they
    have grown. With `pattern=n_m(2, 4)` it trains an N:M network from scratch.

    Args:
      sparsity: the fraction of zeros in [0, 1) from the first step on, perhaps traced; or a
        schedule; or None where the pattern fixes it.
      every: steps from one choice of the masks to the next; choosing costs a few reads of the
        weights.
      begin: the first step at whose end masks are chosen anew.
      end: the last one; left out, they are for ever.
      budget: as in `prune.magnitude`, and so are `pattern` and `select`.

    Returns:
      A Transform of kind "mask", with the state and the report of `prune.magnitude`.

    Raises:
      As `prune.magnitude`.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.ste(pattern=ej.prune.n_m(2, 4), every=10))

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", 2021, https://arxiv.org/abs/2102.04010; Bengio, Leonard and Courville, 2013,
    https://arxiv.org/abs/1308.3432.
    """
    pattern = unstructured() if pattern is None else pattern

    def start(key: Array, weights: Named, choose: Choose) -> Named:
        return choose({path: scores.magnitude(w) for path, w in weights.items()})

    def move(scene: Scene, choose: Choose) -> Named:
        return start(scene.key, scene.weights, choose)

    rule = Rule(move=move, start=start, gradient="all", alive=True)
    times = steady(sparsity, begin, end, every, pattern)
    return pruning(rule, times, budget=budget, pattern=pattern, select=select)


def movement(
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
    """Movement pruning: scores are trained beside the weights, and the largest are kept.

    A score S for each weight gets, straight through the mask, the gradient dL/dS = dL/dw' · w,
    where w' = where(mask, w, 0) is what the forward pass sees. Plain gradient descent then adds up
    -g w, `scores.movement`: weights that move away from zero gain. Weights get the gradient
    where(mask, dL/dw', 0); those that are pruned keep their values and come back with them when
    their score has grown.

    Scores are trainable: the optimizer sees them at "extra/score", and
    `ej.select.label_tree(vars, [("score", "scores"), ("", "weights")])` gives them a learning rate
    of their own (the paper's is larger). Leave them out of weight decay.

    Arguments, report and errors as in `prune.magnitude`.

    Returns:
      A Transform of kind "mask".

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.movement(0.85, begin=100, end=1000, every=10))

    Reference: Sanh, Wolf and Rush, "Movement pruning: adaptive sparsity by fine-tuning", 2020,
    https://arxiv.org/abs/2005.07683.
    """
    pattern = unstructured() if pattern is None else pattern

    def move(scene: Scene, choose: Choose) -> Named:
        return choose(scene.extra["score"], signed=True)

    times = timing(sparsity, begin, end, every, initial, pattern)
    rule = Rule(move=move, alive=True)
    base = pruning(rule, times, budget=budget, pattern=pattern, select=select)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        _, state = base.init(key, params, setup)
        named = leaves(params)
        return {"score": {path: jnp.zeros_like(named[path]) for path in state["mask"]}}, state

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        named = leaves(params)
        seen = {p: _scored(named[p], extra["score"][p], m) for p, m in state["mask"].items()}
        return replace(params, seen)

    return base._replace(init=init, view=view)


@jax.custom_jvp
def _scored(weight: Array, score: Array, mask: Array) -> Array:
    return masked(weight, mask)


@_scored.defjvp
def _scored_jvp(primals, tangents):
    (weight, _, mask), (dweight, dscore, _) = primals, tangents
    return masked(weight, mask), masked(dweight, mask) + weight * dscore
