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
from effjax.prune.channels import Axis, Units
from effjax.prune.layout import (
    ALONG,
    ELEMENTWISE,
    REDUCTIONS,
    WINDOW,
    WINDOWS,
    Layout,
    Value,
    shape_of,
)
from effjax.select import leaves


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


class _Walker(Layout):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product | None] = []

    def leaf_axis(self, path: str, index: int, size: int) -> Axis:
        if size == 1:
            return self.units.kept(1, "an axis of one entry")
        axis = self.units.new(size)
        self.origin.update(dict.fromkeys(axis[:, 0].tolist(), (path, index)))
        return axis

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
        (x, kernel), shape = values[:2], shape_of(eqn)
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


def entered(eqn: jaxprs.Eqn) -> jaxprs.Body | None:
    """The function that an equation calls once on its operands, or None."""
    found = jaxprs.parts(eqn)
    if isinstance(found, jaxprs.Call | jaxprs.Remat | jaxprs.Ruled):
        body = found.body
        if len(body.jaxpr.invars) == len(eqn.invars):
            return body
    return None
