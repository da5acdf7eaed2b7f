"""JAX's primitives in ONNX: a rule for each, by the primitive's name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from effjax.errors import ExportError
from effjax.export import onnx_layout, onnx_patterns
from effjax.export.onnx_graph import Graph
from effjax.export.onnx_products import convolution, product
from effjax.export.onnx_values import Value, constant, dtype_of, shape_of
from effjax.jaxprs import CONV, DOT, GATHER, Eqn

Rule = Callable[..., Value | list[Value]]


def _same(op: str, **attributes: Any) -> Callable[..., Value]:
    """An operation on elements that ONNX has."""

    def rule(graph: Graph, eqn: Eqn, *values: Value) -> Value:
        return graph.elements(op, values, shape_of(eqn), **attributes)

    return rule


def _chain(*ops: str) -> Rule:
    """Several operations of one operand, one after the other."""

    def rule(graph: Graph, eqn: Eqn, x: Value) -> Value:
        for op in ops:
            x = graph.elements(op, [x], x.shape)
        return x

    return rule


def _identity(graph: Graph, eqn: Eqn, x: Value) -> Value:
    return x


def _scalar(value: float, like: Eqn) -> Value:
    return constant(np.asarray(value, dtype_of(like)))


def _maximum(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    shape = shape_of(eqn)
    for bound, x in ((a, b), (b, a)):
        if _all(bound, -np.inf):
            return x
        if _all(bound, 0) and x.shape == shape:
            return graph.elements("Relu", [x], shape)
    return graph.elements("Max", [a, b], shape)


def _minimum(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    shape = shape_of(eqn)
    for bound, x in ((a, b), (b, a)):
        if _all(bound, np.inf):
            return x
    return graph.elements("Min", [a, b], shape)


def _all(x: Value, value: float) -> bool:
    """Whether a value is this constant."""
    return x.constant and x.grid is None and bool(np.all(x.data == value))


def _add(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    for nothing, x in ((a, b), (b, a)):
        if _all(nothing, 0) and x.shape == shape_of(eqn):
            return x
    return onnx_patterns.biased(graph, eqn, a, b) or _same("Add")(graph, eqn, a, b)


def _subtract(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    if b.constant and b.grid is None and b.data.dtype.kind == "f":
        return _add(graph, eqn, a, b._replace(data=-b.data))
    return _same("Sub")(graph, eqn, a, b)


def _divide(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    found = onnx_patterns.mean(graph, eqn, a, b) or onnx_patterns.softmax(graph, eqn, a, b)
    return found or _same("Div")(graph, eqn, a, b)


def _multiply(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    if b.constant and b.grid is None and (b.data != 0).all() and b.data.dtype.kind == "f":
        inverse = b._replace(data=1 / b.data)
        if found := onnx_patterns.mean(graph, eqn, a, inverse):
            return found
    if found := onnx_patterns.layer_norm(graph, eqn, a, b):
        return found
    for nothing, x in ((a, b), (b, a)):
        if _all(nothing, 1) and x.shape == shape_of(eqn):
            return x
    product = _same("Mul")(graph, eqn, a, b)
    return onnx_patterns.gelu(graph, product) or product


def _integer_pow(graph: Graph, eqn: Eqn, x: Value) -> Value:
    y = eqn.params["y"]
    if y in (2, 3):
        square = graph.elements("Mul", [x, x], x.shape)
        return square if y == 2 else graph.elements("Mul", [square, x], x.shape)
    return graph.elements("Pow", [x, _scalar(y, eqn)], x.shape)


def _square(graph: Graph, eqn: Eqn, x: Value) -> Value:
    return graph.elements("Mul", [x, x], x.shape)


def _one_minus(op: str) -> Rule:
    def rule(graph: Graph, eqn: Eqn, x: Value) -> Value:
        return graph.elements("Sub", [_scalar(1, eqn), graph.elements(op, [x], x.shape)], x.shape)

    return rule


def _shifted(op: str, before: float, after: float) -> Rule:
    """log1p and expm1, near enough in float32 where networks use them."""

    def rule(graph: Graph, eqn: Eqn, x: Value) -> Value:
        if before:
            x = graph.elements("Add", [x, _scalar(before, eqn)], x.shape)
        x = graph.elements(op, [x], x.shape)
        return graph.elements("Add", [x, _scalar(after, eqn)], x.shape) if after else x

    return rule


def _not_equal(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value:
    equal = _same("Equal")(graph, eqn, a, b)
    return graph.elements("Not", [equal], equal.shape)


def _where(graph: Graph, eqn: Eqn, which: Value, *cases: Value) -> Value:
    kind: Any = eqn.invars[0].aval
    if len(cases) != 2 or kind.dtype != bool:
        raise ExportError(
            f"ONNX: a selection among {len(cases)} cases at {graph.scope}; it has Where, for two."
        )
    return graph.elements("Where", [which, cases[1], cases[0]], shape_of(eqn))


def _clamp(graph: Graph, eqn: Eqn, low: Value, x: Value, high: Value) -> Value:
    return onnx_patterns.clipped(graph, low, x, high) or _minimum(
        graph, eqn, _maximum(graph, eqn, x, low), high
    )


def _convert(graph: Graph, eqn: Eqn, x: Value) -> Value:
    before: Any = eqn.invars[0].aval
    if before.dtype == dtype_of(eqn):
        return x
    return graph.elements("Cast", [x], x.shape, to=str(dtype_of(eqn)))


def _exp2(graph: Graph, eqn: Eqn, x: Value) -> Value:
    return graph.elements("Pow", [_scalar(2, eqn), x], x.shape)


RULES: dict[str, Rule] = {
    CONV: convolution,
    DOT: product,
    GATHER: onnx_layout.gather,
    "abs": _same("Abs"),
    "add": _add,
    "add_any": _add,
    "and": _same("And"),
    "ceil": _same("Ceil"),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": _identity,
    "copy_p": _identity,
    "cos": _same("Cos"),
    "div": _divide,
    "eq": _same("Equal"),
    "erf": _same("Erf"),
    "erfc": _one_minus("Erf"),
    "exp": _same("Exp"),
    "exp2": _exp2,
    "expm1": _shifted("Exp", 0, -1),
    "floor": _same("Floor"),
    "ge": _same("GreaterOrEqual"),
    "gt": _same("Greater"),
    "integer_pow": _integer_pow,
    "le": _same("LessOrEqual"),
    "log": _same("Log"),
    "log1p": _shifted("Log", 1, 0),
    "logistic": _same("Sigmoid"),
    "lt": _same("Less"),
    "max": _maximum,
    "min": _minimum,
    "mul": _multiply,
    "ne": _not_equal,
    "neg": _same("Neg"),
    "not": _same("Not"),
    "optimization_barrier": _identity,
    "or": _same("Or"),
    "pow": _same("Pow"),
    "reduce_precision": _identity,
    "rem": _same("Mod", fmod=1),
    "rsqrt": _chain("Sqrt", "Reciprocal"),
    "select_n": _where,
    "sign": _same("Sign"),
    "sin": _same("Sin"),
    "sqrt": _same("Sqrt"),
    "square": _square,
    "stop_gradient": _identity,
    "sub": _subtract,
    "tanh": _same("Tanh"),
    **onnx_layout.RULES,
}


# These only move axes: on constants too they are written as such, and not evaluated.
VIEWS = ("transpose", "broadcast_in_dim", "reshape", "squeeze", "stop_gradient", "copy")
