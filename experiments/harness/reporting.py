"""`python -m experiments report`: finished runs as a table, or as a folder with a whole report."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.progress import say
from experiments.harness.provenance import brief, provenance
from experiments.harness.results import choose, column_of, declared_columns, default_keys, known_as
from experiments.harness.summaries import Finished, find_runs, read_rows, read_runs
from experiments.harness.trainings import read_trainings

if TYPE_CHECKING:
    from effjax.report import Column, Study

_ABOUT = """\
Puts finished runs side by side: mean and standard deviation over seeds. Runs whose configs differ
in nothing but the seed are averaged. With --out, writes a folder: Markdown, LaTeX, CSV, JSON,
figures (PNG, SVG, PDF) and index.html, with the Pareto front, hypervolumes, tests against a
baseline, training curves and what every layer was compressed to.
"""


def main(arguments: Sequence[str]) -> int:
    """Prints the table in Markdown, and writes the report with `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments report",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="run folders, folders with runs below them, names of experiments, or patterns",
    )
    parser.add_argument("--out", type=Path, help="the report's folder")
    parser.add_argument("--quality", help="what should be good: accuracy")
    parser.add_argument("--cost", help="what it is set against: bytes (or kb), effective_macs, ...")
    parser.add_argument("--columns", help="results in the table: accuracy,bytes; by default all")
    parser.add_argument("--baseline", help="the name to compare the others with")
    parser.add_argument("--curve", help="the metric of training curves: validation/accuracy")
    parser.add_argument("--title", default="Runs", help="the page's heading")
    parser.add_argument("--skip-unfinished", action="store_true", help="and say which")
    asked = vars(parser.parse_args(arguments))
    columns, out = asked.pop("columns"), asked.pop("out")
    study, runs = make_study(columns=columns.split(",") if columns else None, **asked)
    for note in study.notes:
        say(note)
    print(study.table._replace(caption="").markdown(), end="")
    if out is not None:
        say(f"report: {_write(out, study, runs)}")
    return 0


def report(runs: Sequence[str | Path] | str | Path, out: str | Path, **asked: Any) -> Path:
    """Writes the report of finished runs, and returns the path of its page.

    Args:
      runs: run folders, folders with runs below them, names of experiments, or patterns.
      out: the folder to write; see `effjax.report.write_report` for what is in it.
      **asked: as for `make_study`.

    Raises:
      RunError: from `make_study`.
      effjax.errors.ReportError: from the tables and figures.
    """
    return _write(out, *make_study([runs] if isinstance(runs, (str, Path)) else runs, **asked))


def make_study(
    runs: Sequence[str | Path],
    *,
    quality: str | None = None,
    cost: str | None = None,
    columns: Sequence[str] | None = None,
    baseline: str | None = None,
    curve: str | None = None,
    title: str = "Runs",
    skip_unfinished: bool = False,
) -> "tuple[Study, list[Finished]]":
    """Reads runs, and chooses what to show of them.

    Args:
      runs: see `summaries.find_runs`.
      quality, cost: keys of results; by default the first that is known and that runs have.
      columns: keys of results in the table; by default those that the experiments declare, else the
        numbers that all rows have.
      baseline: a name or series; by default what an experiment declares.
      curve: a metric of the trainings.
      title: the page's heading.
      skip_unfinished: leave unfinished runs out and note it, where they are an error otherwise.

    Raises:
      RunError: runs that are not there, not finished or contradict each other; a quality, cost or
        metric that no run has.
    """
    from effjax.report import Study

    found, notes = read_runs(find_runs(runs), skip_unfinished=skip_unfinished)
    rows = read_rows(found)
    declared = declared_columns(found)
    up = choose("quality", quality, rows, declared)
    across = choose("cost", cost, rows, declared)
    keys = [known_as(key, rows) for key in columns or ()]
    keys = keys or default_keys(rows, declared, (up, across))
    for axis in (up, across):
        lacking = [row["name"] for row in rows if axis and row.get(axis.key) is None]
        if axis and lacking:
            names = ", ".join(dict.fromkeys(lacking))
            notes.append(f"Without {axis.key!r}, and so not in the figure: {names}.")
    training = read_trainings(rows, up, curve)
    return Study(
        rows=rows,
        columns=[column_of(key, rows, declared) for key in keys],
        quality=up,
        cost=across,
        baseline=baseline or _baseline(found, rows, up),
        curves=training.curves,
        curve=training.curve,
        title=title,
        notes=[*notes, *training.notes],
    ), found


def _write(out: str | Path, study: "Study", runs: Sequence[Finished]) -> Path:
    from effjax.report import write_report

    sources = {
        run.label: run.summary.get("provenance") or run.record.get("provenance", {}) for run in runs
    }
    every = {**sources, "this report": provenance()}
    return write_report(out, study, brief(*sources.values()), every)


def _baseline(
    runs: Sequence[Finished], rows: Sequence[Mapping[str, Any]], quality: "Column | None"
) -> str | None:
    """The first name with the quality that is of the series which its experiment declares."""
    wanted = {run.record.get("experiment"): run.summary.get("baseline") for run in runs}
    for row in rows:
        series = row["series"].removeprefix(f"{row['experiment']}: ")
        if quality and row.get(quality.key) is not None and series == wanted[row["experiment"]]:
            return row["name"]
    return None
