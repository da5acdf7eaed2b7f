"""Strategies that need nothing but a space: random, local search and regularized evolution."""

from collections import deque

import jax
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.space import Space


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

    What was told before is not asked for again, but where a climb starts.

    Reference: White et al., 2021, https://arxiv.org/abs/2005.02960.
    """

    def __init__(self, space: Space):
        self._space, self._sample = space, jax.jit(space.sample)
        self._best: float | None = None
        self._left: list[np.ndarray] = []
        self._told: set[bytes] = set()

    def ask(self, key: Array) -> np.ndarray:
        """A neighbour that was not seen yet."""
        if self._left:
            return self._left.pop()
        self._best = None
        return np.asarray(self._sample(key))

    def tell(self, genes: np.ndarray, value: float) -> None:
        """A better one becomes the place to look from."""
        genes = np.asarray(genes, np.int32)
        self._told.add(genes.tobytes())
        if self._best is None or value > self._best:
            self._best = value
            found = [x for x in self._space.neighbours(genes) if x.tobytes() not in self._told]
            rng = np.random.default_rng(genes)
            self._left = [found[i] for i in rng.permutation(len(found))]
