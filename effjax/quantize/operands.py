"""A Transform from two functions: how weights are rounded at sites, and how activations are.

What they learn (steps, offsets, bounds) is trained in `extra`, and begins at values fitted to the
first training step: its weights as they meet data, and its activations.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Forward, Metrics, PyTree, Setup, Transform, Vars
from effjax.interpret import Operation
from effjax.quantize import engine
from effjax.quantize.backward import round_gradient
from effjax.quantize.keys import layer_numbers, own_key
from effjax.quantize.numerics import Bits
from effjax.quantize.rules import Rules, is_float
from effjax.schedules import Scalar
from effjax.sites import Site

Values = dict[str, Array]


class Place(NamedTuple):
    """Where and when an operand is rounded.

    site: the site.
    operand: which operand it is.
    axes: those along which scales differ; others have length 1.
    step: int32 [].
    key: of this operand, layer and step; None unless the transform is `random`.
    train: False in evaluation.
    """

    site: Site
    operand: int
    axes: tuple[int, ...]
    step: Array
    key: Array | None
    train: bool


def _nothing(x: Array, axes: tuple[int, ...]) -> Values:
    return {}


def _no_fit(seen: Values, bits: Bits) -> Values:
    return {}


class Operand(NamedTuple):
    """How one operand of a site is rounded.

    rounded: `(x, values, bits, place) -> x`, with `values` broadcastable against x.
    seen: `(x, axes) -> {name: float32}`, reductions of x over all axes but `axes`, which are kept
      with length 1. They are merged by maximum where a loop runs the site more than once.
    fit: `(seen, bits) -> {name: array}`, elementwise: the values to begin with.
    trained: which of these are trained; the others stay as they were fitted.
    """

    rounded: Callable[[Array, Values, Bits, Place], Array]
    seen: Callable[[Array, tuple[int, ...]], Values] = _nothing
    fit: Callable[[Values, Bits], Values] = _no_fit
    trained: tuple[str, ...] = ()

    @property
    def fitted(self) -> bool:
        """Whether it has values at all."""
        return self.fit is not _no_fit


def transform_of(
    asked: Rules,
    weights: Operand,
    activations: Operand,
    *,
    per_channel: bool = True,
    random: bool = False,
    gradients: Bits | None = None,
    penalty: Mapping[str, Scalar] | None = None,
    check: Callable[[list[Site]], None] | None = None,
    form: str | None = None,
) -> Transform:
    """The Transform that rounds weights and activations at the sites of some rules.

    Args:
      asked: which sites, and their bits.
      weights, activations: how.
      per_channel: whether weights have values for each output channel.
      random: whether an operand draws random numbers.
      gradients: bits of what flows back into each operation; None leaves it alone.
      penalty: {name of trained values: factor f}: adds the loss f/2 · (sum of their squares).
      check: called with the sites at `init`, to raise what is wrong with them.
      form: the name of the values' form where evaluation does not round as `qat` does by default;
        kept as state["form"], which tells what reads the state that its grids are others.

    State: "scales" and "tables" as `qat`; {"fitted": {site: bool}, "count": {name: int32}} say
    which weights and activations have values, "fixed" holds those that are not trained. Trained
    ones are extra[name]["weights" or "activations"][site]. `aux` carries {"seen"}.
    """
    learns = weights.fitted or activations.fitted
    random = random or gradients is not None

    def names(site: Site) -> dict[str, tuple[Operand, int, tuple[int, ...]]]:
        """{"weights" or the name of an activation: how, which operand, the axes kept}."""
        found: dict[str, tuple[Operand, int, tuple[int, ...]]] = {}
        if site.weight is not None and not is_float(asked.at(site.path).weights):
            axes = site.channels[site.weight] if per_channel else ()
            found["weights"] = (weights, site.weight, axes)
        return found | {n: (activations, i, ()) for i, n in asked.inputs(site).items()}

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        sites = engine.find(asked, params, setup)
        if check is not None:
            check(sites)
        state: dict[str, Any] = dict(engine.scale_counts(sites, per_channel))
        if form is not None:
            state["form"] = {form: jnp.ones((), jnp.int32)}
        if random:
            state["layer"] = layer_numbers(sites)
        if not learns:
            return {}, state
        extra: dict[str, Any] = {}
        state |= {"fitted": {}, "count": {}, "fixed": {}}
        for site in sites:
            for name, (operand, i, axes) in names(site).items():
                if not operand.fitted:
                    continue
                role, path, flag = _role(name, site)
                state[flag][path] = jnp.zeros(site.stack, bool if flag == "fitted" else jnp.int32)
                shape = (*site.stack, *(site.shapes[i][axis] for axis in axes))
                x = jax.ShapeDtypeStruct(site.shapes[i], site.dtypes[i])
                bits = asked.at(site.path)
                width = bits.weights if role == "weights" else bits.activations
                known = jax.eval_shape(
                    lambda x, o=operand, a=axes, b=width: o.fit(o.seen(x, a), b), x
                )
                for value, like in known.items():
                    tree = extra if value in operand.trained else state["fixed"]
                    where = tree.setdefault(value, {}).setdefault(role, {})
                    where[path] = jnp.zeros(shape, like.dtype)
        return extra, state

    def given(extra: PyTree, state: PyTree) -> dict[str, Any]:
        """What each site reads: {role and path: (values, whether they are fitted)}, its layer."""
        found: dict[str, Any] = {}
        for path in (*state["scales"], *state["tables"]):
            own: dict[str, Any] = {}
            if random:
                own["layer"] = state["layer"][path]
            if learns:
                known = {"weights": state["fitted"].get(path)}
                known |= {n: state["count"].get(n) for n in _names(path)}
                for name, flag in known.items():
                    if flag is None:
                        continue
                    role, key = ("weights", path) if name == "weights" else ("activations", name)
                    trees = {**extra, **state["fixed"]}
                    values = {n: t[role][key] for n, t in trees.items() if key in t.get(role, {})}
                    own[name] = (values, flag > 0)
            found[path] = own
        return found

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def rounded(op: Operation, x: Array, bits: Bits, name: str) -> engine.Rounded:
            operand, i, axes = names(op.site)[name]
            key = own_key(op, i) if random else None
            place = Place(op.site, i, axes, op.shared["step"], key, ctx.train)
            if not operand.fitted:
                return engine.Rounded(operand.rounded(x, {}, bits, place))
            values, known = op.given[name]
            shape = tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
            values = {n: v.reshape(shape) for n, v in values.items()}
            if not ctx.train and name != "weights":
                # Without a fitted range evaluation leaves activations alone; see "uncalibrated".
                known_value = operand.rounded(x, values, bits, place)
                return engine.Rounded(jnp.where(known, known_value, x))
            seen = operand.seen(lax.stop_gradient(x), axes)
            if op.axes:  # the same values for all shards
                seen = {n: lax.pmax(v, op.axes) for n, v in seen.items()}
            first = operand.fit(seen, bits)
            values = {n: jnp.where(known, v, first[n]) for n, v in values.items()}
            own = tuple(x.shape[axis] for axis in axes)
            label = op.site.path + " weights" if name == "weights" else name
            found = {label: {n: v.reshape(own) for n, v in seen.items()}}
            return engine.Rounded(operand.rounded(x, values, bits, place), found)

        shared: dict[str, Any] = {"step": ctx.step}
        if random:
            shared["key"] = ctx.key
        if gradients is not None:
            shared["gradients"] = jnp.asarray(gradients, jnp.int32)

        def weight(op: Operation, w: Array, bits: Bits) -> engine.Rounded:
            return rounded(op, w, bits, "weights")

        def result(op: Operation, out: Array) -> Array:
            batch = (0,) if op.site.weight == 1 else ()
            return round_gradient(out, op.shared["gradients"], own_key(op, 2), batch)

        run = engine.round_sites(
            forward,
            asked,
            weight,
            rounded,
            known=[*state["scales"], *state["tables"]],
            train=ctx.train,
            strict=learns or random,
            given=given(extra, state) if learns or random else None,
            shared=shared,
            result=result if ctx.train and gradients is not None else None,
        )

        def quantized(params, model_state, batch, key, train):
            outputs, model_state, aux, seen = run(params, model_state, batch, key, train)
            return outputs, model_state, {**aux, "seen": seen}

        return quantized

    def update(vars: Vars, opt, state, grads, aux, ctx) -> tuple[Vars, PyTree, PyTree]:
        """Takes the fitted values over where there were none; whatever the optimizer made of 0."""
        if not learns:
            return vars, opt, state
        extra = {n: {r: dict(v) for r, v in t.items()} for n, t in vars.extra.items()}
        fixed = {n: {r: dict(v) for r, v in t.items()} for n, t in state["fixed"].items()}
        flags = {"fitted": dict(state["fitted"]), "count": dict(state["count"])}
        for label, seen in aux["seen"].items():
            path = label.removesuffix(" weights")
            role, flag = ("weights", "fitted") if path != label else ("activations", "count")
            operand = weights if role == "weights" else activations
            bits = asked.at(_site(path, state))
            first = operand.fit(seen, bits.weights if role == "weights" else bits.activations)
            known = flags[flag][path]
            some = [(v != 0) & jnp.isfinite(v) for v in seen.values()]
            some = [jnp.any(x, axis=tuple(range(known.ndim, x.ndim))) for x in some]
            learnt = jnp.any(jnp.stack(some), axis=0)
            for name, value in first.items():
                tree = (extra if name in operand.trained else fixed)[name][role]
                stay = ((known > 0) | ~learnt).reshape(
                    known.shape + (1,) * (value.ndim - known.ndim)
                )
                tree[path] = jnp.where(stay, tree[path], value)
            flags[flag][path] = (known > 0) | learnt if flag == "fitted" else known + learnt
        return Vars(vars.model, extra), opt, {**state, **flags, "fixed": fixed}

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        terms: Metrics = {}
        for name, factor in (penalty or {}).items():
            squares = [jnp.sum(value**2) for value in jax.tree.leaves(extra.get(name, {}))]
            if squares:
                terms[name] = jnp.asarray(factor / 2 * sum(squares))
        return terms

    def report(vars: Vars, state, aux, ctx) -> Metrics:
        if not learns or not state["count"]:
            return {}
        unseen = [jnp.ravel(count == 0) for count in state["count"].values()]
        return {"uncalibrated": jnp.sum(jnp.concatenate(unseen), dtype=jnp.int32)}

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        return asked.describe(params, state)

    return Transform(
        init=init,
        wrap=wrap,
        loss=loss,
        update=update,
        report=report,
        describe=describe,
        kind="quantize",
    )


def _role(name: str, site: Site) -> tuple[str, str, str]:
    """The role, the path and the flag of a site's operand in `extra` and the state."""
    if name == "weights":
        return "weights", site.path, "fitted"
    return "activations", name, "count"


def _names(path: str) -> tuple[str, str, str]:
    return path, f"{path}/lhs", f"{path}/rhs"


def _site(name: str, state: PyTree) -> str:
    """The site of an activation's name."""
    paths = {*state["scales"], *state["tables"]}
    return name if name in paths else name.rpartition("/")[0]
