"""The practitioner's guide's published numbers, and its table, figure and findings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.report import Column, Table, summarise
from effjax.report.canvas import COLOURS, GREY, MARKERS, new_figure, set_footer, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, AUGMENTED, DISTILLED = "plain", "augmented", "distilled"
PRUNED, QAT, ALL = "pruned", "QAT", "all in one step"
PAPER = (PLAIN, AUGMENTED, DISTILLED)
KINDS = (*PAPER, PRUNED, QAT, ALL)
SPARSE = (PRUNED, ALL)
KB = 1000  # the paper's kilobytes

# Width: parameters, float32 KB, int8 KB, then the accuracies (%) in float32 and int8 of the three
# arms. Table 6 of the survey; a parameter here includes BatchNorm's moving statistics.
PUBLISHED: dict[float, tuple[Any, ...]] = {
    0.05: (14_713, 65.45, 26.87, (70.17, 69.90), (71.71, 71.72), (72.89, 72.70)),
    0.1: (26_044, 109.61, 38.55, (75.93, 75.98), (78.22, 78.19), (78.93, 78.55)),
    0.25: (98_570, 392.49, 111.00, (80.60, 80.76), (84.14, 83.98), (84.51, 84.18)),
    0.5: (350_058, 1374.11, 359.31, (83.04, 83.00), (87.47, 87.32), (88.03, 87.86)),
    0.75: (764_874, 2993.71, 767.09, (83.79, 83.60), (89.06, 88.57), (89.51, 89.29)),
    1.0: (1_343_018, 5251.34, 1334.41, (84.42, 84.52), (89.41, 89.28), (89.92, 89.91)),
    1.4: (2_606_654, 10186.21, 2572.82, (85.82, 85.64), (90.86, 90.82)),
}


COLUMNS = (
    Column("float_bytes", "float32 KB", ".1f", "min", 1 / KB),
    Column("float", "accuracy (%)", ".1f", "max", 100),
    Column("int8_bytes", "int8 KB", ".1f", "min", 1 / KB),
    Column("int8", "int8 accuracy (%)", ".1f", "max", 100),
    Column("effective_macs", "effective MMACs", ".1f", "min", 1e-6),
)
PUBLISHED_COLUMNS = (
    Column("published_float_kb", "(published)", ".1f"),
    Column("published_float", "(published)", ".2f"),
    Column("published_int8_kb", "(published)", ".1f"),
    Column("published_int8", "(published)", ".2f"),
)


def published() -> dict[str, dict[str, float]]:
    """{"kind, width": {"float", "int8" (%), "float_kb", "int8_kb"}}, as the survey gives them."""
    found = {}
    for width, (_, float_kb, int8_kb, *arms) in PUBLISHED.items():
        for kind, (real, integer) in zip(PAPER, arms, strict=False):
            entry = {"float": real, "int8": integer, "float_kb": float_kb, "int8_kb": int8_kb}
            found[f"{kind}, {width:g}"] = entry
    return found


class Point:
    """A model to ship: its size in bytes and its test accuracies (%), one a seed."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], kind: str, width: float, form: str):
        mine = [r for r in rows if r["kind"] == kind and r["width"] == width]
        self.kind, self.width, self.form = kind, width, form
        self.accuracies = np.array([100 * r[form] for r in mine])
        self.kb = float(np.mean([r[f"{form}_bytes"] for r in mine])) / KB

    @property
    def accuracy(self) -> float:
        return float(self.accuracies.mean())

    def to_dict(self) -> dict[str, Any]:
        names = {"kind": self.kind, "width": self.width, "form": self.form}
        return {**names, "kb": self.kb, "accuracy": self.accuracy}


def points(rows: Sequence[Mapping[str, Any]], kind: str, form: str) -> list[Point]:
    """An arm's models from the narrowest to the widest."""
    widths = sorted({r["width"] for r in rows if r["kind"] == kind and r.get(form) is not None})
    return [Point(rows, kind, width, form) for width in widths]


