"""The frozen program: a model's evaluation written again, with quantizers in place and known values
computed beforehand.

The model is traced and read equation by equation. What does not depend on the batch is known and
computed at once; a site's result waits for what BatchNorm and biases do to it; calls are read as if
they were written out, scans over layers too. The program is written twice and more: once to find
its weights and where values go, then, from those, at every shape it is called with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import jaxprs
from effjax.errors import SiteError
from effjax.quantize import products
from effjax.quantize.affine import absorbed, folded
from effjax.quantize.frozen import FrozenSite, decode, decode_bias
from effjax.quantize.grids import Grid, integers
from effjax.quantize.marker import Quantizer, fake_quant
from effjax.quantize.points import OTHER, POOL, SITE, SUM, Made
from effjax.quantize.values import (
    LAYOUT,
    SUMS,
    Data,
    Known,
    Pending,
    Value,
    evaluate,
    is_positive,
    known,
    whole,
)
from effjax.select import leaves
from effjax.sites import Plan, Site, Step

RELU = frozenset({"max", "min", "clamp"})


class Entry(NamedTuple):
    """A quantized site.

    bits: of its weight, or None where that stays in floating point.
    inputs: {operand: (name, grid)} of its rounded activations.
    values: its rounded weight as it meets data, layers of scans on leading axes; None once known.
    """

    bits: int | None
    inputs: Mapping[int, tuple[str, Grid]]
    values: np.ndarray | None


@dataclass
class Store:
    """The weights of the program: found while it is written first, then given."""

    given: Mapping[str, Any] | None = None
    found: dict[str, np.ndarray] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)

    def name(self, path: str) -> str:
        """A name for what stays in floating point."""
        name = path or "constant#0"
        count = self.uses.get(name, 0)
        self.uses[name] = count + 1
        if not path:
            return f"constant#{count}"
        return f"{path}#{count}" if count else path

    def put(self, name: str, value: Any) -> None:
        if self.given is None:
            self.found[name] = np.asarray(value)

    def all(self) -> Mapping[str, Any]:
        return self.found if self.given is None else self.given


@dataclass
class Program:
    """One writing of the program.

    entries: the quantized sites.
    weights: see there.
    rounding: {number of a value: quantizer} where it is made.
    marked: whether quantizers are composites.
    made: what is made, by number; quantizers, sites, seen: what is met on the way.
    """

    entries: Mapping[str, Entry]
    weights: Store
    rounding: Mapping[int, Quantizer]
    quantizers: dict[str, Quantizer]
    marked: bool = False
    made: dict[int, Made] = field(default_factory=dict)
    arrays: dict[int, Array] = field(default_factory=dict)
    seen: dict[str, Array] = field(default_factory=dict)
    sites: list[FrozenSite] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)

    # Values ------------------------------------------------------------------------------------

    def make(self, array: Array, kind: str, name: str, positive: bool) -> Data:
        """A new value, rounded where that was decided."""
        number = len(self.made)
        self.made[number] = Made(kind, name)
        self.arrays[number] = array
        own = self.rounding.get(number)
        if own is None:
            return Data(array, number, positive)
        return Data(self.rounded(array, own), number, positive, own)

    def rounded(self, x: Array, own: Quantizer) -> Array:
        scale = self.weights.all().get(f"{own.name}:scale")
        value = fake_quant(x, own, marked=self.marked, scale=scale)
        self.seen[own.name] = value
        self.quantizers[own.name] = own
        return value

    def numbered(self, name: str) -> str:
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        return f"{name}#{count}" if count else name

    def array(self, value: Data | Known, small: bool = False) -> Any:
        """The operand of an equation; `small` where its entries need not be repeated."""
        if isinstance(value, Data):
            return value.array
        if value.static:
            return value.value if small else whole(value)
        name = self.weights.name(value.path)
        self.weights.put(name, value.value)
        stored = self.weights.all()[name]
        return (
            stored
            if small or value.compact == value.shape
            else jnp.broadcast_to(stored, value.shape)
        )

    def settled(self, value: Value) -> Data | Known:
        """The value, computed."""
        return self.layer(value) if isinstance(value, Pending) else value

    def use(self, value: Value, what: str) -> None:
        if isinstance(value, Data):
            self.made[value.number].uses.add(what)

    # Bodies ------------------------------------------------------------------------------------

    def body(self, body: jaxprs.Body, args: Sequence[Value], plan: Plan, depth: int) -> list[Value]:
        """The outputs of a jaxpr; of what they do not need nothing is computed."""
        jaxpr = body.jaxpr
        env: dict[Any, Value] = dict(
            zip(jaxpr.constvars, (known(c, static=True) for c in body.consts), strict=True)
        )
        env.update(zip(jaxpr.invars, args, strict=True))
        needed = jaxprs.needed(jaxpr)
        for var in jaxpr.invars:
            if needed.get(var, 0) > 1:
                env[var] = self.settled(env[var])

        def read(atom: Any) -> Value:
            if jaxprs.is_literal(atom):
                return known(np.asarray(atom.val, atom.aval.dtype), static=True)
            return env[atom]

        for eqn, step in zip(jaxpr.eqns, plan.steps, strict=True):
            if not any(v in needed for v in eqn.outvars):
                continue
            values = [read(v) for v in eqn.invars]
            outs = self.step(jaxpr, eqn, values, step, depth)
            for var, value in zip(eqn.outvars, outs, strict=True):
                env[var] = self.settled(value) if needed.get(var, 0) > 1 else value
        return [read(v) for v in jaxpr.outvars]

    def step(
        self, jaxpr: jaxprs.Jaxpr, eqn: jaxprs.Eqn, values: list[Value], step: Step, depth: int
    ) -> Sequence[Value]:
        inner = jaxprs.parts(eqn)
        if step.site is not None and step.site.path in self.entries:
            return [self.site(jaxpr, eqn, values, step.site, step.stacked)]
        if isinstance(inner, jaxprs.Call | jaxprs.Remat | jaxprs.Ruled) and _plain(eqn, inner):
            return self.body(inner.body, values, step.inner[0], depth)
        if inner is not None and self.chosen(step):
            if isinstance(inner, jaxprs.Scan):
                return self.scan(inner, values, step.inner[0], depth)
            raise SiteError(
                f"{self.chosen(step)} lie inside a {eqn.primitive.name}, which no engine's integer "
                "kernels run. Write it out as layers (or a scan over stacked layers), or leave "
                "these weights out of the quantizer's `select`."
            )
        if all(isinstance(v, Known) for v in values):
            return evaluate(jaxpr, eqn, values)  # type: ignore[arg-type]
        if (pending := absorbed(eqn, values)) is not None:
            return [pending]
        return self.operation(jaxpr, eqn, [self.settled(v) for v in values])

    def chosen(self, step: Step) -> list[str]:
        """The quantized sites inside an equation."""
        found = [s.site.path for s in Plan((step,)).all() if s.site is not None]
        return [path for path in found if path in self.entries]

    def operation(
        self, jaxpr: jaxprs.Jaxpr, eqn: jaxprs.Eqn, values: list[Data | Known]
    ) -> list[Value]:
        """An equation that is no quantized site, run as it is."""
        name = eqn.primitive.name
        small = len(eqn.outvars) == 1 and name in SMALL
        outs = jaxprs.applied(jaxpr, eqn)(*(self.array(v, small) for v in values))
        data = [v for v in values if isinstance(v, Data)]
        first, positive = data[0], is_positive(eqn, values)
        padded = name == "pad" and isinstance(values[1], Known) and values[1].number() == 0
        if (name in LAYOUT and isinstance(values[0], Data) and len(data) == 1) or padded:
            return [Data(outs[0], first.number, positive, first.grid)]
        if name == "convert_element_type" and outs[0].dtype == first.array.dtype:
            return [Data(outs[0], first.number, positive, first.grid)]
        kind, label, use = OTHER, "value", OTHER
        origin = self.made[first.number]
        static = all(isinstance(v, Data) or v.number() is not None for v in values)
        if name in RELU and len(data) == 1 and static:
            use, kind, label = "relu", origin.kind, origin.name
        elif name in ("add", "sub", "add_any") and len(data) == 2:
            use, kind, label = SUM, SUM, self.numbered("sum")
        elif name in SUMS:
            use, kind, label = POOL, POOL, self.numbered("pool")
        elif name in ("mul", "div") and len(data) == 1 and static and origin.kind == POOL:
            use, kind, label = "relu", POOL, origin.name
        for value in data:
            self.use(value, use)
        return [self.make(x, kind, label, positive) for x in outs]

    def scan(
        self, scan: jaxprs.Scan, values: list[Value], plan: Plan, depth: int
    ) -> Sequence[Value]:
        """Layers one after the other."""
        settled = [self.settled(v) for v in values]
        last = scan.consts + scan.carry
        consts, carry, xs = settled[: scan.consts], settled[scan.consts : last], settled[last:]
        rows: list[Sequence[Value]] = []
        order = range(scan.length)
        for i in reversed(order) if scan.options["reverse"] else order:
            self.layers[depth] = i
            slices = [_row(x, i) for x in xs]
            body = self.body(scan.body, [*consts, *carry, *slices], plan, depth + 1)
            outs = [self.settled(v) for v in body]
            carry, rest = outs[: scan.carry], outs[scan.carry :]
            rows.append(rest)
        del self.layers[depth]
        if scan.options["reverse"]:
            rows.reverse()
        stacked = [self.stacked(list(column)) for column in zip(*rows, strict=True)]
        return [*carry, *stacked]

    def stacked(self, rows: list[Value]) -> Value:
        """What a scan gives of each layer."""
        if all(isinstance(v, Known) for v in rows):
            fixed: list[Known] = rows  # type: ignore[assignment]
            shape = (len(rows), *fixed[0].shape)
            found = None
            if all(v.value is not None for v in fixed):
                with jax.ensure_compile_time_eval():
                    found = jnp.stack([whole(v) for v in fixed])
            return Known(found, shape, shape)
        arrays = []
        for value in rows:
            arrays.append(self.array(self.settled(value)))
            self.use(value, OTHER)
        return self.make(jnp.stack(arrays), OTHER, "value", False)

    # Sites -------------------------------------------------------------------------------------

    def site(
        self,
        jaxpr: jaxprs.Jaxpr,
        eqn: jaxprs.Eqn,
        values: list[Value],
        site: Site,
        stacked: frozenset[int],
    ) -> Value:
        if stray := set(self.layers) - stacked:
            raise SiteError(
                f"{site.path} is used by every iteration of a loop (of depth {sorted(stray)}), as "
                "in a recurrent network; freeze() writes loops over layers out, not over time. "
                "Leave it out of the quantizer's `select`."
            )
        layer = tuple(self.layers[d] for d in sorted(stacked))
        name = site.path + "".join(f"[{i}]" for i in layer)
        entry = self.entries[site.path]
        if site.weight is None:
            both = [
                self.input(self.settled(v), entry, i, layer, site) for i, v in enumerate(values)
            ]
            out = jaxprs.operation(jaxpr, eqn)(*(x.array for x in both))
            names = tuple(x.grid.name for x in both if x.grid is not None)
            self.sites.append(FrozenSite(name, site.op, names, "", False, 1))
            return self.make(out, SITE, name, False)
        weight = values[site.weight]
        assert isinstance(weight, Known)  # or it would be no site
        if entry.values is not None:
            weight = known(entry.values[layer], static=False)
        if site.op == jaxprs.GATHER:
            return self.rows(jaxpr, eqn, values, site, entry, weight, name)
        operand = self.input(
            self.settled(values[1 - site.weight]), entry, 1 - site.weight, layer, site
        )
        channels, sizes = products.channels(eqn, site)
        fresh = weight.value is not None
        return Pending(
            site,
            name,
            eqn,
            jaxpr,
            operand,
            weight,
            channels,
            jaxprs.shape(eqn.outvars[0]),
            np.ones(sizes) if fresh else None,
            np.zeros(sizes) if fresh else None,
        )

    def input(
        self, value: Data | Known, entry: Entry, i: int, layer: tuple[int, ...], site: Site
    ) -> Data:
        """A site's activation, rounded."""
        assert isinstance(value, Data)  # or it would be no site
        if i not in entry.inputs:
            self.use(value, OTHER)
            return value
        path, grid = entry.inputs[i]
        scale, low, high = grid.at(layer)
        if value.positive and low < 0:
            # What is never negative has the other half of the integers too.
            low, high = 0, 255 if high == 127 else high
        elif (low, high) == (-127, 127):
            low = -128  # engines end there
        side = path.removeprefix(site.path) or "input"
        full = site.path + "".join(f"[{n}]" for n in layer) + ":" + side.removeprefix("/")
        own = Quantizer(full, np.asarray(scale), low, high, None, grid.bits)
        self.made[value.number].sites.append(own)
        if value.grid is not None and _same(value.grid, own):
            return value
        return Data(self.rounded(value.array, own), value.number, value.positive, own)

    def rows(
        self,
        jaxpr: jaxprs.Jaxpr,
        eqn: jaxprs.Eqn,
        values: list[Value],
        site: Site,
        entry: Entry,
        weight: Known,
        name: str,
    ) -> Data:
        """A table whose rows are looked up."""
        axes = site.channels[0]
        if len(axes) != 1 or entry.bits is None:
            raise SiteError(f"{site.path} is looked up along {len(axes)} axes; engines know one.")
        codes = scale = None
        if weight.value is not None:
            codes, scale = integers(site.path, np.asarray(weight.value), axes, entry.bits)
            scale = scale.reshape(-1)
        table = self.weight(name, codes, scale, axes[0], entry.bits)
        indices = self.settled(values[1])
        self.use(indices, OTHER)
        out = jaxprs.operation(jaxpr, eqn)(table, self.array(indices))
        self.sites.append(FrozenSite(name, site.op, (), f"{name}:weight", False, 1))
        return self.make(out, OTHER, name, False)

    def weight(self, name: str, codes: Any, scale: Any, axis: int, bits: int) -> Array:
        """A rounded weight, in floating point."""
        full = f"{name}:weight"
        if codes is not None:
            bound = 2 ** (bits - 1) - 1
            low, high = min(int(codes.min()), -bound), max(int(codes.max()), bound)
            self.quantizers[full] = Quantizer(full, scale, low, high, axis, bits)
            self.weights.put(full, codes)
            self.weights.put(f"{name}:scale", scale)
        own = self.quantizers[full]
        self.quantizers[full] = self.quantizers.pop(full)  # in the order of execution
        w = decode(self.weights.all(), own)
        return fake_quant(w, own, marked=True) if self.marked else w

    def layer(self, own: Pending) -> Data:
        """A dense layer or a convolution, with its bias."""
        site, entry, name = own.site, self.entries[own.site.path], own.name
        if entry.bits is None:
            raise SiteError(
                f"{site.path} has rounded activations and a weight in floating point, which no "
                "engine's kernels multiply. Quantize both, or neither (qat's `rules`)."
            )
        conv = site.op == jaxprs.CONV
        step = None if own.operand.grid is None else np.float32(own.operand.grid.scale)
        codes = scale = bias = None
        axis = own.eqn.params["dimension_numbers"].rhs_spec[0] if conv else 1
        if own.factor is not None and own.shift is not None:
            values = np.asarray(own.weight.value)
            values = values if conv else products.matrix(values, own.eqn, site)
            codes, scale = integers(site.path, values, (axis,), entry.bits)
            last = np.moveaxis(codes, axis, -1)
            last, scale, bias = folded(
                last, scale.reshape(-1), own.factor.reshape(-1), own.shift.reshape(-1), step
            )
            codes = np.moveaxis(last, -1, axis)
        w = self.weight(name, codes, scale, axis, entry.bits)
        inputs = () if own.operand.grid is None else (own.operand.grid.name,)
        x = own.operand.array
        out = (
            jaxprs.operation(own.jaxpr, own.eqn)(x, w)
            if conv
            else products.dense(x, w, own.eqn, site)
        )
        if own.shifted:
            if bias is not None:
                self.weights.put(f"{name}:bias", bias)
            b = decode_bias(self.weights.all(), name, step)
            features = own.eqn.params["dimension_numbers"].out_spec[1] if conv else out.ndim - 1
            out = out + b.reshape([-1 if a == features else 1 for a in range(out.ndim)])
        if not conv:
            out = products.shaped(out, own, site)
        self.sites.append(
            FrozenSite(name, site.op, inputs, f"{name}:weight", own.shifted, site.groups)
        )
        return self.make(out, SITE, name, False)


