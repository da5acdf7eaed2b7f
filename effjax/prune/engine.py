"""What all pruning transforms share: masks that are carried, seen through, moved and kept.

An algorithm is a `Rule`: which masks follow from what a step knows. The engine does the rest, once
for all of them: when the masks move, how many weights stay, what gradient the weights get, and that
pruned weights and their moments are zero after every step.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.prune import budgets, masks
from effjax.prune.counts import count
from effjax.prune.ends import inner_kernels
from effjax.prune.patterns import Pattern
from effjax.prune.timing import Timing
from effjax.select import check_floating, leaves, owners, replace
from effjax.select import select as select_leaves
from effjax.sites import find_sites

Named = dict[str, Array]  # by params path

# The masks that keep the largest scores, in the pattern, as many as the schedule says.
Choose = Callable[..., Named]

# Which weights get a gradient: those that are kept; all of them in the steps that move the masks;
# all of them always (the straight-through view).
Gradient = Literal["kept", "moving", "all"]


class Scene(NamedTuple):
    """What a rule may look at. All by params path, of the selected leaves only.

    weights: as the optimizer left them; pruned ones are 0, unless the rule leaves them alive.
    grads: of the objective, with respect to these weights.
    mask: before the move.
    extra: what the transform trains beside the weights.
    memory: what the rule has kept of earlier steps.
    """

    weights: Named
    grads: Named
    mask: Named
    extra: PyTree
    memory: PyTree
    key: Array
    step: Array


def nothing(weights: Named) -> PyTree:
    """No memory."""
    return {}


class Rule(NamedTuple):
    """A pruning algorithm.

    move: `(scene, choose) -> masks`, run only in the steps that move them. `choose(scores,
      signed=False)` gives the masks that meet the schedule.
    start: `(key, weights, choose) -> masks` at step 0; None keeps every weight.
    memory: `(weights) -> tree` of what is carried from step to step, keyed by path where it is
      shaped like a weight.
    observe: `(scene) -> memory`, run in every step.
    forgets: whether the memory starts anew after each move.
    gradient: which weights get one.
    alive: pruned weights keep their values and moments, and only the view zeroes them.
    """

    move: Callable[[Scene, Choose], Named]
    start: Callable[[Array, Named, Choose], Named] | None = None
    memory: Callable[[Named], PyTree] = nothing
    observe: Callable[[Scene], PyTree] | None = None
    forgets: bool = False
    gradient: Gradient = "kept"
    alive: bool = False


def pruning(
    rule: Rule,
    timing: Timing,
    *,
    budget: str | budgets.Allocation = "uniform",
    pattern: Pattern,
    select: str | list[str] | None = None,
) -> Transform:
    """The transform that prunes by a rule.

    Args:
      rule: which masks follow from weights, gradients and memory.
      timing: when masks move, and how sparse they are then.
      budget: how a sparsity is spread over the layers; a name of `budgets.ALLOCATIONS` or an
        Allocation.
      pattern: which weights are kept or pruned together.
      select: a regular expression for the params paths that are pruned; None for every kernel but
        those of the model's first and last operation.

    Returns:
      A Transform with state {"mask": {path: bool}, "sparsity": float32 [], "sparsest": float32 [],
      "memory": the rule's, "macs": {path: float32 []} where the budget is of MACs}.

    Raises:
      SelectorError (at `init`): nothing is selected.
      SetupError: an unknown budget; at `init`, a leaf that is not floating point, does not fit the
        pattern, or would be emptied.
    """
    allocation = budgets.resolve(budget)
    schedule, window = timing.schedule, timing.window

    def chooser(sparsity: Array, macs: Mapping[str, Array]) -> Choose:
        def choose(scores: Named, signed: bool = False) -> Named:
            layers = _layers(scores, pattern, macs)
            return pattern.choose(scores, lambda units: allocation(layers, units, sparsity), signed)

        return choose

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        chosen = selected(params, setup, select)
        for path, leaf in chosen.items():
            pattern.check(path, leaf.shape)
        macs = _macs(params, setup, chosen) if allocation is budgets.macs else {}
        if pattern.sparsity is None:
            _check_budget(allocation, chosen, pattern, macs, timing.final)
        weights = {path: jnp.asarray(leaf) for path, leaf in chosen.items()}
        if rule.start is None:
            mask = {path: jnp.ones(leaf.shape, bool) for path, leaf in chosen.items()}
        else:
            mask = rule.start(key, weights, chooser(schedule(jnp.int32(0)), macs))
        state = {"mask": mask, "memory": rule.memory(weights), "macs": macs}
        return {}, state | _measured(mask)

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        if rule.gradient == "moving":
            return masks.apply(params, state["mask"], window.contains(ctx.step))
        return masks.apply(params, state["mask"], rule.gradient == "all")

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx: Ctx) -> tuple[Vars, PyTree, PyTree]:
        mask = state["mask"]
        named, slopes, moments = leaves(vars.model), leaves(grads.model), leaves(opt)
        belongs = {n: p for n, p in owners(opt, vars.model).items() if p in mask}
        weights = {path: named[path] for path in mask}
        if not rule.alive:
            # This much in every step: XLA makes it part of the optimizer's own arithmetic. All
            # that goes over the weights once more is left to the steps that move the masks.
            weights = {path: masks.masked(w, mask[path]) for path, w in weights.items()}
            if rule.gradient == "all":
                owned = {n: masks.masked(moments[n], mask[p]) for n, p in belongs.items()}
                moments = {**moments, **owned}
        slopes = {path: slopes[path] for path in mask}
        scene = Scene(weights, slopes, mask, vars.extra, state["memory"], ctx.key, ctx.step)
        if rule.observe is not None:
            scene = scene._replace(memory=rule.observe(scene))

        def move(operands):
            kept, memory, weights, moments = operands
            old = kept["mask"]
            now = scene._replace(weights=weights, mask=old, memory=memory)
            new = rule.move(now, chooser(schedule(ctx.step), state["macs"]))
            if not rule.alive:
                # What comes back comes back at 0, and its moments with it.
                both = {path: old[path] & new[path] for path in new}
                weights = {path: masks.masked(w, both[path]) for path, w in weights.items()}
                moments = {n: masks.masked(x, both[belongs[n]]) for n, x in moments.items()}
            memory = rule.memory(weights) if rule.forgets else memory
            return {"mask": new, **_measured(new)}, memory, weights, moments

        kept = {name: state[name] for name in ("mask", "sparsity", "sparsest")}
        operands = (kept, scene.memory, weights, {name: moments[name] for name in belongs})
        kept, memory, weights, owned = _if(window.contains(ctx.step), move, operands)
        vars = vars._replace(model=replace(vars.model, weights))
        return vars, replace(opt, owned), {**state, **kept, "memory": memory}

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return masks.apply(params, state["mask"])

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        target = schedule(ctx.step)
        if rule.start is None:
            target = jnp.where(ctx.step < window.begin, 0.0, target)
        found = {name: state[name] for name in ("sparsity", "sparsest")}
        return {**found, "target": target}

    return Transform(
        init=init,
        view=view,
        update=update,
        export=export,
        report=report,
        describe=functools.partial(describe, pattern=pattern.name),
        kind="mask" if rule.alive else "prune",
    )


def _if(condition: Array, f: Callable[[PyTree], PyTree], operands: PyTree) -> PyTree:
    """`f(operands)` where the condition holds, else the operands: `lax.cond` without its copies.

    A loop of at most one round. XLA updates what a loop carries in place, but copies whatever a
    conditional passes through, which would cost every step another read and write of the masks.
    """

    def once(carry):
        return jnp.bool_(False), f(carry[1])

    return lax.while_loop(lambda carry: carry[0], once, (jnp.bool_(condition), operands))[1]


def _layers(
    named: Mapping[str, Array], pattern: Pattern, macs: Mapping[str, Array]
) -> dict[str, budgets.Layer]:
    return {
        path: budgets.Layer(x.shape, pattern.units(x.shape), macs.get(path))
        for path, x in named.items()
    }


def _macs(params: PyTree, setup: Setup, paths: Iterable[str]) -> dict[str, Array]:
    """The multiply-accumulates of each leaf."""
    found: dict[str, int] = {}
    for site in find_sites(
        setup.apply, jax.eval_shape(lambda: params), setup.model_state, setup.batch
    ):
        found[site.leaf] = found.get(site.leaf, 0) + site.macs
    return {path: jnp.float32(found[path]) for path in paths if path in found}


def _check_budget(
    allocation: budgets.Allocation,
    chosen: Named,
    pattern: Pattern,
    macs: Mapping[str, Array],
    final: float | None,
) -> None:
    """Raises what the allocation has to say of these layers, and where one would be emptied."""
    layers = _layers(chosen, pattern, macs)
    scores = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in chosen.items()}
    jax.eval_shape(lambda s: allocation(layers, _pooled(pattern, s), 0.5), scores)
    if final is not None:
        sizes = {path: layer.units for path, layer in layers.items()}
        if allocation is not budgets.uniform:
            sizes = {"the whole selection": sum(sizes.values())}
        budgets.check_not_emptied(sizes, final)


def _pooled(pattern: Pattern, scores: Named) -> Named:
    return {path: pattern.pool(score) for path, score in scores.items()}


def selected(params: PyTree, setup: Setup, select: str | list[str] | None) -> Named:
    """The leaves to be pruned, checked: those of a regular expression, those of a list of paths, or
    every kernel but those of the model's two ends.

    Raises:
      SelectorError: nothing is selected.
      SetupError: a leaf that is not floating point.
    """
    named = leaves(params)
    select = inner_kernels(params, setup) if select is None else select
    chosen = (
        select_leaves(params, select)
        if isinstance(select, str)
        else {path: named[path] for path in select}
    )
    check_floating(chosen, select, "scores are compared among floating-point weights")
    return chosen


def _measured(mask: Named) -> dict[str, Array]:
    """What is reported of masks: counted when they move, as a count a step would cost more than all
    else in a step in which they don't."""
    layers = [masks.sparsity({path: m}) for path, m in mask.items()]
    return {"sparsity": masks.sparsity(mask), "sparsest": jnp.max(jnp.stack(layers))}


def describe(
    params: PyTree, extra: PyTree, state: PyTree, pattern: str = ""
) -> dict[str, dict[str, Any]]:
    """The fraction of zeros of each masked leaf, and the pattern they lie in."""
    named: Mapping[str, Array] = state["mask"]
    pruned = {path: mask.size - int(count(mask)) for path, mask in named.items()}
    named_pattern = {"pattern": pattern} if pattern else {}
    return {p: {"sparsity": pruned[p] / mask.size, **named_pattern} for p, mask in named.items()}
