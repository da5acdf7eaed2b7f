"""Tables of trained networks as an oracle: a search that would take GPU years runs in seconds."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from effjax.errors import SetupError
from effjax.nas.dimensions import Choice, Repeat
from effjax.nas.search import Search
from effjax.nas.space import Space

OPERATIONS = ("none", "skip", "conv1x1", "conv3x3", "pool")
# The cell is a graph of four nodes; each edge has an operation, in the table's order.
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def nasbench201() -> Space:
    """The 15,625 cells of NAS-Bench-201: one of five operations on each of six edges.

    The cell has nodes 0 to 3; gene e is the operation on `EDGES[e]`, from one node to a later one,
    and a node is the sum of what reaches it.

    Reference: Dong and Yang, "NAS-Bench-201", 2020, https://arxiv.org/abs/2001.00326.
    """
    return Space({"edge": Repeat(len(EDGES), {"op": Choice(OPERATIONS)})})


class Table:
    """What the training of every configuration of a space gave and cost.

    Example:
      >>> import numpy as np
      >>> from effjax.nas import Choice, Space, Table
      >>> space = Space({"op": Choice(("conv", "pool"))})
      >>> table = Table(space, np.array([[90.0, 92.0], [80.0, np.nan]]), np.array([60.0, 10.0]))
      >>> table.mean(np.array([0])), table.regret(np.array([1])), table.seeds(np.array([1]))
      (91.0, 11.0, 1)

    Args:
      space: of at most 262,144 configurations.
      values: float [configurations, seeds], larger is better, NaN where a seed is missing; the
        rows in the order of `space.enumerate()`.
      seconds: of one training, float [configurations].
      columns: further numbers by configuration, {name: float [configurations]}.

    Raises:
      SetupError: rows that are not one for each configuration, a configuration without a value, or
        a training that takes no time.
    """

    def __init__(
        self,
        space: Space,
        values: np.ndarray,
        seconds: np.ndarray,
        columns: Mapping[str, np.ndarray] | None = None,
    ):
        self.space, self.values, self.seconds = space, np.asarray(values), np.asarray(seconds)
        self.columns = {name: np.asarray(x) for name, x in (columns or {}).items()}
        self.genes = space.enumerate()
        rows = {"seconds": self.seconds, **self.columns}
        for name, x in rows.items():
            if x.shape != (len(self.genes),):
                raise SetupError(
                    f"{name} is {x.shape} for {len(self.genes)} configurations; it has one number "
                    "for each, in the order of space.enumerate()."
                )
        if self.values.ndim != 2 or len(self.values) != len(self.genes):
            raise SetupError(
                f"the values are {self.values.shape}; they are [{len(self.genes)}, seeds]."
            )
        self._known = np.isfinite(self.values)
        if not self._known.any(axis=1).all() or not (self.seconds > 0).all():
            raise SetupError("each configuration has a value, and takes more than 0 seconds.")
        self.means = np.nanmean(self.values, axis=1)
        self.best = float(self.means.max())
        self._rows = {row.tobytes(): i for i, row in enumerate(self.genes)}

    def row(self, genes: np.ndarray) -> int:
        """The row of a configuration.

        Raises:
          SetupError: the vector is none of the space.
        """
        found = self._rows.get(np.asarray(genes, np.int32).tobytes())
        if found is None:
            raise SetupError(f"{np.asarray(genes).tolist()} is no configuration of {self.space}.")
        return found

    def mean(self, genes: np.ndarray) -> float:
        """The mean of a configuration's values over its seeds."""
        return float(self.means[self.row(genes)])

    def regret(self, genes: np.ndarray) -> float:
        """How far its mean is below the best mean of the table; 0 or more."""
        return self.best - self.mean(genes)

    def seeds(self, genes: np.ndarray) -> int:
        """How many values a configuration has."""
        return int(self._known[self.row(genes)].sum())

    def runs(self, genes: np.ndarray) -> np.ndarray:
        """A configuration's values, float [seeds]."""
        row = self.row(genes)
        return self.values[row][self._known[row]]


class Training(NamedTuple):
    """A training that was looked up."""

    value: float
    clock: float  # seconds spent when it ended


class Oracle:
    """Trains by looking it up, on a simulated clock with a budget.

    A training takes its seconds and gives the value of one of the table's seeds, drawn at random
    without replacement: asked for the same configuration again, it gives another seed while there
    is one, at the price of another training. A search meets the noise that it would meet.

    Args:
      table: what to look up.
      budget: simulated seconds.
      seed: of the draws.
    """

    def __init__(self, table: Table, budget: float, seed: int = 0):
        self.table, self.budget, self.clock = table, budget, 0.0
        self._rng = np.random.default_rng([seed, 0x7AB1E])
        self._left: dict[int, list[float]] = {}

    def train(self, genes: np.ndarray) -> Training | None:
        """One training, or None if the budget ends before it does: the clock then stands there."""
        row = self.table.row(genes)
        self.clock += float(self.table.seconds[row])
        if self.clock > self.budget:
            self.clock = self.budget
            return None
        if not self._left.get(row):
            values = self.table.runs(genes)
            self._left[row] = [float(values[i]) for i in self._rng.permutation(len(values))]
        return Training(self._left[row].pop(), self.clock)


class Step(NamedTuple):
    """Where a search stands after a trial."""

    clock: float  # simulated seconds
    regret: float  # of the search's best trial


def trace(search: Search, oracle: Oracle, seeds: int = 1) -> Iterator[Step]:
    """Runs a search until the oracle's budget is spent.

    The incumbent is `search.best`, as someone without the table would choose; its regret is by the
    means over seeds, which the search never sees. A search that resumes first repeats what it told
    on the oracle's clock, and then trains what is pending.

    Args:
      search: with a stopper if trials may end before their last seed.
      oracle: a new one.
      seeds: trainings of a trial, from different seeds, as far as the table has them; its value is
        their mean, which is reported to the search after each (as step 1, 2, ...). This is all
        that less or more effort can mean here: the table has no learning curves, and the accuracy
        after few epochs is nowhere in it.
    """
    for number in list(search.values):
        for _ in search.reports.get(number, [()]):
            oracle.train(search.trials[number].genes)
    while True:
        trial = search.pending[0] if search.pending else search.ask()
        seen: list[float] = []
        for step in range(1, min(seeds, oracle.table.seeds(trial.genes)) + 1):
            found = oracle.train(trial.genes)
            if found is None:
                return
            seen.append(found.value)
            done = search.reports.get(trial.number, [])
            if seeds > 1 and step > len(done) and search.report(trial, step, float(np.mean(seen))):
                break
        search.tell(trial, float(np.mean(seen)))
        yield Step(oracle.clock, oracle.table.regret(search.best.genes))


def at(times: np.ndarray, steps: list[Step], before: float = np.nan) -> np.ndarray:
    """The regret at given times of a trace, a step function: float [times].

    Args:
      times: simulated seconds.
      steps: of `trace`, in order.
      before: the regret before the first training has ended.
    """
    clocks = np.array([step.clock for step in steps])
    regrets = np.array([before, *(step.regret for step in steps)])
    return regrets[np.searchsorted(clocks, np.asarray(times), side="right")]
