"""Sparse from the first step to the last: masks that stay, and masks whose connections move while
their number does not (SET, RigL, sparse momentum)."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune import masks as masking
from effjax.prune.budgets import Allocation, Budget, Layers
from effjax.prune.counts import Count, count
from effjax.prune.engine import Choose, Named, Rule, Scene, pruning
from effjax.prune.gradual import random_scores
from effjax.prune.patterns import Pattern, unstructured
from effjax.prune.timing import Timing, steady
from effjax.schedules import Scalar, Schedule, Window, as_schedule, is_traced
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
        kept = {path: _units(mask, pattern) for path, mask in scene.mask.items()}
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


def exchange(
    scene: Scene,
    growth: Named,
    dropped: Mapping[str, Count],
    grown: Mapping[str, Count],
    pattern: Pattern,
) -> Named:
    """The masks after each layer has dropped its smallest weights and grown others.

    Args:
      scene: whose kept weights are dropped by magnitude.
      growth: scores >= 0 by path; the largest are grown among all that are not kept, those just
        dropped included.
      dropped: how many units each layer drops, at most all it has.
      grown: how many it grows, at most what is not kept then.
      pattern: what is dropped and grown together.
    """

    def choose(scores: Named, keep: dict[str, Count]) -> Named:
        return pattern.choose(scores, lambda units: keep, signed=True)

    # Below every magnitude, so that nothing but what is free is passed over.
    left = choose(
        {path: jnp.where(m, jnp.abs(scene.weights[path]), -1.0) for path, m in scene.mask.items()},
        {path: _units(m, pattern).minus(dropped[path]) for path, m in scene.mask.items()},
    )
    free = {path: jnp.where(kept, -1.0, growth[path]) for path, kept in left.items()}
    new = choose(free, dict(grown))
    return {path: kept | new[path] for path, kept in left.items()}


def shared_out(total: Count, room: list[Count], weight: Array) -> list[Count]:
    """A number in parts, in proportion to weights and none larger than its room; exact in sum.

    Args:
      total: at most the sum of the rooms.
      room: n Counts.
      weight: float32 [n], not negative; where all that have room left are 0, room counts instead.

    Returns:
      n Counts.

    Example:
      >>> import jax.numpy as jnp
      >>> room = [Count.of(3), Count.of(20), Count.of(20)]
      >>> [int(part) for part in shared_out(Count.of(16), room, jnp.array([4.0, 2.0, 2.0]))]
      [3, 7, 6]
    """
    limit = Count.stack(room).value()

    def fill(_: int, part: Array) -> Array:
        is_open = part < limit
        wanted = jnp.where(is_open, weight, 0.0)
        wanted = jnp.where(jnp.sum(wanted) > 0, wanted, limit - part)
        more = (total.value() - jnp.sum(part)) * wanted / jnp.maximum(jnp.sum(wanted), 1e-30)
        return jnp.minimum(part + jnp.maximum(more, 0.0), limit)

    # Each round fills at least one more layer or ends with all shared out.
    part = lax.fori_loop(0, len(room), fill, jnp.zeros_like(limit))
    bounds, later = jnp.cumsum(part), Count.stack(room).after()
    left, found = total, []
    for i, own in enumerate(room):
        given = total.minus(left)
        wanted = Count.rounded(bounds[i]).minus(given)
        least = left.minus(Count(later.high[i], later.low[i]))  # what finds no room after this one
        found.append(wanted.maximum(least).minimum(own).minimum(left))
        left = left.minus(found[-1])
    return found


def _random(key: Array, weights: Named, choose: Choose) -> Named:
    return choose(random_scores(key, weights))


def _units(mask: Array, pattern: Pattern) -> Count:
    """How many units a mask keeps."""
    return count(pattern.pool(mask.astype(jnp.float32)) > 0.5)


def _to_move(mask: Named, share: Array, pattern: Pattern) -> dict[str, Count]:
    kept = {path: _units(m, pattern) for path, m in mask.items()}
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
