"""Finished runs, found by path, name or pattern, and put together as rows of results.

A run's summary.json holds, beside what an experiment keeps for itself:

| key | value |
|---|---|
| `rows` | one object a trained model; without it, the summary's own numbers are the one row |
| `columns` | how to show results: `[Column._asdict(), ...]` of `effjax.report`; optional |
| `baseline` | the name or series to compare the others with; optional |
| `config`, `provenance` | written by `Run.finish` |

and a row:

| key | value |
|---|---|
| `name` | what was trained: rows of one name differ in nothing but the seed |
| `seed` | an integer; by default the config's |
| `series` | names that belong together, as one method at several sparsities; by default the name |
| `part` | the folder below the run's with its metrics.jsonl; by default the run's own |
| `layers` | `{path: {"sparsity": 0.8, "bits": 8}}`, optional |
| any other | a result, where it is a number |
"""

import glob
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness.config import difference
from experiments.harness.errors import RunError
from experiments.harness.runs import read_json, read_metrics, runs_root

# Fields of a config that say which seeds are run and what is kept: not what is run.
SEEDS = ("seed", "seeds", "save")
_NOT_RESULTS = {"config", "provenance", "seed", "step", "seconds"}


class Finished(NamedTuple):
    """A run that is finished: its folder, config.json and summary.json."""

    path: Path
    record: dict[str, Any]
    summary: dict[str, Any]

    @property
    def label(self) -> str:
        """Experiment and id."""
        return f"{self.record.get('experiment', '?')}/{self.record.get('id', self.path.name)}"


def find_runs(words: Iterable[str | Path]) -> list[Path]:
    """The run folders that words mean, each once: folders of runs or with runs below them, names of
    experiments below $EFFJAX_RUNS, and patterns of either.

    Raises:
      RunError: no words, or a word without runs.
    """
    words = list(words)
    if not words:
        raise RunError("there are no runs to report on: name run folders or experiments.")
    return list(dict.fromkeys(run for word in words for run in _meant(str(word))))


def _meant(word: str) -> list[Path]:
    for place in (Path(), runs_root()):
        paths = [place / word] if (place / word).exists() else []
        paths = paths or [Path(p) for p in sorted(glob.glob(str(place / word)))]
        if found := [run for path in paths for run in _below(path.resolve())]:
            return found
    known = sorted(p.name for p in runs_root().glob("*") if p.is_dir())
    here = f" There, runs of {', '.join(known)} are found." if known else ""
    raise RunError(
        f"{word} is no run's folder, nor one that has runs: there is no config.json. Runs are in "
        f"runs/NAME/ID, or below $EFFJAX_RUNS; this is {runs_root().resolve()}.{here}"
    )


