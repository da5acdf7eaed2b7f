"""Follows every axis of a model's weights through the program to where it ends.

The program is read once, equation by equation. An axis passes through elementwise operations,
reshapes, transposes, slices, concatenations, pooling and lookups; the two axes that a product sums
over are tied; and what cannot be followed keeps the axis whole, with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax import jaxprs, operations
from effjax.core import Apply, PyTree, abstract_key
from effjax.prune.channels import Axis, Units, blocks
from effjax.select import leaves

# Entry by entry, whatever they compute.
_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz convert_element_type
copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow
reduce_precision rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
_REDUCTIONS = """
argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCTIONS = frozenset(_REDUCTIONS.split())
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
ALONG = {  # primitives that mix entries along one axis, and the parameter that says which
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}


class Value(NamedTuple):
    """What is known of a value: its axes, whether it depends on the batch, and on which leaf."""

    axes: tuple[Axis, ...]
    data: bool = False
    leaf: str = ""


class Product(NamedTuple):
    """A dot or convolution with at most one operand that depends on the batch.

    where: the params path of its weight, or its name scope.
    conv: whether it is a convolution.
    macs: multiply-accumulates, of data with weights.
    axes: of both operands.
    summed: pairs of axes that are summed over.
    out: axes of the result, in its order.
    groups: feature groups of a convolution.
    inner: units of one group's input features, for a convolution.
    features: axes of a convolution's features in its input, and of its kernel's in- and outputs.
    """

    where: str
    conv: bool
    macs: int
    axes: tuple[tuple[Axis, ...], tuple[Axis, ...]]
    summed: tuple[tuple[int, int], ...]
    out: tuple[Axis, ...]
    groups: int
    inner: Axis | None
    features: tuple[int, int, int]


class Dependencies(NamedTuple):
    """What `trace` found."""

    units: Units
    leaves: Mapping[str, tuple[Axis, ...]]  # of params and model_state, by path
    state: frozenset[str]  # the paths that are of the model_state
    roles: Mapping[tuple[str, int], set[str]]  # "out" and "in" of the leaf's axis, in products
    products: tuple[Product | None, ...]  # in the order of execution; None: not followed
    closed: Any
    params: int  # how many inputs of `closed` are params and model_state


def trace(apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree) -> Dependencies:
    """The dependencies between the axes of a model's params and model_state, in evaluation."""

    def outputs(params: PyTree, model_state: PyTree, batch: PyTree, key: Any) -> PyTree:
        return apply(params, model_state, batch, key, False)[0]

    closed = jax.make_jaxpr(outputs)(params, model_state, batch, abstract_key())
    named, state = leaves(params), leaves(model_state)
    walker = _Walker()
    found: dict[str, tuple[Axis, ...]] = {}
    inputs: list[Value] = []
    for path, leaf in [*named.items(), *((f"{STATE}{p}", x) for p, x in state.items())]:
        axes = tuple(walker.leaf_axis(path, i, n) for i, n in enumerate(np.shape(leaf)))
        found[path] = axes
        inputs.append(Value(axes, False, path if path in named else ""))
    for atom in closed.jaxpr.invars[len(inputs) :]:
        inputs.append(walker.whole(atom, "it meets an axis of the model's inputs", data=True))
    consts = [walker.constant(c) for c in closed.consts]
    for out in walker.run(closed.jaxpr, consts, inputs):
        for axis in out.axes:
            walker.units.pin(axis, "it reaches the model's outputs")
    return Dependencies(
        walker.units,
        found,
        frozenset(p for p in found if p.startswith(STATE)),
        walker.roles,
        tuple(walker.products),
        closed,
        len(found),
    )


STATE = "model_state:"  # in front of the paths of model_state leaves, which params may have too


