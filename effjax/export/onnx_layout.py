"""Operations that move, take and reduce along axes, in ONNX. Moves alone write nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effjax.errors import ExportError
from effjax.export.onnx_graph import Graph
from effjax.export.onnx_values import Sum, Value, dtype_of, shape_of, size
from effjax.jaxprs import Eqn


def transpose(graph: Graph, eqn: Eqn, x: Value) -> Value:
    """Axes in another order; nothing is written."""
    perm = eqn.params["permutation"]
    return x.moved({old: new for new, old in enumerate(perm)}, shape_of(eqn))


def broadcast(graph: Graph, eqn: Eqn, x: Value, *lengths: Value) -> Value:
    """Axes put in or repeated; nothing is written."""
    axes, shape = eqn.params["broadcast_dimensions"], shape_of(eqn)
    return x.moved({a: b for a, b in enumerate(axes) if x.shape[a] == shape[b]}, shape)


def reshape(graph: Graph, eqn: Eqn, x: Value, *lengths: Value) -> Value:
    """Another shape; written unless only axes of length 1 come and go. Integers stay integers where
    the axis of their scales stays."""
    shape = shape_of(eqn)
    old = [a for a, n in enumerate(x.shape) if n != 1]
    new = [a for a, n in enumerate(shape) if n != 1]
    if [x.shape[a] for a in old] == [shape[a] for a in new]:
        return x.moved(dict(zip(old, new, strict=True)), shape)
    grid = x.grid
    if grid is not None and grid.axis is not None:
        axis = _kept(x.shape, shape, grid.axis)
        if axis is None:
            x = Value(graph.floats(x), x.order, x.shape)
        grid = None if axis is None else grid._replace(axis=axis)
    data = graph.reshaped(x, range(len(x.shape)), shape)
    return Value(data, tuple(range(len(shape))), tuple(shape), grid)


def _kept(old: Sequence[Any], new: Sequence[Any], axis: int) -> int | None:
    """Where an axis is after a reshape that leaves it as it is."""
    inner = size(old[axis + 1 :])
    found = [a for a, n in enumerate(new) if n == old[axis] and size(new[a + 1 :]) == inner]
    return found[0] if found else None


def squeeze(graph: Graph, eqn: Eqn, x: Value) -> Value:
    """Axes of length 1 taken out; nothing is written."""
    kept = [a for a in range(len(x.shape)) if a not in eqn.params["dimensions"]]
    return x.moved({a: i for i, a in enumerate(kept)}, shape_of(eqn))


def stack(graph: Graph, eqn: Eqn, *values: Value) -> Value:
    """Values joined along a new axis, as Concat."""
    axis, shape = eqn.params["axis"], shape_of(eqn)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    spread = [v.moved({a: a + (a >= axis) for a in range(len(v.shape))}, one) for v in values]
    return joined(graph, spread, axis, shape)


def concatenate(graph: Graph, eqn: Eqn, *values: Value) -> Value:
    """Values joined along an axis, as Concat."""
    return joined(graph, values, eqn.params["dimension"], shape_of(eqn))


def joined(graph: Graph, values: Sequence[Value], axis: int, shape: Sequence[Any]) -> Value:
    """Values one after the other along an axis, stored as the first is."""
    order = _whole(values[0])
    names = [graph.floats(graph.full(v, order)) for v in values]
    return Value(graph.node("Concat", *names, axis=order.index(axis)), order, tuple(shape))


def cut(graph: Graph, eqn: Eqn, x: Value) -> Value:
    """`slice`."""
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    shape = shape_of(eqn)
    return piece(graph, x, p["start_indices"], p["limit_indices"], strides, shape)


def split(graph: Graph, eqn: Eqn, x: Value) -> list[Value]:
    """Parts along an axis, as a Slice each."""
    axis, start = eqn.params["axis"], 0
    found = list[Value]()
    for out in eqn.outvars:
        aval: Any = out.aval
        low: list[Any] = [0] * len(x.shape)
        high: list[Any] = list(x.shape)
        low[axis], high[axis] = start, start + aval.shape[axis]
        found.append(piece(graph, x, low, high, [1] * len(low), aval.shape))
        start = high[axis]
    return found


def piece(
    graph: Graph,
    x: Value,
    starts: Sequence[Any],
    limits: Sequence[Any],
    strides: Sequence[Any],
    shape: Sequence[Any],
) -> Value:
    """A slice; integers stay integers."""
    axes = [a for a, n in enumerate(x.shape) if n != shape[a]]
    order = _whole(x)
    if x.grid is not None and x.grid.axis in axes:
        x = Value(graph.floats(x), x.order, x.shape)
    x = graph.full(x, order)
    numbers = [[part[a] for a in axes] for part in (starts, limits, strides)]
    names = [graph.array(np.array(n, np.int64)) for n in numbers]
    stored = graph.array(np.array([order.index(a) for a in axes], np.int64))
    name = graph.node("Slice", graph.name(x), names[0], names[1], stored, names[2])
    return Value(name, order, tuple(shape), x.grid)


def pad(graph: Graph, eqn: Eqn, x: Value, value: Value) -> Value:
    """A value put around, as Pad; an error for paddings that take away or go between elements."""
    config = eqn.params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise ExportError(
            f"ONNX: the padding {config} at {graph.scope} is negative or between elements; its Pad "
            "adds at the ends only."
        )
    order = _whole(x)
    x = graph.full(x, order)
    pads = [config[a][0] for a in order] + [config[a][1] for a in order]
    filled = graph.floats(value)
    name = graph.node("Pad", graph.floats(x), graph.array(np.array(pads, np.int64)), filled)
    return Value(name, order, shape_of(eqn))


def gather(graph: Graph, eqn: Eqn, table: Value, indices: Value) -> Value:
    """`gather` of whole rows, as of an embedding, as Gather; of every so many elements along axes,
    as x[:, ::2, ::2] is written for batches of any size, as Slice. Integers stay integers."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    picked = numbers.start_index_map
    if indices.constant:
        places = graph.full(indices, range(len(indices.shape))).data
        found = _slice_of(numbers, sizes, table.shape, places, shape_of(eqn))
        if found is not None:
            return piece(graph, table, *found, shape_of(eqn))
    whole = all(n == table.shape[a] for a, n in enumerate(sizes) if a not in picked)
    if len(picked) != 1 or numbers.collapsed_slice_dims != picked or not whole:
        raise ExportError(
            f"ONNX: the gather at {graph.scope} takes slices {sizes} of {table.shape} along axes "
            f"{picked}; its Gather takes whole rows along one axis."
        )
    (axis,) = picked
    shape, offsets = shape_of(eqn), numbers.offset_dims
    table = graph.full(table, range(len(table.shape)))
    grid = table.grid
    if grid is not None and grid.axis == axis:
        table, grid = Value(graph.floats(table), table.order, table.shape), None
    rank = len(indices.shape) - 1  # the last axis holds the index of one row
    places = graph.arranged(indices, range(rank))
    name = graph.node("Gather", graph.name(table), graph.floats(places), axis=axis)
    others = [a for a in range(len(table.shape)) if a != axis]
    moved = dict(zip(others, offsets, strict=True))
    before = [moved[a] for a in others if a < axis]
    after = [moved[a] for a in others if a > axis]
    batch = [a for a in range(len(shape)) if a not in offsets]
    own = [
        a if stored is not None or shape[a] != 1 else None
        for a, stored in zip(batch, places.order, strict=True)
    ]
    if grid is not None and grid.axis is not None:
        grid = grid._replace(axis=moved[grid.axis])
    return Value(name, (*before, *own, *after), shape, grid)


