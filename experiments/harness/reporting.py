"""`python -m experiments report`: finished runs as a table, or as a folder with a whole report."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.errors import RunError
from experiments.harness.progress import say
from experiments.harness.provenance import brief, provenance
from experiments.harness.summaries import Finished, find_runs, is_number, read_rows, read_runs
from experiments.harness.trainings import read_trainings

if TYPE_CHECKING:
    from effjax.report import Column, Study

_ABOUT = """\
Puts finished runs side by side: mean and standard deviation over seeds. Runs whose configs differ
in nothing but the seed are averaged. With --out, writes a folder: Markdown, LaTeX, CSV, JSON,
figures (PNG, SVG, PDF) and index.html, with the Pareto front, hypervolumes, tests against a
baseline, training curves and what every layer was compressed to.
"""
_NOT_RESULTS = {"name", "series", "seed", "part", "layers", "folder", "experiment"}
_BEST = {
    "accuracy": "max",
    **dict.fromkeys(("loss", "error", "perplexity", "bytes", "macs", "flops"), "min"),
    **dict.fromkeys(("parameters", "nonzeros", "latency", "seconds", "remaining"), "min"),
}
_QUALITIES = ("accuracy", "error", "perplexity", "loss")
_COSTS = ("bytes", "effective_macs", "macs", "flops", "remaining", "parameters", "latency")
_UNITS = {  # key: label, format, scale
    "bytes": ("stored size (KB)", ",.1f", 1e-3),
    "latency": ("latency (ms)", ".3g", 1e3),
    **{key: (key.replace("_", " "), ",.0f", 1.0) for key in ("parameters", "nonzeros", "macs")},
}
_ALSO = {"kb": "bytes", "size": "bytes", "params": "parameters", "ms": "latency"}


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
    declared = _declared(found)
    up = _axis("quality", quality, _QUALITIES, rows, declared)
    across = _axis("cost", cost, _COSTS, rows, declared)
    keys = list(columns) if columns else _default_keys(rows, declared, (up, across))
    for axis in (up, across):
        lacking = [row["name"] for row in rows if axis and row.get(axis.key) is None]
        if axis and lacking:
            names = ", ".join(dict.fromkeys(lacking))
            notes.append(f"Without {axis.key!r}, and so not in the figure: {names}.")
    training = read_trainings(rows, up, curve)
    baseline = baseline or next(
        (run.summary["baseline"] for run in found if "baseline" in run.summary), None
    )
    if baseline is not None and len({run.record.get("experiment") for run in found}) > 1:
        series = dict.fromkeys(row["series"] for row in rows)
        baseline = next((name for name in series if name.endswith(f": {baseline}")), baseline)
    study = Study(
        rows=rows,
        columns=[_column(key, rows, declared) for key in keys],
        quality=up,
        cost=across,
        baseline=baseline,
        curves=training.curves,
        curve=training.curve,
        title=title,
        notes=[*notes, *training.notes],
    )
    return study, found


def _write(out: str | Path, study: "Study", runs: Sequence[Finished]) -> Path:
    from effjax.report import write_report

    sources = {
        run.label: run.summary.get("provenance") or run.record.get("provenance", {}) for run in runs
    }
    short = brief(*sources.values())
    now = provenance()
    return write_report(out, study, short, {**sources, "this report": now})


def _declared(runs: Sequence[Finished]) -> "dict[str, Column]":
    """The columns that summaries declare, the first of a key."""
    from effjax.report import Column

    found: dict[str, Column] = {}
    for run in runs:
        for entry in run.summary.get("columns", []):
            try:
                column = Column(**entry)
            except TypeError as error:
                raise RunError(
                    f"{run.path / 'summary.json'} declares a column {entry!r} that is none: "
                    f"{error}. A column has {list(Column._fields)}."
                ) from error
            found.setdefault(column.key, column)
    return found


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of results that are a number in some row."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in _NOT_RESULTS)
    return [key for key in keys if any(is_number(row.get(key)) for row in rows)]


def _default_keys(
    rows: Sequence[Mapping[str, Any]],
    declared: "Mapping[str, Column]",
    axes: "Sequence[Column | None]",
) -> list[str]:
    known = _numbers(rows)
    shared = [key for key in known if all(is_number(row.get(key)) for row in rows)]
    quality, cost = ([axis.key] if axis else [] for axis in axes)
    chosen = [key for key in declared if key in known] or shared
    if len({row["experiment"] for row in rows}) > 1:  # what one alone has is no comparison
        chosen = [
            key
            for key in chosen
            if len({row["experiment"] for row in rows if is_number(row.get(key))}) > 1
        ]
    if not (chosen or quality or cost):
        raise RunError(
            f"these runs have no result in common; choose some with --columns: {', '.join(known)}."
        )
    first = [key for key in quality if key not in chosen]
    return list(dict.fromkeys([*first, *chosen, *cost]))


def _axis(
    role: str,
    asked: str | None,
    usual: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    declared: "Mapping[str, Column]",
) -> "Column | None":
    """The column of quality or cost, with its better end; None where none is asked or known."""
    known = _numbers(rows)
    if asked is None:
        end = "max" if role == "quality" else "min"
        exact = [key for key in usual if key in known]
        near = [key for word in usual for key in known if word in key.replace(" ", "_")]
        said = [key for key in known if key in declared and declared[key].best == end]
        found = next(iter([*exact, *near, *said]), None)
    else:
        found = asked if asked in known else _ALSO.get(asked.lower(), asked)
    if found is None:
        return None
    if found not in known:
        near = difflib.get_close_matches(str(asked), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RunError(f"no run has the {role} {asked!r}.{hint} There are: {', '.join(known)}.")
    column = _column(found, rows, declared)
    usually: Any = "max" if role == "quality" else "min"
    return column._replace(best=column.best or _better(found) or usually)


def _column(
    key: str, rows: Sequence[Mapping[str, Any]], declared: "Mapping[str, Column]"
) -> "Column":
    from effjax.report import Column

    if key in declared:
        return declared[key]
    best = _better(key)
    if key in _UNITS:
        label, form, scale = _UNITS[key]
        return Column(key, label, form, best, scale)
    return Column(key, key, ".4g", best)


def _better(key: str) -> Any:
    """Which end is better, as far as a key's words say."""
    return next((end for word, end in _BEST.items() if word in key), None)