def strategies(widths: Sequence[float]) -> dict[str, tuple[float, float]]:
    """{name: (the plain width it starts from, the distilled width it ends at)}."""
    if {0.25, 0.5, 1.0} <= set(widths):
        return {"Shrink-and-Improve": (1.0, 0.25), "Grow-Improve-and-Shrink": (0.25, 0.5)}
    *students, widest = widths
    if len(students) < 2:
        return {}
    return {
        "Shrink-and-Improve": (widest, students[0]),
        "Grow-Improve-and-Shrink": (students[0], students[1]),
    }


def findings(rows: Sequence[Mapping[str, Any]], widths: Sequence[float]) -> dict[str, Any]:
    """The two strategies, what each arm gains beside what it gained in the paper, and which of the
    paper's arms are dominated by ours: neither smaller nor more accurate, in the mean."""
    found: dict[str, Any] = {"strategies": {}, "gains": {}}
    for strategy, (start, end) in strategies(widths).items():
        a, b = Point(rows, PLAIN, start, "float"), Point(rows, DISTILLED, end, "int8")
        ends = {"from": a.to_dict(), "to": b.to_dict()}
        change = {"points": b.accuracy - a.accuracy, "times smaller": a.kb / b.kb}
        found["strategies"][strategy] = {**ends, **change, "dominated": dominated(b, rows)}
    for width in widths[:-1]:
        own = {kind: Point(rows, kind, width, "float").accuracy for kind in PAPER}
        gains = {kind: own[kind] - own[PLAIN] for kind in PAPER[1:]}
        arms = PUBLISHED.get(width, ())[3:]
        known = {k: arm[0] - arms[0][0] for k, arm in zip(PAPER, arms, strict=False)}
        found["gains"][f"{width:g}"] = {
            kind: {"points": gains[kind], "published": known.get(kind)} for kind in gains
        }
    paper = [p for kind in PAPER for form in ("float", "int8") for p in points(rows, kind, form)]
    free = [p for p in paper if not dominated(p, rows)]
    counts = {"by": ALL, "points": len(paper), "dominated": len(paper) - len(free)}
    found["dominated"] = {**counts, "others": [p.to_dict() for p in free]}
    return found


