"""`python -m experiments sweep NAME --over sparsity=0.5,0.8 seed=0..4`: a grid of runs."""

import argparse
import csv
import io
from collections.abc import Sequence
from typing import Any

from effjax.report import write_text
from experiments.harness.grid import make_grid, parse_over
from experiments.harness.progress import say
from experiments.harness.runs import runs_root
from experiments.harness.sweep_folder import Sweep, open_sweep
from experiments.harness.workers import work

_DESCRIPTION = """Runs an experiment for all combinations of values. The same command again goes on
with the same sweep, and may be given in several terminals at once, which share the work."""


def main(name: str, module: Any, words: Sequence[str]) -> int:
    """Does a sweep; returns the exit code: 0, or 1 where runs failed.

    Args:
      name: the experiment's.
      module: its module.
      words: `--over`, `--id`, `--together`, and `--FIELD VALUE` for fields that stay the same.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments sweep {name}", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument(
        "--over", nargs="*", action="extend", default=[], metavar="FIELD=VALUES",
        help="values a,b,c or a range of whole numbers 0..4, both ends included; the entries of a "
        "tuple are separated by spaces: 'channels=8 16,16 32'",
    )  # fmt: skip
    parser.add_argument("--id", help="the sweep's folder below runs/sweeps")
    parser.add_argument(
        "--together", type=int, metavar="N",
        help="at most N runs in one program, where the experiment can and other fields agree; by "
        "default 1 on CPU, and 16 elsewhere",
    )  # fmt: skip
    parser.epilog = "Further --FIELD VALUE words fix fields for all runs."
    asked, fixed = parser.parse_known_args(list(words))
    grid = make_grid(module.Config, parse_over(asked.over), fixed, parser.prog)
    sweep = open_sweep(runs_root(), name, grid, asked.id)
    say(f"{len(sweep.points)} runs in {sweep.path}")
    failed = work(sweep, module, asked.together)
    for line in table(sweep):
        print("  ".join(line))
    print(f"table: {sweep.path / 'table.csv'}")
    print(f"report: python -m experiments report {sweep.path / name}")
    for point in sweep.points:
        if point.id in failed:
            say(f"failed: {point.label}: {failed[point.id]}")
    if failed:
        say(f"{len(failed)} of {len(sweep.points)} runs failed; the same command tries them again.")
    return 1 if failed else 0


def table(sweep: Sweep) -> list[list[str]]:
    """Writes table.csv, one line a finished run; returns it as padded columns to print."""
    rows: list[dict[str, Any]] = []
    for point in sweep.points:
        if sweep.finished(point):
            found = sweep.summary(point) or {}
            results = {n: x for n, x in found.items() if isinstance(x, (int, float))}
            rows.append({"id": point.id, **results, **point.values})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(sweep.path / "table.csv", text.getvalue())
    shown = [columns, *([_short(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    return [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in shown]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