def _below(path: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(path):
        if "config.json" in files:
            inside.clear()  # what is in a run's folder is the run's
            yield Path(folder)
        inside.sort()


def read_runs(
    paths: Iterable[Path], *, skip_unfinished: bool = False
) -> tuple[list[Finished], list[str]]:
    """Reads runs; copies of one run count once. Returns them, and what was left out, in words.

    Raises:
      RunError: a run that is not finished, unless those are to be skipped; two runs of one
        experiment and id with different contents; no run left.
    """
    found: dict[str, Finished] = {}
    unfinished, notes = [], []
    for path in paths:
        record, summary = read_json(path / "config.json") or {}, read_json(path / "summary.json")
        if summary is None:
            unfinished.append(_unfinished(path, record))
            continue
        run = Finished(path, record, summary)
        before = found.setdefault(run.label, run)
        if before is run:
            continue
        if changed := _changed(before, run):
            raise RunError(
                f"two runs are {run.label}, but differ in {changed}:\n  {before.path}\n  {path}\n"
                "Leave one out, or run one of them again with another --id."
            )
        notes.append(f"{path} is a copy of {before.path}, and counts once.")
    if unfinished and not skip_unfinished:
        hint = "Or report on the finished ones alone: --skip-unfinished."
        raise RunError("\n".join([*unfinished, hint]))
    if not found:
        raise RunError("\n".join([*unfinished, "No run is left to report on."]))
    return list(found.values()), [*notes, *(f"Left out: {text}" for text in unfinished)]


def _unfinished(path: Path, record: Mapping[str, Any]) -> str:
    logs = [read_metrics(log) for log in path.rglob("metrics.jsonl")]
    steps = [log[-1].get("step") for log in logs if log]
    far = f" (trainings begun: {len(steps)}, last one at step {steps[-1]})" if steps else ""
    command = _command(path, record)
    again = f"Finish it with\n  {command}" if command else "Run it to its end."
    return f"{path} is not finished: it has no summary.json{far}. {again}"


def _command(path: Path, record: Mapping[str, Any]) -> str:
    """What was typed to begin a run; "" where that is not known."""
    words = record.get("command") or []
    if len(words) < 2 or Path(words[0]).name != "__main__.py":
        return ""
    root = path.parents[1]
    before = "" if root == runs_root().resolve() else f"EFFJAX_RUNS={shlex.quote(str(root))} "
    return f"{before}python -m experiments {shlex.join(words[1:])}"


def _changed(a: Finished, b: Finished) -> str:
    if changed := difference(a.record.get("config", {}), b.record.get("config", {})):
        return f"their configs ({changed})"
    keep = ({k: v for k, v in run.summary.items() if k != "provenance"} for run in (a, b))
    one, other = keep
    names = [n for n in {**one, **other} if one.get(n, ...) != other.get(n, ...)]
    return f"what came out ({', '.join(names)})" if names else ""


def read_rows(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """The runs' rows, each with its "name", "series", "seed", "experiment", and the "folder" of its
    metrics.

    Where configs of one experiment differ in more than seeds, names tell in what; where there are
    several experiments, names tell which.

    Raises:
      RunError: a row without a name; one name and seed in two runs.
    """
    several = len({run.record.get("experiment") for run in runs}) > 1
    owner: dict[tuple[str, Any], Finished] = {}
    rows = []
    for run in runs:
        tag = _tag(run, runs)
        experiment = str(run.record.get("experiment", run.path.parent.name))
        for row in _own_rows(run, experiment):
            before = f"{experiment}: " if several and "rows" in run.summary else ""
            name, series = (before + str(row.get(key, row["name"])) for key in ("name", "series"))
            row = {"seed": run.record.get("config", {}).get("seed", 0), **row}
            row |= {"name": f"{name}, {tag}" if tag else name, "series": series}
            row |= {"folder": run.path / row.get("part", ""), "experiment": experiment}
            rows.append(row)
            other = owner.setdefault((row["name"], row["seed"]), run)
            if other is not run:
                raise RunError(
                    f"seed {row['seed']} of {row['name']!r} is in two runs, and a mean over both "
                    f"would count it twice:\n  {other.path}\n  {run.path}\nLeave one out."
                )
    return rows


def _own_rows(run: Finished, experiment: str) -> list[dict[str, Any]]:
    if "rows" not in run.summary:
        found = {k: v for k, v in run.summary.items() if k not in _NOT_RESULTS and is_number(v)}
        return [{"name": experiment, **found}]
    rows = run.summary["rows"]
    if not rows or not all(isinstance(row, Mapping) and "name" in row for row in rows):
        raise RunError(
            f"{run.path / 'summary.json'} has rows without a name, or none: another version wrote "
            f"it. The same command again writes it anew:\n  {_command(run.path, run.record)}"
        )
    return [dict(row) for row in rows]


def _tag(run: Finished, runs: Sequence[Finished]) -> str:
    """In which fields a run's config differs from those of its experiment's other runs."""
    mine = run.record.get("config", {})
    same = [r for r in runs if r.record.get("experiment") == run.record.get("experiment")]
    configs = [r.record.get("config", {}) for r in same]
    fields = dict.fromkeys(field for config in configs for field in config if field not in SEEDS)
    differing = [f for f in fields if len({json.dumps(c.get(f)) for c in configs}) > 1]
    return ", ".join(f"{field}={mine[field]}" for field in differing if field in mine)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
