"""Convolutions and matrix products in ONNX, in the forms that engines have integer kernels for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effjax.errors import ExportError
from effjax.export.onnx_graph import Graph
from effjax.export.onnx_values import Value, shape_of, size
from effjax.jaxprs import Eqn

Biased = Callable[[np.ndarray, int], str | None]  # a bias in the stored order and rank


def convolution(graph: Graph, eqn: Eqn, x: Value, kernel: Value) -> Value:
    """`conv_general_dilated` as Conv; the batch is stored first, the channels second."""
    p, shape = eqn.params, shape_of(eqn)
    numbers = p["dimension_numbers"]
    if any(d != 1 for d in p["lhs_dilation"]) or p["batch_group_count"] != 1:
        raise ExportError(
            f"ONNX: the convolution at {graph.scope} is transposed (lhs_dilation="
            f"{p['lhs_dilation']}, batch_group_count={p['batch_group_count']}); only others are "
            "written. Resize and convolve instead."
        )
    if any(n < 0 for pair in p["padding"] for n in pair):
        raise ExportError(f"ONNX: the convolution at {graph.scope} has negative padding.")
    x = graph.full(x, numbers.lhs_spec)
    kernel = graph.full(kernel, numbers.rhs_spec)
    lows, highs = zip(*p["padding"], strict=True) if p["padding"] else ((), ())
    options = {
        "strides": list(p["window_strides"]),
        "dilations": list(p["rhs_dilation"]),
        "pads": [*lows, *highs],
        "group": p["feature_group_count"],
        "kernel_shape": [kernel.shape[a] for a in numbers.rhs_spec[2:]],
    }
    operands, scope = (graph.floats(x), graph.floats(kernel)), graph.scope

    def biased(bias: np.ndarray, rank: int) -> str | None:
        channels = _only(bias, rank, (1,), [shape[numbers.out_spec[1]]])
        if channels is None:
            return None
        with graph.at(scope):
            return graph.node("Conv", *operands, _bias(graph, channels, x, kernel), **options)

    name = graph.node("Conv", *operands, **options)
    graph.notes[name] = biased
    return Value(name, tuple(numbers.out_spec), shape)


def product(graph: Graph, eqn: Eqn, lhs: Value, rhs: Value) -> Value:
    """`dot_general` as Gemm, where both are quantized and one is constant, or as MatMul."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    shape, batch = shape_of(eqn), len(lhs_batch)
    lhs_free = [a for a in range(len(lhs.shape)) if a not in (*lhs_sum, *lhs_batch)]
    rhs_free = [a for a in range(len(rhs.shape)) if a not in (*rhs_sum, *rhs_batch)]
    cut = batch + len(lhs_free)
    lhs_out, rhs_out = list(range(batch, cut)), list(range(cut, len(shape)))
    if lhs.constant and not rhs.constant:  # ONNX's layers have the weights second
        lhs, rhs, lhs_sum, rhs_sum = rhs, lhs, rhs_sum, lhs_sum
        lhs_batch, rhs_batch, lhs_free, rhs_free = rhs_batch, lhs_batch, rhs_free, lhs_free
        lhs_out, rhs_out = rhs_out, lhs_out
    order = (*range(batch), *lhs_out, *rhs_out)
    whole = lhs.grid is not None and lhs.grid.axis is None and rhs.grid is not None
    gemm = batch == 0 and rhs.constant and whole
    lead = [lhs.shape[a] for a in lhs_batch]
    rows, inner = [lhs.shape[a] for a in lhs_free], size([lhs.shape[a] for a in lhs_sum])
    columns = [rhs.shape[a] for a in rhs_free]
    # A matrix on the right serves rows of any number of axes; else there is one.
    flat = gemm or batch > 0 or len(rhs_free) != 1 or not rhs.constant
    wanted_rows = [size(rows)] if flat else rows
    x = _matrix(graph, lhs, (*lhs_batch, *lhs_free, *lhs_sum), [*lead, *wanted_rows, inner])
    w = _matrix(graph, rhs, (*rhs_batch, *rhs_sum, *rhs_free), [*lead, inner, size(columns)])
    out = [*lead, *wanted_rows, size(columns)]
    operands, scope = (graph.floats(x), graph.floats(w)), graph.scope

    def finished(name: str) -> str:
        stored = Value(name, tuple(range(len(out))), tuple(out))
        return str(graph.reshaped(stored, range(len(out)), [shape[a] for a in order]))

    def biased(bias: np.ndarray, rank: int) -> str | None:
        own = tuple(range(rank - len(columns), rank))
        channels = _only(bias, rank, own, columns)
        if channels is None:
            return None
        with graph.at(scope):
            return finished(graph.node("Gemm", *operands, _bias(graph, channels, x, w)))

    name = finished(graph.node("Gemm" if gemm else "MatMul", *operands))
    if gemm:
        graph.notes[name] = biased
    return Value(name, order, shape)


def _matrix(graph: Graph, value: Value, order: Sequence[int], shape: Sequence[Any]) -> Value:
    """A value stored with its axes in an order and merged; scales follow to the last axis."""
    grid = value.grid
    if grid is not None and grid.axis is not None:
        each = [-1 if a == grid.axis else 1 for a in range(len(value.shape))]
        scale = np.broadcast_to(grid.scale.reshape(each), value.shape)
        columns = scale.transpose(order).reshape(-1, shape[-1])
        if not value.constant or (columns != columns[0]).any():  # in a sum, scales cannot differ
            name = graph.floats(value)
            value = Value(name, value.order, value.shape)
            grid = None
        else:
            grid = grid._replace(scale=columns[0].copy(), axis=len(shape) - 1)
    data = graph.reshaped(value, order, shape)
    return Value(data, tuple(range(len(shape))), tuple(shape), grid)


def _only(
    bias: np.ndarray, rank: int, axes: tuple[int, ...], lengths: Sequence[int]
) -> np.ndarray | None:
    """A bias that varies along these stored axes alone, flat; None if it varies along others."""
    full = bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
    if any(n != 1 for a, n in enumerate(full.shape) if a not in axes):
        return None
    own = full.reshape([full.shape[a] for a in axes])
    return np.broadcast_to(own, lengths).reshape(-1)


def _bias(graph: Graph, bias: np.ndarray, x: Value, w: Value) -> str:
    """A bias as integers on the grid of the sums, if these are integers."""
    if x.grid is None or w.grid is None or x.grid.axis is not None:
        return graph.array(bias)
    scale = np.broadcast_to(x.grid.scale * w.grid.scale, bias.shape).astype(np.float32)
    limit = 2.0**31 - 1
    steps = np.clip(np.round(bias.astype(np.float64) / scale), -limit, limit).astype(np.int32)
    return graph.node("DequantizeLinear", graph.array(steps), graph.array(scale), axis=0)
