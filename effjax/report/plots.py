"""Figures of a paper, as PNG and SVG: the Pareto plot, with error bars and labels that stay clear
of each other, and training curves. matplotlib is imported when a figure is made."""

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.errors import ReportError
from effjax.report.footer import flatten, footer
from effjax.report.labels import Box, place, spread
from effjax.report.pareto import pareto_front
from effjax.report.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008: distinct for every common kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
COLUMN_INCHES = 3.5  # one column of a two-column paper
LOG_FROM = 10.0  # a positive axis that spans more than this factor is logarithmic
INK, GREY, PALE = "#222222", "#8a8a8a", "#e8e8e8"
STYLE = {
    "font.size": 7.5,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "svg.hashsalt": "effjax",  # the same figure is the same file
}


def pareto_plot(
    table: Table,
    x: str,
    y: str,
    *,
    highlight: str | None = None,
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
    with _style():
        figure, axes = _figure(width, 0.74 * width + 0.3)
        _axis(axes, "x", [a for a, _ in points], across)
        _axis(axes, "y", [b for _, b in points], up)
        outline = _staircase(axes, [(points[i][0].mean, points[i][1].mean) for i in front], larger)
        for i, (name, (a, b)) in enumerate(zip(names, points, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            stressed = name == highlight
            axes.errorbar(
                a.mean,
                b.mean,
                xerr=a.std or None,
                yerr=b.std or None,
                fmt=MARKERS[i % len(MARKERS)],
                color=colour,
                markerfacecolor=colour if i in front else "white",
                markeredgewidth=1.1,
                # Points that coincide are nested, so that none is hidden.
                markersize=(8 if stressed else 5.5) - 1.7 * _covered(axes, points, i),
                elinewidth=0.8,
                capsize=1.8,
                zorder=4 if stressed else 3,
            )
        _title(axes, title)
        _corner(axes, larger)
        _footer(figure, provenance)
        _label_points(figure, axes, names, points, highlight, outline)
    return figure


def curves_plot(
    series: Mapping[str, tuple[Sequence[float], Any]],
    x: str,
    y: str,
    *,
    title: str = "",
    scale: float = 1.0,
    bottom: float | None = None,
    width: float = COLUMN_INCHES,
    provenance: Mapping[str, Any] | None = None,
) -> "Figure":
    """Training curves: the mean over seeds as a line and one standard deviation as a band.

    Args:
      series: {name: (steps [n], values [n] or [seeds, n])}; each line is named at its right end.
      x: label across.
      y: label up.
      scale: multiplies the values.
      bottom: where the axis begins; by default it holds every value.

    Raises:
      ReportError: no series, or shapes that do not fit.
    """
    if not series:
        raise ReportError("there are no curves to draw.")
    with _style():
        figure, axes = _figure(width, 0.74 * width + 0.3)
        ends = []
        for i, (name, (steps, values)) in enumerate(series.items()):
            runs = np.atleast_2d(np.asarray(values, np.float64)) * scale
            if runs.shape[1] != len(steps) or not len(steps):
                raise ReportError(
                    f"the curve {name!r} has values of shape {runs.shape} for {len(steps)} steps; "
                    "give [seeds, steps]."
                )
            colour, mean = COLOURS[i % len(COLOURS)], runs.mean(axis=0)
            # Lines that lie on each other are told apart by their dashes as well.
            style = "-" if i < len(COLOURS) else "--"
            axes.plot(steps, mean, color=colour, linewidth=1.2, linestyle=style, zorder=3)
            if len(runs) > 1:
                std = runs.std(axis=0, ddof=1)
                low, high = mean - std, mean + std
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            ends.append((name, colour, float(steps[-1]), float(mean[-1])))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=bottom)
        _title(axes, title)
        _footer(figure, provenance)
        _label_ends(figure, axes, ends)
    return figure


def save(figure: "Figure", stem: str | Path, provenance: Mapping[str, Any] | None = None) -> list:
    """Writes `stem`.png (300 dpi) and `stem`.svg, with the provenance in their metadata, and
    returns both paths. Two calls write the same bytes."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    described = {"Description": footer(provenance)}
    with _style():
        figure.savefig(paths[0], dpi=300, metadata=described)
        figure.savefig(paths[1], metadata={**described, "Date": None})
    return paths


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "figures need matplotlib, which is not installed: pip install 'effjax[experiments]'."
        ) from error
    return matplotlib


def _style() -> Any:
    return _matplotlib().rc_context(STYLE)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of its own, outside pyplot: no global state, no display, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


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


def _covered(axes: "Axes", points: Sequence[tuple[Cell, Cell]], index: int) -> int:
    """How many earlier points lie under a point, up to two."""
    where = axes.transData.transform([(a.mean, b.mean) for a, b in points])
    near = np.hypot(*(where[:index] - where[index]).T) < 0.02 * axes.bbox.width
    return min(2, int(near.sum()))


def _title(axes: "Axes", title: str) -> None:
    if title:
        axes.set_title(title)


def _corner(axes: "Axes", larger: tuple[bool, bool]) -> None:
    """Says which corner is the better one."""
    x, y = (0.985 if larger[0] else 0.015), (0.98 if larger[1] else 0.02)
    arrow = {(0, 1): "↖", (1, 1): "↗", (0, 0): "↙", (1, 0): "↘"}[larger]
    text = f"better {arrow}" if larger[0] else f"{arrow} better"
    found = axes.text(x, y, text, transform=axes.transAxes, color=GREY, fontsize=6.5)
    found.set(ha="right" if larger[0] else "left", va="top" if larger[1] else "bottom")


def _footer(figure: "Figure", provenance: Mapping[str, Any] | None) -> None:
    if provenance and flatten(provenance):
        line = footer(provenance)
        characters = int(figure.get_size_inches()[0] * 38)
        wrapped = "\n".join(textwrap.wrap(line, characters))
        figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=4.5, color=GREY)


def _freeze(figure: "Figure") -> Callable[[Any], Box]:
    """Lays the figure out for good, and returns what measures an artist in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return lambda artist: Box(*artist.get_window_extent(renderer).extents)


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
    measure = _freeze(figure)
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


def _label_ends(
    figure: "Figure", axes: "Axes", ends: Sequence[tuple[str, str, float, float]]
) -> None:
    """Names the lines at their right ends, apart from each other, each tied to its line."""
    # As texts of the axes from the start, so that the layout leaves them room at the right.
    indent, middle = "   ", sum(axes.get_ylim()) / 2
    texts = [
        axes.text(x, middle, indent + name, color=INK, fontsize=6.5, va="center", clip_on=False)
        for name, _, x, _ in ends
    ]
    measure = _freeze(figure)
    height = max(box.top - box.bottom for box in map(measure, texts))
    bounds = axes.get_window_extent()
    pixels = [axes.transData.transform((x, y)) for _, _, x, y in ends]
    limits = (bounds.y0 + height / 2, bounds.y1 - height / 2)
    centres = spread([float(y) for _, y in pixels], height, *limits)
    back = axes.transData.inverted()
    right = max(x for x, _ in pixels)
    for text, (_, colour, _, _), (x, y), centre in zip(texts, ends, pixels, centres, strict=True):
        text.set_position(tuple(back.transform((right, centre))))
        elbow = back.transform([(x, y), (right + 4, centre), (right + 8, centre)])
        axes.plot(*elbow.T, color=colour, linewidth=0.9, clip_on=False, zorder=2)
