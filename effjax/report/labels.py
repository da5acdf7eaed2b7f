"""Where labels go so that they cover neither points nor each other. Boxes in any one unit."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A rectangle: left, bottom, right, top."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, bounds: "Box") -> float:
        """The area of this box that lies outside the bounds."""
        area = (self.right - self.left) * (self.top - self.bottom)
        return area - self.overlap(bounds)


ANGLES = np.deg2rad(np.arange(0, 360, 15))
RINGS = (1.0, 1.6, 2.4, 3.4, 4.8, 6.5, 9.0)
SWEEPS = 8


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    *,
    obstacles: Sequence[Box] = (),
    soft: Sequence[Box] = (),
    gap: float = 4.0,
) -> list[Box]:
    """A box for each label near its anchor.

    Each label tries places around its anchor in rings of growing distance and takes the one that
    overlaps least, the near ones first; then all are placed anew, given the others, until none
    moves. Deterministic.

    Args:
      anchors: (x, y) of what is labelled.
      sizes: (width, height) of each label.
      bounds: where labels may be.
      obstacles: what they must not cover: markers, error bars.
      soft: what they should rather not cover: lines.
      gap: distance of the nearest ring.
    """
    taken: list[Box | None] = [None] * len(anchors)
    for _ in range(SWEEPS):
        before = list(taken)
        for i in range(len(anchors)):
            others = [box for j, box in enumerate(taken) if j != i and box is not None]
            taken[i] = min(
                _candidates(anchors[i], sizes[i], gap),
                key=lambda found: (
                    1e3 * sum(found[0].overlap(other) for other in (*others, *obstacles))
                    + 1e3 * found[0].outside(bounds)
                    + 10 * sum(found[0].overlap(other) for other in soft)
                    + found[1]
                ),
            )[0]
        if taken == before:
            break
    return [box for box in taken if box is not None]


def _candidates(
    anchor: tuple[float, float], size: tuple[float, float], gap: float
) -> list[tuple[Box, float]]:
    """(box, cost of its place) around an anchor: near before far, beside before above."""
    (x, y), (width, height) = anchor, size
    found = []
    for ring in RINGS:
        for angle in ANGLES:
            dx, dy = float(np.cos(angle)), float(np.sin(angle))
            # The box's nearest point lies on the ring: its centre is pushed out by its half size.
            cx = x + dx * (gap * ring + width / 2)
            cy = y + dy * (gap * ring + height / 2)
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            # A label at the right reads best; the corners last.
            found.append((box, gap * (10 * (ring - 1) + 2 * abs(dx * dy) + 0.5 * (1 - dx))))
    return found


def spread(
    positions: Sequence[float], distance: float, low: float = -np.inf, high: float = np.inf
) -> list[float]:
    """Positions moved as little as keeps them `distance` apart, in the same order (least squares),
    and within [low, high] where there is room for all.

    Subtracting i · distance from the i-th turns this into isotonic regression: neighbours that are
    too close are pooled around their mean.

    Example:
      >>> from effjax.report.labels import spread
      >>> spread([0.0, 0.0, 10.0], 2.0)
      [-1.0, 1.0, 10.0]
    """
    order = np.argsort(positions, kind="stable")
    pools: list[tuple[float, int]] = []  # (mean, count)
    for rank, index in enumerate(order):
        mean, count = positions[index] - rank * distance, 1
        while pools and pools[-1][0] > mean:
            last, n = pools.pop()
            mean, count = (mean * count + last * n) / (count + n), count + n
        pools.append((mean, count))
    level = [mean for mean, count in pools for _ in range(count)]
    # Clipping the isotonic fit gives the bounded one. The last label ends at `high`.
    last = high - (len(positions) - 1) * distance
    moved = [0.0] * len(positions)
    for rank, index in enumerate(order):
        moved[index] = float(max(min(level[rank], last), low) + rank * distance)
    return moved
