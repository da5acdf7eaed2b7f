"""Labels keep clear of points and of each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.report.labels import Box, place, spread

BOUNDS = Box(0, 0, 800, 600)
ANCHORS = st.lists(st.tuples(st.integers(60, 740), st.integers(60, 540)), min_size=1, max_size=8)


@settings(max_examples=20, deadline=None)
@given(ANCHORS)
def test_labels_overlap_neither_each_other_nor_the_points(anchors):
    sizes = [(60 + 10 * (i % 4), 16) for i in range(len(anchors))]
    points = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    boxes = place(anchors, sizes, BOUNDS, obstacles=points, gap=6)
    assert [b.right - b.left for b in boxes] == pytest.approx([w for w, _ in sizes])
    for a, b in itertools.combinations(boxes, 2):
        assert a.overlap(b) == 0
    for box in boxes:
        assert box.outside(BOUNDS) == pytest.approx(0)
        assert sum(box.overlap(point) for point in points) == 0


def test_a_lone_label_stands_at_the_right():
    [box] = place([(100, 100)], [(40, 10)], BOUNDS, gap=6)
    assert box == Box(106, 95, 146, 105)


def test_overlap_and_outside_by_hand():
    assert Box(0, 0, 4, 4).overlap(Box(2, 3, 9, 9)) == 2
    assert Box(0, 0, 4, 4).overlap(Box(5, 0, 6, 4)) == 0
    assert Box(-1, 0, 1, 2).outside(Box(0, 0, 9, 9)) == 2


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10), st.floats(0.1, 5))
def test_spread_keeps_order_and_distance(positions, distance):
    moved = spread(positions, distance)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(np.asarray(moved)[order]) >= distance - 1e-6).all()
    if (np.diff(np.sort(positions)) >= distance).all():
        np.testing.assert_allclose(moved, positions, atol=1e-9)


def test_spread_moves_as_little_as_possible_and_stays_within():
    assert spread([0, 0, 10], 2) == [-1, 1, 10]
    assert spread([0, 0, 10], 2, low=0) == [0, 2, 10]
    assert spread([9, 9, 10], 2, high=10) == [6, 8, 10]
