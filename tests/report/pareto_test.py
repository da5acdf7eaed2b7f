"""The Pareto front against its definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effjax.errors import ReportError
from effjax.report import pareto_front

# Small integers, so that ties and equal points happen.
POINTS = st.integers(1, 4).flatmap(
    lambda d: st.tuples(
        st.lists(st.tuples(*[st.integers(0, 4)] * d), max_size=20),
        st.tuples(*[st.booleans()] * d),
    )
)


def dominates(a, b, larger):
    better = [(x > y) if up else (x < y) for x, y, up in zip(a, b, larger, strict=True)]
    worse = [(x < y) if up else (x > y) for x, y, up in zip(a, b, larger, strict=True)]
    return any(better) and not any(worse)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(case):
    points, larger = case
    expected = [i for i, b in enumerate(points) if not any(dominates(a, b, larger) for a in points)]
    assert pareto_front(points, larger) == expected


def test_by_hand():
    size_and_accuracy = [(3, 0.9), (1, 0.5), (2, 0.4), (3, 0.8), (1, 0.5), (9, 0.95)]
    assert pareto_front(size_and_accuracy, (False, True)) == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("points", "says"), [([(1, 2, 3)], "one entry a criterion"), ([(1.0, float("nan"))], r"\[0\]")]
)
def test_points_without_an_order_are_refused(points, says):
    with pytest.raises(ReportError, match=says):
        pareto_front(points, (False, True))
