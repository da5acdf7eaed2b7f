"""The Transform: a NamedTuple of pure functions, one for each place of a train step where an
efficiency technique can act; and `chain`, which composes them and is itself a Transform."""

import itertools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

from effjax.errors import ChainError, SetupError

PyTree = Any
Metrics = dict[str, Array]

# (params, model_state, batch, key, train) -> (outputs, model_state): what the user brings.
Apply = Callable[[PyTree, PyTree, PyTree, Array, bool], tuple[PyTree, PyTree]]
# The same with what was measured on the way as a third result: what `wrap` takes and returns.
Forward = Callable[[PyTree, PyTree, PyTree, Array, bool], tuple[PyTree, PyTree, dict[str, PyTree]]]


class Vars(NamedTuple):
    """Everything that is differentiated: one optimizer, one checkpoint entry."""

    model: PyTree  # the Flax params
    extra: (
        PyTree  # trainable leaves the transform adds: step sizes, architecture logits, projections
    )


class Ctx(NamedTuple):
    """What a hook may read in one step; nothing here is differentiated or returned."""

    step: Array  # int32 []
    key: Array  # fresh for this transform and this step
    frozen: PyTree = None  # this transform's frozen inputs (a teacher): an argument of the step
    train: bool = True  # False in evaluation; a Python bool, so that hooks may branch on it


class Setup(NamedTuple):
    """What `init` may look at besides the params. Every leaf may be abstract (ShapeDtypeStruct)."""

    apply: Apply
    model_state: PyTree
    batch: PyTree
    frozen: PyTree = None

    def trace(self, params: PyTree, train: bool = True) -> tuple[PyTree, PyTree]:
        """Shapes of `apply`'s (outputs, model_state) for these params, without computing them."""
        args = (params, self.model_state, self.batch)
        return jax.eval_shape(
            lambda p, s, b, k: self.apply(p, s, b, k, train), *args, abstract_key()
        )


