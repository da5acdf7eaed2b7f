"""Training curves: the mean over seeds, and how far the seeds lie from it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.errors import ReportError
from effjax.report.canvas import (
    COLOURS,
    COLUMN_INCHES,
    INK,
    freeze,
    legend_above,
    legend_columns,
    new_figure,
    set_footer,
    set_title,
    style,
)
from effjax.report.labels import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONG = 22  # letters of a name beside a figure that is a column wide


def curves_plot(
    series: Mapping[str, tuple[Sequence[float], Any]],
    x: str,
    y: str,
    *,
    title: str = "",
    scale: float = 1.0,
    bottom: float | None = None,
    top: float | None = None,
    width: float = COLUMN_INCHES,
    provenance: Mapping[str, Any] | None = None,
) -> "Figure":
    """Training curves: the mean over seeds as a line and one standard deviation as a band.

    Args:
      series: {name: (steps [n], values [n] or [seeds, n])}; each line is named at its right end,
        or in a legend above where names are long.
      x: label across.
      y: label up.
      scale: multiplies the values.
      bottom, top: where the axis begins and ends; by default it holds every value.

    Raises:
      ReportError: no series, or shapes that do not fit.
    """
    if not series:
        raise ReportError("there are no curves to draw.")
    with style():
        longest = max(map(len, series))
        beside = longest <= LONG * width / COLUMN_INCHES
        rows = 0 if beside else -(-len(series) // legend_columns(width, len(series), longest))
        figure, axes = new_figure(width, 0.74 * width + 0.3 + 0.14 * rows)
        ends, lines = [], []
        for i, (name, (steps, values)) in enumerate(series.items()):
            runs = np.atleast_2d(np.asarray(values, np.float64)) * scale
            if runs.shape[1] != len(steps) or not len(steps):
                raise ReportError(
                    f"the curve {name!r} has values of shape {runs.shape} for {len(steps)} steps; "
                    "give [seeds, steps]."
                )
            colour, mean = COLOURS[i % len(COLOURS)], runs.mean(axis=0)
            # Lines that lie on each other are told apart by their dashes as well.
            dashes = "-" if i < len(COLOURS) else "--"
            look: dict[str, Any] = {"color": colour, "linewidth": 1.2, "linestyle": dashes}
            lines += axes.plot(steps, mean, label=name, zorder=3, **look)
            if len(runs) > 1:
                std = runs.std(axis=0, ddof=1)
                low, high = mean - std, mean + std
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            ends.append((name, colour, float(steps[-1]), float(mean[-1])))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom, top)
        set_title(axes, title)
        set_footer(figure, provenance)
        if beside:
            _label_ends(figure, axes, ends)
        else:
            legend_above(figure, lines)
    return figure


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
    measure = freeze(figure)
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
