"""Several operations of JAX that are one of ONNX: found by looking back from the last of them.

What is replaced is left in the graph; where nothing else reads it, it is not written to the file.
"""

import numpy as np

from effjax.export.onnx_graph import Graph
from effjax.export.onnx_values import Grid, Node, Sum, Value, shape_of
from effjax.jaxprs import Eqn


def biased(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value | None:
    """x + constant, where what computes x can add it: a layer, or LayerNormalization."""
    shape = shape_of(eqn)
    for x, bias in ((a, b), (b, a)):
        if x.constant or not bias.constant or bias.grid is not None or x.shape != shape:
            continue
        note = graph.notes.get(str(x.data))
        if callable(note):
            array = graph.aligned(bias, x.order).data
            name = note(np.asarray(array), len(x.order))
            if name is not None:
                return x._replace(data=name, shape=shape)
    return None


def mean(graph: Graph, eqn: Eqn, total: Value, count: Value) -> Value | None:
    """A sum over its number of elements: ReduceMean, or GlobalAveragePool over all of space."""
    note = None if total.constant else graph.notes.get(str(total.data))
    if not isinstance(note, Sum) or not count.constant or count.grid is not None:
        return None
    name, axes, rank, number = note
    if (
        not isinstance(number, int)
        or not (np.abs(np.asarray(count.data) / number - 1) < 1e-6).all()
    ):
        return None
    if axes is None:  # of a window
        return total._replace(data=name)
    if rank > 3 and axes == tuple(range(2, rank)):
        return total._replace(data=graph.node("GlobalAveragePool", name))
    return total._replace(
        data=graph.node("ReduceMean", name, graph.array(np.array(axes, np.int64)), keepdims=1)
    )


def softmax(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value | None:
    """exp(x - max x) / sum exp(x - max x)."""
    above, below = _node(graph, a), _node(graph, b)
    if above is None or below is None or (above.op, below.op) != ("Exp", "ReduceSum"):
        return None
    axes = graph.notes[str(b.data)].axes
    shifted = graph.producer(above.inputs[0])
    if below.inputs[0] != a.data or len(axes) != 1 or shifted is None or shifted.op != "Sub":
        return None
    x, largest = shifted.inputs
    peak = graph.producer(largest)
    if peak is None or (peak.op, peak.inputs[0]) != ("ReduceMax", x):
        return None
    if _axes(graph, peak) != list(axes):
        return None
    return a._replace(data=graph.node("Softmax", x, axis=axes[0]))


def layer_norm(graph: Graph, eqn: Eqn, a: Value, b: Value) -> Value | None:
    """(x - E x) * (scale / sqrt(max(0, E x² - (E x)²) + epsilon)) over the last stored axis."""
    centred, factor = _node(graph, a), _node(graph, b)
    if centred is None or factor is None or centred.op != "Sub":
        return None
    x, mean = centred.inputs
    scale = None
    if factor.op == "Mul":
        scales = [n for n in factor.inputs if n in graph.arrays]
        roots = [n for n in factor.inputs if n not in graph.arrays]
        if len(scales) != 1 or len(roots) != 1:
            return None
        scale, factor = scales[0], graph.producer(roots[0])
    epsilon = _inverse_deviation(graph, factor, x, mean)
    averaged = graph.producer(mean)
    if epsilon is None or averaged is None or scale is None or a.order[-1] is None:
        return None
    length = a.shape[a.order[-1]]
    each = graph.arrays[scale]
    if _axes(graph, averaged) != [len(a.order) - 1] or each.size not in (1, length):
        return None
    flat = graph.array(np.broadcast_to(each.reshape(-1), length))
    options = {"axis": len(a.order) - 1, "epsilon": epsilon}
    name = graph.node("LayerNormalization", x, flat, **options)

    def shifted(bias: np.ndarray, rank: int) -> str | None:
        if bias.size != length or bias.shape[-1] != length:
            return None
        return graph.node("LayerNormalization", x, flat, graph.array(bias.reshape(-1)), **options)

    graph.notes[name] = shifted
    return a._replace(data=name, shape=shape_of(eqn))


def gelu(graph: Graph, product: Value) -> Value | None:
    """A product that is a GELU:

    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))  or  0.5 x (1 + erf(x / sqrt 2)).
    """
    factor, others = _factors(graph, str(product.data))
    if abs(factor - 0.5) > 1e-6 or len(others) != 2:
        return None
    for x, gate in (others, others[::-1]):
        one, sign, inner = _sum(graph, gate)
        node = graph.producer(inner)
        if one != 1 or node is None or node.op not in ("Tanh", "Erf"):
            continue
        scale, operands = _factors(graph, node.inputs[0])
        if node.op == "Erf":
            if abs(sign * scale - 0.5**0.5) < 1e-6 and operands == [x]:
                return product._replace(data=graph.node("Gelu", x, approximate="none"))
            continue
        if abs(sign * scale - (2 / np.pi) ** 0.5) > 1e-6 or len(operands) != 1:
            continue
        added = graph.producer(operands[0])
        if added is None or added.op != "Add" or x not in added.inputs:
            continue
        cubic = next((n for n in added.inputs if n != x), x)
        share, powers = _factors(graph, cubic)
        if abs(share - 0.044715) < 1e-6 and powers == [x] * 3:
            return product._replace(data=graph.node("Gelu", x, approximate="tanh"))
    return None


def _factors(graph: Graph, name: str) -> tuple[float, list[str]]:
    """A product as a number and tensors."""
    if name in graph.arrays and graph.arrays[name].size == 1:
        return float(graph.arrays[name].reshape(())), []
    node = graph.producer(name)
    if node is None or node.op not in ("Mul", "Neg"):
        return 1.0, [name]
    parts = [_factors(graph, i) for i in node.inputs]
    sign = -1.0 if node.op == "Neg" else 1.0
    return sign * float(np.prod([n for n, _ in parts])), [x for _, xs in parts for x in xs]


def _sum(graph: Graph, name: str) -> tuple[float, int, str]:
    """A number plus or minus a tensor."""
    node = graph.producer(name)
    if node is not None and node.op in ("Add", "Sub"):
        swapped = node.inputs[::-1] if node.op == "Add" else node.inputs
        for number, tensor in (node.inputs, swapped):
            if number in graph.arrays and graph.arrays[number].size == 1:
                value = float(graph.arrays[number].reshape(()))
                return value, 1 if node.op == "Add" else -1, tensor
    return 0.0, 1, name


def _inverse_deviation(graph: Graph, node: Node | None, x: str, mean: str) -> float | None:
    """The epsilon of 1 / sqrt(max(0, E x² - (E x)²) + epsilon)."""
    for op in ("Reciprocal", "Sqrt"):
        if node is None or node.op != op:
            return None
        node = graph.producer(node.inputs[0])
    if node is None or node.op != "Add" or node.inputs[1] not in graph.arrays:
        return None
    epsilon, variance = graph.arrays[node.inputs[1]], graph.producer(node.inputs[0])
    if variance is not None and variance.op == "Relu":
        variance = graph.producer(variance.inputs[0])
    if variance is None or variance.op != "Sub" or epsilon.size != 1:
        return None
    squares, square = (graph.producer(name) for name in variance.inputs)
    if square is None or (square.op, square.inputs) != ("Mul", (mean, mean)):
        return None
    if squares is None or squares.op != "ReduceMean":
        return None
    squared = graph.producer(squares.inputs[0])
    if squared is None or (squared.op, squared.inputs) != ("Mul", (x, x)):
        return None
    return float(epsilon.reshape(()))


def _axes(graph: Graph, node: Node) -> list[int]:
    return [int(a) for a in graph.arrays[node.inputs[1]]]


def _node(graph: Graph, value: Value) -> Node | None:
    return None if value.constant or value.grid is not None else graph.producer(str(value.data))


def quantized(graph: Graph, x: Value, grid: Grid) -> Value:
    """x rounded to a grid: before the layout operations that computed it, which then move integers,
    so that the rounding follows the layer."""
    x, least, most = unclamped(graph, x, grid)
    node, moves = _node(graph, x), []
    while node is not None and node.op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
        moves.append(node)
        before = node.inputs[0]
        node = graph.producer(before)
    if not moves or grid.axis is not None:
        return graph.quantized(x, grid, least, most)
    name = str(graph.quantized(x._replace(data=before), grid, least, most).data)
    for node in reversed(moves):
        name = graph.node(node.op, name, *node.inputs[1:], **node.attributes)
    return x._replace(data=name, grid=grid)


def unclamped(graph: Graph, x: Value, grid: Grid) -> tuple[Value, int, int]:
    """What a quantizer's operand was before ReLUs and other clamps, and the least and the largest
    integer that they leave: rounding is monotone, so that clamping the integers is the same, and
    the rounding follows the layer directly. Nearly always the grid has no other integers anyway.
    """
    least, most = grid.limits
    if grid.scale.size > 1:
        return x, least, most
    scale = np.float32(grid.scale.reshape(()))
    while (node := _node(graph, x)) is not None and node.op in ("Relu", "Max", "Min"):
        bounds = [graph.arrays[n] for n in node.inputs if n in graph.arrays]
        rest = [n for n in node.inputs if n not in graph.arrays]
        bounds = [np.zeros(())] if node.op == "Relu" else bounds
        if len(bounds) != 1 or len(rest) != 1 or bounds[0].size > 1:
            break
        level: float = np.rint(np.float32(bounds[0].reshape(())) / scale) + grid.zero_point
        if node.op == "Min":
            lower, upper = float(least), min(most, level)
        else:
            lower, upper = max(least, level), float(most)
        if lower > upper:
            break
        x, least, most = x._replace(data=rest[0]), int(lower), int(upper)
    return x, least, most


def clipped(graph: Graph, low: Value, x: Value, high: Value) -> Value | None:
    """A clamp of quantized values to points of their grid, on the integers."""
    grid = x.grid
    if grid is None or grid.axis is not None or not (low.constant and high.constant):
        return None
    if np.size(low.data) != 1 or np.size(high.data) != 1:
        return None
    lo, hi = grid.limits
    steps = [float(np.reshape(b.data, ())) / float(grid.scale[0]) for b in (low, high)]
    if any(abs(s - round(s)) > 1e-3 for s in steps):
        return None
    least, most = (min(max(round(s) + grid.zero_point, lo), hi) for s in steps)
    return graph.clipped(x, least, most)
