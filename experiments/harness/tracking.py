"""Metrics to experiment trackers: `--track tensorboard wandb mlflow`.

metrics.jsonl is what a run has; trackers are handed copies of its lines. A writer says which step
it has come to, so that a run that goes on from a checkpoint logs no step twice, and one that is
tracked late is caught up with.
"""

import contextlib
import importlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from experiments.harness.errors import UsageError
from experiments.harness.provenance import write_json
from experiments.harness.runs import Run, read_json

_chosen: ContextVar[tuple[str, ...]] = ContextVar("chosen_trackers", default=())


class Writer(Protocol):
    """Where the metrics of one run are written.

    last: the last step that it has, -1 for none; steps up to it are not handed to it again.
    """

    last: int

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes all metrics of one step; steps come in order, each once."""

    def close(self) -> None:
        """Brings everything to where it belongs."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`.

    They cannot be cut back to a checkpoint as metrics.jsonl can, so they are written anew from it.
    """

    def __init__(self, run: Run):
        from tensorboardX import SummaryWriter

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self.last = -1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run in the project `effjax`; WANDB_PROJECT, WANDB_MODE... are heeded."""

    def __init__(self, run: Run):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "effjax"),
            name=run.label,
            id=_remembered(run, "wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            config=run.config,
            dir=str(run.path),
        )
        self.last = self._run.starting_step - 1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run in the experiment `effjax`, where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: Run):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self._id = _remembered(run, "mlflow", lambda: self._create(run))
        self._client.update_run(self._id, status="RUNNING")
        names = self._client.get_run(self._id).data.metrics
        known = [m.step for n in names for m in self._client.get_metric_history(self._id, n)]
        self.last = max(known, default=-1)

    def _create(self, run: Run) -> str:
        found = self._client.get_experiment_by_name("effjax")
        experiment = found.experiment_id if found else self._client.create_experiment("effjax")
        created = self._client.create_run(experiment, run_name=run.label).info.run_id
        for name, value in run.config.items():
            self._client.log_param(created, name, value)
        return created

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(n, x, now, step) for n, x in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


# By name: the package that is imported, what pip installs, and the writer.
WRITERS: dict[str, tuple[str, str, Callable[[Run], Writer]]] = {
    "tensorboard": ("tensorboardX", "-e '.[tracking]'", TensorBoard),
    "wandb": ("wandb", "wandb", WandB),
    "mlflow": ("mlflow", "mlflow", MLflow),
}


@contextlib.contextmanager
def track_to(names: Sequence[str]) -> Iterator[None]:
    """Within this, `fit` hands its metrics to these trackers too: the command line's `--track`.

    Raises:
      UsageError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in WRITERS:
            raise UsageError(f"--track {name}: there is {', '.join(WRITERS)}.")
        package, installed, _ = WRITERS[name]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(
                f"--track {name} needs the package {package}: pip install {installed}"
            ) from error
    token = _chosen.set(tuple(dict.fromkeys(names)))
    try:
        yield
    finally:
        _chosen.reset(token)


class Tracker:
    """Hands the records of a run to its writers, each step once and whole."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers
        self._held: dict[str, Any] = {}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes lines of metrics.jsonl; a step's are held back until the next step begins."""
        for record in records:
            if self._held and self._held["step"] != record["step"]:
                self._hand()
            self._held |= record

    def close(self) -> None:
        """Hands over the last step, and closes the writers."""
        if self._held:
            self._hand()
        for writer in self._writers:
            writer.close()

    def _hand(self) -> None:
        step, held = self._held.pop("step"), self._held
        # JSON has null for what is not finite.
        metrics = {n: math.nan if x is None else float(x) for n, x in held.items()}
        for writer in self._writers:
            if step > writer.last:
                writer.write(step, metrics)
        self._held = {}


@contextlib.contextmanager
def tracked(run: Run) -> Iterator[Tracker]:
    """A tracker of a run, which has been handed what the run's metrics.jsonl has."""
    with contextlib.ExitStack() as stack:
        tracker = Tracker([WRITERS[name][2](run) for name in _chosen.get()])
        stack.callback(tracker.close)
        if _chosen.get():
            tracker.append(run.metrics.read())
        yield tracker


def _remembered(run: Run, tracker: str, make: Callable[[], str]) -> str:
    """The tracker's id of a run: made once, and found again when the run goes on."""
    path = run.path / "tracking.json"
    known = read_json(path) or {}
    if tracker not in known:
        known[tracker] = make()
        write_json(path, known)
    return known[tracker]
