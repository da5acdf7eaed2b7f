"""The geometry of the operations that can be sites: which axes are summed over, which may have
scales of their own, and how many multiplications there are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax import jaxprs

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def shapes(eqn: jaxprs.Eqn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the first two operands and of the output."""
    lhs, rhs, out = (_shape(v) for v in (*eqn.invars[:2], eqn.outvars[0]))
    return lhs, rhs, out


def dtypes(eqn: jaxprs.Eqn) -> tuple[str, str, str]:
    """Names of the dtypes of the first two operands and of the output."""
    atoms: list[Any] = [*eqn.invars[:2], eqn.outvars[0]]
    lhs, rhs, out = (str(v.aval.dtype) for v in atoms)
    return lhs, rhs, out


def axes(eqn: jaxprs.Eqn) -> tuple[Axes, Axes]:
    """The contracting axes and the channel axes of each operand."""
    lhs, rhs, _ = (len(shape) for shape in shapes(eqn))
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == jaxprs.DOT:
        (a, b), _ = numbers
        return (tuple(a), tuple(b)), (_others(lhs, a), _others(rhs, b))
    if eqn.primitive.name == jaxprs.CONV:
        # lhs_spec: batch, features, spatial axes; rhs_spec: output, input features, spatial axes.
        batch, features = (numbers.lhs_spec[0],), (numbers.rhs_spec[0],)
        return (_others(lhs, batch), _others(rhs, features)), (batch, features)
    rows = tuple(numbers.start_index_map)
    return (_others(lhs, rows), ()), (rows, ())


def groups(eqn: jaxprs.Eqn) -> int:
    """Feature groups of a convolution, 1 elsewhere."""
    return eqn.params.get("feature_group_count", 1)


def macs(eqn: jaxprs.Eqn) -> int:
    """Multiply-accumulates; see `Site.macs`."""
    lhs, rhs, out = shapes(eqn)
    p = eqn.params
    if eqn.primitive.name == jaxprs.DOT:
        (contracted, _), _ = p["dimension_numbers"]
        return math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if eqn.primitive.name == jaxprs.CONV:
        numbers = p["dimension_numbers"]
        total = math.prod(out[axis] for axis in numbers.out_spec[:2]) * rhs[numbers.rhs_spec[1]]
        spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
        for i, (l, r, o) in enumerate(spatial):
            stride, padding = p["window_strides"][i], p["padding"][i][0]
            dilation = p["lhs_dilation"][i], p["rhs_dilation"][i]
            total *= _products(lhs[l], rhs[r], out[o], stride, padding, *dilation)
        return total
    return 0


def _products(
    size: int, taps: int, positions: int, stride: int, padding: int, holes: int, spread: int
) -> int:
    """How many (position, tap) pairs along a convolution's axis multiply something.

    Padding counts, as it does for hardware and in the literature; the zeros between the entries of
    a transposed convolution's input do not.
    """
    if holes == 1:
        return positions * taps
    at = np.arange(positions)[:, None] * stride + np.arange(taps)[None] * spread - padding
    return int(np.sum((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _others(ndim: int, some: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in some)
