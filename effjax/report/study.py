"""A study: results over seeds, and the tables and figures that are made of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from effjax.errors import ReportError
from effjax.report.comparisons import Comparison, compare, comparison_grid
from effjax.report.curves import curves_plot
from effjax.report.fronts import Front, fronts, fronts_grid
from effjax.report.grid import Grid
from effjax.report.layers import layers_plot
from effjax.report.scatter import pareto_plot
from effjax.report.tables import Column, Row, Table, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED, LETTERS = 10, 120  # names, and letters in them, that have room at a figure's points
LINE = 3  # points that a series is drawn as a line from
LINES = 4  # in one figure of curves: more bands than these cover each other
MODELS = 3  # in one chart of layers
Curves = Mapping[str, tuple[Sequence[float], Any]]  # {name: (steps [n], values [seeds, n])}


@dataclasses.dataclass(frozen=True)
class Study:
    """Results to report on.

    rows: one a name and seed: "name", "seed", "series" (by default the name), "layers" (optional:
      {path: {"sparsity", "bits"}}), and results.
    columns: what the table shows.
    quality, cost: what is drawn against what; both must say which end is better. Without them there
      is a table and no more.
    baseline: a name, or a series of which the first name is meant; the others are compared to it.
    curves: of training, scaled by `curve`.
    curve: what the curves show.
    title: of the page.
    notes: what readers should know: runs left out, curves that are missing.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    quality: Column | None = None
    cost: Column | None = None
    baseline: str | None = None
    curves: Curves = dataclasses.field(default_factory=dict)
    curve: Column | None = None
    title: str = "Runs"
    notes: Sequence[str] = ()

    @cached_property
    def table(self) -> Table:
        """All names; means and deviations."""
        table = summarise(self.rows, self.columns, heading="run")
        seeds = sorted({cell.n for cell in table.cells.values()})
        if seeds == [1]:
            return table
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        return table._replace(caption=f"Mean ± standard deviation over {many} seeds.")

    @cached_property
    def series(self) -> dict[str, str]:
        """{name: series}."""
        return {str(row["name"]): str(row.get("series", row["name"])) for row in self.rows}

    @cached_property
    def comparisons(self) -> tuple[str, list[Comparison]]:
        """The baseline, and every other name against it in quality; none without baseline."""
        if self.quality is None or self.baseline is None or len(self.table.names) < 2:
            return "", []
        name = next((n for n, s in self.series.items() if self.baseline in (n, s)), None)
        if name is None:
            names = list(self.series)
            raise ReportError(f"there is no baseline {self.baseline!r}; there are {names}.")
        return name, compare(self.rows, name, self.quality)

    @cached_property
    def fronts(self) -> list[Front]:
        """Hypervolumes, where quality and cost are known."""
        if self.quality is None or self.cost is None:
            return []
        return fronts([{**r, "series": self.series[r["name"]]} for r in self.rows], *self.axes)

    @property
    def axes(self) -> tuple[Column, Column]:
        """Cost and quality."""
        if self.quality is None or self.cost is None:
            raise ReportError("the study has no quality and cost to draw.")
        return self.cost, self.quality

    def grids(self) -> dict[str, Grid]:
        """The tables: {file stem: grid}."""
        found = {"table": self.table.grid()}
        if self.fronts:
            found["fronts"] = fronts_grid(self.fronts, *self.axes)
        if self.quality is not None and self.comparisons[1]:
            baseline, compared = self.comparisons
            found["comparison"] = comparison_grid(compared, baseline, self.quality)
        return found

    def shown(self) -> list[str]:
        """What curves and layers are drawn of: every name where there are few, else the cheapest of
        every series."""
        table, cost = self.table, self.cost
        if len(table.names) <= LABELLED:
            return list(table.names)
        chosen: dict[str, str] = {}
        for name in table.names:
            best = chosen.setdefault(self.series[name], name)
            if cost and {(name, cost.key), (best, cost.key)} <= table.cells.keys():
                new, old = table.cells[name, cost.key].mean, table.cells[best, cost.key].mean
                if (new < old) == (cost.best == "min") and new != old:
                    chosen[self.series[name]] = name
        return list(chosen.values())

    def figures(self, provenance: Mapping[str, Any]) -> "dict[str, tuple[Figure, str]]":
        """{file stem: (figure, what it shows)}."""
        return {**self._pareto(provenance), **self._curves(provenance), **self._layers(provenance)}

    def _pareto(self, provenance: Mapping[str, Any]) -> "dict[str, tuple[Figure, str]]":
        if not self.fronts:
            return {}
        cost, quality = self.axes
        # With the axes' columns among the table's, whichever it shows.
        both = summarise([r for r in self.rows if _has(r, self.axes)], (cost, quality))
        crowded = len(both.names) > LABELLED or sum(map(len, both.names)) > LETTERS
        owners = [self.series[name] for name in both.names]
        lines = max(map(owners.count, owners)) >= LINE
        series = self.series if crowded or lines else None
        figure = pareto_plot(both, cost.key, quality.key, series=series, provenance=provenance)
        return {"pareto": (figure, f"{quality.label} against {cost.label}, with the Pareto front")}

    def _curves(self, provenance: Mapping[str, Any]) -> "dict[str, tuple[Figure, str]]":
        found = {name: self.curves[name] for name in self.shown() if name in self.curves}
        if not found or self.curve is None:
            return {}
        curve, drawn = self.curve, {}
        for stem, names in _parts("curves", list(found), LINES):
            some = {name: found[name] for name in names}
            scale: dict[str, Any] = {"scale": curve.scale, **_limits(some, curve)}
            figure = curves_plot(some, "training step", curve.label, **scale, provenance=provenance)
            drawn[stem] = (figure, f"{curve.label} in training")
        return drawn

    def _layers(self, provenance: Mapping[str, Any]) -> "dict[str, tuple[Figure, str]]":
        facts = {name: _facts(self.rows, name) for name in self.shown()}
        found = {name: layers for name, layers in facts.items() if _compressed(layers)}
        drawn = {}
        for stem, names in _parts("layers", list(found), MODELS):
            figure = layers_plot({name: found[name] for name in names}, provenance=provenance)
            drawn[stem] = (figure, f"Sparsity and bits of the layers: {', '.join(names)}")
        return drawn


