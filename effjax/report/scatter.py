"""Quality against cost: every method a labelled point with error bars, and the Pareto front."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.errors import ReportError
from effjax.report.canvas import (
    COLOURS,
    COLUMN_INCHES,
    GREY,
    INK,
    MARKERS,
    freeze,
    legend_above,
    legend_columns,
    new_figure,
    set_footer,
    set_title,
    style,
)
from effjax.report.fronts import LOG_FROM
from effjax.report.labels import Box, place
from effjax.report.pareto import pareto_front
from effjax.report.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto_plot(
    table: Table,
    x: str,
    y: str,
    *,
    highlight: str | None = None,
    series: Mapping[str, str] | None = None,
    title: str = "",
    width: float = COLUMN_INCHES,
    provenance: Mapping[str, Any] | None = None,
) -> "Figure":
    """Every name of a table as a labelled point, with the Pareto front of the means.

    Error bars are one standard deviation over seeds. An axis is logarithmic where its values are
    positive and span more than a factor of ten. Points on the front are filled, the others hollow.

    Args:
      table: from `summarise`; its columns say which end is better ("max" or "min", both needed).
      x: key of the column across, usually a cost.
      y: key of the column up, usually the accuracy.
      highlight: a name to stress.
      series: {name: series}: the points of one series have one colour and marker and are joined by
        a line, and a legend above names the series in place of labels at the points.
      width: in inches; by default one column of a paper.
      provenance: printed small underneath.

    Raises:
      ReportError: an unknown column or name, or a column without a better end.
    """
    across, up = _column(table, x), _column(table, y)
    cells = table.cells
    names = [n for n in table.names if (n, x) in cells and (n, y) in cells]
    if highlight is not None and highlight not in names:
        raise ReportError(f"nothing named {highlight!r} to highlight; the points are {names}.")
    points = [(cells[n, x], cells[n, y]) for n in names]
    larger = (across.best == "max", up.best == "max")
    front = pareto_front([(a.mean, b.mean) for a, b in points], larger)
    with style():
        kinds = list(dict.fromkeys((series or {}).get(name, name) for name in names))
        rows = -(-len(kinds) // legend_columns(width, len(kinds), max(map(len, kinds))))
        figure, axes = new_figure(width, 0.74 * width + 0.3 + (0.14 * rows if series else 0))
        _axis(axes, "x", [a for a, _ in points], across)
        _axis(axes, "y", [b for _, b in points], up)
        outline = _staircase(axes, [(points[i][0].mean, points[i][1].mean) for i in front], larger)
        for i, (name, (a, b)) in enumerate(zip(names, points, strict=True)):
            kind = kinds.index((series or {}).get(name, name))
            colour = COLOURS[kind % len(COLOURS)]
            stressed = name == highlight
            axes.errorbar(
                a.mean,
                b.mean,
                xerr=a.std or None,
                yerr=b.std or None,
                fmt=MARKERS[kind % len(MARKERS)],
                color=colour,
                markerfacecolor=colour if i in front else "white",
                markeredgewidth=0.8 if series else 1.1,
                # Points that coincide are nested, so that none is hidden.
                markersize=(8 if stressed else 3.8 if series else 5.5)
                - (0 if series else 1.7) * _covered(axes, points, i),
                elinewidth=0.8,
                capsize=1.8,
                zorder=4 if stressed else 3,
            )
        set_title(axes, title)
        _corner(axes, larger)
        set_footer(figure, provenance)
        if series:
            _join(figure, axes, kinds, [series.get(name, name) for name in names], points)
        else:
            _label_points(figure, axes, names, points, highlight, outline)
    return figure


def _column(table: Table, key: str) -> Column:
    found = next((c for c in table.columns if c.key == key), None)
    if found is None:
        known = [c.key for c in table.columns]
        raise ReportError(f"the table has no column {key!r} to plot; it has {known}.")
    if found.best is None:
        raise ReportError(
            f"which end of {key!r} is better? A Pareto front needs to know: "
            "Column(..., best='min') or 'max'."
        )
    return found


def _axis(axes: "Axes", which: str, cells: Sequence[Cell], column: Column) -> None:
    """Label, limits with room for the labels of points, and a log scale where apt."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low = min(c.mean - c.std for c in cells)
    high = max(c.mean + c.std for c in cells)
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}label")(column.label)
    positive = low > 0
    if positive and high / low > LOG_FROM:
        room = (high / low) ** 0.18
        getattr(axes, f"set_{which}scale")("log")
        getattr(axes, f"set_{which}lim")(low / room, high * room)
        narrow = high / low < 300
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        room = 0.18 * ((high - low) or abs(high) or 1.0)
        getattr(axes, f"set_{which}lim")(low - room, high + room)
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _staircase(
    axes: "Axes", front: list[tuple[float, float]], larger: tuple[bool, bool]
) -> np.ndarray:
    """Draws the border of what the front dominates, to the edges of the axes: [corners, 2]."""
    steps = sorted(front)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    worst = bottom if larger[1] else top
    # Each point dominates what is to its worse side across, so the stairs turn at the points.
    if larger[0]:
        xs, ys = [left, *(x for x, _ in steps)], [y for _, y in steps]
        corners = [(xs[i + j], ys[i]) for i in range(len(ys)) for j in (0, 1)]
        corners.append((xs[-1], worst))
    else:
        xs, ys = [*(x for x, _ in steps), right], [y for _, y in steps]
        corners = [(xs[0], worst)]
        corners += [(xs[i + j], ys[i]) for i in range(len(ys)) for j in (0, 1)]
    outline = np.asarray(corners)
    axes.plot(outline[:, 0], outline[:, 1], color=GREY, linewidth=0.8, dashes=(4, 2), zorder=2)
    base = np.full(len(outline), worst)
    axes.fill_between(outline[:, 0], outline[:, 1], base, color="#f6f6f6", linewidth=0, zorder=0)
    return outline


