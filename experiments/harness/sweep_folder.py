"""The folder of a sweep: what it is, which of its runs are finished, and which failed.

runs/sweeps/<id>/sweep.json           experiment, grid and runs
                /<experiment>/<id>/   the folder of each run, as it always is
                /table.csv            all finished runs
                /claims/, failed/     who does which run; what did not end well
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness.claims import Claims
from experiments.harness.config import config_hash, difference
from experiments.harness.errors import RunError
from experiments.harness.grid import Grid
from experiments.harness.provenance import provenance, write_json
from experiments.harness.runs import check_name, default_id, read_json


class Point(NamedTuple):
    """One run of a sweep."""

    id: str
    values: dict[str, Any]  # of the swept fields
    config: Any

    @property
    def label(self) -> str:
        """The swept fields' values, for a message."""
        return ", ".join(f"{name}={value}" for name, value in self.values.items())


class Sweep:
    """A sweep's folder. Make it with `open_sweep`."""

    def __init__(self, path: Path, experiment: str, points: list[Point]):
        self.path, self.experiment, self.points = path, experiment, points
        self.claims = Claims(path / "claims")
        self._finished: dict[str, dict[str, Any]] = {}

    def folder(self, point: Point) -> Path:
        """A run's folder."""
        return self.path / self.experiment / point.id

    def summary(self, point: Point) -> dict[str, Any] | None:
        """What a finished run left, None where it is not finished.

        Raises:
          RunError: files that are half written, or that another run wrote.
        """
        if point.id not in self._finished:
            folder = self.folder(point)
            found = read_json(folder / "summary.json")
            if found is None:
                return None
            record = read_json(folder / "config.json")
            if record is None:
                raise RunError(f"{folder} has a summary.json, but no config.json: move it away.")
            if changed := difference(record.get("config", {}), point.config):
                raise RunError(f"{folder} is another config's run ({changed}): move it away.")
            self._finished[point.id] = found
        return self._finished[point.id]

    def finished(self, point: Point) -> bool:
        """Whether a run is finished; one whose files cannot be read is not."""
        try:
            return self.summary(point) is not None
        except RunError:
            return False

    def failure(self, point: Point) -> dict[str, Any] | None:
        """The record of a run's last failure, where it has not succeeded since."""
        return read_json(self.path / "failed" / f"{point.id}.json")

    def note(self, point: Point, error: str | None) -> None:
        """Writes down that a run failed; None takes the note away."""
        path = self.path / "failed" / f"{point.id}.json"
        if error is None:
            path.unlink(missing_ok=True)
        else:
            write_json(path, {**point.values, "error": error, "time_ns": time.time_ns()})


def open_sweep(root: Path, experiment: str, grid: Grid, id: str | None = None) -> Sweep:
    """The folder of a sweep: made, or found again to go on.

    Args:
      root: where runs are; the folder is below `root`/sweeps.
      id: the folder's name; by default the experiment and the grid's hash.

    Raises:
      RunError: the folder holds another grid's sweep, or a file of it is half written; two runs
        have one id.
    """
    asked: dict[str, Any] = {"experiment": experiment, "over": grid.over, "base": grid.base}
    points = [
        Point(default_id(config), values, config)
        for values, config in zip(grid.points, grid.configs, strict=True)
    ]
    id = id or f"{experiment}-{config_hash(asked)}"
    check_name(id, "a sweep's id")
    path = (root / "sweeps" / id).absolute()
    sweep = Sweep(path, experiment, points)
    with sweep.claims.claim("sweep", wait=True):
        before = read_json(path / "sweep.json")
        if before is None:
            record = asked | {"config_hash": config_hash(asked), "provenance": provenance(asked)}
            record["runs"] = [{"id": p.id, **p.values} for p in points]
            write_json(path / "sweep.json", record)
        elif changed := difference(_flat(before), _flat(asked)):
            raise RunError(
                f"{path} is another sweep ({changed}). Give this one another --id, leave --id out, "
                "or move the folder away."
            )
    _check_ids(sweep)
    return sweep


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """What a sweep is, one entry a field, for a message that says what differs."""
    over = {f"--over {name}": values for name, values in record.get("over", {}).items()}
    return {"experiment": record.get("experiment"), **over, **record.get("base", {})}


def _check_ids(sweep: Sweep) -> None:
    by_id: dict[str, Point] = {}
    for point in sweep.points:
        if (other := by_id.setdefault(point.id, point)) is not point:
            raise RunError(
                f"{point.label} and {other.label} are one run, {point.id}; leave one out."
            )
    for config in sorted((sweep.path / sweep.experiment).glob("*/config.json")):
        folder = config.parent
        try:
            id = (read_json(config) or {}).get("id")
        except RunError:
            continue  # half written: told where the run is done
        if id != folder.name:
            raise RunError(
                f"{folder} holds the run {id}, whose folder is {folder.parent / str(id)}: two runs "
                "with one id. Move the copy out of the sweep's folder."
            )