def _has(row: Row, columns: Sequence[Column]) -> bool:
    return all(row.get(column.key) is not None for column in columns)


def _parts(stem: str, names: list[str], most: int) -> list[tuple[str, list[str]]]:
    """Names shared out evenly among as few figures as hold them."""
    if not names:
        return []
    parts = np.array_split(np.asarray(names, object), -(-len(names) // most))
    stems = [stem] if len(parts) == 1 else [f"{stem}_{i}" for i in range(1, len(parts) + 1)]
    return [(stem, part.tolist()) for stem, part in zip(stems, parts, strict=True)]


def _limits(curves: Curves, column: Column) -> dict[str, float]:
    """Where the axis ends at the worse side: the first steps would flatten all the others."""
    means = [np.atleast_2d(np.asarray(v, np.float64)).mean(axis=0) for _, v in curves.values()]
    late = np.concatenate([mean[len(mean) // 2 :] for mean in means]) * column.scale
    room = 0.1 * float(np.ptp(late))
    if not room or column.best is None:
        return {}
    if column.best == "max":
        return {"bottom": float(late.min()) - room}
    return {"top": float(late.max()) + room}


def _facts(rows: Sequence[Row], name: str) -> dict[str, dict[str, list[float]]]:
    """{layer: {metric: one value a seed}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for path, facts in (row.get("layers") or {}).items() if row["name"] == name else ():
            for key, value in facts.items():
                found.setdefault(path, {}).setdefault(key, []).append(value)
    return found


def _compressed(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> bool:
    """Whether there is anything to see: a dense float32 network is all zeros and 32s."""
    return any(
        max(facts.get("sparsity", [0.0])) > 0 or min(facts.get("bits", [32])) < 32
        for facts in layers.values()
    )
