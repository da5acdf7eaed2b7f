"""A search's trials: each ends exactly once, by whichever worker.

Workers know nothing of each other but what the storage says, and may be killed at any moment:

- The first N trials are the search. Which they are follows from the trials' numbers, which the
  storage hands out one by one; a worker that gets one too many gives it back ("void").
- A worker writes a beat to the trial that it is at. Others who see the same beat for `grace`
  seconds, by their own clocks, mark the trial as failed and queue a retry with the same values.
- If two workers queue a retry of one trial, only the earlier one counts.

So each of the N trials ends exactly once: it is complete, or it failed with an error of its own.
optuna's heartbeat serves databases only, begins after its trial and compares the hosts' clocks.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from effjax.errors import SetupError
from effjax.nas.optuna_search import distributions, optuna, quiet, suggest
from effjax.nas.space import Space
from experiments.harness.errors import Interrupted, UsageError
from experiments.harness.progress import say
from experiments.harness.storage import reached

RETRIES = 3  # a trial that so many workers died of is given up
_PROPOSED, _REFUSED = 8, 64  # refusals in a row: then uniform draws, then an error


class Refused(Exception):
    """A configuration that cannot be meant: the trial is void, and another takes its place."""


class Trials:
    """One worker's hold on a study; `work` does trials until all are done.

    Args:
      study: from `storage.open_study`.
      url: its storage, for messages.
      space: of the search.
      trials: how many the search has, all workers together.
      grace: seconds without a beat after which a worker counts as dead.
    """

    def __init__(self, study: Any, url: str, space: Space, trials: int, grace: float = 60.0):
        self.study, self.url, self.space = study, url, space
        self.trials, self.grace = trials, grace
        self._kinds = distributions(space)
        self._seen: dict[int, tuple[Any, float]] = {}
        self._refused = 0
        self._valid, self._sample = jax.jit(space.valid), jax.jit(space.sample)

    def work(self, evaluate: Callable[[dict[str, Any]], Sequence[float]]) -> None:
        """Does trials until all of the search are done, by this worker or another.

        Args:
          evaluate: from a configuration to its objectives. Where it raises, the trial has failed,
            and is not tried again; `UsageError` and signals end the worker and free the trial.

        Raises:
          RunError: the storage cannot be reached.
          SetupError: nothing that was drawn is accepted.
        """
        waiting = False
        with reached(self.url), quiet():
            while True:
                self._bury()
                slots = self._slots()
                ended = [self._ended(attempts) for attempts in slots]
                if len(slots) == self.trials and all(ended):
                    return
                for attempts in slots:
                    self._queue(attempts)
                if len(slots) == self.trials and not self._waiting():
                    if not waiting:
                        left = ended.count(False)
                        say(f"waiting for {left} trials that other workers are at")
                    waiting = True
                    time.sleep(min(1.0, self.grace / 4))
                elif (trial := self._ask()) is not None:
                    waiting = False
                    self._run(trial, evaluate)

    def results(self) -> list[Any]:
        """The attempt that ended each trial of the search, in order, as optuna's FrozenTrial."""
        with reached(self.url), quiet():
            ended = [[a for a in attempts if self._ends(a)] for attempts in self._slots()]
            return [a for attempts in ended for a in attempts]

    def given_up(self) -> list[int]:
        """The numbers of the trials that cost too many workers their lives."""
        with reached(self.url), quiet():
            slots = self._slots()
        return [a[0].number for a in slots if self._ended(a) and not any(map(self._ends, a))]

    # What the trials in the storage are.

    def _all(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def _slots(self) -> list[list[Any]]:
        """The attempts at each trial of the search, the first one first."""
        slots: dict[int, list[Any]] = {}
        for trial in self._all():
            root = trial.user_attrs.get("retry_of")
            if root in slots:
                slots[root].append(trial)
            elif root is None and "void" not in trial.user_attrs:
                slots[trial.number] = [trial]
        return list(slots.values())[: self.trials]

    def _state(self, trial: Any) -> str:
        return trial.state.name

    def _ends(self, trial: Any) -> bool:
        return self._state(trial) == "COMPLETE" or "error" in trial.user_attrs

    def _dead(self, attempts: list[Any]) -> int:
        return sum(
            self._state(t) == "FAIL" and not {"void", "released"} & set(t.user_attrs)
            for t in attempts
        )

    def _ended(self, attempts: list[Any]) -> bool:
        return any(map(self._ends, attempts)) or self._dead(attempts) > RETRIES

    def _waiting(self) -> bool:
        return any(self._state(t) == "WAITING" for t in self._all())

    # What this worker does to them.

    def _bury(self) -> None:
        """Fails the trials whose beat has not changed for so long as this worker has looked."""
        now = time.monotonic()
        for trial in self._all():
            if self._state(trial) != "RUNNING":
                continue
            beat = trial.user_attrs.get("beat")
            before, since = self._seen.setdefault(trial.number, (beat, now))
            if before != beat:
                self._seen[trial.number] = (beat, now)
            elif now - since > self.grace:
                say(f"trial {trial.number} has lost its worker")
                self._fail(trial.number)

    def _fail(self, number: int) -> None:
        state = optuna().trial.TrialState.FAIL
        self.study.tell(number, state=state, skip_if_finished=True)

    def _queue(self, attempts: list[Any]) -> None:
        """A retry of a trial that nobody is at."""
        open_states = ("RUNNING", "WAITING")
        if self._ended(attempts) or any(self._state(t) in open_states for t in attempts):
            return
        first, last = attempts[0], attempts[-1]
        say(f"trial {first.number} is tried again")
        values = {} if "void" in last.user_attrs else last.params
        self.study.enqueue_trial(values, user_attrs={"retry_of": first.number})

    def _ask(self) -> Any:
        """A trial of the search, or None where it is none: another worker was quicker."""
        trial = self.study.ask()
        root = trial.user_attrs.get("retry_of", trial.number)
        attempts = next((a for a in self._slots() if a[0].number == root), [])
        earlier = [t for t in attempts if t.number < trial.number]
        if attempts and all(
            self._state(t) not in ("RUNNING", "WAITING") and not self._ends(t) for t in earlier
        ):
            return trial
        self._void(trial)
        return None

    def _void(self, trial: Any) -> None:
        trial.set_user_attr("void", True)
        self._fail(trial.number)

    def _run(self, trial: Any, evaluate: Callable[[dict[str, Any]], Sequence[float]]) -> None:
        with self._beating(trial):
            genes = suggest(self.space, self._kinds, trial)
            try:
                if self.space.constraint is not None and not bool(self._valid(genes)):
                    raise Refused
                values = evaluate(self.space.decode(genes))
            except Refused:
                self._refuse(trial)
            except (UsageError, Interrupted, KeyboardInterrupt):
                with contextlib.suppress(Exception):
                    trial.set_user_attr("released", True)
                    self._fail(trial.number)
                raise
            except Exception as error:
                say(f"trial {trial.number} failed: {error}")
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                self._fail(trial.number)
            else:
                self._refused = 0
                self._tell(trial, values)

    def _tell(self, trial: Any, values: Sequence[float]) -> None:
        try:
            self.study.tell(trial, [float(value) for value in values])
        except ValueError:  # this process was halted for longer than `grace`
            say(f"trial {trial.number} was given to another worker meanwhile")

    def _refuse(self, trial: Any) -> None:
        """The sampler knows no constraint: after some tries, uniform draws are queued."""
        self._void(trial)
        self._refused += 1
        if self._refused >= _REFUSED:
            raise SetupError(
                f"{self._refused} configurations in a row were refused, by the space's constraint "
                "or by the experiment's Config. Loosen it, or leave out the values that it refuses."
            )
        if self._refused >= _PROPOSED:
            key = jax.random.key(int(np.random.default_rng().integers(2**31)))
            genes = np.asarray(self._sample(key)).tolist()
            self.study.enqueue_trial(dict(zip(self.space.names, genes, strict=True)))

    @contextlib.contextmanager
    def _beating(self, trial: Any) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            number = 0
            while not stop.wait(self.grace / 4):
                number += 1
                # A storage that is away now may be back before the trial is done.
                with contextlib.suppress(Exception):
                    trial.set_user_attr("beat", number)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
