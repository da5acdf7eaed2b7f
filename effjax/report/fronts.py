"""How much each family of methods reaches of what lies between quality and cost: hypervolumes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.errors import ReportError
from effjax.report.grid import Grid
from effjax.report.pareto import pareto_front
from effjax.report.statistics import hypervolume, worst_corner
from effjax.report.tables import Cell, Column

LOG_FROM = 10.0  # what is positive and spans more than this factor is taken logarithmically
TOGETHER = "all together"


class Front(NamedTuple):
    """One series among the others.

    points: how many names it has.
    on_front: how many of them are on the front of all.
    volume: its hypervolume in per cent of the box that holds all points; over seeds.
    lost: how much the hypervolume of all would lose without it, from the means.
    """

    name: str
    points: int
    on_front: int
    volume: Cell
    lost: float


def fronts(
    rows: Sequence[Mapping[str, Any]], cost: Column, quality: Column, *, by: str = "series"
) -> list[Front]:
    """The hypervolume of each series and, last, of all together.

    The box reaches from the best value of each axis to `worst_corner`, both over all seeds. A cost
    that is positive and spans more than a factor of ten is taken as its logarithm, as the figure
    draws it. A seed's front is of that seed's points; where a series' names have no seed in common,
    the volume is that of their means, and n is 0.

    Args:
      rows: one a name and seed, with the entries "name", "seed" and `by`.
      cost, quality: with `best` given.

    Raises:
      ReportError: no row has both, or a column says no better end.

    Example:
      >>> from effjax.report import Column, fronts
      >>> rows = [{"name": n, "seed": 0, "series": n, "kb": k, "acc": a}
      ...         for n, k, a in (("dense", 4, 0.9), ("sparse", 2, 0.8), ("worse", 4, 0.7))]
      >>> found = fronts(rows, Column("kb", "KB", best="min"), Column("acc", "acc.", best="max"))
      >>> [(one.name, round(one.volume.mean), one.on_front) for one in found]
      [('dense', 9, 1), ('sparse', 55, 1), ('worse', 1, 0), ('all together', 59, 2)]
    """
    if not (cost.best and quality.best):
        raise ReportError("a hypervolume needs to know which end of cost and quality is better.")
    larger = (cost.best == "max", quality.best == "max")
    values: dict[tuple[str, Any], tuple[float, float]] = {}
    series: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get(cost.key) is not None and row.get(quality.key) is not None:
            name = str(row["name"])
            values[name, row.get("seed")] = (float(row[cost.key]), float(row[quality.key]))
            series.setdefault(str(row.get(by, name)), {})[name] = None
    if not values:
        raise ReportError(f"no row has both {cost.key!r} and {quality.key!r}.")
    means = _means(values)
    transform = _unit(list(values.values()), [means[name] for name in means], larger)
    scaled = {key: transform(point) for key, point in values.items()}
    middle = {name: transform(point) for name, point in means.items()}
    everything = list(middle)
    best = {everything[i] for i in pareto_front(list(middle.values()), (False, False))}
    whole = _volume([middle[n] for n in everything])
    found = []
    for label, names in series.items():
        rest = [middle[n] for n in everything if n not in names]
        lost = 100 * (whole - _volume(rest))
        volume = _over_seeds(list(names), scaled, middle)
        found.append(Front(label, len(names), len(best & set(names)), volume, lost))
    volume = _over_seeds(everything, scaled, middle)
    return [*found, Front(TOGETHER, len(everything), len(best), volume, 100 * whole)]


def fronts_grid(found: Sequence[Front], cost: Column, quality: Column) -> Grid:
    """Fronts as a table."""
    rows = []
    for one in found:
        volume = f"{one.volume.mean:.1f}" + (f" ± {one.volume.std:.1f}" if one.volume.n > 1 else "")
        lost = "-" if one.name == TOGETHER else f"{one.lost:.1f}"
        rows.append([one.name, str(one.points), str(one.on_front), volume, lost])
    caption = (
        f"{quality.label} against {cost.label}. Hypervolume: the share of the box between the best "
        "and the worst values of all runs, widened by a tenth, that lies within reach, mean ± "
        "standard deviation over seeds; logarithmic in a cost that spans more than a factor of "
        "ten. Lost: what all together would lose without it."
    )
    head = ["series", "points", "on the front", "hypervolume (%)", "lost without it"]
    return Grid(head, rows, {}, caption)


def _means(values: Mapping[tuple[str, Any], tuple[float, float]]) -> dict[str, Any]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for (name, _), point in values.items():
        groups.setdefault(name, []).append(point)
    return {name: tuple(np.mean(points, axis=0).tolist()) for name, points in groups.items()}


def _unit(points: list[Any], means: list[Any], larger: tuple[bool, bool]) -> Any:
    """From a point to costs in the unit box, where (1, 1) is the reference and (0, 0) the best."""
    every = np.asarray([*points, *means], np.float64)
    if not np.isfinite(every).all():
        raise ReportError("some of the values are not finite, so they have no place in a box.")
    low, high = every.min(axis=0), every.max(axis=0)
    log = (low > 0) & (high > LOG_FROM * low)

    def moved(point: Any) -> np.ndarray:
        plain = np.asarray(point, np.float64)
        return np.where(log, np.log(np.where(log, plain, 1.0)), plain)

    placed = [tuple(moved(p).tolist()) for p in every]
    worst = np.asarray(worst_corner(placed, larger))
    best = np.where(larger, np.max(placed, axis=0), np.min(placed, axis=0))
    span = np.where(worst == best, 1.0, worst - best)
    return lambda point: tuple(((moved(point) - best) / span).tolist())


def _volume(points: Sequence[Any]) -> float:
    return hypervolume(points, (1.0, 1.0), (False, False))


def _over_seeds(
    names: Sequence[str], scaled: Mapping[tuple[str, Any], Any], middle: Mapping[str, Any]
) -> Cell:
    seeds = [{s for n, s in scaled if n == name} for name in names]
    shared = sorted(set.intersection(*seeds), key=str)
    if not shared:
        return Cell(100 * _volume([middle[n] for n in names]), 0.0, 0)
    found = [100 * _volume([scaled[n, seed] for n in names]) for seed in shared]
    std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    return Cell(float(np.mean(found)), std, len(found))
