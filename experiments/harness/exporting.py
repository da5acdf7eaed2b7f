"""Export of finished runs: files for engines, with the accuracy that they have on the test set.

    python -m experiments export runs/train/ID --to onnx litert stablehlo

An experiment whose runs can be exported has a function `trained(path, config) -> Trained`, which
restores what the run in a folder left. The files go to the run's folder, "export/", with the test
images beside them, and "export.json" says what was measured.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.checkpoint import Checkpoints
from effjax.core import Apply, PyTree, Transform
from effjax.export.verify import FORMATS, Deployed, deploy, engine
from effjax.quantize.freeze import freeze
from effjax.quantize.frozen import Frozen
from effjax.step import TrainState
from experiments.harness.catalog import entries
from experiments.harness.errors import RunError, UsageError
from experiments.harness.progress import say
from experiments.harness.provenance import provenance, write_json
from experiments.harness.runs import read_json, runs_root

SUFFIXES = {kind: suffix for suffix, kind in FORMATS.items()}


class Trained(NamedTuple):
    """What a finished run left, for export.

    calibration: batches of the training split.
    test: {"image": float32 as the model takes it, "label": int32}, the whole test split.
    accuracy: of evaluation under the transform, on the test split.
    """

    apply: Apply
    transform: Transform
    state: TrainState
    calibration: list[PyTree]
    test: dict[str, np.ndarray]
    accuracy: float


def main(words: Sequence[str]) -> int:
    """The command `export`."""
    parser = argparse.ArgumentParser(prog="python -m experiments export", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of finished runs, or experiment/id")
    parser.add_argument("--to", nargs="+", choices=list(SUFFIXES), default=list(SUFFIXES))
    parser.add_argument("--batch", type=int, help="the only size of batch; by default any")
    own = parser.parse_intermixed_args(list(words))
    for run in own.runs:
        export(_folder(run), own.to, own.batch)
    return 0


def export(path: Path, formats: Sequence[str], batch: int | None = None) -> dict[str, Any]:
    """Exports one run; returns what export.json says."""
    found = restored(path)
    frozen = freeze(found.apply, found.transform, found.state, found.calibration)
    folder = path / "export"
    accuracy = {"evaluation": found.accuracy}
    accuracy["frozen"] = score(frozen_call(frozen), found.test, 500)
    say(f"{path}: evaluation {found.accuracy:.2%}, frozen {accuracy['frozen']:.2%}")
    rows = {}
    for kind in formats:
        file = folder / f"model{SUFFIXES[kind]}"
        row = deploy(frozen, file, batch=batch)
        size = batch or (1 if kind == "litert" else 500)
        accuracy[kind] = score(engine(file), found.test, size)
        rows[kind] = _record(row)
        say(
            f"{file}: {accuracy[kind]:.2%}, {row.nbytes:,} bytes ({row.integers:,} in integers), "
            f"{row.seconds * 1e3:.3g} ms for {row.batch}, integer kernels {row.integer_kernels}"
        )
    np.savez_compressed(folder / "test.npz", **found.test)  # type: ignore[arg-type]
    record = {"accuracy": accuracy, "files": rows, "distance": frozen.distance._asdict()}
    write_json(folder / "export.json", {**record, "provenance": provenance({"run": str(path)})})
    return record


def restored(path: Path) -> Trained:
    """What the run in a folder left.

    Raises:
      RunError: no run's folder, or one of an experiment whose runs are not exported.
    """
    record = read_json(path / "config.json")
    if record is None:
        raise RunError(f"{path} is no run's folder: there is no config.json in it.")
    module = importlib.import_module(f"experiments.{record['experiment']}")
    if not hasattr(module, "trained"):
        names = [e.name for e in entries() if "def trained(" in e.path.read_text()]
        raise RunError(
            f"runs of {record['experiment']!r} leave no one model to export; those of {names} do. "
            "Other models are exported in Python: ej.quantize.freeze, then "
            "effjax.export.verify.deploy."
        )
    known = {field.name for field in fields(module.Config)}
    return module.trained(
        path, module.Config(**{n: x for n, x in record["config"].items() if n in known})
    )


def restore(checkpoints: Path, state: TrainState, steps: int) -> TrainState:
    """The last state of a training that is finished.

    Raises:
      RunError: it is not.
    """
    with Checkpoints(checkpoints) as saved:
        if steps not in saved.steps():
            have = saved.steps() or "none"
            raise RunError(
                f"{checkpoints} has no checkpoint of step {steps}, the last; it has {have}. Give "
                "the run's command again to finish it, then export."
            )
        return saved.restore(state).tree


def frozen_call(frozen: Frozen) -> Callable[[Any], Any]:
    """The frozen model as a function of its inputs."""
    run = jax.jit(frozen.apply)
    return lambda inputs: run(frozen.weights, inputs)


def score(call: Callable[[Any], Any], test: dict[str, np.ndarray], size: int) -> float:
    """The accuracy on a test split, in batches of one size; the last is filled up."""
    return float(np.mean(predictions(call, test["image"], size) == test["label"]))


def predictions(call: Callable[[Any], Any], images: np.ndarray, size: int) -> np.ndarray:
    """The classes of images, in batches of one size; the last is filled up."""
    found = []
    for start in range(0, len(images), size):
        some = images[start : start + size]
        filled = np.concatenate([some, np.repeat(some[:1], size - len(some), axis=0)])
        (outputs,) = jax.tree.leaves(call({"image": filled}))
        found.append(np.argmax(np.asarray(outputs)[: len(some)], -1))
    return np.concatenate(found)


def _record(row: Deployed) -> dict[str, Any]:
    plain = {**row._asdict(), "path": row.path.name, "distance": row.distance._asdict()}
    return plain


def _folder(run: str) -> Path:
    for path in (Path(run), runs_root() / run):
        if path.is_dir():
            return path
    raise UsageError(
        f"there is no run {run!r}, neither as a folder nor below {runs_root()}. Give the folder "
        "that a finished run printed, such as runs/train/ID."
    )
