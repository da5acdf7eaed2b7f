"""Several runs of one experiment as a population: one program, side by side.

An experiment offers it with two names in its module:

    TOGETHER = ("seed", "sparsity")   the fields in which runs of one program may differ
    def train_together(configs): ...  trains them, with `fit_together`

What is left to do is `run(config)` of each, which finds its training finished.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

import effjax as ej
from effjax.checkpoint import Checkpoints
from experiments.harness.config import as_dict
from experiments.harness.errors import ConfigError, UsageError
from experiments.harness.loop import fit
from experiments.harness.runs import Run, runs_root
from experiments.harness.tracking import track_to, tracked

MOST = 16

HasConfig = TypeVar("HasConfig", bound=Any)


def plan(
    module: Any, points: Sequence[HasConfig], most: int | None = None
) -> list[list[HasConfig]]:
    """Points in groups whose configs agree in all but the fields that may differ.

    Args:
      module: an experiment's; without `TOGETHER` every point is a group of its own.
      points: have a `config`.
      most: in a group; by default 1 on CPU, where one program after another is faster than one for
        all, and 16 elsewhere.

    Raises:
      UsageError: `most` is more than 1, and the experiment does not offer it.
    """
    fields = getattr(module, "TOGETHER", None)
    if fields is None and most is not None and most > 1:
        raise UsageError(f"{module.__name__} cannot run several configs together (no TOGETHER).")
    if most is None:
        most = 1 if jax.default_backend() == "cpu" else MOST
    if most < 1:
        raise UsageError(f"--together is {most}; give a number of runs, 1 or more.")
    groups: dict[str, list[HasConfig]] = {}
    for number, point in enumerate(points):
        same = {n: v for n, v in as_dict(point.config).items() if n not in (fields or ())}
        key = json.dumps(same, sort_keys=True) if fields is not None else str(number)
        groups.setdefault(key, []).append(point)
    return [g[i : i + most] for g in groups.values() for i in range(0, len(g), most)]


def train_together(module: Any, configs: Sequence[Any]) -> None:
    """The module's `train_together`, for configs that agree in all other fields."""
    others = {
        json.dumps(
            {n: v for n, v in as_dict(c).items() if n not in module.TOGETHER}, sort_keys=True
        )
        for c in configs
    }
    if len(others) > 1:
        raise ConfigError(f"these configs differ in more than {', '.join(module.TOGETHER)}.")
    module.train_together(configs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Side:
    """K runs' batches of a step, from one data set: every leaf [K, ...]."""

    batches: Any
    keys: Array

    def __call__(self, step: Array) -> Any:
        return jax.vmap(lambda key: dataclasses.replace(self.batches, key=key)(step))(self.keys)


def fit_together(
    runs: Sequence[Run],
    build: Callable[[Any], ej.Run],
    hypers: Mapping[str, Any],
    keys: Array,
    batches: Any,
    batch_keys: Array,
    *,
    steps: int,
    evaluate: Sequence[Callable[[ej.TrainState], Mapping[str, Any]]] = (),
    **how: Any,
) -> None:
    """Trains K runs as one program; each folder is left as `fit` leaves it after the last step.

    Each run has its own metrics.jsonl, and one checkpoint, of its last step. Killed, and called
    again for the same runs, it goes on from the newest checkpoint of all. Results equal those of
    single runs to rounding. Runs whose training is finished are left alone.

    Args:
      runs: their folders.
      build: from traced hyper-parameters to functions; see `effjax.population`.
      hypers: {name: [K] array or list}.
      keys: [K], for `init`.
      batches: a `Batches`, whose data all runs share.
      batch_keys: [K], which choose the orders.
      evaluate: [K] or none, each run's `state -> {name: number}`.
      how: `eval_every`, `checkpoint_every`, `log_every` of `fit`.

    Raises:
      DivergedError: one of them diverged.
    """
    left = [k for k, run in enumerate(runs) if steps not in _saved(run)]
    if not left:
        return
    values = {name: jnp.asarray(v) for name, v in hypers.items()}
    side = _Side(batches, batch_keys)
    many = ej.population(build, values, "vmap", batch_axis=0)

    def step(states: Any, batch: Any, hypers: Any) -> Any:
        states, metrics = many.step(states, batch, None, hypers)
        named = {f"{k}/{n}": x[k] for n, x in metrics.items() for k in range(many.size)}
        return states, {"loss": jnp.mean(metrics["loss"]), **named}

    def evaluate_all(states: Any) -> dict[str, Any]:
        found = [own(many.member(states, k)) for k, own in enumerate(evaluate)]
        return {f"{k}/{n}": x for k, own in enumerate(found) for n, x in own.items()}

    whole = _folder(runs)
    states = many.init(keys, side(jnp.int32(0)))
    with track_to(()):  # each run is tracked by itself, below
        fitted = fit(
            whole, step, states, side, steps=steps, frozen=values, evaluate=evaluate_all, **how
        )
    records = whole.metrics.read()
    for k, run in enumerate(runs):
        if k not in left:
            continue
        run.metrics.rewind(0)
        run.metrics.append(_own(records, f"{k}/"))
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        with Checkpoints(run.checkpoints) as checkpoints:
            position = {"metrics_bytes": run.metrics.position()}
            checkpoints.save(steps, many.member(fitted.state, k), position)
        with tracked(run):
            pass  # all that it has is handed over
    shutil.rmtree(whole.path)


def _own(records: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """One run's lines of those of all."""
    own = []
    for record in records:
        found = {n.removeprefix(prefix): x for n, x in record.items() if n.startswith(prefix)}
        own.append({"step": record["step"], **found})
    return own


def _saved(run: Run) -> list[int]:
    if not run.checkpoints.exists():
        return []
    with Checkpoints(run.checkpoints) as checkpoints:
        return checkpoints.steps()


def _folder(runs: Sequence[Run]) -> Run:
    """Where the runs are trained: a folder for this very set of them."""
    labels = [run.label for run in runs]
    name = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:12]
    path: Path = runs_root() / "together" / name
    path.mkdir(parents=True, exist_ok=True)
    return Run(path, runs[0].config, f"{labels[0]} and {len(labels) - 1} more")
