"""Values of a program as an ONNX graph holds them: what is stored, in which order of axes.

A value says which axis of the stored tensor holds which of its own. So transposing, inserting and
repeating axes write nothing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.export.marker import Marker
from effjax.jaxprs import Eqn

Order = tuple[int | None, ...]


class Grid(NamedTuple):
    """Integers as ONNX stores them: the value is (stored - zero_point) * scale.

    Weights are int8. What the inputs change is uint8: x86 multiplies uint8 by int8, and what begins
    at the least integer begins at zero, where engines fuse a ReLU with the rounding.
    """

    scale: np.ndarray
    zero_point: int
    limits: tuple[int, int]
    dtype: type[np.integer]
    axis: int | None

    @classmethod
    def of(cls, marker: Marker, constant: bool) -> "Grid":
        """The grid of a frozen quantizer, of a constant or of what the inputs change. That the
        least integer is left out of a narrow one is not kept: no engine's rounding does so, and
        what differs is saturated."""
        half = 2 ** (marker.bits - 1)
        if constant:
            limits = (-half, half - 1)
            return cls(marker.scale, marker.zero_point, limits, np.int8, marker.axis)
        limits = (128 - half, 127 + half)
        return cls(marker.scale, marker.zero_point + 128, limits, np.uint8, marker.axis)

    def equals(self, other: "Grid | None") -> bool:
        """Whether both have the same integers for the same values."""
        return other is not None and self[1:] == other[1:] and np.array_equal(self[0], other[0])


class Value(NamedTuple):
    """A value of the program, as the graph holds it.

    data: the name of a tensor of the graph; or an array, if the inputs do not change it.
    order: for each axis of the stored tensor the axis of the value that it holds, or None for one
      of length 1 that holds none. What is not stored of a value is repeated.
    shape: of the value; lengths may be symbolic.
    grid: the stored are integers, and the value is (stored - zero_point) * scale; `grid.axis`
      counts the value's axes.
    """

    data: Any
    order: Order
    shape: tuple[Any, ...]
    grid: Grid | None = None

    @property
    def constant(self) -> bool:
        """Whether the inputs do not change it."""
        return isinstance(self.data, np.ndarray)

    def moved(self, to: dict[int, int], shape: Sequence[Any]) -> "Value":
        """The same stored tensor seen with other axes: `to` maps old to new; others are dropped."""
        order = tuple(None if a is None else to.get(a) for a in self.order)
        grid = self.grid
        if grid is not None and grid.axis is not None:
            grid = grid._replace(axis=to[grid.axis])
        return Value(self.data, order, tuple(shape), grid)


class Node(NamedTuple):
    """An operation of the graph; its output has its name."""

    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    scope: str


class Sum(NamedTuple):
    """What a node sums, for the division that makes it a mean.

    name: of the tensor that is summed, or of the mean itself where that is written already.
    axes: stored, that are summed; None in the second case.
    rank: of the tensor.
    count: elements in a sum.
    """

    name: str
    axes: tuple[int, ...] | None
    rank: int
    count: Any


def constant(array: Any) -> Value:
    """An array that the inputs do not change."""
    array = np.asarray(array)
    return Value(array, tuple(range(array.ndim)), array.shape)


def shape_of(eqn: Eqn) -> tuple[Any, ...]:
    """The shape of an equation's first output."""
    aval: Any = eqn.outvars[0].aval
    return tuple(aval.shape)


def dtype_of(eqn: Eqn) -> np.dtype:
    """The type of an equation's first output."""
    aval: Any = eqn.outvars[0].aval
    return np.dtype(aval.dtype)


def size(shape: Sequence[Any]) -> Any:
    """The number of elements; symbolic where a length is."""
    return math.prod(shape)
