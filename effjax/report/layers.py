"""How sparse and how wide in bits every layer is, as bars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.errors import ReportError
from effjax.report.canvas import (
    COLOURS,
    COLUMN_INCHES,
    GREY,
    INK,
    legend_above,
    legend_columns,
    new_figure,
    set_footer,
    style,
)
from effjax.report.tables import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPARSITY = Column("sparsity", "sparsity (%)", ".0f", scale=100)
BITS = Column("bits", "bits of a weight", ".3g")
Facts = Mapping[str, Mapping[str, Any]]  # {layer: {metric: number, or one a seed}}


def layer_facts(footprint: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{path: {"sparsity", "bits"}} of the layers that multiply, from `Footprint.to_dict()`."""
    found = [leaf for leaf in footprint["leaves"] if leaf.get("op")] or footprint["leaves"]
    return {
        leaf["path"]: {
            "sparsity": 1 - leaf["nonzeros"] / max(1, leaf["parameters"]),
            "bits": leaf["bits"],
        }
        for leaf in found
    }


def layers_plot(
    models: Mapping[str, Facts],
    metrics: Sequence[Column] = (SPARSITY, BITS),
    *,
    title: str = "",
    width: float = COLUMN_INCHES,
    provenance: Mapping[str, Any] | None = None,
) -> "Figure":
    """Bars for every layer, one panel a metric; error bars are one standard deviation over seeds.

    Args:
      models: {name: {layer: {metric: number or [seeds]}}}, up to seven names, told apart by colour;
        layers are drawn from the top in the order in which they first appear. A layer that a model
        lacks has no bar.
      metrics: what to draw, one panel each.

    Raises:
      ReportError: no layers, more models than colours, or a metric that no layer has.

    Example:
      >>> from effjax.report import layers_plot
      >>> sparse = {
      ...     "conv": {"sparsity": [0.79, 0.81], "bits": 8},
      ...     "head": {"sparsity": 0, "bits": 8},
      ... }
      >>> figure = layers_plot({"pruned": sparse})
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['sparsity (%)', 'bits of a weight']
    """
    layers = list(dict.fromkeys(layer for facts in models.values() for layer in facts))
    if not layers:
        raise ReportError("there are no layers to draw.")
    if len(models) > len(COLOURS):
        raise ReportError(
            f"{len(models)} models are more than the {len(COLOURS)} colours that stay apart; draw "
            "some of them."
        )
    bar = 0.82 / len(models)
    rows = -(-len(models) // legend_columns(width, len(models), max(map(len, models))))
    height = 0.65 + len(layers) * max(0.2, 0.11 * len(models)) + 0.14 * rows * (len(models) > 1)
    with style():
        figure, first = new_figure(width, height)
        first.remove()
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for i, facts in enumerate(models.values()):
                offset = (i - (len(models) - 1) / 2) * bar
                _bars(axes, layers, facts, metric, offset, bar, COLOURS[i])
            if not axes.patches:
                raise ReportError(f"no layer has {metric.key!r} to draw.")
            axes.set_xlabel(metric.label)
            axes.grid(False, axis="y")
            axes.set_xlim(0, axes.dataLim.x1 * 1.22 or 1.0)
        panels[0].set_yticks(range(len(layers)), _short(layers))
        panels[0].set_ylim(len(layers) - 0.45, -0.55)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, fontweight="bold", color=INK)
        if len(models) > 1:
            from matplotlib.patches import Patch

            handles = [Patch(color=c, label=n) for c, n in zip(COLOURS, models, strict=False)]
            legend_above(figure, handles)
        set_footer(figure, provenance)
    return figure


def _bars(
    axes: "Axes",
    layers: Sequence[str],
    facts: Facts,
    metric: Column,
    offset: float,
    bar: float,
    colour: str,
) -> None:
    for i, layer in enumerate(layers):
        value = facts.get(layer, {}).get(metric.key)
        if value is None:
            continue
        seeds = np.atleast_1d(np.asarray(value, np.float64)) * metric.scale
        mean, std = float(seeds.mean()), float(seeds.std(ddof=1)) if len(seeds) > 1 else 0.0
        axes.barh(i + offset, mean, 0.9 * bar, color=colour)
        if std:
            axes.errorbar(mean, i + offset, xerr=std, color=INK, linewidth=0.7, capsize=1.5)
        axes.annotate(
            format(mean, metric.format),
            (mean + std, i + offset),
            (2, 0),
            textcoords="offset points",
            va="center",
            fontsize=6 if bar > 0.3 else 4.5,
            color=GREY,
        )


def _short(layers: Sequence[str]) -> list[str]:
    """Paths without the last part where all have the same: "conv_0/kernel" is "conv_0"."""
    ends = {layer.rpartition("/")[2] for layer in layers}
    heads = [layer.rpartition("/")[0] for layer in layers]
    return heads if len(ends) == 1 and all(heads) else list(layers)