def dominated(point: Point, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a model trained with all in one step is no larger and no less accurate."""
    ours = points(rows, ALL, "int8")
    return any(own.kb <= point.kb and own.accuracy >= point.accuracy for own in ours)


def headline(results: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers to see first."""
    found = {
        name: (
            f"{s['from']['kb']:.0f} -> {s['to']['kb']:.0f} KB ({s['times smaller']:.1f}x smaller), "
            f"{s['points']:+.1f} points"
        )
        for name, s in results["strategies"].items()
    }
    counts = results["dominated"]
    found[f"points of the paper's arms dominated by {ALL!r}"] = (
        f"{counts['dominated']} of {counts['points']}"
    )
    return found


def about(results: Mapping[str, Any]) -> str:
    """How long the runs were, and that it is less than the paper's if it is."""
    config = results["config"]
    if not results["truncated"]:
        return f"{config['dataset']}, {results['epochs']} epochs, {config['seeds']} seeds."
    return (
        f"{config['dataset']}, TRUNCATED: "
        f"{results['epochs']} epochs of {results['images']:,} images "
        f"({results['scale']:.2%} of the paper's cost), {len(results['widths'])} of 7 widths, "
        f"{config['seeds']} seeds."
    )


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Arms and widths down; sizes and accuracies in float32 and int8, beside the published."""
    known, rows = results["published"], []
    for row in results["rows"]:
        theirs = known.get(row["name"], {})
        rows.append({**row, **{f"published_{key}": value for key, value in theirs.items()}})
    caption = (
        f"{about(results)} Test accuracy, mean ± standard deviation. int8: of {QAT} and {ALL!r} as "
        "trained, of the others rounded after training; sizes include masks, scales and BatchNorm. "
        "Published: 100 epochs, best epoch on the test set, one seed."
    )
    wanted = {key for row in rows for key in row}
    beside = [column for pair in zip(COLUMNS, PUBLISHED_COLUMNS, strict=False) for column in pair]
    shown = [c for c in (*beside, COLUMNS[-1]) if c.key in wanted]
    return {"practitioners_guide": summarise(rows, shown, heading="arm, width", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Accuracy against size: our runs with both strategies, and the survey's numbers."""
    rows = results["rows"]
    with style():
        figure, first = new_figure(7.0, 3.5)
        first.remove()
        left, right = figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        arrows: dict[str, Any] = {}
        ours = {series: points(rows, *series) for series in SERIES}
        theirs = {series: _published_points(*series) for series in SERIES if series[0] in PAPER}
        for axes, found, widths in ((left, ours, results["widths"]), (right, theirs, WIDEST)):
            for series, models in found.items():
                if models:
                    _series(axes, series, models, handles)
            for rank, (name, (start, end)) in enumerate(strategies(widths).items()):
                before = next(p for p in found[PLAIN, "float"] if p.width == start)
                after = next(p for p in found[DISTILLED, "int8"] if p.width == end)
                arrows[name] = _arrow(axes, rank, before, after)
        left.set_title("Measured, truncated" if results["truncated"] else "Measured")
        right.set_title("Published (100 epochs, one seed)")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("stored size (KB)")
        left.set_ylabel("test accuracy (%)")
        handles |= arrows
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=5,
            frameon=False,
            fontsize=7,
            columnspacing=1.4,
        )
        set_footer(figure, {"runs": about(results), **source})
    return {"practitioners_guide": figure}


SERIES = (
    (PLAIN, "float"),
    (PLAIN, "int8"),
    (AUGMENTED, "int8"),
    (DISTILLED, "int8"),
    (PRUNED, "int8"),
    (QAT, "int8"),
    (ALL, "int8"),
)
WIDEST = tuple(PUBLISHED)


def _published_points(kind: str, form: str) -> list[Point]:
    found = []
    for width, (_, float_kb, int8_kb, *arms) in PUBLISHED.items():
        if PAPER.index(kind) < len(arms):
            real, integer = arms[PAPER.index(kind)]
            kb, accuracy = (float_kb, real) if form == "float" else (int8_kb, integer)
            row = {"kind": kind, "width": width, form: accuracy / 100, f"{form}_bytes": kb * KB}
            found.append(Point([row], kind, width, form))
    return found


def _series(
    axes: Any, series: tuple[str, str], found: Sequence[Point], handles: dict[str, Any]
) -> None:
    rank, (kind, form) = SERIES.index(series), series
    last = rank == len(SERIES) - 1
    deviations = [p.accuracies.std(ddof=1) if len(p.accuracies) > 1 else 0.0 for p in found]
    handles[f"{kind}, {'float32' if form == 'float' else 'int8'}"] = axes.errorbar(
        [p.kb for p in found],
        [p.accuracy for p in found],
        yerr=deviations if any(deviations) else None,
        color=COLOURS[rank % len(COLOURS)],
        marker=MARKERS[rank % len(MARKERS)],
        markersize=5 if last else 3.8,
        linewidth=1.6 if last else 1.0,
        elinewidth=0.7,
        capsize=1.6,
        zorder=4 if last else 3,
    )


def _arrow(axes: Any, rank: int, before: Point, after: Point) -> Any:
    """A strategy, from a plain float32 model to a distilled int8 one; returns its legend entry."""
    line = {"color": GREY, "linewidth": 1.2, "linestyle": ("--", ":")[rank]}
    ends = (after.kb, after.accuracy), (before.kb, before.accuracy)
    axes.annotate("", *ends, arrowprops={"arrowstyle": "->", **line}, zorder=2)
    return axes.plot([], [], **line)[0]
