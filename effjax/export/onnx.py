"""ONNX: a frozen function as a file whose layers engines run on integers.

The function's own jaxpr is translated, primitive by primitive: `onnx_rules.py` has the table,
`onnx_graph.py` the graph under construction, `onnx_products.py` the layers, `onnx_patterns.py` what
is one operation in ONNX and several in JAX. Models in Linen, NNX and plain JAX are all jaxprs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.core import PyTree
from effjax.errors import ExportError
from effjax.export import onnx_patterns
from effjax.export.extras import need
from effjax.export.marker import codes, is_marker, read, scope_of
from effjax.export.onnx_graph import OPSET, Graph
from effjax.export.onnx_rules import RULES, VIEWS
from effjax.export.onnx_runtime import INTEGER, integer_kernels, kernels, run, session
from effjax.export.onnx_values import Grid, Node, Value, constant
from effjax.jaxprs import Call, Eqn, Jaxpr, Remat, Ruled, is_literal, parts, rerun
from effjax.select import leaves

LAYERS = ("Conv", "Gemm", "MatMul")  # the nodes that are named, by where they stand in the model


def to_onnx(fn: Callable[..., PyTree], *avals: PyTree) -> bytes:
    """The ONNX file of a function.

    A quantizer of an activation becomes QuantizeLinear and DequantizeLinear with its scale, one of
    a constant an int8 array and DequantizeLinear; a bias between two of them is int32. Ranges that
    begin at zero are uint8. What the inputs do not change is computed now.

    Args:
      fn: a frozen model as a function of arrays, its weights among its constants.
      *avals: shapes and dtypes of its arguments, trees of `jax.ShapeDtypeStruct`. A batch size from
        `jax.export.symbolic_shape` makes a file for every batch size.

    Returns:
      The file's bytes. Its inputs are named by the arguments' paths, or "input"; its outputs
      "output", or by their paths; its layers by where they stand in the model.

    Raises:
      ExportError: an operation that ONNX does not have, or not in this form; or the package onnx is
        not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.export.onnx import run, to_onnx
      >>> data = to_onnx(lambda x: jax.nn.relu(x), jax.ShapeDtypeStruct((3,), jnp.float32))
      >>> run(data)(np.array([-1, 0, 2], np.float32))
      [array([0., 0., 2.], dtype=float32)]
    """
    helper = need("onnx.helper", "onnx")
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*avals)
    graph = Graph()
    tree: PyTree = avals[0] if len(avals) == 1 else avals
    inputs = {p or "input": x for p, x in leaves(tree).items()}
    values = [Value(name, tuple(range(len(x.shape))), tuple(x.shape)) for name, x in inputs.items()]
    found = _Lowering(graph).run(
        closed.jaxpr, [constant(np.asarray(c)) for c in closed.consts], values, ""
    )
    named: dict[str, tuple[str, Any]] = {}
    for (path, aval), value in zip(leaves(outputs).items(), found, strict=True):
        graph.scope = ""
        name = graph.floats(graph.full(value, range(len(value.shape))))
        named[path or "output"] = (name, aval)
    return _written(helper, graph, inputs, named)


class _Lowering:
    """A walk over a jaxpr that writes each equation to the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Value], inputs: Sequence[Value], scope: str
    ) -> list[Value]:
        """The outputs' values."""
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def of(atom: Any) -> Value:
            return constant(np.asarray(atom.val)) if is_literal(atom) else env[atom]

        for eqn in _needed(jaxpr):
            own = scope_of(scope, eqn)
            self.graph.scope = own
            outs = self.equation(jaxpr, eqn, [of(v) for v in eqn.invars], own)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [of(v) for v in jaxpr.outvars]

    def equation(self, jaxpr: Jaxpr, eqn: Eqn, values: list[Value], scope: str) -> list[Value]:
        """One equation's outputs."""
        name = eqn.primitive.name
        if is_marker(eqn):
            return [self.quantizer(eqn, values[-1])]
        inner = parts(eqn)
        if isinstance(inner, Call | Remat | Ruled):
            held = [constant(np.asarray(c)) for c in inner.body.consts]
            return self.run(inner.body.jaxpr, held, values[-len(inner.body.jaxpr.invars) :], scope)
        known = all(v.constant and v.grid is None for v in values)
        avals: list[Any] = [v.aval for v in eqn.outvars]
        fixed = all(isinstance(n, int) for aval in avals for n in aval.shape)
        if known and fixed and name not in VIEWS:
            return self.evaluated(jaxpr, eqn, values)
        if name not in RULES:
            shapes = ", ".join(str(v.aval.str_short()) for v in eqn.invars)
            raise ExportError(
                f"ONNX: the operation {name!r} on ({shapes}) at {scope or 'the top'} has no "
                f"translation. Replace it in the model, or add a rule for it to "
                "effjax/export/onnx_rules.py."
            )
        found = RULES[name](self.graph, eqn, *values)
        return [found] if isinstance(found, Value) else found

    def quantizer(self, eqn: Eqn, x: Value) -> Value:
        marker = read(eqn)
        known = x.constant and x.grid is None
        grid = Grid.of(marker, known)
        if known:
            x = self.graph.full(x, range(len(x.shape)))
            return x._replace(data=codes(x.data, marker), grid=grid)
        if x.grid is not None and x.grid.equals(grid):
            return x
        return onnx_patterns.quantized(self.graph, x, grid)

    def evaluated(self, jaxpr: Jaxpr, eqn: Eqn, values: Sequence[Value]) -> list[Value]:
        """What only constants go into."""
        if any(v.data.dtype == object for v in values):
            raise ExportError(
                f"ONNX: random numbers are drawn at {self.graph.scope or 'the top'} "
                f"({eqn.primitive.name}). Export the model as it is evaluated, without dropout."
            )
        full = [self.graph.full(v, range(len(v.shape))).data for v in values]
        env = {v: x for v, x in zip(eqn.invars, full, strict=True) if not is_literal(v)}
        rerun(jaxpr, [eqn], eqn.outvars, env)
        return [constant(_array(env[v])) for v in eqn.outvars]


