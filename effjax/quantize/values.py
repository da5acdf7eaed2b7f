"""The values of a program that is being frozen: known, data, or a layer's result that still waits
for what is added to it and multiplied with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import jaxprs
from effjax.prune.layout import ELEMENTWISE
from effjax.quantize.marker import Quantizer
from effjax.sites import Site

Shape = tuple[Any, ...]  # of integers, or symbolic


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the batch.

    value: of the shape `compact`; None where the program is written again, unless `static`.
    compact: the shape before it was repeated: of length 1 where all entries are the same.
    shape: the whole shape.
    static: whether it is written into the program: a literal, or computed from such.
    path: of the leaf that it is, or "".
    """

    value: Any
    compact: tuple[int, ...]
    shape: Shape
    static: bool = False
    path: str = ""

    def number(self) -> float | None:
        """The number that all its entries are, if that is written into the program."""
        if not self.static or self.value is None or np.size(self.value) != 1:
            return None
        if jax.dtypes.issubdtype(self.value.dtype, jax.dtypes.prng_key):
            return None
        return float(np.asarray(self.value).reshape(()))


@dataclass(frozen=True)
class Data:
    """A value that depends on the batch.

    number: of the value it was made as; moving entries about makes no new one.
    positive: whether it is never negative.
    grid: the quantizer whose points its entries are, or None.
    """

    array: Array
    number: int
    positive: bool = False
    grid: Quantizer | None = None


@dataclass(frozen=True)
class Pending:
    """A site's result times a factor plus a shift, both for each channel, not yet computed.

    operand: the site's activation, rounded; weight: as it meets it.
    channels: axes of the result, of this shape, along which factor and shift differ.
    factor, shift: float64, of the channels' shape; None where the program is written again.
    shifted: whether anything was added.
    """

    site: Site
    name: str
    eqn: jaxprs.Eqn
    jaxpr: jaxprs.Jaxpr
    operand: Data
    weight: Known
    channels: tuple[int, ...]
    shape: Shape
    factor: np.ndarray | None
    shift: np.ndarray | None
    shifted: bool = False


Value = Known | Data | Pending

# What moves or repeats entries, or chooses some: a grid stays a grid.
LAYOUT = {
    "broadcast_in_dim",
    "copy",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "optimization_barrier",
    "reduce_max",
    "reduce_min",
    "reduce_window_max",
    "reduce_window_min",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}
SUMS = {"reduce_sum", "reduce_window_sum"}
POSITIVE = {"abs", "exp", "exp2", "logistic", "square"}  # of any argument
KEEPS = {"add", "add_any", "cumsum", "div", "max", "mul", "sqrt", *SUMS}  # of positive ones


def known(value: Any, *, static: bool, path: str = "") -> Known:
    """A leaf, literal or constant."""
    shape = tuple(np.shape(value))
    return Known(value, shape, shape, static, path)


def compact_shape(eqn: jaxprs.Eqn, values: Sequence[Known]) -> tuple[int, ...]:
    """The compact shape of what an equation makes of known values."""
    name, out = eqn.primitive.name, jaxprs.shape(eqn.outvars[0])
    if name in ELEMENTWISE:
        shape = np.broadcast_shapes(*(v.compact for v in values))
        return (1,) * (len(out) - len(shape)) + tuple(shape)
    if name == "broadcast_in_dim":
        found = [1] * len(out)
        for axis, n in zip(eqn.params["broadcast_dimensions"], values[0].compact, strict=True):
            found[axis] = n
        return tuple(found)
    return out


def evaluate(jaxpr: jaxprs.Jaxpr, eqn: jaxprs.Eqn, values: Sequence[Known]) -> list[Known]:
    """What an equation makes of known values."""
    name, static = eqn.primitive.name, all(v.static for v in values)
    shapes = [jaxprs.shape(v) for v in eqn.outvars]
    compacts = [compact_shape(eqn, values), *shapes[1:]]
    path = values[0].path if name in ("reshape", "broadcast_in_dim") else ""
    found: list[Any] = [None] * len(shapes)
    if all(v.value is not None for v in values):
        small = name in ELEMENTWISE
        with jax.ensure_compile_time_eval():
            if name == "broadcast_in_dim":
                found = [values[0].value]
            else:
                joint = np.broadcast_shapes(*(v.compact for v in values))
                operands = [_repeated(v, joint) if small else whole(v) for v in values]
                found = jaxprs.applied(jaxpr, eqn)(*operands)
            if small or name == "broadcast_in_dim":
                found = [jnp.reshape(found[0], compacts[0])]
    return [
        Known(x, compact, shape, static, path)
        for x, compact, shape in zip(found, compacts, shapes, strict=True)
    ]


def _repeated(value: Known, shape: tuple[int, ...]) -> Any:
    """The value in a shape that all operands have; scalars stay, as in the program."""
    return jnp.broadcast_to(value.value, shape) if value.shape else value.value


def whole(value: Known) -> Any:
    """The value in its whole shape."""
    if value.compact == value.shape:
        return value.value
    return jnp.broadcast_to(value.value, value.shape)


def is_positive(eqn: jaxprs.Eqn, values: Sequence[Value]) -> bool:
    """Whether an equation's result is never negative."""
    name = eqn.primitive.name
    signs = [
        v.positive if isinstance(v, Data) else isinstance(v, Known) and (v.number() or 0.0) > 0
        for v in values
    ]
    if name in POSITIVE or (name == "integer_pow" and eqn.params["y"] % 2 == 0):
        return True
    if name == "max":
        numbers = [v.number() for v in values if isinstance(v, Known)]
        return any(signs) or any(n is not None and n >= 0 for n in numbers)
    if name == "clamp":
        low = values[0]
        return signs[1] or (isinstance(low, Known) and (n := low.number()) is not None and n >= 0)
    if name == "min":
        return all(signs)
    if name == "pad":
        fill = values[1]
        return signs[0] and isinstance(fill, Known) and fill.number() == 0
    if name in LAYOUT or name == "convert_element_type":
        return bool(signs) and signs[0]
    return name in KEEPS and all(signs)
