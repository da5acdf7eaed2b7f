"""The training loop: steps, metrics, evaluation, checkpoints; stopped, killed, and gone on with."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.checkpoint import Checkpoints, CheckpointWarning
from experiments.harness.errors import ConfigError, DivergedError, Interrupted
from experiments.harness.finite import broken_leaves, broken_loss, find_break
from experiments.harness.profiling import Profile
from experiments.harness.progress import Progress, say
from experiments.harness.runs import Run
from experiments.harness.signals import Stop
from experiments.harness.stepper import Pace, Step, make_stepper
from experiments.harness.tracking import tracked


class Fitted(NamedTuple):
    """What a training gave."""

    state: Any
    metrics: dict[str, Any]  # the last of each metric and evaluation, as in metrics.jsonl
    resumed: int | None  # the step it went on from, None for a fresh run
    seconds: float  # of this process's training, compilation and evaluation included


def fit(
    run: Run,
    step: Step,
    state: Any,
    batches: Callable[[Any], Any],
    *,
    steps: int,
    frozen: Any = None,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    mode: str = "auto",
    show: bool | None = None,
) -> Fitted:
    """Trains until `state.step == steps`, going on from the run's newest checkpoint if it has one.

    Killed at any moment and called again with the same arguments, it computes what an uninterrupted
    run computes, bit for bit, and metrics.jsonl has the same bytes. At SIGTERM or SIGINT it saves
    and raises Interrupted (a SystemExit with code 143 or 130). A loss or weight that becomes NaN or
    infinite stops it, and is never saved.

    Args:
      run: where metrics.jsonl and checkpoints/ are; see `open_run` and `Run.part`.
      step: `(state, batch, frozen) -> (state, metrics)`, for example `effjax.make_step`'s, jitted
        or not; metrics are scalars.
      state: a TrainState at step 0 (`effjax.init_state`), sharded or not; copied, not donated.
      batches: a pytree that is called with the step, such as `Batches`; an argument of the program,
        not a constant in it.
      steps: how many in all.
      frozen: handed to every step: a teacher.
      evaluate: `state -> {name: number}`, written to metrics.jsonl; see `evaluator`.
      eval_every: steps between evaluations; at the end there always is one.
      checkpoint_every: steps between checkpoints; by default a tenth of the run. There always is
        one at step 0 and one at the end.
      log_every: steps between lines of metrics.jsonl.
      mode: "step", "block" or "auto"; see `make_stepper`.
      show: whether to draw a progress bar; by default if someone watches.

    Raises:
      DivergedError: with the step, the loss terms and the leaves that broke first.
      Interrupted: after a signal, when everything is saved.
      CheckpointError: the checkpoints are another model's, or none can be read.
    """
    checkpoint_every = max(1, steps // 10) if checkpoint_every is None else checkpoint_every
    eval_every = max(1, steps) if eval_every is None else eval_every
    every = {"eval_every": eval_every, "checkpoint_every": checkpoint_every, "log_every": log_every}
    if wrong := {name: n for name, n in {"steps": steps, **every}.items() if n < 1}:
        raise ConfigError(f"{wrong}: give a number of steps, 1 or more.")
    began = time.monotonic()
    # A copy, so that the caller's is not donated; committed, so that the step compiles once.
    state = jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), state)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints))
        state, resumed = _resume(run, checkpoints, state, steps)
        tracker = stack.enter_context(tracked(run))
        at = first = int(state.step)
        if at >= steps:
            return Fitted(state, _last(run), resumed, time.monotonic() - began)
        stepper = make_stepper(step, state, batches, frozen, mode)
        stop = stack.enter_context(Stop())
        bar = stack.enter_context(Progress(run.label, at, steps, show))
        profile = stack.enter_context(Profile(run))

        def log(records: list[dict[str, Any]]) -> None:
            run.metrics.append(records)
            tracker.append(records)

        pace = Pace()
        while at < steps:
            until = min(steps, at + pace.block, _next(at, eval_every), _next(at, checkpoint_every))
            until = profile.begin(at, first, until)
            started = time.monotonic()
            state, metrics = stepper(state, batches, frozen, until - at)
            profile.took(until - at)
            pace.took(until - at, time.monotonic() - started)
            numbered = list(enumerate(metrics, at + 1))
            bad = next((i for i, m in numbered if broken_loss(m)), None)
            at = until
            log(
                [
                    {"step": i, **_plain(m)}
                    for i, m in numbered[: None if bad is None else bad - until + len(numbered)]
                    if i % log_every == 0 or i in (steps, bad)
                ]
            )
            bar.update(at, float(metrics[-1].get("loss", math.nan)))
            if bad:
                raise _diverged(run, checkpoints, stepper, state, batches, frozen, bad)
            if evaluate is not None and (at == steps or at % eval_every == 0):
                log([{"step": at, **_plain(evaluate(state))}])
            stopping = stop.signum
            if stopping or at == steps or at % checkpoint_every == 0:
                if broken_leaves(state):
                    raise _diverged(run, checkpoints, stepper, state, batches, frozen, at)
                checkpoints.save(at, state, {"metrics_bytes": run.metrics.position()})
            if stopping:
                break
        # Looked at again: a signal during the last save must not be lost.
        if stop.signum is not None:
            checkpoints.wait()
            raise Interrupted(
                stop.signum,
                f"{run.label}: stopped by signal {stop.signum}, saved at step {at} of {steps} in "
                f"{run.path}. Give the same command again to go on from there.",
            )
    seconds = time.monotonic() - began
    return Fitted(state, _last(run), resumed, seconds)


def _resume(run: Run, checkpoints: Checkpoints, state: Any, steps: int) -> tuple[Any, int | None]:
    if not checkpoints.steps():
        run.metrics.rewind(0)
        checkpoints.save(0, state, {"metrics_bytes": 0})
        return state, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        restored = checkpoints.restore(state)
    for warning in caught:
        say(f"{run.label}: {warning.message}")
    if lacking := run.metrics.rewind(restored.metadata["metrics_bytes"]):
        say(f"{run.label}: metrics.jsonl lacks {lacking} bytes that were there at the checkpoint")
    if restored.step < steps:
        say(f"{run.label}: going on from step {restored.step} of {steps}")
    return restored.tree, restored.step


def _diverged(run, checkpoints, stepper, state, batches, frozen, at) -> DivergedError:
    restored = checkpoints.restore(state)
    cause = find_break(stepper, restored.tree, batches, frozen, at)
    return DivergedError(
        f"{run.label} stopped at step {at}: {cause}. The last good checkpoint is of step "
        f"{restored.step}, in {run.checkpoints}. Likely causes: a learning rate that is too high, "
        "log or division of 0, float16 overflow. JAX_DEBUG_NANS=True names the operation."
    )


def _next(at: int, every: int) -> int:
    return (at // every + 1) * every


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON numbers; NaN and infinity, which JSON lacks, as null."""

    def number(x: Any) -> Any:
        value = x.item() if hasattr(x, "item") else x
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: number(x) for name, x in metrics.items()}


def _last(run: Run) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for record in run.metrics.read():
        last |= record
    return last