# Primitives whose operands may have length 1 where the others are longer.
SMALL = {"add", "add_any", "atan2", "div", "max", "min", "mul", "nextafter", "pow", "rem", "sub"}
SMALL |= {"and", "eq", "ge", "gt", "le", "lt", "ne", "or", "xor"}


def _same(a: Quantizer, b: Quantizer) -> bool:
    return (float(a.scale), a.low, a.high) == (float(b.scale), b.low, b.high)


def _plain(eqn: jaxprs.Eqn, inner: Any) -> bool:
    """Whether a call's body takes the equation's operands."""
    same = len(inner.body.jaxpr.invars) == len(eqn.invars)
    return same and eqn.primitive.name != "composite"


def _row(value: Data | Known, i: int) -> Value:
    """One slice along the leading axis."""
    if isinstance(value, Data):
        return Data(value.array[i], value.number, value.positive, value.grid)
    j = 0 if value.compact[0] == 1 else i
    with jax.ensure_compile_time_eval():
        row = None if value.value is None else value.value[j]
    path = f"{value.path}[{i}]" if value.path else ""
    return Known(row, value.compact[1:], value.shape[1:], value.static, path)


def write(
    forward: Callable[..., Any],
    program: Program,
    plan_of: Callable[..., Plan],
    params: Any,
    model_state: Any,
    batch: Any,
    fresh: bool,
) -> tuple[list[Any], Any]:
    """Writes the program for a batch.

    Args:
      forward: `(params, model_state, batch, key) -> outputs`.
      plan_of: the plan of a jaxpr.
      params, model_state: whose values are read where `fresh`; else only their shapes.
      batch: arrays, of which those that the outputs need may be traced.
      fresh: whether weights are found, or given.

    Returns:
      (outputs, their tree).
    """
    key = jax.random.key(0)
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(params, model_state, batch, key)
    names = _paths(params, model_state)
    values: list[Value] = []
    for path, leaf in zip(names, jax.tree.leaves((params, model_state)), strict=True):
        shape = tuple(np.shape(leaf))
        values.append(Known(leaf if fresh else None, shape, shape, False, path))
    for path, x in zip(_paths(batch), jax.tree.leaves(batch), strict=True):
        values.append(program.make(x, OTHER, path, False))
    values.append(known(key, static=True))
    plan = plan_of(closed.jaxpr)
    outs = program.body(jaxprs.Body(closed.jaxpr, closed.consts), values, plan, 0)
    settled = [program.settled(v) for v in outs]
    for value in settled:
        program.use(value, "output")
    return [program.array(v) for v in settled], jax.tree.structure(shapes)


def _paths(*trees: Any) -> list[str]:
    return [path for tree in trees for path in leaves(tree)]