def _slice_of(
    numbers: Any, sizes: Sequence[Any], table: Sequence[Any], places: np.ndarray, shape: Any
) -> tuple[list[Any], list[Any], list[int]] | None:
    """Starts, limits and strides of the slice that a gather at known places is, if it is one."""
    picked, rank = numbers.start_index_map, places.ndim - 1
    starts, limits, strides = [0] * len(table), list(table), [1] * len(table)
    if rank == 0 and not numbers.collapsed_slice_dims:
        for axis, start in zip(picked, places.tolist(), strict=True):
            starts[axis], limits[axis] = start, start + sizes[axis]
        return starts, limits, strides
    kept = [a for a in range(len(shape)) if a not in numbers.offset_dims]
    if numbers.collapsed_slice_dims != picked or list(picked) != kept or rank != len(picked):
        return None
    for i, axis in enumerate(picked):
        along = np.moveaxis(places[..., i], i, -1)
        line = along.reshape(-1, along.shape[-1])[0]
        step = int(line[1] - line[0]) if len(line) > 1 else 1
        if step < 1 or (along != line[0] + step * np.arange(len(line))).any():
            return None
        starts[axis], limits[axis], strides[axis] = int(line[0]), int(line[-1]) + 1, step
    return starts, limits, strides


def reduction(op: str) -> Callable[..., Value]:
    """A reduction; reduced axes stay stored, with length 1, and are seen no more."""

    def rule(graph: Graph, eqn: Eqn, x: Value) -> Value:
        axes = eqn.params["axes"]
        if not all(a in x.order for a in axes):
            x = graph.full(x, range(len(x.shape)))
        stored = sorted(x.order.index(a) for a in axes)
        name = graph.floats(x)
        out = graph.node(op, name, graph.array(np.array(stored, np.int64)), keepdims=1)
        if op == "ReduceSum":
            count = size([x.shape[a] for a in axes])
            graph.notes[out] = Sum(name, tuple(stored), len(x.order), count)
        left = [a for a in range(len(x.shape)) if a not in axes]
        to = {a: i for i, a in enumerate(left)}
        return Value(out, x.order, x.shape).moved(to, shape_of(eqn))

    return rule


