"""Dynamic sparse training: masks whose connections move while their number does not (SET, RigL,
sparse momentum)."""

import math

import jax.numpy as jnp
from jax import Array

from effjax.core import Transform
from effjax.errors import ScheduleError, SetupError
from effjax.prune import masks as masking
from effjax.prune.budgets import Allocation
from effjax.prune.counts import Count, count
from effjax.prune.engine import Choose, Named, Rule, Scene, pruning
from effjax.prune.exchange import exchange, kept_units, shared_out
from effjax.prune.gradual import random_scores
from effjax.prune.patterns import Pattern, unstructured
from effjax.prune.timing import Timing, steady
from effjax.schedules import Scalar, Schedule, Window, as_schedule, is_traced


def set_(
    sparsity: Scalar,
    begin: int | None = None,
    end: int | None = None,
    every: int = 100,
    *,
    alpha: Scalar | Schedule = 0.3,
    budget: str | Allocation = "erk",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Sparse evolutionary training (SET): drops the smallest weights, grows others at random.

    Named like the paper's algorithm, with an underscore as `set` is Python's. Arguments, counts and
    what happens to weights and moments are those of `rigl`; what differs:

    - connections grow at random, so that no step needs the gradients of pruned weights, and they
      are exactly 0 in every one;
    - the fraction `alpha` stays as it is (a schedule may say otherwise), and so `end` may be left
      out: connections then move for ever;
    - "smallest" is of magnitudes. The paper drops a fraction of the positive and one of the
      negative weights, those nearest to 0.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.set_(0.9, every=100))

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", 2018, https://arxiv.org/abs/1707.04780.
    """
    pattern = _free(pattern, "set_")
    _check_share(alpha)
    share = as_schedule(alpha)

    def move(scene: Scene, choose: Choose) -> Named:
        moved = _to_move(scene.mask, share(scene.step), pattern)
        return exchange(scene, random_scores(scene.key, scene.weights), moved, moved, pattern)

    times = _times(sparsity, begin, end, every, pattern)
    return pruning(Rule(move, _random), times, budget=budget, pattern=pattern, select=select)


def rigl(
    sparsity: Scalar,
    begin: int | None = None,
    end: int | None = None,
    every: int = 100,
    *,
    alpha: Scalar | Schedule = 0.3,
    budget: str | Allocation = "erk",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """RigL: drops the weights of smallest magnitude and grows those of largest gradient.

    Masks are drawn at random at the start, as sparse in each layer as the budget says. At the end
    of steps begin, begin + every, ... before `end`, in each layer that keeps n weights,

        k = round(n * alpha / 2 * (1 + cos(pi * t / end)))

    are dropped, those with the smallest |w| after the optimizer's step, and k are grown, those with
    the largest |dL/dw| among all that are not kept then. Each layer keeps exactly n weights after
    every step. As in the paper and its code, what was just dropped may be grown again if its
    gradient is large enough; it then keeps its value and its moments, as if it had not been
    dropped. All others that are grown start at 0, with moments of 0. Of equal magnitudes, and of
    equal gradients, the first ones are kept and grown.

    The forward pass sees `where(mask, w, 0)`. In the steps that move the masks the gradient passes
    straight through, so that pruned weights have one; in all others it is exactly 0 for them. That
    has two consequences:

    - In those steps clipping by the global norm (`optax.clip_by_global_norm`) sees the gradients of
      pruned weights too, and clips harder.
    - The optimizer takes its step for kept weights in every step. The paper leaves it out in the
      steps that move masks; with `every=100` that is one step more in a hundred.

    Args:
      sparsity: the fraction of zeros in [0, 1), perhaps traced, from the first step to the last.
      begin: the first step at whose end connections move. Left out, it is `every`: magnitudes mean
        nothing before some training.
      end: the paper's T_end, from which on masks stay as they are; a good one is 3/4 of the run.
      every: the paper's ΔT.
      alpha: the fraction of connections that move at first, perhaps traced; or a schedule of the
        fraction in place of the cosine.
      budget: how the sparsity is spread over the layers; see `budgets`. Each layer's number of
        weights is fixed at the start.
      pattern: blocks or channels are dropped by their mean |w| and grown by their mean |dL/dw|;
        left out, weights move one by one.
      select: a regular expression for the params paths that are pruned. Left out, every kernel but
        those of the model's first and last operation.

    Returns:
      A Transform of kind "prune" with the state and the report of `prune.magnitude`.

    Raises:
      ScheduleError: a sparsity or alpha out of range; a window that ends before it begins, or no
        end for the cosine.
      SetupError: an N:M pattern; at `init`, what `prune.magnitude` raises.
      SelectorError (at `init`): nothing is selected.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.rigl(0.9, end=7500, every=100))

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", 2020,
    https://arxiv.org/abs/1911.11134.
    """
    pattern = _free(pattern, "rigl")
    share = _annealed(alpha, end, "rigl")

    def move(scene: Scene, choose: Choose) -> Named:
        slopes = {path: jnp.abs(g) for path, g in scene.grads.items()}
        moved = _to_move(scene.mask, share(scene.step), pattern)
        return exchange(scene, slopes, moved, moved, pattern)

    times = _times(sparsity, begin, end, every, pattern)
    rule = Rule(move, _random, gradient="moving")
    return pruning(rule, times, budget=budget, pattern=pattern, select=select)


def sparse_momentum(
    sparsity: Scalar,
    begin: int | None = None,
    end: int | None = None,
    every: int = 100,
    *,
    alpha: Scalar | Schedule = 0.5,
    decay: Scalar = 0.9,
    budget: str | Allocation = "uniform",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Sparse momentum: weights move between layers, to where the momentum is.

    The momentum of all weights, M ← decay * M + (1 - decay) * dL/dw, is updated in every step. When
    connections move (`begin`, `every`, `end` as in `rigl`, of which the paper's is one epoch), each
    layer drops the share alpha / 2 * (1 + cos(pi * t / end)) of its weights, smallest magnitudes
    first, but never all. The K that were dropped are shared out over the layers in proportion to
    the mean |M| of their kept weights; what does not fit into a layer goes to the others in the
    same proportion. Each layer grows its part where |M| is largest, perhaps where it has just
    dropped. The network keeps exactly the same number of weights; layers do not. Blocks and
    channels are counted as they are, so that the number of weights stays the same only where they
    all have one size.

    The cost: a dense gradient in every step, so that its backward pass over weights saves nothing,
    and one float32 for every selected weight, state["memory"]. Clipping by the global norm sees the
    gradients of pruned weights in every step. Weights that come back start at 0, with moments of 0.

    Args:
      sparsity: as in `rigl`, and so are the others.
      alpha: the share that moves at first (the paper's prune rate), or a schedule of it.
      decay: of the momentum, in [0, 1).

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.sparse_momentum(0.9, end=10000, every=500))

    Reference: Dettmers and Zettlemoyer, "Sparse networks from scratch: faster training without
    losing performance", 2019, https://arxiv.org/abs/1907.04840.
    """
    pattern = _free(pattern, "sparse_momentum")
    share = _annealed(alpha, end, "sparse_momentum")
    if not is_traced(decay) and not 0.0 <= decay < 1.0:
        raise ScheduleError(f"the momentum's decay is {decay}; it is a number in [0, 1).")

    def memory(weights: Named) -> Named:
        return {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}

    def observe(scene: Scene) -> Named:
        return {
            path: decay * m + (1.0 - decay) * scene.grads[path].astype(jnp.float32)
            for path, m in scene.memory.items()
        }

    def move(scene: Scene, choose: Choose) -> Named:
        momentum = {path: jnp.abs(m) for path, m in scene.memory.items()}
        kept = {path: kept_units(mask, pattern) for path, mask in scene.mask.items()}
        dropped, room, means = {}, [], []
        for path, mask in scene.mask.items():
            wanted = Count.rounded(share(scene.step) * kept[path].value())
            dropped[path] = wanted.minimum(kept[path].minus(Count.of(1)))
            left = kept[path].minus(dropped[path])
            room.append(Count.of(pattern.units(mask.shape)).minus(left))
            total = jnp.sum(masking.masked(momentum[path], mask))
            means.append(total / jnp.maximum(count(mask).value(), 1.0))
        shares = shared_out(Count.stack(list(dropped.values())).sum(), room, jnp.stack(means))
        grown = dict(zip(scene.mask, shares, strict=True))
        return exchange(scene, momentum, dropped, grown, pattern)

    times = _times(sparsity, begin, end, every, pattern)
    rule = Rule(move, _random, memory, observe, gradient="all")
    return pruning(rule, times, budget=budget, pattern=pattern, select=select)


