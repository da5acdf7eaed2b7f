"""What the experiments on sparsity share: their task, figures with error bars, and what is written.

A finished experiment leaves `experiments/results/<name>.json` (everything, with provenance), its
tables beside it (Markdown and LaTeX) and its figures in `docs/images/`. Tables and figures are made
from the results alone, so that they can be made again without training.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core import PyTree
from effjax.report import Table, save, write_text
from effjax.report.canvas import COLOURS, GREY, MARKERS, new_figure, set_footer, style
from experiments.harness.progress import say
from experiments.harness.provenance import brief, provenance, write_json
from experiments.harness.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
IMAGES = ROOT / "docs" / "images"


def cross_entropy(logits: jax.Array, batch: PyTree) -> jax.Array:
    """The task's loss: the mean over the batch."""
    return scores(logits, batch)["loss"].mean()


def scores(logits: jax.Array, batch: PyTree) -> dict[str, jax.Array]:
    """Of each image its cross entropy, and 1 if it is classified rightly."""
    label = batch["label"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return {"loss": loss, "accuracy": (jnp.argmax(logits, -1) == label).astype(jnp.float32)}


def publish(
    run: Run,
    results: dict[str, Any],
    tables: Callable[[dict[str, Any]], Mapping[str, Table]],
    figures: Callable[[dict[str, Any], Mapping[str, Any]], Mapping[str, "Figure"]],
    keep: bool,
) -> dict[str, Any]:
    """Writes the run's summary and report; with `keep`, also what the repository keeps.

    Args:
      run: its label's first part names the experiment.
      results: JSON values; the config and the provenance are added.
      tables: from the results to {file stem: table}.
      figures: from the results and a short provenance to {file stem: figure}.
      keep: whether to write `experiments/results` and `docs/images`.

    Returns:
      The results as written.
    """
    name = run.label.split("/")[0]
    whole = {**results, "config": run.config, "provenance": provenance(run.config)}
    source = brief(whole["provenance"])
    run.finish(results)
    if keep:
        write_json(RESULTS / f"{name}.json", whole)
    for stem, table in tables(whole).items():
        texts = {".md": table.markdown(source), ".tex": table.latex(source)}
        for folder in [run.path / "report", *([RESULTS] if keep else [])]:
            for suffix, text in texts.items():
                write_text(folder / f"{stem}{suffix}", text)
        say(table.markdown())
    for stem, figure in figures(whole, source).items():
        save(figure, run.path / "report" / stem, source)
        if keep:
            save(figure, IMAGES / stem, source, formats=["png"])
    return whole


def error_curves(
    curves: Mapping[str, Mapping[str, Any]], y: str, source: Mapping[str, Any], headroom: float
) -> "Figure":
    """Errors in training, in percent; the axis ends at `headroom` times the largest last one.

    Args:
      curves: {name: {"steps": [looks], "error": [seeds, looks]}}.
      y: the axis' label.
    """
    from effjax.report import curves_plot

    series = {name: (curve["steps"], np.asarray(curve["error"])) for name, curve in curves.items()}
    last = max(float(np.mean(values[:, -1])) for _, values in series.values())
    return curves_plot(
        series,
        "step",
        y,
        title="Training",
        scale=100,
        bottom=0,
        top=100 * headroom * last,
        provenance=source,
    )


class Band(NamedTuple):
    """A line and how far its band reaches on either side, each [n]."""

    mean: Any
    reach: Any


class Panel(NamedTuple):
    """One set of axes: means over seeds as lines, standard deviations as bars.

    series: {name: (places [n], values [seeds, n] or a Band)}; one name has one colour in all
      panels.
    x, y: the axes' labels.
    title: above the axes.
    ticks: {place: label} of the horizontal axis.
    level: {name: values [seeds]}, a dashed horizontal line with a band.
    bars: False draws the deviation as a band, for curves of many points.
    limits: of the vertical axis.
    """

    series: Mapping[str, tuple[Sequence[float], Any]]
    x: str
    y: str
    title: str = ""
    ticks: Mapping[float, str] | None = None
    level: Mapping[str, Any] = {}
    bars: bool = True
    limits: tuple[float | None, float | None] = (None, None)


def panels_plot(
    panels: Sequence[Panel], source: Mapping[str, Any], *, width: float, height: float
) -> "Figure":
    """Panels side by side, with one legend below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    with style():
        figure, first = new_figure(width, height)
        first.remove()
        handles: dict[str, Any] = {}
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw(axes, panel, names, handles)
        room = int(72 * width / (4 * max(map(len, handles)) + 36))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=min(max(1, int(width * 0.75)), max(1, room), len(handles)),
            frameon=False,
            fontsize=7,
            handlelength=2.4,
            columnspacing=1.4,
        )
        set_footer(figure, source)
    return figure


def _draw(axes: Any, panel: Panel, names: Sequence[str], handles: dict[str, Any]) -> None:
    places = np.concatenate([np.asarray(x, np.float64) for x, _ in panel.series.values()])
    span = float(np.ptp(places)) or 1.0
    for name, values in panel.level.items():
        mean, std = _moments(np.asarray(values, np.float64)[:, None])
        handles[name] = axes.axhline(mean[0], color=GREY, linewidth=1.0, dashes=(5, 2), zorder=1)
        axes.axhspan(mean[0] - std[0], mean[0] + std[0], color=GREY, alpha=0.12, linewidth=0)
    for rank, (name, (where, values)) in enumerate(panel.series.items()):
        i = names.index(name)
        colour = COLOURS[i % len(COLOURS)]
        given = isinstance(values, Band)
        mean, std = map(np.asarray, values) if given else _moments(np.atleast_2d(values))
        if panel.bars:
            # A little apart, so that bars at one place can be told from each other.
            beside = 0.007 * span * (rank - (len(panel.series) - 1) / 2)
            handles[name] = axes.errorbar(
                np.asarray(where, np.float64) + beside,
                mean,
                yerr=std,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=3.6,
                markerfacecolor="white" if i >= len(COLOURS) else colour,
                linestyle="-" if i < len(COLOURS) else "--",
                linewidth=1.1,
                elinewidth=0.7,
                capsize=1.6,
                zorder=3,
            )
        else:
            (handles[name],) = axes.plot(where, mean, color=colour, linewidth=1.2, zorder=3)
            axes.fill_between(where, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    if panel.ticks is not None:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    axes.set_ylim(*panel.limits)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(panel.title)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis; 0 where there is one seed."""
    values = np.asarray(values, np.float64)
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return values.mean(axis=0), std
