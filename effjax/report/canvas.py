"""What figures share: a style for one column of a paper, and files in three formats.

matplotlib is imported when a figure is made.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effjax.errors import ReportError
from effjax.report.files import whole
from effjax.report.footer import flatten, footer
from effjax.report.labels import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008: distinct for every common kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
COLUMN_INCHES = 3.5  # one column of a two-column paper
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
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse matplotlib's default, type 3
    "svg.fonttype": "path",  # letters as outlines: a page looks alike where the font is missing
    "svg.hashsalt": "effjax",  # the same figure is the same file
}


FORMATS = ("png", "svg", "pdf")


def save(
    figure: "Figure",
    stem: str | Path,
    provenance: Mapping[str, Any] | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Writes `stem`.png (300 dpi), `stem`.svg and `stem`.pdf, and returns their paths in the order
    of `formats`.

    Fonts are embedded, the provenance is in the files' metadata, two calls write the same bytes,
    and a file is there whole or not at all.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    line = footer(provenance)
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Description": line},
        "svg": {"Description": line, "Date": None},
        "pdf": {"Subject": line, "CreationDate": None},
    }
    if unknown := [name for name in formats if name not in metadata]:
        raise ReportError(f"figures are written as {list(metadata)}, not as {unknown}.")
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    with style():
        for path, name in zip(paths, formats, strict=True):
            with whole(path) as temporary:
                figure.savefig(temporary, format=name, dpi=300, metadata=metadata[name])
    return paths


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "figures need matplotlib, which is not installed: pip install 'effjax[experiments]'."
        ) from error
    return matplotlib


def style() -> Any:
    """Within this, matplotlib draws and writes in the style above."""
    return _matplotlib().rc_context(STYLE)


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of its own, outside pyplot: no global state, no display, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def set_title(axes: "Axes", title: str) -> None:
    """The title, where there is one."""
    if title:
        axes.set_title(title)


def set_footer(figure: "Figure", provenance: Mapping[str, Any] | None) -> None:
    """The provenance, small, underneath."""
    if provenance and flatten(provenance):
        line = footer(provenance)
        characters = int(figure.get_size_inches()[0] * 30)
        wrapped = "\n".join(textwrap.wrap(line, characters))
        figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=4.5, color=GREY)


def legend_above(figure: "Figure", handles: Sequence[Any]) -> None:
    """A legend above the axes, in as many columns as the width has room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    figure.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=legend_columns(figure.get_size_inches()[0], len(handles), longest),
        frameon=False,
        fontsize=6,
        handlelength=1.6,
        columnspacing=1.2,
    )


def legend_columns(width: float, entries: int, longest: int) -> int:
    """How many columns of a legend fit a width in inches; `longest` counts letters."""
    return max(1, min(entries, int((72 * width - 4) / (3.5 * longest + 24))))


def freeze(figure: "Figure") -> Callable[[Any], Box]:
    """Lays the figure out for good, and returns what measures an artist in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return lambda artist: Box(*artist.get_window_extent(renderer).extents)