def _random(key: Array, weights: Named, choose: Choose) -> Named:
    return choose(random_scores(key, weights))


def _to_move(mask: Named, share: Array, pattern: Pattern) -> dict[str, Count]:
    kept = {path: kept_units(m, pattern) for path, m in mask.items()}
    return {path: Count.rounded(share * n.value()).minimum(n) for path, n in kept.items()}


def _annealed(alpha: Scalar | Schedule, end: int | None, name: str) -> Schedule:
    """alpha / 2 * (1 + cos(pi * t / end)), or the schedule given."""
    _check_share(alpha)
    if callable(alpha):
        return alpha
    if end is None:
        raise ScheduleError(
            f"{name} lets fewer connections move as step `end` comes nearer, so it needs one: "
            "end=..., usually 3/4 of the run. For a fraction that stays, pass a schedule: "
            "alpha=lambda step: 0.3."
        )
    return lambda step: jnp.float32(alpha / 2) * (1.0 + jnp.cos(math.pi * (step / end)))


def _check_share(alpha: Scalar | Schedule) -> None:
    if not callable(alpha) and not is_traced(alpha) and not 0.0 <= alpha <= 1.0:
        raise ScheduleError(
            f"alpha is {alpha}; it is the fraction of the kept connections that move at once, in "
            "[0, 1]."
        )


def _free(pattern: Pattern | None, name: str) -> Pattern:
    """The pattern, which must leave a layer's budget to be spent anywhere in it."""
    if pattern is not None and pattern.sparsity is not None:
        raise SetupError(
            f"{name} drops connections in one place of a layer and grows them in another, and an "
            "N:M pattern has as many in every group of M. Use ste(pattern=n_m(...)), in which the "
            "weights of each group compete, or static(pattern=n_m(...))."
        )
    return unstructured() if pattern is None else pattern


def _times(
    sparsity: Scalar, begin: int | None, end: int | None, every: int, pattern: Pattern
) -> Timing:
    """Moves at begin, begin + every, ..., all before `end`."""
    begin = every if begin is None else begin
    times = steady(sparsity, begin, end, every, pattern)
    if end is not None:
        last = begin + (end - 1 - begin) // every * every
        times = times._replace(window=Window(begin, last, every))
    return times