def _join(
    figure: "Figure",
    axes: "Axes",
    kinds: Sequence[str],
    owners: Sequence[str],
    points: Sequence[tuple[Cell, Cell]],
) -> None:
    """Joins the points of each series in the order of their cost, and names the series above."""
    from matplotlib.lines import Line2D

    handles: list[Line2D] = []
    for i, kind in enumerate(kinds):
        mine = sorted(
            (a.mean, b.mean) for (a, b), owner in zip(points, owners, strict=True) if owner == kind
        )
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(*zip(*mine, strict=True), color=colour, linewidth=0.8, alpha=0.7, zorder=2.5)
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.8}
        handles.append(Line2D([], [], color=colour, linewidth=0.8, label=kind, **look))
    legend_above(figure, handles)


def _covered(axes: "Axes", points: Sequence[tuple[Cell, Cell]], index: int) -> int:
    """How many earlier points lie under a point, up to two."""
    where = axes.transData.transform([(a.mean, b.mean) for a, b in points])
    near = np.hypot(*(where[:index] - where[index]).T) < 0.02 * axes.bbox.width
    return min(2, int(near.sum()))


def _corner(axes: "Axes", larger: tuple[bool, bool]) -> None:
    """Says which corner is the better one."""
    x, y = (0.985 if larger[0] else 0.015), (0.98 if larger[1] else 0.02)
    arrow = {(0, 1): "↖", (1, 1): "↗", (0, 0): "↙", (1, 0): "↘"}[larger]
    text = f"better {arrow}" if larger[0] else f"{arrow} better"
    found = axes.text(x, y, text, transform=axes.transAxes, color=GREY, fontsize=6.5)
    found.set(ha="right" if larger[0] else "left", va="top" if larger[1] else "bottom")


def _label_points(
    figure: "Figure",
    axes: "Axes",
    names: Sequence[str],
    points: Sequence[tuple[Cell, Cell]],
    highlight: str | None,
    outline: np.ndarray,
) -> None:
    weights = ["bold" if name == highlight else "normal" for name in names]
    texts = [
        axes.text(a.mean, b.mean, name, color=INK, fontweight=weight, fontsize=7, zorder=5)
        for name, weight, (a, b) in zip(names, weights, points, strict=True)
    ]
    measure = freeze(figure)
    to_pixels, from_pixels = axes.transData, axes.transData.inverted()
    anchors, obstacles = [], [measure(t) for t in axes.texts if t not in texts]
    for a, b in points:
        x, y = to_pixels.transform((a.mean, b.mean))
        anchors.append((float(x), float(y)))
        marker = 5.0
        obstacles.append(Box(x - marker, y - marker, x + marker, y + marker))
        low = to_pixels.transform((a.mean - a.std if a.mean > a.std else a.mean, b.mean - b.std))
        high = to_pixels.transform((a.mean + a.std, b.mean + b.std))
        obstacles.append(Box(x - 2, low[1], x + 2, high[1]))
        obstacles.append(Box(low[0], y - 2, high[0], y + 2))
    sizes = [(box.right - box.left, box.top - box.bottom) for box in map(measure, texts)]
    bounds = Box(*axes.get_window_extent().extents)
    corners = to_pixels.transform(outline)
    lines = [
        Box(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1)
        for (x0, y0), (x1, y1) in itertools.pairwise(corners)
    ]
    boxes = place(anchors, sizes, bounds, obstacles=obstacles, soft=lines, gap=6.0)
    for text, box, (x, y) in zip(texts, boxes, anchors, strict=True):
        centre = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
        text.set_position(tuple(from_pixels.transform(centre)))
        text.set(ha="center", va="center")
        nearest = np.clip((x, y), (box.left, box.bottom), (box.right, box.top))
        if np.hypot(*(nearest - (x, y))) > 12:
            (x0, y0), (x1, y1) = from_pixels.transform(nearest), from_pixels.transform((x, y))
            axes.plot([x0, x1], [y0, y1], color=GREY, linewidth=0.5, zorder=2.5)
