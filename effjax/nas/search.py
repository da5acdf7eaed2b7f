"""Searches: strategies that are asked for configurations and told their values; trials on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.space import Space

Value = float | tuple[float, ...]


class Strategy(Protocol):
    """What proposes configurations; larger values are better."""

    def ask(self, key: Array) -> np.ndarray:
        """The next vector to evaluate, int32 [genes]: a function of the key and what was told."""

    def tell(self, genes: np.ndarray, value: Any) -> None:
        """The value of a vector that was asked for; a tuple where there are several objectives."""


class Stopper(Protocol):
    """What ends trials early, by what was seen of them and others at the same step."""

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether to stop the trial of this number, which has this value at this step."""

    def end(self, number: int) -> None:
        """The trial has its final value."""


class Trial(NamedTuple):
    """A configuration to evaluate."""

    number: int
    genes: np.ndarray  # int32 [genes]


class Search:
    """Asks and tells a strategy, and keeps every trial in a file of JSON lines.

    Opened on a file that exists it goes on where the file ends, exactly: what was asked, reported
    and told is repeated to the strategy and the stopper, and trials that were asked for and never
    told are in `pending`.

    Args:
      space: what is searched.
      strategy: a new one, that nothing was asked of.
      path: of the file; without it nothing is stored.
      seed: of the strategy's randomness.
      stopper: a new one, if trials may end early.

    Raises:
      SetupError: the file is of another space, seed, strategy or stopper.
    """

    def __init__(
        self,
        space: Space,
        strategy: Strategy,
        path: Path | str | None = None,
        *,
        seed: int = 0,
        stopper: Stopper | None = None,
    ):
        self.space, self.strategy, self.stopper = space, strategy, stopper
        self._key = jax.random.key(seed)
        self.trials: list[Trial] = []
        self.values: dict[int, Value] = {}  # in the order they were told
        self.reports: dict[int, list[tuple[int, float]]] = {}  # (step, value) by trial
        self.stopped: set[int] = set()
        self._path = None if path is None else Path(path)
        head = {"space": space.digest, "strategy": _named(strategy), "seed": seed}
        if stopper is not None:
            head["stopper"] = type(stopper).__name__
        if self._path is not None and self._path.exists():
            self._replay(head)
        else:
            self._write(head)

    def _replay(self, head: dict) -> None:
        assert self._path is not None
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed in the middle of a line: that event did not happen
            self._path.write_text(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return self._write(head)
        if lines[0] != head:
            raise SetupError(
                f"{self._path} is of the search {lines[0]}, and this one is {head}. A space that "
                "changed needs a new file; nothing was written."
            )
        for line in lines[1:]:
            self._repeat(line)
        return None

    def _repeat(self, line: dict) -> None:
        number = line["trial"]
        if "step" in line:
            if self._reported(number, line["step"], line["value"]) != line["stop"]:
                raise SetupError(
                    f"trial {number} of {self._path} was {'' if line['stop'] else 'not '}stopped "
                    f"at step {line['step']}, and the stopper now decides otherwise: its settings "
                    "changed. Use those of the file, or a new file; nothing was written."
                )
        elif "value" in line:
            value = line["value"]
            self._told(number, tuple(value) if isinstance(value, list) else value)
        elif self._asked().genes.tolist() != line["genes"]:
            raise SetupError(
                f"trial {number} of {self._path} is {line['genes']}, and the strategy now asks for "
                f"{self.trials[-1].genes.tolist()}: its settings changed. Use those of the file, "
                "or a new file; nothing was written."
            )

    def _asked(self) -> Trial:
        number = len(self.trials)
        genes = self.strategy.ask(jax.random.fold_in(self._key, number))
        self.trials.append(Trial(number, genes))
        return self.trials[-1]

    def _reported(self, number: int, step: int, value: float) -> bool:
        self.reports.setdefault(number, []).append((step, value))
        stop = self.stopper is not None and self.stopper.report(number, step, value)
        if stop:
            self.stopped.add(number)
        return stop

    def _told(self, number: int, value: Value) -> None:
        self.strategy.tell(self.trials[number].genes, value)
        self.values[number] = value
        if self.stopper is not None:
            self.stopper.end(number)

    def _write(self, line: dict) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def ask(self) -> Trial:
        """A trial to evaluate."""
        trial = self._asked()
        self._write({"trial": trial.number, "genes": trial.genes.tolist()})
        return trial

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """What a trial has reached at a step (an epoch, a number of seeds); whether to stop it.

        A trial that is stopped is told as others are: with the last value that was seen.

        Raises:
          SetupError: the trial was told or stopped before or never asked for, the value is not
            finite, or the steps do not increase.
        """
        self._check(trial, value)
        seen = self.reports.get(trial.number, [])
        if trial.number in self.stopped or (seen and step <= seen[-1][0]):
            raise SetupError(
                f"trial {trial.number} reports step {step} after {seen[-1]}; steps increase, and "
                "end where a trial is stopped."
            )
        stop = self._reported(trial.number, int(step), float(value))
        line = {"trial": trial.number, "step": int(step), "value": float(value), "stop": stop}
        self._write(line)
        return stop

    def tell(self, trial: Trial, value: float | Sequence[float]) -> None:
        """The value of a trial; larger is better. Several objectives are a sequence.

        Raises:
          SetupError: the trial was told before or never asked for, a value is not finite, or
            there are more or fewer objectives than before.
        """
        self._check(trial, value)
        found = tuple(map(float, value)) if isinstance(value, Sequence) else float(value)
        before = next(iter(self.values.values()), found)
        if np.shape(before) != np.shape(found):
            raise SetupError(f"trial {trial.number} has the value {found}, others {before}.")
        self._told(trial.number, found)
        self._write({"trial": trial.number, "value": found})

    def _check(self, trial: Trial, value: float | Sequence[float]) -> None:
        if trial.number in self.values or not 0 <= trial.number < len(self.trials):
            raise SetupError(f"trial {trial.number} was told before, or never asked for.")
        if not np.all(np.isfinite(value)):
            raise SetupError(f"trial {trial.number} has the value {value}; tell a finite one.")

    @property
    def pending(self) -> list[Trial]:
        """Trials that were asked for and not told."""
        return [trial for trial in self.trials if trial.number not in self.values]

    @property
    def best(self) -> Trial:
        """The trial of the largest value; of those that were not stopped, if there are any."""
        whole = [n for n in self.values if n not in self.stopped] or list(self.values)
        if not whole:
            raise SetupError("no trial has been told a value yet.")
        if isinstance(self.values[whole[0]], tuple):
            raise SetupError("the trials have several objectives, and no best one; use `front`.")
        return self.trials[max(whole, key=lambda number: self.values[number])]

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is as good as in all objectives and better than in one."""
        numbers = list(self.values)
        if not numbers:
            raise SetupError("no trial has been told a value yet.")
        values = np.array([np.atleast_1d(self.values[n]) for n in numbers])
        covers = (values[:, None] >= values).all(axis=2) & (values[:, None] > values).any(axis=2)
        kept = np.flatnonzero(~covers.any(axis=0))
        return [self.trials[numbers[i]] for i in kept]


def _named(strategy: Strategy) -> str:
    """The strategy's class, with that of the strategy which it wraps."""
    inner = getattr(strategy, "strategy", None)
    name = type(strategy).__name__
    return name if inner is None else f"{name}({_named(inner)})"
