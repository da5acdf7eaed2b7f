"""Searches: strategies that are asked for configurations and told their values; trials on disk."""

import json
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.space import Space


class Strategy(Protocol):
    """What proposes configurations; larger values are better."""

    def ask(self, key: Array) -> np.ndarray:
        """The next vector to evaluate, int32 [genes]."""

    def tell(self, genes: np.ndarray, value: float) -> None:
        """The value of a vector that was asked for."""


class RandomSearch:
    """Uniform draws."""

    def __init__(self, space: Space):
        self._sample = jax.jit(space.sample)

    def ask(self, key: Array) -> np.ndarray:
        """A uniform draw."""
        return np.asarray(self._sample(key))

    def tell(self, genes: np.ndarray, value: float) -> None:
        """Nothing is learned."""


class Evolution:
    """Regularized evolution: the best of a random few is mutated, and the oldest dies.

    Args:
      space: of the search.
      population: how many live; so many are drawn at random first.
      tournament: how many compete to be the parent.

    Reference: Real et al., 2019, https://arxiv.org/abs/1802.01548.
    """

    def __init__(self, space: Space, population: int = 50, tournament: int = 10):
        if not 1 <= tournament <= population:
            raise SetupError(
                f"a tournament of {tournament} in a population of {population}; it needs at least "
                "1 and at most the population."
            )
        self.population, self.tournament, self._asked = population, tournament, 0
        self._living: deque[tuple[float, np.ndarray]] = deque(maxlen=population)
        self._sample, self._mutate = jax.jit(space.sample), jax.jit(space.mutate)

    def ask(self, key: Array) -> np.ndarray:
        """A random vector at first, then the mutated winner of a tournament."""
        self._asked += 1
        if self._asked <= self.population or not self._living:
            return np.asarray(self._sample(key))
        first, second = jax.random.split(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(first)))
        drawn = rng.choice(
            len(self._living), min(self.tournament, len(self._living)), replace=False
        )
        parent = max((self._living[i] for i in drawn), key=lambda pair: pair[0])[1]
        return np.asarray(self._mutate(second, parent))

    def tell(self, genes: np.ndarray, value: float) -> None:
        """The newest joins, and the oldest leaves once the population is full."""
        self._living.append((value, np.asarray(genes)))


class LocalSearch:
    """Climbs to the first better neighbour; where there is none, starts anew at random.

    Reference: White et al., 2021, https://arxiv.org/abs/2005.02960.
    """

    def __init__(self, space: Space):
        self._space, self._sample = space, jax.jit(space.sample)
        self._best: float | None = None
        self._left: list[np.ndarray] = []

    def ask(self, key: Array) -> np.ndarray:
        """A neighbour that was not seen from here yet."""
        if self._left:
            return self._left.pop()
        self._best = None
        return np.asarray(self._sample(key))

    def tell(self, genes: np.ndarray, value: float) -> None:
        """A better one becomes the place to look from."""
        if self._best is None or value > self._best:
            self._best = value
            found = self._space.neighbours(genes)
            rng = np.random.default_rng(np.asarray(genes))
            self._left = [found[i] for i in rng.permutation(len(found))]


class Trial(NamedTuple):
    """A configuration to evaluate."""

    number: int
    genes: np.ndarray  # int32 [genes]


class Search:
    """Asks and tells a strategy, and keeps every trial in a file of JSON lines.

    Opened on a file that exists it goes on where the file ends, exactly: what was asked and told is
    repeated to the strategy, and trials that were asked for and never told are in `pending`.

    Args:
      space: what is searched.
      strategy: a new one, that nothing was asked of.
      path: of the file; without it nothing is stored.
      seed: of the strategy's randomness.

    Raises:
      SetupError: the file is of another space, seed or strategy.
    """

    def __init__(
        self, space: Space, strategy: Strategy, path: Path | str | None = None, *, seed: int = 0
    ):
        self.space, self.strategy, self._key = space, strategy, jax.random.key(seed)
        self.trials: list[Trial] = []
        self.values: dict[int, float] = {}
        self._path = None if path is None else Path(path)
        head = {"space": space.digest, "strategy": type(strategy).__name__, "seed": seed}
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
            if "value" in line:
                self._told(line["trial"], line["value"])
            elif self._asked().genes.tolist() != line["genes"]:
                raise SetupError(
                    f"trial {line['trial']} of {self._path} is {line['genes']}, and the strategy "
                    f"now asks for {self.trials[-1].genes.tolist()}: its settings changed. Use "
                    "those of the file, or a new file; nothing was written."
                )
        return None

    def _asked(self) -> Trial:
        number = len(self.trials)
        genes = self.strategy.ask(jax.random.fold_in(self._key, number))
        self.trials.append(Trial(number, genes))
        return self.trials[-1]

    def _told(self, number: int, value: float) -> None:
        self.values[number] = value
        self.strategy.tell(self.trials[number].genes, value)

    def _write(self, line: dict) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def ask(self) -> Trial:
        """A trial to evaluate."""
        trial = self._asked()
        self._write({"trial": trial.number, "genes": trial.genes.tolist()})
        return trial

    def tell(self, trial: Trial, value: float) -> None:
        """The value of a trial; larger is better.

        Raises:
          SetupError: the trial was told before or never asked for, or the value is not finite.
        """
        if trial.number in self.values or not 0 <= trial.number < len(self.trials):
            raise SetupError(f"trial {trial.number} was told before, or never asked for.")
        if not np.isfinite(value):
            raise SetupError(f"trial {trial.number} has the value {value}; tell a finite one.")
        self._write({"trial": trial.number, "value": float(value)})
        self._told(trial.number, float(value))

    @property
    def pending(self) -> list[Trial]:
        """Trials that were asked for and not told."""
        return [trial for trial in self.trials if trial.number not in self.values]

    @property
    def best(self) -> Trial:
        """The trial of the largest value."""
        if not self.values:
            raise SetupError("no trial has been told a value yet.")
        return self.trials[max(self.values, key=lambda number: self.values[number])]