def argmax(graph: Graph, eqn: Eqn, x: Value) -> Value:
    """Where along an axis the largest or the smallest is, as ArgMax or ArgMin."""
    (axis,) = eqn.params["axes"]
    order = _whole(x)
    x = graph.full(x, order)
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[eqn.primitive.name]
    name = graph.node(op, graph.floats(x), axis=order.index(axis), keepdims=1)
    name = graph.node("Cast", name, to=str(dtype_of(eqn)))
    left = [a for a in range(len(x.shape)) if a != axis]
    to = {a: i for i, a in enumerate(left)}
    return Value(name, order, x.shape).moved(to, shape_of(eqn))


def window(op: str) -> Callable[..., Value]:
    """Pooling: MaxPool on what is stored, integers too; a sum as AveragePool times the window."""

    def rule(graph: Graph, eqn: Eqn, x: Value) -> Value:
        p, rank = eqn.params, len(x.shape)
        lengths = p["window_dimensions"]
        ones = [a for a in range(rank) if lengths[a] == 1 and p["padding"][a] == (0, 0)]
        dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
        if len(ones) < 2 or dilated:
            raise ExportError(
                f"ONNX: the window {lengths} at {graph.scope} has no batch and channel axis, or "
                "is dilated; its pooling needs both and takes no dilation."
            )
        order = (ones[0], ones[-1], *(a for a in range(rank) if a not in (ones[0], ones[-1])))
        x = graph.full(x, order)
        space = order[2:]
        options: dict[str, Any] = {
            "kernel_shape": [lengths[a] for a in space],
            "strides": [p["window_strides"][a] for a in space],
            "pads": [p["padding"][a][i] for i in (0, 1) for a in space],
        }
        shape = shape_of(eqn)
        if op == "MaxPool":
            return Value(graph.node(op, graph.name(x), **options), order, shape, x.grid)
        options["count_include_pad"] = 1
        name = graph.node("AveragePool", graph.floats(x), **options)
        count = np.float32(size([lengths[a] for a in space]))
        out = graph.node("Mul", name, graph.array(count))
        graph.notes[out] = Sum(name, None, rank, int(count))
        return Value(out, order, shape)

    return rule


def _whole(x: Value) -> tuple[int, ...]:
    """An order with all axes: the one there is, or the value's own."""
    if None not in x.order and len(x.order) == len(x.shape):
        return tuple(a for a in x.order if a is not None)
    return tuple(range(len(x.shape)))


RULES: dict[str, Callable[..., Value | list[Value]]] = {
    "argmax": argmax,
    "argmin": argmax,
    "broadcast_in_dim": broadcast,
    "concatenate": concatenate,
    "pad": pad,
    "reduce_max": reduction("ReduceMax"),
    "reduce_min": reduction("ReduceMin"),
    "reduce_prod": reduction("ReduceProd"),
    "reduce_sum": reduction("ReduceSum"),
    "reduce_window_max": window("MaxPool"),
    "reduce_window_sum": window("AveragePool"),
    "reshape": reshape,
    "slice": cut,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "transpose": transpose,
}
