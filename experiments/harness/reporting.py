"""`python -m experiments report`: finished runs side by side in one table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.errors import ExperimentError
from experiments.harness.provenance import provenance
from experiments.harness.runs import read_json

# What a summary has beside its results.
_NOT_RESULTS = {"config", "provenance", "seed", "step"}
_BEST = {"accuracy": "max", "loss": "min", "bytes": "min", "macs": "min", "latency": "min"}


def main(arguments: Sequence[str]) -> int:
    """Prints the table in Markdown, and writes it with `--out`; returns the exit code."""
    from effjax.report import Column, Section, page, summarise

    parser = argparse.ArgumentParser(
        prog="python -m experiments report",
        description="Mean and standard deviation over the seeds of each config, as a table.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders, or an experiment's folder with its runs"
    )
    parser.add_argument("--columns", help="results to show: accuracy,bytes; by default all numbers")
    parser.add_argument("--out", type=Path, help="a folder for table.md, .tex, .csv and index.html")
    asked = parser.parse_args(arguments)
    rows = read_rows(asked.runs)
    keys = asked.columns.split(",") if asked.columns else _shared_numbers(rows)
    columns = [Column(key, key, ".4g", _better(key)) for key in keys]
    table = summarise(rows, columns, heading="run")
    print(table.markdown(), end="")
    if asked.out is not None:
        source = provenance()
        asked.out.mkdir(parents=True, exist_ok=True)
        html = page("Runs", [Section("Results", [table.html()])], provenance=source)
        written = {
            "table.md": table.markdown(source),
            "table.tex": table.latex(source),
            "table.csv": table.csv(source),
            "index.html": html,
        }
        for name, text in written.items():
            (asked.out / name).write_text(text, encoding="utf-8")
    return 0


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of runs as rows, one a name and seed.

    A summary with "rows" (a run of several arms) gives those; another gives one row of its numbers,
    named by its experiment. Where the runs' configs differ, names tell in what.

    Raises:
      ExperimentError: a path that is no run, or a run that is not finished.
    """
    runs = list(dict.fromkeys(run for path in paths for run in _runs(path)))
    found = [(read_json(run / "config.json") or {}, _summary(run)) for run in runs]
    configs = [{k: v for k, v in asked["config"].items() if k != "seed"} for asked, _ in found]
    fields = dict.fromkeys(field for config in configs for field in config)
    differing = [f for f in fields if len({json.dumps(c.get(f)) for c in configs}) > 1]
    rows = []
    for (asked, summary), config in zip(found, configs, strict=True):
        tag = ", ".join(f"{field}={config[field]}" for field in differing if field in config)
        seed = asked["config"].get("seed", 0)
        plain = {k: v for k, v in summary.items() if k not in _NOT_RESULTS and _is_number(v)}
        for row in summary.get("rows") or [{"name": asked["experiment"], "seed": seed, **plain}]:
            rows.append({**row, "name": f"{row['name']}, {tag}" if tag else row["name"]})
    return rows


def _runs(path: Path) -> list[Path]:
    if (path / "config.json").exists():
        return [path.resolve()]
    inside = sorted(p.parent.resolve() for p in path.glob("*/config.json"))
    if not inside:
        raise ExperimentError(
            f"{path} is no run's folder, nor one that has runs: there is no config.json. Runs are "
            "in runs/NAME/ID, or below $EFFJAX_RUNS."
        )
    return inside


def _summary(run: Path) -> dict[str, Any]:
    summary = read_json(run / "summary.json")
    if summary is None:
        raise ExperimentError(f"{run} is not finished: it has no summary.json. Run it to its end.")
    return summary


def _shared_numbers(rows: list[dict[str, Any]]) -> list[str]:
    """The entries that are numbers in every row."""
    keys = [key for key in rows[0] if key not in ("name", "seed")]
    found = [key for key in keys if all(_is_number(row.get(key)) for row in rows)]
    if not found:
        raise ExperimentError("these runs have no result in common; choose some with --columns.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _better(key: str) -> Any:
    return next((best for word, best in _BEST.items() if word in key), None)
