"""Results over seeds as a table: mean ± standard deviation, in Markdown, LaTeX, CSV, JSON and
HTML."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from effjax.errors import ReportError
from effjax.report.footer import footer
from effjax.report.grid import Grid

Row = Mapping[str, Any]
MISSING = "-"


class Column(NamedTuple):
    """One metric of a table.

    key: its name in the rows.
    label: its heading.
    format: how its mean and deviation are written, for example ".2f" or ",.0f".
    best: which end is better; None where there is no better.
    scale: multiplies the values first: 100 for per cent, 1e3 for milliseconds.
    """

    key: str
    label: str
    format: str = ".3g"
    best: Literal["max", "min"] | None = None
    scale: float = 1.0


class Cell(NamedTuple):
    """The sample mean and standard deviation (n - 1) of a metric over n seeds, scaled."""

    mean: float
    std: float
    n: int


class Table(NamedTuple):
    """Names down, columns across. Make it with `summarise`."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[str, str], Cell]  # by (name, column key); missing where never measured
    heading: str = "method"
    caption: str = ""

    def text(self, name: str, column: Column) -> str:
        """A cell as written: the mean, and the deviation where the seeds differ visibly."""
        cell = self.cells.get((name, column.key))
        if cell is None:
            return MISSING
        mean, std = format(cell.mean, column.format), format(cell.std, column.format)
        return mean if std == format(0.0, column.format) else f"{mean} ± {std}"

    def ranks(self, column: Column) -> dict[str, int]:
        """1 for the best of a column and 2 for the second, by the mean as written: what looks alike
        ranks alike. Empty where no end is better, or where all are alike."""
        if column.best is None:
            return {}
        cells = {n: self.cells[n, column.key] for n in self.names if (n, column.key) in self.cells}
        shown = {n: format(c.mean, column.format) for n, c in cells.items() if c.mean == c.mean}
        order = sorted(shown, key=lambda n: cells[n].mean, reverse=column.best == "max")
        distinct = list(dict.fromkeys(shown[n] for n in order))
        if len(distinct) < 2:
            return {}
        return {n: distinct.index(shown[n]) + 1 for n in order if shown[n] in distinct[:2]}

    def grid(self) -> Grid:
        """The cells as written."""
        ranks = [self.ranks(column) for column in self.columns]
        rows = [[name, *(self.text(name, c) for c in self.columns)] for name in self.names]
        marks = {
            (i, j): found[name]
            for j, found in enumerate(ranks, 1)
            for i, name in enumerate(self.names)
            if name in found
        }
        return Grid([self.heading, *(c.label for c in self.columns)], rows, marks, self.caption)

    def markdown(self, provenance: Mapping[str, Any] | None = None) -> str:
        """GitHub Markdown; the best of a column bold."""
        return self.grid().markdown(provenance)

    def latex(self, provenance: Mapping[str, Any] | None = None) -> str:
        """A `tabular` for `\\usepackage{booktabs}`; the best bold, the second underlined."""
        return self.grid().latex(provenance)

    def html(self) -> str:
        """A `<table>`; the best and the second carry the classes "best" and "second"."""
        return self.grid().html()

    def csv(self, provenance: Mapping[str, Any] | None = None) -> str:
        """One line a name, with mean, std and n of each column at full precision, and the
        provenance in a last line that begins with "#"."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        parts = ("mean", "std", "n")
        keys = [f"{c.key}_{part}" for c in self.columns for part in parts]
        writer.writerow([self.heading, *keys])
        for name in self.names:
            cells = (self.cells.get((name, c.key), ("", "", 0)) for c in self.columns)
            writer.writerow([name, *(value for cell in cells for value in cell)])
        if provenance:
            out.write(f"# {footer(provenance)}\n")
        return out.getvalue()

    def json(self, provenance: Mapping[str, Any] | None = None) -> str:
        """{"rows": [{"name", column key: {"mean", "std", "n"}}], "columns": ..., "provenance"}, at
        full precision; a cell that was never measured is left out."""
        rows = [
            {"name": name}
            | {
                c.key: self.cells[name, c.key]._asdict()
                for c in self.columns
                if (name, c.key) in self.cells
            }
            for name in self.names
        ]
        columns = [c._asdict() for c in self.columns]
        found = {"rows": rows, "columns": columns, "caption": self.caption}
        return json.dumps({**found, "provenance": provenance}, indent=1) + "\n"


def summarise(
    rows: Iterable[Row],
    columns: Sequence[Column],
    *,
    by: str = "name",
    seed: str = "seed",
    heading: str = "method",
    caption: str = "",
) -> Table:
    """The table of results over seeds, names in the order in which they first appear.

    Args:
      rows: one a name and seed: {"name": "pruned", "seed": 0, "accuracy": 0.97, ...}.
      columns: what to show; see `Column`.
      by: the entry that names the table's row.
      seed: the entry that tells runs of one name apart.

    Raises:
      ReportError: no rows; a row without name; two rows of one name and seed; a column that no row
        has, or that only some seeds of a name have.

    Example:
      >>> from effjax.report import Column, summarise
      >>> rows = [{"name": "a", "seed": s, "acc": x} for s, x in enumerate((0.9, 0.8))]
      >>> rows += [{"name": "b", "seed": 0, "acc": 0.5}]
      >>> print(summarise(rows, [Column("acc", "acc. (%)", ".1f", "max", 100)]).markdown())
      | method | acc. (%) |
      | :-- | --: |
      | a | **85.0 ± 7.1** |
      | b | 50.0 |
      <BLANKLINE>
    """
    groups: dict[str, dict[Any, Row]] = {}
    for row in rows:
        if by not in row:
            raise ReportError(f"a row has no {by!r}: its entries are {list(row)}.")
        seeds = groups.setdefault(str(row[by]), {})
        if row.get(seed) in seeds:
            raise ReportError(
                f"two rows are named {row[by]!r} with {seed} {row.get(seed)!r}; a mean over them "
                "would count one run twice. Give each run a seed, or another name."
            )
        seeds[row.get(seed)] = row
    if not groups:
        raise ReportError("there are no rows to make a table of.")
    cells = {}
    for column in columns:
        for name, seeds in groups.items():
            have = [s for s, row in seeds.items() if row.get(column.key) is not None]
            if have and len(have) < len(seeds):
                raise ReportError(
                    f"{column.key!r} of {name!r} is there for seeds {have} but not for "
                    f"{[s for s in seeds if s not in have]}; a mean over some of the seeds would "
                    "mislead. Run the missing ones, or leave the column out."
                )
            if have:
                values = np.asarray([float(seeds[s][column.key]) for s in have]) * column.scale
                std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
                cells[name, column.key] = Cell(float(values.mean()), std, len(values))
        if not any(key == column.key for _, key in cells):
            known = sorted(
                {key for seeds in groups.values() for row in seeds.values() for key in row}
            )
            raise ReportError(f"no row has {column.key!r}; they have {known}.")
    return Table(tuple(groups), tuple(columns), cells, heading, caption)