def abstract_key() -> jax.ShapeDtypeStruct:
    """The shape of one PRNG key, for tracing a function that takes one."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
    return {}, {}


def _batch(batch: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
    return batch


def _view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
    return params


def _wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
    return forward


def _loss(
    outputs: PyTree, batch: PyTree, aux: dict[str, PyTree], extra: PyTree, state: PyTree, ctx: Ctx
) -> Metrics:
    return {}


def _update(
    vars: Vars, opt: PyTree, state: PyTree, grads: Vars, aux: dict[str, PyTree], ctx: Ctx
) -> tuple[Vars, PyTree, PyTree]:
    return vars, opt, state


def _export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
    return params


def _report(vars: Vars, state: PyTree, aux: dict[str, PyTree], ctx: Ctx) -> Metrics:
    return {}


def _describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
    return {}


class Transform(NamedTuple):
    """An efficiency technique as pure functions, each the identity by default.

    init      `(key, params, setup) -> (extra, state)`: works under `jax.eval_shape`, and raises
              what can be known to be wrong before the first step.
    batch     `(batch, state, ctx) -> batch`: the data; augmentation, label mixing.
    view      `(params, extra, state, ctx) -> params`: the weights the forward pass sees;
              differentiable.
    wrap      `(forward, extra, state, ctx) -> forward`: activations, feature taps, op mixtures.
    loss      `(outputs, batch, aux, extra, state, ctx) -> {name: scalar}`: added loss terms.
    update    `(vars, opt, state, grads, aux, ctx) -> (vars, opt, state)`: after the optimizer;
              masks, ranges, moments.
    export    `(params, extra, state) -> params`: what is shipped; the same maths as `view` in
              evaluation.
    report    `(vars, state, aux, ctx) -> {name: scalar}`: metrics; dropped, never carried.
    describe  `(params, extra, state) -> {path: {fact: value}}`: how a leaf is stored and its site
              computed, for `inspect` and footprints; on concrete state, outside jit.

    `forward` is `(params, model_state, batch, key, train) -> (outputs, model_state, aux)`. A `wrap`
    adds what it measures to the `aux` dict it received, and `loss`, `update` and `report` find that
    (and nothing of the other transforms') as their `aux`.

    The facts that `describe` may give of a params path: "weight_bits" and "act_bits" (int),
    "scales" (number of scale values stored beside the weights), "sparsity" (fraction of zeros),
    "channels" (channels kept). A key that begins with "@" is about one operation: see `Site.path`.

    `kind` says what the transform does to the weights; `chain` uses it to refuse a wrong order:
    "prune" (pruned weights are zero), "mask" (they are zero in the view alone, and live on behind
    it), "cluster", "quantize", "architecture", "other".
    `state` and `extra` are trees of arrays without None leaves, and `update` keeps their structure,
    shapes and dtypes. What is keyed by a params path and shaped like that leaf (a mask) is sharded
    like it.
    """

    init: Callable[[Array, PyTree, Setup], tuple[PyTree, PyTree]] = _init
    batch: Callable[[PyTree, PyTree, Ctx], PyTree] = _batch
    view: Callable[[PyTree, PyTree, PyTree, Ctx], PyTree] = _view
    wrap: Callable[[Forward, PyTree, PyTree, Ctx], Forward] = _wrap
    loss: Callable[[PyTree, PyTree, dict[str, PyTree], PyTree, PyTree, Ctx], Metrics] = _loss
    update: Callable[
        [Vars, PyTree, PyTree, Vars, dict[str, PyTree], Ctx], tuple[Vars, PyTree, PyTree]
    ] = _update
    export: Callable[[PyTree, PyTree, PyTree], PyTree] = _export
    report: Callable[[Vars, PyTree, dict[str, PyTree], Ctx], Metrics] = _report
    describe: Callable[[PyTree, PyTree, PyTree], dict[str, dict[str, Any]]] = _describe
    kind: str = "other"
    members: tuple[tuple[str, "Transform"], ...] = ()


# The stage at which each kind meets the weights. Masks and channel slices are both products with
# zeros and ones, so they commute; shared values are chosen among what is left; the grid comes last.
STAGES = {"architecture": 0, "prune": 0, "mask": 0, "cluster": 1, "quantize": 2}


def chain(*chains: Transform, allow_order: bool = False, **members: Transform) -> Transform:
    """Composes transforms into one. Keyword order is application order.

    Weights flow through `view` from left to right, then through the wrapped forward pass from left
    to right (the first member's `wrap` is the outermost), into the model. Batches, loss terms,
    updates and exports go from left to right. Each member sees its own slot of `extra`, `state`,
    `frozen` and `aux`, and a key of its own that depends on its name but not on its neighbours, so
    that a run with and one without pruning see the same augmentations. Losses and metrics are
    reported as "name/term".

    Args:
      *chains: chains to splice in front, their members keeping their names: `chain(chain(a=A, b=B),
        c=C)` is `chain(a=A, b=B, c=C)`, bit for bit.
      allow_order: accept an order of techniques that is known to be wrong.
      **members: transforms by name. A chain given by keyword is spliced under it: "name/member".

    Returns:
      A Transform whose `extra`, `state` and `frozen` are dicts by member name.

    Raises:
      ChainError: two members of one name; something that is not a Transform; or weights quantized
        before they are pruned, clustered or sliced (ranges calibrated on weights that then vanish).
    """
    flat: list[tuple[str, Transform]] = []
    for position, spliced in enumerate(chains):
        if not isinstance(spliced, Transform) or (not spliced.members and spliced != _EMPTY):
            raise ChainError(
                f"chain() got {spliced!r:.80} as positional argument {position}; only chains are "
                "given by position. Name it: chain(prune=...)."
            )
        flat += spliced.members
    for name, member in members.items():
        if not isinstance(member, Transform):
            raise ChainError(
                f"chain({name}=...) got a {type(member).__name__}, not an effjax.Transform. "
                "If it is a function that makes one, call it."
            )
        flat += [(f"{name}/{n}", t) for n, t in member.members] or [(name, member)]
    names = [name for name, _ in flat]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ChainError(
            f"chain() has more than one member named {repeated}; give each its own name."
        )
    if not allow_order:
        _check_order(flat)
    return _compose(tuple(flat))


def _check_order(flat: list[tuple[str, Transform]]) -> None:
    staged = [(name, t) for name, t in flat if t.kind in STAGES]
    for (first, a), (second, b) in itertools.pairwise(staged):
        if STAGES[a.kind] > STAGES[b.kind]:
            right = sorted(staged, key=lambda member: STAGES[member[1].kind])
            raise ChainError(
                f"{first!r} ({a.kind}) comes before {second!r} ({b.kind}): its values and ranges "
                f"would be fitted to weights that {second!r} then removes or moves. Write "
                f"chain({', '.join(f'{n}=...' for n, _ in right)}), "
                "or pass allow_order=True if this order is what you study."
            )


def _compose(members: tuple[tuple[str, Transform], ...]) -> Transform:
    names = [name for name, _ in members]

    def own(name: str, ctx: Ctx) -> Ctx:
        frozen = scoped_frozen(ctx.frozen, names)
        return ctx._replace(key=_own_key(name, ctx.key), frozen=frozen.get(name))

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        frozen = scoped_frozen(setup.frozen, names)
        extra, state = {}, {}
        for name, t in members:
            own_setup = setup._replace(frozen=frozen.get(name))
            extra[name], state[name] = t.init(_own_key(name, key), params, own_setup)
        return extra, state

    def batch(batch: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        for name, t in members:
            batch = t.batch(batch, state[name], own(name, ctx))
        return batch

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        for name, t in members:
            params = t.view(params, extra[name], state[name], own(name, ctx))
        return params

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        for name, t in reversed(members):
            if t.wrap is not _wrap:
                wrapped = t.wrap(_hide_aux(forward), extra[name], state[name], own(name, ctx))
                forward = _scope_aux(name, wrapped)
        return forward

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        losses: Metrics = {}
        for name, t in members:
            terms = t.loss(
                outputs, batch, aux.get(name, {}), extra[name], state[name], own(name, ctx)
            )
            losses |= {f"{name}/{term}": value for term, value in terms.items()}
        return losses

    def update(vars: Vars, opt, state, grads: Vars, aux, ctx) -> tuple[Vars, PyTree, PyTree]:
        state = dict(state)
        for name, t in members:
            mine = Vars(vars.model, vars.extra[name])
            own_grads = Vars(grads.model, grads.extra[name])
            mine, opt, state[name] = t.update(
                mine, opt, state[name], own_grads, aux.get(name, {}), own(name, ctx)
            )
            vars = Vars(mine.model, {**vars.extra, name: mine.extra})
        return vars, opt, state

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        for name, t in members:
            params = t.export(params, extra[name], state[name])
        return params

    def report(vars: Vars, state, aux, ctx) -> Metrics:
        metrics: Metrics = {}
        for name, t in members:
            mine = Vars(vars.model, vars.extra[name])
            found = t.report(mine, state[name], aux.get(name, {}), own(name, ctx))
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        return metrics

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        facts: dict[str, dict[str, Any]] = {}
        for name, t in members:
            for path, found in t.describe(params, extra[name], state[name]).items():
                facts[path] = facts.get(path, {}) | found
        return facts

    hooks = (init, batch, view, wrap, loss, update, export, report, describe)
    return Transform(*hooks, kind="chain", members=members) if members else _EMPTY


def _own_key(name: str, key: Array) -> Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def scoped_frozen(frozen: PyTree, names: list[str]) -> Mapping[str, PyTree]:
    """The frozen inputs of a chain by member name, checked against the members it has."""
    if frozen is None:
        return {}
    if not isinstance(frozen, Mapping):
        raise SetupError(
            f"frozen is a {type(frozen).__name__}; a chain takes a dict by member name, for "
            "example frozen={'kd': teacher}."
        )
    if unknown := sorted(set(frozen) - set(names)):
        raise SetupError(f"frozen has entries for {unknown}, but the chain's members are {names}.")
    return frozen


# Around one member's `wrap`, the measurements of the members inside it travel under this key: the
# member passes on the dict it received, and sees and names only its own entries.
_INNER = "__inner__"


def _hide_aux(forward: Forward) -> Forward:
    def hidden(params, model_state, batch, key, train):
        outputs, model_state, aux = forward(params, model_state, batch, key, train)
        return outputs, model_state, {_INNER: aux}

    return hidden


def _scope_aux(name: str, forward: Forward) -> Forward:
    def scoped(params, model_state, batch, key, train):
        outputs, model_state, aux = forward(params, model_state, batch, key, train)
        if _INNER not in aux:
            raise ChainError(
                f"the wrap of {name!r} dropped what the transforms inside it measured. Return "
                "{**aux, 'mine': ...} with the aux that the wrapped forward returned."
            )
        mine = {k: v for k, v in aux.items() if k != _INNER}
        return outputs, model_state, {**aux[_INNER], name: mine}

    return scoped


_EMPTY = Transform(kind="chain")
