"""Which entries of which axes can only be removed together.

Every axis is an int array [size, k] of units: entry p of the axis goes if any of the units in row p
goes. One unit a row is the usual case; a flattened [heads, dim] axis has two, as an entry goes with
its head or with its dimension. The tie of two axes unites their units entry by entry, so offsets
(concatenation, slices) and blocks (flattening) need no bookkeeping of their own.
"""

import math
from collections.abc import Sequence

import numpy as np

Axis = np.ndarray  # int [size, k], rows of units
FREE = -1  # an entry of a broadcast or padding, which goes with whatever it meets


class Units:
    """Units, which are one (union-find), which are several others at once, and which must stay."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.family: list[int] = []  # units made together have a family: one for each axis
        self.families = 0
        self.made_of: dict[int, tuple[int, ...]] = {}  # a root that goes with any of these
        self.reasons: dict[int, set[str]] = {}  # why a root stays
        self.constant: dict[str, int] = {}  # a unit for each reason, never united with others
        self.is_constant: set[int] = set()
        self.factors: dict[int, list[Axis]] = {}  # by family: all factors of the axis it came from

    def new(self, size: int) -> Axis:
        """An axis of new units."""
        first = len(self.parent)
        self.parent.extend(range(first, first + size))
        self.family.extend([self.families] * size)
        self.families += 1
        return np.arange(first, first + size)[:, None]

    def kept(self, size: int, reason: str) -> Axis:
        """An axis that stays whole."""
        if reason not in self.constant:
            [[unit]] = self.new(1)
            self.constant[reason] = int(unit)
            self.is_constant.add(int(unit))
            self.reasons[int(unit)] = {reason}
        return np.full((size, 1), self.constant[reason])

    def free(self, size: int) -> Axis:
        """An axis whose entries are alike and follow what they meet."""
        return np.full((size, 1), FREE)

    def find(self, unit: int) -> int:
        """The representative of a unit."""
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def atoms(self, row: Sequence[int]) -> frozenset[int]:
        """The representatives that a row of units is made of."""
        found: set[int] = set()
        stack = [int(u) for u in row if u != FREE]
        while stack:
            root = self.find(stack.pop())
            if root in self.made_of:
                stack.extend(self.made_of[root])
            else:
                found.add(root)
        return frozenset(found)

    def pin(self, axis: Axis, reason: str) -> None:
        """All entries of the axis stay."""
        for unit in np.unique(axis):
            for root in self.atoms([unit]):
                self._pin(root, {reason})

    def pin_whole(self, axis: Axis, reason: str) -> None:
        """All entries of the axis stay, and all of the axis that it was cut out of."""
        self.pin(axis, reason)
        roots = frozenset().union(*(self.atoms([unit]) for unit in np.unique(axis)))
        for family in {self.family[root] for root in roots}:
            for factor in self.factors.get(family, ()):
                self.pin(factor, reason)

    def _pin(self, root: int, reasons: set[str]) -> None:
        if root not in self.is_constant:
            self.reasons.setdefault(root, set()).update(reasons)

    def join(self, a: Axis, b: Axis) -> Axis:
        """Ties two axes entry by entry, and returns one that stands for both.

        An axis of one entry that meets a longer one is broadcast and ties nothing.
        """
        if len(a) != len(b):
            return a if len(b) == 1 else b
        if a.shape == b.shape and np.array_equal(a, b):
            return a
        for i in _first_of_each(a, b):
            self._equate(a[i], b[i])
        free = (a == FREE).all(axis=1)
        if not free.any():
            return a
        width = max(a.shape[1], b.shape[1])
        return np.where(free[:, None], _widened(b, width), _widened(a, width))

    def _equate(self, a: Sequence[int], b: Sequence[int]) -> None:
        left, right = self.atoms(a), self.atoms(b)
        if left == right or not left or not right:
            return
        pinned = (left | right) & self.is_constant
        left, right = left - pinned, right - pinned
        if pinned:
            reasons = set().union(*(self.reasons[u] for u in pinned))
            for root in left | right:
                self._pin(root, reasons)
        elif len(left) == len(right) == 1 or left & right:
            self._unite(left | right)
        elif len(left) == 1 or len(right) == 1:
            one, many = (left, right) if len(left) == 1 else (right, left)
            [root] = one
            self.made_of[root] = tuple(sorted(many))
            for other in many:
                self._pin(other, self.reasons.get(root, set()))
        elif len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self._equate([x], [y])
            if self.atoms(a) != self.atoms(b):
                self._unite(self.atoms(a) | self.atoms(b))
        else:
            self._unite(left | right)

    def _unite(self, roots: frozenset[int]) -> None:
        first, *others = sorted(roots)
        for root in others:
            self.parent[root] = first
            self._pin(first, self.reasons.get(root, set()))
        if not self.reasons.get(first, {""}):
            del self.reasons[first]

    def merged(self, axes: Sequence[Axis]) -> Axis:
        """The axis that several become when they are flattened into one, the last moving fastest.

        An axis that stays whole leaves no trace beside one that doesn't.
        """
        sizes = [len(axis) for axis in axes]
        columns = []
        for i, axis in enumerate(axes):
            shape = [1] * len(axes)
            shape[i] = len(axis)
            for column in axis.T:
                grid = np.broadcast_to(column.reshape(shape), sizes)
                columns.append(grid.reshape(-1))
        free = [c for c in columns if (c == FREE).all()]
        whole = [c for c in columns if self._stays(c)]
        moving = [c for c in columns if not self._stays(c) and (c != FREE).any()]
        chosen = moving or whole[:1] or free[:1]
        return np.stack(chosen, axis=1)

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes that one becomes when it is cut into a grid, the last moving fastest."""
        axis = self.resolved(axis)
        if (axis == FREE).all():
            return [self.free(n) for n in sizes]
        whole = "it shares an axis with one that stays whole"
        if all(self._stays(c) for c in axis.T):
            return [self.kept(n, next(iter(self.reasons[axis[0, 0]]), whole)) for n in sizes]
        parts: list[list[np.ndarray]] = [[] for _ in sizes]
        mixed = []
        for column in axis.T:
            grid = column.reshape(sizes)
            moving = [i for i in range(len(sizes)) if (grid != grid.take([0], axis=i)).any()]
            if len(moving) == 1:
                [i] = moving
                index = tuple(slice(None) if j == i else 0 for j in range(len(sizes)))
                parts[i].append(grid[index])
            elif moving:
                mixed.append((column, moving))
            else:
                self.pin(column[:, None], whole)
        for column, moving in mixed:
            factors = {i: self.new(sizes[i]) for i in moving if sizes[i] > 1}
            coordinates = np.stack(np.unravel_index(np.arange(len(column)), sizes), axis=1)
            for unit, at in zip(column, coordinates, strict=True):
                self._equate([unit], [factors[i][at[i], 0] for i in factors])
            for i, factor in factors.items():
                parts[i].append(factor[:, 0])
                self.factors[self.family[factor[0, 0]]] = list(factors.values())
        return [
            np.stack(part, axis=1) if part else self.kept(n, whole)
            for part, n in zip(parts, sizes, strict=True)
        ]

    def _stays(self, column: np.ndarray) -> bool:
        return all(int(u) in self.is_constant for u in np.unique(column))

    def resolved(self, axis: Axis) -> Axis:
        """The axis in representatives, with as many columns as it takes."""
        rows = {}
        for row in map(tuple, np.unique(axis, axis=0)):
            rows[row] = sorted(self.atoms(row)) or [FREE]
        width = max((len(atoms) for atoms in rows.values()), default=1)
        padded = {row: atoms + [atoms[-1]] * (width - len(atoms)) for row, atoms in rows.items()}
        return np.array([padded[tuple(row)] for row in axis], int).reshape(len(axis), width)


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a reshape become which: the shortest runs of axes with equal products.

    Axes of one entry belong to no run.

    Example:
      >>> blocks((2, 4, 4, 8), (2, 16, 2, 4))
      [([0], [0]), ([1, 2], [1]), ([3], [2, 3])]
    """
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := math.prod(before[i] for i in a)) != (y := math.prod(after[i] for i in b)):
            a, b = ([*a, left.pop(0)], b) if x < y else (a, [*b, right.pop(0)])
        found.append((a, b))
    return found


def _first_of_each(a: Axis, b: Axis) -> np.ndarray:
    return np.sort(np.unique(np.concatenate([a, b], axis=1), axis=0, return_index=True)[1])


def _widened(axis: Axis, width: int) -> Axis:
    return np.pad(axis, ((0, 0), (0, width - axis.shape[1])), mode="edge")
