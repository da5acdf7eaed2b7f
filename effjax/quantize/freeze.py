"""From a trained state to a deployable function: all that training decided, fixed in integers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import jaxprs
from effjax.core import Apply, Ctx, PyTree, Transform, chain
from effjax.errors import SelectorError, SetupError, SiteError
from effjax.interpret import Handler, Operation, intercept
from effjax.quantize.frozen import Distance, Frozen, Inputs, Weights, compare
from effjax.quantize.grids import Grid, activation_grids, check_on_grids, quantizer_of
from effjax.quantize.marker import Quantizer
from effjax.quantize.points import Point, points
from effjax.quantize.program import Entry, Program, Store, write
from effjax.select import leaves
from effjax.sites import Plan, Site, analyze
from effjax.step import TrainState, forward

COVERED = 1.25  # by how much values may exceed a range that they share with a site's input


def freeze(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    *,
    outputs: Literal["float", "rounded"] = "float",
) -> Frozen:
    """The trained model as a pure function on the grids that it was trained with.

    Masks are applied and other transforms' wraps run as in evaluation. Of a site of the quantizer

        y = (s_x · s_w) · (sum_k x'_k w'_k + b'),    x' and w' integers, b' int32,

    s_w takes in what follows the site for each channel (BatchNorm, a scaling; where its factor is
    negative w' changes sign) and b' is the bias, with BatchNorm's shift, rounded to steps of s_x ·
    s_w. Inputs that are never negative (after a ReLU) are 0 ... 255 steps of their scale, where
    training had 0 ... 127 of them; others are -128 ... 127, where training had -127.

    An engine needs a grid for each result as well. One that meets a site's input alone has that
    grid. Others (before pooling or a sum) get 256 steps from the least to the largest value seen in
    the batches, or share the grid of a site's input that they are as well; so do sums, where they
    go on to sites. The rest, LayerNorm, softmax and the like, stays in floating point.

    What that changes is measured: `Frozen.distance` compares with evaluation under the transform.

    Args:
      apply: the model's, as in training.
      transform: trained with, with one quantizer of static ranges in it.
      state: of the run, its ranges seen in training or by `calibrate`.
      batches: of the calibration split, a few hundred examples; the first is the example.
      outputs: whether the model's outputs are rounded to 8 bits too, as engines without floating
        point need.

    Raises:
      SetupError: no quantizer or several; ranges that are dynamic or were never calibrated; weights
        on no grid; no batches; a model that is not float32.
      SiteError: a site that engines have no kernel for: inside a loop over time or a branch, with a
        batch axis of its own, with only one operand rounded.
      SelectorError: nothing is quantized.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> model = ej.Model(lambda key, batch: ({"kernel": jnp.eye(4)}, {}), apply)
      >>> batch = {"x": jnp.linspace(-1, 1, 8).reshape(2, 4)}
      >>> small = ej.quantize.ptq(model, {"kernel": jnp.eye(4)}, {}, [batch])
      >>> frozen = ej.quantize.freeze(apply, small.transform, small.state, [batch])
      >>> list(frozen.quantizers)
      ['kernel:input', 'kernel:weight']
      >>> bool(jnp.allclose(frozen.apply(frozen.weights, batch), batch["x"], atol=0.01))
      True

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877.
    """
    if outputs not in ("float", "rounded"):
        raise SetupError(f"outputs is {outputs!r}; the model's outputs are 'float' or 'rounded'.")
    batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    if not batches:
        raise SetupError(
            "freeze() got no batches: the ranges of results come from data. Give a few hundred "
            "examples of a calibration split, in a list of batches."
        )
    grids = activation_grids(transform, state)
    plain = _without_quantizer(transform, state)
    ctx = Ctx(state.step, state.key, None, train=False)

    def evaluated(params, model_state, batch, key):
        vars = state.vars._replace(model=params)
        own = ctx._replace(key=key)
        return forward(apply, plain, vars, model_state, state.transform, batch, own).outputs

    params, model_state = state.vars.model, state.model_state
    entries = _entries(apply, transform, state, grids, batches[0])

    def plan_of(jaxpr: jaxprs.Jaxpr, batch: PyTree) -> Plan:
        return analyze(jaxpr, params, model_state, batch).plan

    def written(program: Program, batch: PyTree, fresh: bool) -> PyTree:
        outs, tree = write(
            evaluated,
            program,
            lambda jaxpr: plan_of(jaxpr, batch),
            params,
            model_state,
            batch,
            fresh,
        )
        return jax.tree.unflatten(tree, outs)

    first = Program(entries, Store(), {}, {})
    jax.eval_shape(lambda batch: written(first, batch, True), batches[0])
    weights: Weights = {n: jnp.asarray(x) for n, x in first.weights.found.items()}
    if not first.sites:
        raise SelectorError(
            "freeze() met none of the quantizer's sites in evaluation, so that nothing would be "
            f"quantized; the quantizer has {list(entries)}."
        )
    known = {path: entry._replace(values=None) for path, entry in entries.items()}
    kept = {n: q for n, q in first.quantizers.items() if n.endswith(":weight")}
    chosen = points(first.made, outputs == "rounded")
    rounding = _ranges(chosen, known, kept, weights, written, batches)
    read = _read(evaluated, params, model_state, batches[0])
    example = batches[0]

    def program_of(weights: Weights, marked: bool) -> Program:
        return Program(known, Store(weights), rounding, dict(kept), marked)

    def run(weights: Weights, inputs: Inputs, marked: bool) -> tuple[PyTree, Program]:
        program = program_of(weights, marked)
        return written(program, _filled(example, read, inputs), False), program

    def plainly(weights: Weights, inputs: Inputs) -> PyTree:
        return run(weights, inputs, False)[0]

    def marked(weights: Weights, inputs: Inputs) -> PyTree:
        return run(weights, inputs, True)[0]

    def observe(weights: Weights, inputs: Inputs) -> dict[str, Array]:
        return run(weights, inputs, False)[1].seen

    last = program_of(weights, False)
    jax.eval_shape(lambda batch: written(last, batch, False), example)
    weights |= {f"{n}:scale": jnp.asarray(last.quantizers[n].scale) for n in last.seen}
    frozen = Frozen(
        plainly,
        marked,
        observe,
        weights,
        {name: np.asarray(leaves(example)[name]) for name in read},
        dict(last.quantizers),
        tuple(last.sites),
        Distance(0.0, 0.0, 0.0, 1.0, 0),
    )
    return frozen._replace(distance=_distance(apply, transform, state, frozen, batches))


def _without_quantizer(transform: Transform, state: TrainState) -> Transform:
    """The same chain, rounding nothing."""
    name, _, _ = quantizer_of(transform, state, "freeze()")
    if not transform.members:
        return transform._replace(wrap=Transform().wrap, view=Transform().view)
    members = [
        (n, t._replace(wrap=Transform().wrap, view=Transform().view) if n == name else t)
        for n, t in transform.members
    ]
    return chain(allow_order=True, **dict(members))


def _entries(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    grids: Mapping[str, Grid],
    batch: PyTree,
) -> dict[str, Entry]:
    """The quantized sites, with the weights that evaluation under the transform multiplies."""
    _, own, _ = quantizer_of(transform, state, "freeze()")
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    chosen = {**own["scales"], **own["tables"]}
    ctx = Ctx(state.step, state.key, None, train=False)
    found: dict[str, Entry] = {}

    def evaluated(params, model_state, batch, key):
        vars = state.vars._replace(model=params)
        own = ctx._replace(key=key)
        return forward(apply, transform, vars, model_state, state.transform, batch, own).outputs

    def inputs(site: Site) -> dict[int, tuple[str, Grid]]:
        names = {0: f"{site.path}/lhs", 1: f"{site.path}/rhs"}
        if site.weight is not None:
            names = {1 - site.weight: site.path}
        return {i: (name, grids[name]) for i, name in names.items() if name in grids}

    def handler(op: Operation) -> tuple[Array, PyTree]:
        site = op.site
        off = jnp.zeros(())
        for i, (name, _) in inputs(site).items():
            scale, low, high = op.given[name]
            codes = op.operands[i].astype(jnp.float32) / scale
            off = jnp.maximum(off, jnp.max(jnp.abs(codes - jnp.round(codes))))
            outside = jnp.maximum(jnp.max(low - codes), jnp.max(codes - high))
            off = jnp.maximum(off, outside)
        weight = {} if site.weight is None else {"weight": op.operands[site.weight]}
        return op.run(*op.operands), {"off": off, **weight}

    def choose(site: Site) -> Handler | None:
        if site.path not in chosen:
            return None
        if set(site.dtypes[:2]) - {"float32", "int32", "int64"}:
            raise SetupError(
                f"{site.path} multiplies {site.dtypes[:2]}; freeze() takes float32 models. Build "
                "the model with dtype float32 (the trained params serve it as they are)."
            )
        fact = facts.get("@" + site.path, facts.get(site.path, {}))
        found[site.path] = Entry(fact.get("weight_bits"), inputs(site), None)
        return handler

    given = {
        path: {
            name: tuple(jnp.asarray(x, jnp.float32) for x in grids[name][:3])
            for name in (path, f"{path}/lhs", f"{path}/rhs")
            if name in grids
        }
        for path in chosen
    }
    # A maximum would not do for weights: where a branch did not run, they are zeros.
    look = intercept(evaluated, choose, given=given, merge=lambda a, b: jnp.where(a != 0, a, b))
    args = (state.vars.model, state.model_state, batch, state.key)
    measured = jax.device_get(jax.jit(lambda *args: look(*args)[1])(*args))
    check_on_grids({path: float(np.max(own["off"])) for path, own in measured.items()})
    return {
        path: entry._replace(values=measured[path].get("weight")) for path, entry in found.items()
    }


def _ranges(
    chosen: Mapping[int, Point],
    entries: Mapping[str, Entry],
    weight_quantizers: Mapping[str, Quantizer],
    weights: Weights,
    written: Any,
    batches: Sequence[PyTree],
) -> dict[int, Quantizer]:
    """The quantizers of values where they are made, by number."""
    asked = [number for number, point in chosen.items() if point.name]

    @jax.jit
    def ends(weights: Weights, batch: PyTree) -> dict[int, tuple[Array, Array]]:
        program = Program(entries, Store(weights), {}, dict(weight_quantizers))
        written(program, batch, False)
        return {n: (jnp.min(program.arrays[n]), jnp.max(program.arrays[n])) for n in asked}

    seen = [jax.device_get(ends(weights, batch)) for batch in batches] if asked else []
    found: dict[int, Quantizer] = {}
    names: dict[str, int] = {}
    for number, point in chosen.items():
        own = point.shared
        if point.name:
            low = min(float(one[number][0]) for one in seen)
            high = max(float(one[number][1]) for one in seen)
            if not np.isfinite([low, high]).all():
                raise SetupError(
                    f"the result of {point.name.removesuffix(':output')} is not finite on the "
                    "calibration batches. Look for NaN in the data, or for a run that diverged."
                )
            if own is None or not _covers(own, low, high):
                count = names.get(point.name, 0)
                names[point.name] = count + 1
                name = f"{point.name}#{count}" if count else point.name
                own = _fitted(name, low, high)
        assert own is not None
        found[number] = own
    return found


def _covers(own: Quantizer, low: float, high: float) -> bool:
    s = float(own.scale)
    return low >= COVERED * s * own.low and high <= COVERED * s * own.high


def _fitted(name: str, low: float, high: float) -> Quantizer:
    """8 bits between the ends that were seen, and zero: 0 ... 255 of what was never negative."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1.0)
    first = round(low / float(scale))
    return Quantizer(name, np.asarray(scale), first, first + 255)


def _read(evaluated: Any, params: PyTree, model_state: PyTree, batch: PyTree) -> list[str]:
    """The names of the batch's leaves that the outputs depend on."""
    key = jax.random.key(0)
    closed = jax.make_jaxpr(evaluated)(params, model_state, batch, key)
    before = len(jax.tree.leaves((params, model_state)))
    needed = jaxprs.needed(closed.jaxpr)
    names = list(leaves(batch))
    used = [n for n, v in zip(names, closed.jaxpr.invars[before:], strict=False) if v in needed]
    if not used:
        raise SiteError("the model's outputs depend on nothing in the batch.")
    return used


def _filled(example: PyTree, read: Sequence[str], inputs: Inputs) -> PyTree:
    """A batch with the inputs in their places; what is not read keeps its place alone."""
    if missing := [name for name in read if name not in inputs]:
        raise SetupError(
            f"the frozen model reads {list(read)}; the inputs have {list(inputs)}, without "
            f"{missing}."
        )
    named = {
        name: jnp.asarray(inputs[name]) if name in read else jnp.zeros(x.shape, x.dtype)
        for name, x in leaves(example).items()
    }
    return jax.tree.unflatten(jax.tree.structure(example), list(named.values()))


def _distance(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    frozen: Frozen,
    batches: Sequence[PyTree],
) -> Distance:
    ctx = Ctx(state.step, state.key, None, train=False)

    @jax.jit
    def trained(vars, model_state, own, batch):
        return forward(apply, transform, vars, model_state, own, batch, ctx).outputs

    run = jax.jit(frozen.apply)
    both = []
    for batch in batches:
        named = leaves(batch)
        inputs = {name: named[name] for name in frozen.example}
        want = trained(state.vars, state.model_state, state.transform, batch)
        both.append(compare(want, run(frozen.weights, inputs)))
    total = sum(one.examples for one in both)
    shares = [one.examples / total for one in both]

    def mean(field: str) -> float:
        return sum(s * getattr(one, field) for s, one in zip(shares, both, strict=True))

    largest = max(one.largest for one in both)
    return Distance(mean("mean"), largest, mean("scale"), mean("agreement"), total)
