"""The folder of a run: its config, metrics, checkpoints and summary.

    runs/<experiment>/<id>/config.json        what was asked, and where it was begun
                          /metrics.jsonl      one JSON object a line, each with its "step"
                          /checkpoints/       see effjax.checkpoint
                          /summary.json       what came out

The environment variable EFFJAX_RUNS puts `runs` elsewhere.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from experiments.harness.config import as_dict, config_hash, difference
from experiments.harness.errors import RunError
from experiments.harness.progress import say
from experiments.harness.provenance import provenance, write_json

_chosen_id: ContextVar[str | None] = ContextVar("chosen_id", default=None)
_root: ContextVar[Path | None] = ContextVar("root", default=None)
# Locks belong to the process: a notebook may open its own run again.
_locks: dict[Path, int] = {}


def runs_root() -> Path:
    """Where run folders are: $EFFJAX_RUNS, else `runs` in the working directory."""
    return _root.get() or Path(os.environ.get("EFFJAX_RUNS") or "runs")


@contextlib.contextmanager
def runs_below(root: Path) -> Iterator[None]:
    """Within this, runs are below another folder; at its end they are free for other processes."""
    root = root.absolute()
    token = _root.set(root)
    try:
        yield
    finally:
        _root.reset(token)
        for path in [path for path in _locks if path.is_relative_to(root)]:
            os.close(_locks.pop(path))


def default_id(config: Any) -> str:
    """The folder's name where none is chosen: the config's hash and seed."""
    plain = as_dict(config)
    return f"{config_hash(plain)}-seed{plain.get('seed', 0)}"


@contextlib.contextmanager
def run_id(name: str | None) -> Iterator[None]:
    """Within this, `open_run` uses this id where it is given none: the command line's `--id`."""
    token = _chosen_id.set(name)
    try:
        yield
    finally:
        _chosen_id.reset(token)


class Run:
    """One run's folder. Make it with `open_run`."""

    def __init__(self, path: Path, config: dict[str, Any], label: str):
        self.path = path
        self.config = config
        self.label = label
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.checkpoints = path / "checkpoints"

    @property
    def config_hash(self) -> str:
        """The config's hash, without its seed."""
        return config_hash(self.config)

    def part(self, name: str) -> "Run":
        """A part of this run (one of several trainings) with metrics, checkpoints and summary of
        its own, in a subfolder."""
        check_name(name, "a run's part")
        (self.path / name).mkdir(exist_ok=True)
        return Run(self.path / name, self.config, f"{self.label}/{name}")

    def finish(self, results: Mapping[str, Any]) -> Path:
        """Writes summary.json: the results, and where they come from."""
        path = self.path / "summary.json"
        write_json(path, {**results, "config": self.config, "provenance": provenance(self.config)})
        return path

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None where the run has not come that far."""
        return read_json(self.path / "summary.json")


def open_run(experiment: str, config: Any, *, id: str | None = None) -> Run:
    """The folder of a run: made, or found again to go on from.

    Args:
      experiment: "quickstart", "bench.prune".
      config: a dataclass or dict; its `seed` tells runs of the same config apart.
      id: the folder's name; by default the config's hash and seed, so that the same config finds
        the same folder.

    Raises:
      RunError: the folder holds another config's run, or another process is using it.
    """
    plain = as_dict(config)
    id = id or _chosen_id.get() or default_id(plain)
    check_name(id, "a run's id")
    path = runs_root() / experiment / id
    path.mkdir(parents=True, exist_ok=True)
    _lock(path)
    before = read_json(path / "config.json")
    if before is None:
        record = {"experiment": experiment, "id": id, "config": plain}
        record |= {"command": sys.argv, "provenance": provenance(plain)}
        write_json(path / "config.json", record)
    elif before.get("experiment") != experiment or before.get("config") != plain:
        changed = difference(before.get("config", {}), plain) or (
            f"experiment: {before.get('experiment')!r} -> {experiment!r}"
        )
        raise RunError(
            f"{path} was begun with another config ({changed}). Give this run another --id, leave "
            "--id out, or move the folder away."
        )
    elif changed := _changed(before.get("provenance", {}), provenance()):
        say(
            f"{path} was begun with other code or on another machine ({changed}): what it goes on "
            "to compute may differ in the last bits from a run that was not interrupted."
        )
    return Run(path, plain, f"{experiment}/{id}")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of code, versions and hardware is not as it was, for a message."""
    old, new = (
        {"commit": p.get("commit"), **p.get("versions", {}), **p.get("hardware", {})}
        for p in (before, now)
    )
    return difference(old, new)


class MetricsLog:
    """A file of JSON lines that can be taken back to where a checkpoint was made."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds one line a record, in one write."""
        if records:
            text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
            with open(self.path, "ab") as file:
                file.write(text.encode())

    def position(self) -> int:
        """The file's length in bytes, as `rewind` takes it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, position: int) -> int:
        """Cuts the file back to a position; returns how many bytes it lacked, 0 if none."""
        here = self.position()
        if here > position:
            os.truncate(self.path, position)
        return max(0, position - here)

    def read(self) -> list[dict[str, Any]]:
        """The records; a last line that is not complete yet is left out."""
        return read_metrics(self.path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that is not complete is left out.

    Raises:
      RunError: another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is no line yet
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"line {number} of {path} is not JSON: {line[:60]!r}.") from error
    return records


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's value, or None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(
            f"{path} is not JSON: {error}. Move the folder away to start anew."
        ) from error


def check_name(name: str, what: str) -> None:
    """Raises RunError unless a name can be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name):
        raise RunError(
            f"{name!r} cannot name {what}: use letters, digits and . _ = + -, beginning with a "
            "letter or digit."
        )


def _lock(path: Path) -> None:
    """Takes the folder for this process, until it ends; a killed process leaves no lock behind."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there, two processes in one folder go unnoticed
        return
    path = path.absolute()
    if path in _locks:
        return
    file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise RunError(
            f"{path} is in use by another process. Wait for it, or give another --id."
        ) from error
    _locks[path] = file
