"""What becomes of a layer's outputs: what is added to them, and which layers they reach scaled.

The program is read once. A value follows a layer if multiplying the layer's output channels, and
all that is added to them, by positive numbers multiplies the value's channels by the same: it is
positively homogeneous. Channels are the last axis, as in Flax; a flattened axis repeats them. The
scale of a normalization (LayerNorm, RMSNorm) is such a layer too, if a product is what it meets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import jaxprs
from effjax.core import Apply, PyTree, abstract_key
from effjax.prune.dependencies import entered
from effjax.select import leaves

STATE = "model_state:"  # in front of the paths of model_state leaves
SAME = {"convert_element_type", "copy", "stop_gradient", "squeeze", "broadcast_in_dim", "reshape"}
POOLS = {"reduce_sum", "reduce_max", "reduce_min"}
WINDOWS = {"reduce_window_max", "reduce_window_sum", "reduce_window_min"}
SIGNS = {"gt", "ge", "lt", "le"}


@dataclass
class Layer:
    """A dense or convolutional layer, or the scale of a normalization.

    kernel: path, of a leaf [..., in, out] (convolution), [in, ...] (dense) or [features] (a scale).
    kind: "conv", "depthwise" (each input channel has output channels of its own), "dense" or
      "scale".
    added: {path of what is added to the outputs: its sign}, in the order of execution.
    first: the one of these that is added before anything else is done, or "".
    reaches: layers whose inputs its outputs are, through homogeneous functions alone.
    blocked: why its outputs cannot be scaled, or "".
    """

    kernel: str
    kind: str
    features: int
    added: dict[str, int] = field(default_factory=dict)
    first: str = ""
    reaches: list[str] = field(default_factory=list)
    blocked: str = ""

    def per_input(self, kernel: Array, features: int) -> Array:
        """The kernel as [taps and repeats, channels of its input, outputs of each]."""
        if self.kind == "depthwise":
            each = kernel.shape[-1] // features
            return kernel.reshape(-1, features, each)
        outputs = kernel.shape[-1] if self.kind == "conv" else kernel[0].size
        return kernel.reshape(-1, features, outputs)


class _Value(NamedTuple):
    data: bool = False
    layer: str = ""  # whose outputs these are, for data
    plain: bool = False  # nothing was done to them yet
    leaf: str = ""  # which leaf this is, for others
    zero: bool = False


def follow(apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree) -> dict[str, Layer]:
    """The layers of a model in evaluation by path (without "/kernel" or "/scale"), in the order of
    execution.

    Batches may be abstract. What is computed inside loops and branches is not followed. Layers
    with leaves that are not floating point are blocked, and those before them.
    """

    def outputs(params: PyTree, model_state: PyTree, batch: PyTree, key: Any) -> PyTree:
        return apply(params, model_state, batch, key, False)[0]

    closed = jax.make_jaxpr(outputs)(params, model_state, batch, abstract_key())
    named = leaves(params) | {STATE + path: leaf for path, leaf in leaves(model_state).items()}
    walker = _Walker(named)
    inputs = [_Value(leaf=path) for path in leaves(params)]
    inputs += [_Value(leaf=STATE + path) for path in leaves(model_state)]
    inputs += [_Value(data=True) for _ in jax.tree.leaves(batch)]
    inputs += [_Value()] * (len(closed.jaxpr.invars) - len(inputs))
    for value in walker.run(closed.jaxpr, [_constant(c) for c in closed.consts], inputs):
        walker.block(value, "they are the model's outputs")
    return walker.layers


def _constant(value: Any) -> _Value:
    return _Value(zero=np.ndim(value) == 0 and bool(np.all(np.asarray(value) == 0)))


class _Walker:
    def __init__(self, named: Mapping[str, Any]) -> None:
        self.named = named  # the leaves
        vectors = {p: x for p, x in named.items() if np.ndim(x) == 1 and not p.startswith(STATE)}
        self.sizes = {path: leaf.shape[0] for path, leaf in vectors.items()}
        self.layers: dict[str, Layer] = {}

    def block(self, value: _Value, why: str) -> None:
        if value.layer:
            own = self.layers[value.layer]
            own.blocked = own.blocked or why

    def integers(self, values: Sequence[_Value]) -> str:
        """Which leaf among these is not floating point, as a reason, or ""."""
        own = {v.leaf: jnp.result_type(self.named[v.leaf]) for v in values if v.leaf}
        odd = [name for name, dtype in own.items() if not jnp.issubdtype(dtype, jnp.floating)]
        return f"{odd[0]} is {own[odd[0]]}, not floating point" if odd else ""

    def run(
        self, jaxpr: jaxprs.Jaxpr, consts: Sequence[_Value], inputs: Sequence[_Value]
    ) -> list[_Value]:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _constant(atom.val) if jaxprs.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            if (body := entered(eqn)) is not None:
                found = self.run(body.jaxpr, [_constant(c) for c in body.consts], values)
            else:
                found = [self.step(eqn, values)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: jaxprs.Eqn, values: list[_Value]) -> _Value:
        name = eqn.primitive.name
        if not any(v.data for v in values):
            keeps = name in SAME and len(values) == 1
            return _Value(leaf=values[0].leaf, zero=values[0].zero) if keeps else _Value()
        if name in (jaxprs.DOT, jaxprs.CONV):
            return self.product(eqn, values)
        followed = [v for v in values if v.layer]
        if not followed:
            return self.scaled(eqn, values)
        if self.passes(eqn, values):
            kept = name in SAME
            return _Value(True, followed[0].layer, all(v.plain for v in followed) and kept)
        if name in ("add", "sub") and (added := self.added(eqn, values)):
            return added
        if name in SIGNS and any(v.zero for v in values):
            return _Value(True)  # signs do not change
        for value in followed:
            why = f"{name} is not positively homogeneous, or not followed"
            self.block(value, self.integers(values) or why)
        return _Value(data=True)

    def passes(self, eqn: jaxprs.Eqn, values: list[_Value]) -> bool:
        """Whether a scaled operand gives a result that is scaled like it."""
        name, p = eqn.primitive.name, eqn.params
        shape, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
        names = {v.layer for v in values if v.layer}
        if name in SAME:
            features = self.layers[values[0].layer].features
            if name == "broadcast_in_dim" and p["broadcast_dimensions"][-1:] != (len(out) - 1,):
                return False
            return bool(out) and out[-1] % features == 0
        if name in POOLS:
            return len(shape) - 1 not in p["axes"]
        if name in WINDOWS:
            return p["window_dimensions"][-1] == 1
        if name == "transpose":
            return p["permutation"][-1] == len(shape) - 1
        if name == "pad":
            return values[1].zero and p["padding_config"][-1] == (0, 0, 0)
        if name in ("max", "min"):
            return all(v.layer or v.zero for v in values) and len(names) == 1
        if name == "mul":  # what does not follow the layer does not depend on its scale
            return sum(bool(v.layer) for v in values) == 1
        if name == "div":
            return bool(values[0].layer) and not values[1].layer
        if name == "select_n":  # leaky ReLU
            return (
                not values[0].layer
                and len(names) == 1
                and all(v.layer or v.zero for v in values[1:])
            )
        if name in ("add", "sub"):
            return all(v.layer for v in values) and len(names) == 1
        return name in ("neg", "abs")

    def added(self, eqn: jaxprs.Eqn, values: list[_Value]) -> _Value | None:
        """The sum of a layer's outputs and a leaf."""
        which = 0 if values[0].layer else 1
        value, other = values[which], values[1 - which]
        if other.data or not (other.leaf or other.zero):
            return None
        own = self.layers[value.layer]
        if other.zero:
            return value
        if own.added.get(other.leaf) is not None:
            return None  # added twice
        ends = np.shape(self.named[other.leaf])[-1:]
        if not ends or ends[0] % own.features or self.integers(values):
            return None  # no number for each channel
        own.added[other.leaf] = -1 if eqn.primitive.name == "sub" and which == 0 else 1
        if value.plain and not own.first:
            own.first = other.leaf
        return value._replace(plain=False)

    def scaled(self, eqn: jaxprs.Eqn, values: list[_Value]) -> _Value:
        """Data times a leaf with a number for each channel begins a layer."""
        if eqn.primitive.name != "mul" or all(v.data for v in values):
            return _Value(data=True)
        leaf = next(v.leaf for v in values if not v.data)
        features, name = self.sizes.get(leaf, 0), leaf.removesuffix("/scale")
        if not features or _shape(eqn.outvars[0])[-1:] != (features,) or name in self.layers:
            self.block(_Value(layer=name if name in self.layers else ""), "it is used twice")
            return _Value(data=True)
        self.layers[name] = Layer(leaf, "scale", features, blocked=self.integers(values))
        return _Value(True, name)

    def product(self, eqn: jaxprs.Eqn, values: list[_Value]) -> _Value:
        x, kernel = values[:2]
        groups = eqn.params.get("feature_group_count", 1)
        shape = _shape(eqn.invars[1])
        depthwise = groups > 1 and shape[-2:-1] == (1,)
        name = kernel.leaf.removesuffix("/kernel")
        if kernel.data or not kernel.leaf or not x.data or not _flax(eqn) or name in self.layers:
            self.block(x, f"the {eqn.primitive.name} they reach is not followed")
            self.block(_Value(layer=name if name in self.layers else ""), "it is used twice")
            return _Value(data=True)
        kind = "dense" if eqn.primitive.name == jaxprs.DOT else "depthwise" if depthwise else "conv"
        self.layers[name] = Layer(kernel.leaf, kind, shape[-1], blocked=self.integers([kernel]))
        if kind == "dense" and len(shape) > 2:
            self.block(_Value(layer=name), "they have several axes")
        if why := self.integers([kernel]):
            self.block(x, why)
        elif groups > 1 and not depthwise:
            self.block(x, f"{name} is a grouped convolution")
        elif x.layer:
            self.layers[x.layer].reaches.append(name)
        return _Value(True, name, True)


def _flax(eqn: jaxprs.Eqn) -> bool:
    """Whether a product is of [..., in] with [in, ...] or, a convolution, with [..., in, out]."""
    p, x = eqn.params, len(_shape(eqn.invars[0]))
    if eqn.primitive.name == jaxprs.DOT:
        return p["dimension_numbers"] == (((x - 1,), (0,)), ((), ()))
    numbers = p["dimension_numbers"]
    last = all(spec[1] == x - 1 for spec in (numbers.lhs_spec, numbers.out_spec))
    return last and numbers.rhs_spec[:2] == (x - 1, x - 2) and p["batch_group_count"] == 1


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)