def _needed(jaxpr: Jaxpr) -> list[Eqn]:
    """The equations that the outputs are computed from."""
    used, found = {v for v in jaxpr.outvars if not is_literal(v)}, []
    for eqn in reversed(jaxpr.eqns):
        if used.intersection(eqn.outvars):
            found.append(eqn)
            used.update(v for v in eqn.invars if not is_literal(v))
    return found[::-1]


def _array(x: Any) -> np.ndarray:
    """A constant; keys of random numbers are none that a graph could hold."""
    return np.array(None) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def _written(
    helper: Any,
    graph: Graph,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[str, Any]],
) -> bytes:
    tensors = need("onnx.numpy_helper", "onnx")

    def type_of(dtype: Any) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def info(name: str, x: Any) -> Any:
        shape = [n if isinstance(n, int) else str(n) for n in x.shape]
        return helper.make_tensor_value_info(name, type_of(x.dtype), shape)

    nodes, arrays = graph.used([name for name, _ in outputs.values()])
    renamed = {name: out for out, (name, _) in outputs.items() if name in nodes}
    names = _layer_names(nodes)
    written = [
        _node(helper, type_of, name, node, renamed, names.get(name)) for name, node in nodes.items()
    ]
    for out, (name, _) in outputs.items():
        if renamed.get(name, name) != out:
            written.append(helper.make_node("Identity", [renamed.get(name, name)], [out]))
    whole = helper.make_graph(
        written,
        "effjax",
        [info(name, x) for name, x in inputs.items()],
        [info(name, x) for name, (_, x) in outputs.items()],
        [tensors.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="effjax",
        ir_version=9,
    )
    return model.SerializeToString()


def _layer_names(nodes: Mapping[str, Node]) -> dict[str, str]:
    """What the layers that multiply are called, by the tensors that they make."""
    counts, found = Counter[str](), dict[str, str]()
    for tensor, node in nodes.items():
        if node.op in LAYERS and node.scope:
            counts[node.scope] += 1
            count = counts[node.scope]
            found[tensor] = node.scope if count == 1 else f"{node.scope}#{count}"
    return found


def _node(
    helper: Any,
    type_of: Callable[[Any], int],
    tensor: str,
    node: Node,
    renamed: Mapping[str, str],
    name: str | None,
) -> Any:
    attributes = dict(node.attributes)
    if node.op == "Cast":
        attributes["to"] = type_of(attributes["to"])
    inputs = [renamed.get(i, i) for i in node.inputs]
    return helper.make_node(node.op, inputs, [renamed.get(tensor, tensor)], name=name, **attributes)


__all__ = ["INTEGER", "integer_kernels", "kernels", "run", "session", "to_onnx"]
