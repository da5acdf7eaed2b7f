"""The Pareto front: what no other point beats in every respect."""

from collections.abc import Sequence

import numpy as np

from effjax.errors import ReportError


def pareto_front(points: Sequence[Sequence[float]], larger: Sequence[bool]) -> list[int]:
    """Indices of the points that no other point dominates, in the order given.

    A point dominates another if it is nowhere worse and somewhere better. Equal points do not
    dominate each other, so all of them stay. O(n²) comparisons, any number of criteria.

    Args:
      points: [n, criteria].
      larger: for each criterion, whether more of it is better.

    Raises:
      ReportError: shapes that do not fit, or values that are not finite.

    Example:
      >>> from effjax.report import pareto_front
      >>> bytes_and_accuracy = [(10, 0.5), (20, 0.9), (30, 0.8)]
      >>> pareto_front(bytes_and_accuracy, larger=(False, True))
      [0, 1]
    """
    values = np.asarray(points, np.float64)
    if values.size == 0:
        return []
    if values.ndim != 2 or values.shape[1] != len(larger):
        raise ReportError(
            f"the points have shape {values.shape} and `larger` has {len(larger)} entries; give "
            "[n, criteria] points and one entry a criterion."
        )
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
        raise ReportError(f"the points {bad} are not finite, so they have no place in an order.")
    cost = np.where(np.asarray(larger), -values, values)
    front = []
    for i, own in enumerate(cost):
        dominated = ((cost <= own).all(axis=1) & (cost < own).any(axis=1)).any()
        if not dominated:
            front.append(i)
    return front