class _Walker:
    def __init__(self) -> None:
        self.units = Units()
        self.products: list[Product | None] = []
        self.roles: dict[tuple[str, int], set[str]] = {}
        self.origin: dict[int, tuple[str, int]] = {}  # unit as made for a leaf's axis

    def leaf_axis(self, path: str, index: int, size: int) -> Axis:
        if size == 1:
            return self.units.kept(1, "an axis of one entry")
        axis = self.units.new(size)
        self.origin.update(dict.fromkeys(axis[:, 0].tolist(), (path, index)))
        return axis

    def whole(self, atom: Any, reason: str, data: bool) -> Value:
        return Value(tuple(self.units.kept(n, reason) for n in atom.aval.shape), data)

    def constant(self, value: Any) -> Value:
        """Constants of one value follow what they meet; others stay as they are."""
        shape = np.shape(value)
        if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
            alike = not shape
        else:
            array = np.asarray(value)
            alike = bool((array == array.ravel()[:1]).all()) if array.size else False
        if alike:
            return Value(tuple(self.units.free(n) for n in shape))
        reason = "it meets a constant array that is written into the model"
        return Value(tuple(self.units.kept(n, reason) for n in shape))

    def role(self, axis: Axis, role: str) -> None:
        for unit in np.unique(axis):
            if int(unit) in self.origin:
                self.roles.setdefault(self.origin[int(unit)], set()).add(role)

    def run(
        self, jaxpr: jaxprs.Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]
    ) -> list[Value]:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if jaxprs.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.step(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: jaxprs.Eqn, values: list[Value]) -> Sequence[Value]:
        if (body := entered(eqn)) is not None:
            return self.run(body.jaxpr, [self.constant(c) for c in body.consts], values)
        name = eqn.primitive.name
        data = any(v.data for v in values)
        leaf = "" if data else next((v.leaf for v in values if v.leaf), "")
        if name in ELEMENTWISE:
            found = [self.elementwise(eqn, values)] * len(eqn.outvars)
        elif name in REDUCTIONS:
            found = [self.reduction(eqn, values[0])]
        elif name in WINDOWS:
            found = [self.window(eqn, values[0])]
        elif name in ALONG:
            found = self.along(eqn, values)
        elif name in (jaxprs.DOT, jaxprs.CONV):
            found = [self.dot(eqn, values) if name == jaxprs.DOT else self.conv(eqn, values)]
        elif rule := getattr(self, f"_{name}", None):
            found = rule(eqn, values)
        else:
            found = self.unknown(eqn, values)
        return [Value(tuple(axes), data, leaf) for axes in found]

    def unknown(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        """What cannot be followed stays whole, on both sides."""
        reason = f"it enters {eqn.primitive.name}, which is not followed"
        for value in values:
            for axis in value.axes:
                self.units.pin(axis, reason)
        return [self.whole(v, reason, False).axes for v in eqn.outvars]

    def elementwise(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> Sequence[Axis]:
        shape = _shape(eqn)
        axes = [self.units.free(n) for n in shape]
        for value in values:
            if len(value.axes) == len(shape):
                pairs = zip(axes, value.axes, shape, strict=True)
                axes = [a if len(b) != n else self.units.join(a, b) for a, b, n in pairs]
        return axes

    def reduction(self, eqn: jaxprs.Eqn, value: Value) -> Sequence[Axis]:
        for i in eqn.params["axes"]:
            self.units.pin(value.axes[i], self.reduced(eqn))
        return [a for i, a in enumerate(value.axes) if i not in eqn.params["axes"]]

    def reduced(self, eqn: jaxprs.Eqn) -> str:
        scope = str(eqn.source_info.name_stack)
        place = f" in {scope}" if scope else ""
        name = eqn.primitive.name
        return f"{name} runs over it{place} (LayerNorm, softmax, mean) and depends on its size"

    def window(self, eqn: jaxprs.Eqn, value: Value) -> Sequence[Axis]:
        p = eqn.params
        out = []
        for i, axis in enumerate(value.axes):
            untouched = p["window_dimensions"][i] == 1 and p["window_strides"][i] == 1
            if untouched and tuple(p["padding"][i]) == (0, 0):
                out.append(axis)
            else:
                self.units.pin(axis, WINDOW)
                out.append(self.units.kept(_shape(eqn)[i], WINDOW))
        return out

    def along(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index = eqn.params[ALONG[eqn.primitive.name]]
        for value in values:
            self.units.pin(value.axes[index], self.reduced(eqn))
        axes = self.elementwise(eqn, values)
        return [axes] * len(eqn.outvars)

    def dot(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> Sequence[Axis]:
        (summed, batch) = eqn.params["dimension_numbers"]
        lhs, rhs = (v.axes for v in values[:2])
        both = all(v.data for v in values[:2])
        for a, b in zip(*summed, strict=True):
            self.units.join(lhs[a], rhs[b])
            if both:  # the code usually divides by the root of the size
                self.units.pin(lhs[a], "activations are multiplied and summed over it")
                self.units.pin(rhs[b], "activations are multiplied and summed over it")
        batched = [self.units.join(lhs[a], rhs[b]) for a, b in zip(*batch, strict=True)]
        free = [
            [i for i in range(len(axes)) if i not in (*s, *b)]
            for axes, s, b in zip((lhs, rhs), summed, batch, strict=True)
        ]
        out = [*batched, *(lhs[i] for i in free[0]), *(rhs[i] for i in free[1])]
        if not both:
            weight = 1 if values[0].data else 0 if values[1].data else 1
            weights = values[weight].axes
            for i in summed[weight]:
                self.role(weights[i], "in")
            for i in (*free[weight], *batch[weight]):
                self.role(weights[i], "out")
            pairs = tuple(zip(*summed, strict=True))
            macs = operations.macs(eqn) if any(v.data for v in values) else 0
            where = values[weight].leaf or str(eqn.source_info.name_stack)
            product = (lhs, rhs), pairs, tuple(out), 1, None, (0, 0, 0)
            self.products.append(Product(where, False, macs, *product))
        else:
            self.products.append(None)
        return out

    def conv(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> Sequence[Axis]:
        p = eqn.params
        numbers, groups = p["dimension_numbers"], p["feature_group_count"]
        (x, kernel), shape = values[:2], _shape(eqn)
        if p["batch_group_count"] != 1 or (x.data and kernel.data):
            self.products.append(None)
            return self.unknown(eqn, values)[0]
        batch, features, *space = numbers.lhs_spec
        outs, ins, *window = numbers.rhs_spec
        for axis in (*(x.axes[i] for i in space), *(kernel.axes[i] for i in window)):
            self.units.pin(axis, WINDOW)
        inner, out = kernel.axes[ins], kernel.axes[outs]
        self.role(inner, "in")
        self.role(out, "out")
        if groups == 1:
            inner = self.units.join(x.axes[features], inner)
        else:
            sizes = [groups, len(inner)]
            which, own = self.units.split(x.axes[features], sizes)
            inner = self.units.join(own, inner)
            theirs, _ = self.units.split(out, [groups, len(out) // groups])
            self.units.join(which, theirs)
            if len(inner) == 1:  # depthwise: the kernel's output features are the input's too
                self.role(out, "in")
        made = [self.units.kept(n, WINDOW) for n in shape]
        made[numbers.out_spec[0]], made[numbers.out_spec[1]] = x.axes[batch], out
        macs = operations.macs(eqn) if x.data or kernel.data else 0
        where = (x.leaf if kernel.data else kernel.leaf) or str(eqn.source_info.name_stack)
        product = (x.axes, kernel.axes), ((features, ins),), tuple(made), groups, inner
        self.products.append(Product(where, True, macs, *product, (features, ins, outs)))
        return made

    # Rules by the name of the primitive.

    def _broadcast_in_dim(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        axes = [self.units.free(n) for n in shape]
        for axis, i in zip(values[0].axes, dims, strict=True):
            if len(axis) == shape[i]:
                axes[i] = axis
        return [axes]

    def _reshape(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        before, after = tuple(map(len, values[0].axes)), eqn.params["new_sizes"]
        if eqn.params.get("dimensions") is not None or 0 in before:
            return self.unknown(eqn, values)
        axes = [self.units.free(n) for n in after]
        for a, b in blocks(before, after):
            if len(a) == len(b) == 1:
                axes[b[0]] = values[0].axes[a[0]]
                continue
            flat = self.units.merged([values[0].axes[i] for i in a])
            found = self.units.split(flat, [after[i] for i in b]) if len(b) > 1 else [flat]
            for i, axis in zip(b, found, strict=True):
                axes[i] = axis
        return [axes]

    def _squeeze(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        gone = eqn.params["dimensions"]
        return [[a for i, a in enumerate(values[0].axes) if i not in gone]]

    def _expand_dims(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = iter(values[0].axes)
        new = eqn.params["dimensions"]
        ndim = len(_shape(eqn))
        return [[self.units.free(1) if i in new else next(axes) for i in range(ndim)]]

    def _transpose(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        return [[values[0].axes[i] for i in eqn.params["permutation"]]]

    def _rev(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        turned = eqn.params["dimensions"]
        return [[a[::-1] if i in turned else a for i, a in enumerate(values[0].axes)]]

    def _slice(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        p, axes = eqn.params, values[0].axes
        strides = p["strides"] or (1,) * len(axes)
        bounds = zip(axes, p["start_indices"], p["limit_indices"], strides, strict=True)
        return [[axis[start:stop:step] for axis, start, stop, step in bounds]]

    def _split(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index, axes = eqn.params["axis"], values[0].axes
        ends = np.cumsum([int(n) for n in eqn.params["sizes"]])[:-1]
        parts = np.split(axes[index], ends)
        return [[*axes[:index], part, *axes[index + 1 :]] for part in parts]

    def _concatenate(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index = eqn.params["dimension"]
        parts = [v.axes[index] for v in values]
        width = max(part.shape[1] for part in parts)
        wide = [np.pad(a, ((0, 0), (0, width - a.shape[1])), mode="edge") for a in parts]
        axes = list(values[0].axes)
        for value in values[1:]:
            pairs = zip(axes, value.axes, strict=True)
            axes = [a if i == index else self.units.join(a, b) for i, (a, b) in enumerate(pairs)]
        axes[index] = np.concatenate(wide)
        return [axes]

    def _pad(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = []
        for axis, config in zip(values[0].axes, eqn.params["padding_config"], strict=True):
            low, high, between = (int(n) for n in config)
            if min(low, high) < 0 or between:
                self.units.pin(axis, "it is padded inside or cropped")
                size = len(axis) + low + high + max(len(axis) - 1, 0) * between
                axes.append(self.units.kept(size, "it is padded inside or cropped"))
                continue
            around = [np.full((n, axis.shape[1]), -1) for n in (low, high)]
            axes.append(np.concatenate([around[0], axis, around[1]]))
        return [axes]

    def _iota(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = [self.units.free(n) for n in eqn.params["shape"]]
        i = eqn.params["dimension"]
        axes[i] = self.units.kept(len(axes[i]), "its positions are counted (iota)")
        return [axes]

    def _gather(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        table, indices = values[0].axes, values[1].axes
        if numbers.operand_batching_dims:
            return self.unknown(eqn, values)
        shape = _shape(eqn)
        dropped = numbers.collapsed_slice_dims
        passed = [i for i in range(len(table)) if i not in dropped]
        axes = [self.units.free(n) for n in shape]
        around = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        for i, axis in zip(around, indices[:-1], strict=True):
            axes[i] = axis
        for i, axis in enumerate(table):
            if i in dropped or sizes[i] != len(axis):
                self.units.pin(axis, LOOKUP)
        for i, j in zip(numbers.offset_dims, passed, strict=True):
            whole = sizes[j] == len(table[j]) and j not in numbers.start_index_map
            if not whole:
                self.units.pin(table[j], LOOKUP)
            axes[i] = table[j] if whole else self.units.kept(shape[i], LOOKUP)
            if whole and not values[0].data:
                self.role(table[j], "out")
        return [axes]

    def _dynamic_slice(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = []
        for axis, size in zip(values[0].axes, eqn.params["slice_sizes"], strict=True):
            if len(axis) != size:
                self.units.pin(axis, LOOKUP)
            axes.append(axis if len(axis) == size else self.units.kept(size, LOOKUP))
        return [axes]


WINDOW = "a window slides over it"
LOOKUP = "its entries are looked up by position"


def entered(eqn: jaxprs.Eqn) -> jaxprs.Body | None:
    """The function that an equation calls once on its operands, or None."""
    found = jaxprs.parts(eqn)
    if isinstance(found, jaxprs.Call | jaxprs.Remat | jaxprs.Ruled):
        body = found.body
        if len(body.jaxpr.invars) == len(eqn.invars):
            return body
    return None


def _shape(eqn: jaxprs.Eqn) -> tuple[int, ...]:
    out: Any = eqn.outvars[0]
    return tuple(out.aval.shape)
