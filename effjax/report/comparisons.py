"""Every method against a baseline: the difference, where it lies, and whether seeds explain it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from effjax.errors import ReportError
from effjax.report.grid import Grid
from effjax.report.statistics import Interval, holm, paired_bootstrap, welch
from effjax.report.tables import MISSING, Column


class Comparison(NamedTuple):
    """One method against the baseline, in one metric.

    difference: of the means, the method's minus the baseline's, scaled as the column is; over the
      seeds that both have, or all seeds where they share fewer than two.
    interval: the paired bootstrap's over the shared seeds; None for fewer than two.
    p, p_holm: Welch's test over all seeds, raw and by Holm's rule among all the methods compared;
      NaN where a side has one seed only, or where nothing varies.
    seeds: how many (the method's, the baseline's).
    """

    name: str
    difference: float
    interval: Interval | None
    p: float
    p_holm: float
    seeds: tuple[int, int]


def compare(
    rows: Iterable[Mapping[str, Any]],
    baseline: str,
    column: Column,
    *,
    by: str = "name",
    seed: str = "seed",
    level: float = 0.95,
) -> list[Comparison]:
    """Compares every method with the baseline, in the order in which they first appear.

    Args:
      rows: one a name and seed, as `summarise` takes them.
      baseline: the name to compare with.
      column: the metric.
      level: of the bootstrap intervals.

    Raises:
      ReportError: no row of the baseline has the metric.

    Example:
      >>> from effjax.report import Column, compare
      >>> rows = [{"name": n, "seed": s, "acc": a + s / 100}
      ...         for n, a in (("dense", 0.9), ("sparse", 0.8)) for s in range(3)]
      >>> [found] = compare(rows, "dense", Column("acc", "acc. (%)", scale=100))
      >>> round(found.difference, 6), round(found.interval.high, 6), f"{found.p:.4f}"
      (-10.0, -10.0, '0.0003')
    """
    groups: dict[str, dict[Any, float]] = {}
    for row in rows:
        if row.get(column.key) is not None:
            value = float(row[column.key]) * column.scale
            groups.setdefault(str(row[by]), {})[row.get(seed)] = value
    if baseline not in groups:
        raise ReportError(
            f"there is no baseline {baseline!r} with a {column.key!r}; there are {list(groups)}."
        )
    base = groups.pop(baseline)
    tested = [_p(list(own.values()), list(base.values())) for own in groups.values()]
    found = []
    for (name, own), p, adjusted in zip(groups.items(), tested, holm(tested), strict=True):
        shared = [s for s in own if s in base]
        a, b = [own[s] for s in shared], [base[s] for s in shared]
        interval = paired_bootstrap(a, b, level=level) if len(shared) > 1 else None
        means = sum(own.values()) / len(own), sum(base.values()) / len(base)
        difference = interval.difference if interval else means[0] - means[1]
        found.append(Comparison(name, difference, interval, p, adjusted, (len(own), len(base))))
    return found


def comparison_grid(found: Sequence[Comparison], baseline: str, column: Column) -> Grid:
    """Comparisons as a table."""

    def signed(value: float) -> str:
        return format(value, "+" + column.format)

    def p_value(value: float) -> str:
        if math.isnan(value):
            return MISSING
        return "<0.0001" if value < 1e-4 else f"{value:.4f}"

    rows = []
    for one in found:
        interval = one.interval
        where = f"[{signed(interval.low)}, {signed(interval.high)}]" if interval else MISSING
        pairs = f"{one.seeds[0]} / {one.seeds[1]}"
        p_values = (p_value(one.p), p_value(one.p_holm))
        rows.append([one.name, signed(one.difference), where, *p_values, pairs])
    levels = {one.interval.level for one in found if one.interval}
    level = f"{levels.pop():.0%}" if len(levels) == 1 else ""
    head = [f"{column.label}, minus {baseline}", "difference", f"{level} interval".strip()]
    caption = (
        "Differences of means over the seeds that both sides have. Interval: paired bootstrap "
        "(BCa) over them. p: Welch's t-test over all seeds, two-sided; Holm: corrected for all "
        f'rows of this table. "{MISSING}": too few seeds, or seeds that do not differ.'
    )
    return Grid([*head, "p (Welch)", "p (Holm)", "seeds"], rows, {}, caption)


def _p(a: Sequence[float], b: Sequence[float]) -> float:
    return welch(a, b).p if min(len(a), len(b)) > 1 else math.nan
