"""An ONNX graph as it is written, with values whose layout is only bookkeeping.

JAX convolves in NHWC and ONNX in NCHW; a translation operation by operation puts a transpose on
either side of every convolution, and engines then find none of the patterns that they have integer
kernels for. Here a value says which axis of the stored tensor holds which of its own, so that
transposing, inserting and repeating axes write nothing, and what does not care about the order of
axes follows the order there is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effjax.errors import ExportError
from effjax.export.onnx_values import Grid, Node, Order, Value

OPSET = 20  # the first with Gelu


class Graph:
    """Nodes and arrays by name. Equal ones are written once, so lookups need no care."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.scope = ""  # where in the model: the layer's name, in the file and in errors
        self.notes: dict[str, Any] = {}  # of tensors, for what is written as one with what follows
        self._known: dict[Any, str] = {}

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor."""
        return self.nodes.get(name)

    @contextlib.contextmanager
    def at(self, scope: str) -> Iterator[None]:
        """What is written inside stands at another place in the model."""
        self.scope, here = scope, self.scope
        yield
        self.scope = here

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Writes an operation with one output, whose name is returned."""
        key = (op, inputs, repr(sorted(attributes.items())))
        if key not in self._known:
            name = self._fresh()
            self.nodes[name] = Node(op, inputs, attributes, self.scope)
            self._known[key] = name
        return self._known[key]

    def _fresh(self) -> str:
        """A tensor's name. Each stands in a file several times, so they are short."""
        return f"#{len(self.nodes) + len(self.arrays):x}"

    def array(self, array: Any, owner: str = "") -> str:
        """Writes an array, whose name is returned; one with an owner is shared with no other's."""
        array = np.asarray(array, order="C")
        key = (array.dtype.name, array.shape, array.tobytes(), owner)
        if key not in self._known:
            name = self._fresh()
            self.arrays[name] = array
            self._known[key] = name
        return self._known[key]

    # Values ----------------------------------------------------------------------------------

    def name(self, value: Value) -> str:
        """The stored tensor's name."""
        return value.data if isinstance(value.data, str) else self.array(value.data)

    def floats(self, value: Value) -> str:
        """The name of what the value is, in the order stored: integers are made floats."""
        name, grid = self.name(value), value.grid
        if grid is None:
            return name
        scale, zero, axis = self._grid(value)
        if value.constant:
            # ONNX Runtime fails to make weights uint8 (see `session`) where layers share their zero
            # points, or have none.
            zero = self.array(self.arrays[zero], owner=name)
        return self.node("DequantizeLinear", name, scale, zero, **axis)

    def quantized(self, value: Value, grid: Grid, least: int, most: int) -> Value:
        """The value rounded to a grid, stored as integers of least ... most."""
        own = value._replace(grid=grid)
        scale, zero, axis = self._grid(own)
        name = self.node("QuantizeLinear", self.floats(value), scale, zero, **axis)
        own = own._replace(data=name)
        info = np.iinfo(grid.dtype)
        return own if (least, most) == (info.min, info.max) else self.clipped(own, least, most)

    def clipped(self, value: Value, low: int, high: int) -> Value:
        """Stored integers held within bounds."""
        assert value.grid is not None
        bounds = [self.array(np.array(x, value.grid.dtype)) for x in (low, high)]
        return value._replace(data=self.node("Clip", self.name(value), *bounds))

    def _grid(self, value: Value) -> tuple[str, str, dict[str, int]]:
        assert value.grid is not None
        grid = value.grid
        zero = np.full(grid.scale.shape, grid.zero_point, grid.dtype)
        if grid.axis is None:
            return self.array(grid.scale.reshape(())), self.array(zero.reshape(())), {}
        return self.array(grid.scale), self.array(zero), {"axis": value.order.index(grid.axis)}

    def arranged(self, value: Value, order: Sequence[int | None]) -> Value:
        """The value stored in an order; axes that it does not have get length 1."""
        order = tuple(order)
        wanted = tuple(a if a in value.order else None for a in order)
        if value.order == wanted:
            return value
        have = tuple(a for a in value.order if a is not None)
        kept = tuple(a for a in wanted if a is not None)
        perm = [have.index(a) for a in kept]
        gone = [i for i, a in enumerate(value.order) if a is None]
        new = [i for i, a in enumerate(wanted) if a is None]
        if isinstance(value.data, np.ndarray):
            array = np.expand_dims(np.squeeze(value.data, tuple(gone)).transpose(perm), new)
            return value._replace(data=array, order=wanted)
        name = value.data
        if gone:
            name = self.node("Squeeze", name, self.array(np.array(gone, np.int64)))
        if perm != sorted(perm):
            name = self.node("Transpose", name, perm=perm)
        if new:
            name = self.node("Unsqueeze", name, self.array(np.array(new, np.int64)))
        return value._replace(data=name, order=wanted)

    def full(self, value: Value, order: Sequence[int]) -> Value:
        """As `arranged`, with repeated axes written out."""
        value = self.arranged(value, order)
        lengths = [value.shape[a] for a in order]
        repeated = [i for i, a in enumerate(value.order) if a is None and lengths[i] != 1]
        if not repeated:
            return value._replace(order=tuple(order))
        if isinstance(value.data, np.ndarray) and all(isinstance(n, int) for n in lengths):
            return value._replace(data=np.broadcast_to(value.data, lengths), order=tuple(order))
        if not all(isinstance(lengths[i], int) for i in repeated):
            raise ExportError(
                f"ONNX: at {self.scope or 'the top'}, a value of shape {value.shape} is repeated "
                "along an axis of symbolic length. Export for a fixed batch size."
            )
        target = [n if i in repeated else 1 for i, n in enumerate(lengths)]
        name = self.node("Expand", self.name(value), self.array(np.array(target, np.int64)))
        return value._replace(data=name, order=tuple(order))

    def reshaped(
        self, value: Value, order: Sequence[int], shape: Sequence[Any]
    ) -> str | np.ndarray:
        """The stored tensor in an order, then with other lengths."""
        value = self.full(value, order)
        if [value.shape[a] for a in order] == list(shape):
            return value.data
        if isinstance(value.data, np.ndarray):
            return value.data.reshape(tuple(shape))
        target = [n if isinstance(n, int) else -1 for n in shape]
        if target.count(-1) > 1:
            raise ExportError(
                f"ONNX: at {self.scope or 'the top'}, a reshape to {tuple(shape)} has two lengths "
                "that are not known. Let only the batch size be symbolic, or none."
            )
        return self.node("Reshape", value.data, self.array(np.array(target, np.int64)))

    def joint_order(self, values: Sequence[Value], rank: int) -> Order:
        """An order in which all values can be stored: that of one that has all axes, if any."""
        axes = {a for v in values for a in v.order if a is not None and v.shape[a] != 1}
        for value in sorted(values, key=lambda v: v.constant):
            if axes <= set(value.order):
                return value.order
        return tuple(range(rank))

    def aligned(self, value: Value, order: Sequence[int | None]) -> Value:
        """The value so that ONNX's broadcasting from the right meets tensors stored in an order."""
        wanted = [a if a in value.order else None for a in order]
        while len(wanted) > len(value.order) and wanted[0] is None:
            wanted.pop(0)
        found = self.arranged(value, wanted) if tuple(wanted) != value.order else value
        if not isinstance(found.data, np.ndarray):
            return found
        lead = next((i for i, n in enumerate(found.data.shape) if n != 1), found.data.ndim)
        if found.grid is not None or lead == 0:
            return found
        return found._replace(
            data=found.data.reshape(found.data.shape[lead:]), order=found.order[lead:]
        )

    def elements(
        self, op: str, values: Sequence[Value], shape: Sequence[Any], **attributes: Any
    ) -> Value:
        """An operation on elements, with the operands' axes repeated where they must be."""
        order = self.joint_order(values, len(shape))
        parts = [self.aligned(v, order) for v in values]
        return self.of(self.node(op, *map(self.floats, parts), **attributes), parts, order, shape)

    def of(self, name: str, parts: Sequence[Value], order: Order, shape: Sequence[Any]) -> Value:
        """The result of an operation on elements of parts that are aligned to an order."""
        stored = {a for v in parts for a in v.order}
        return Value(name, tuple(a if a in stored else None for a in order), tuple(shape))

    def used(self, outputs: Sequence[str]) -> tuple[dict[str, Node], dict[str, np.ndarray]]:
        """The nodes and arrays that outputs are computed from."""
        needed, todo = set(), list(outputs)
        while todo:
            name = todo.pop()
            if name not in needed:
                needed.add(name)
                todo += self.nodes[name].inputs if name in self.nodes else ()
        nodes = {name: node for name, node in self.nodes.items() if name in needed}
        return nodes, {name: array for name, array in self.arrays.items() if name in needed}
