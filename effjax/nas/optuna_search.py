"""Strategies and stoppers of optuna behind ask and tell: TPE, NSGA-II, ASHA and Hyperband.

optuna is an extra (`pip install 'effjax[nas]'`), imported when one of these is made. Each ask makes
a sampler anew, seeded by its key, from what was told: so that a search repeats exactly.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.space import Space

_TRIES = 64


def optuna() -> Any:
    """The module.

    Raises:
      SetupError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SetupError(
            "this search is optuna's, which is not installed: pip install 'effjax[nas]'."
        ) from error
    return optuna


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """The module, without its log lines and its warnings that something is experimental."""
    module = optuna()
    before = module.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", module.exceptions.ExperimentalWarning)
        module.logging.set_verbosity(module.logging.WARNING)
        try:
            yield module
        finally:
            module.logging.set_verbosity(before)


def distributions(space: Space) -> list[Any]:
    """optuna's distribution of each gene: whole numbers where the values are in order."""
    found = []
    for values in space.values:
        steps = [
            b > a if isinstance(a, int | float) and isinstance(b, int | float) else False
            for a, b in itertools.pairwise(values)
        ]
        ordered = all(steps) and not any(isinstance(v, bool) for v in values)
        kinds = optuna().distributions
        found.append(
            kinds.IntDistribution(0, len(values) - 1)
            if ordered
            else kinds.CategoricalDistribution(tuple(range(len(values))))
        )
    return found


def suggest(space: Space, kinds: Sequence[Any], trial: Any) -> np.ndarray:
    """The vector that a trial of optuna proposes: its active genes are asked for, in order."""
    row: list[int] = []
    for name, kind, parent in zip(space.names, kinds, space.parents, strict=True):
        if not space.holds(tuple(row), parent):
            row.append(0)
        elif hasattr(kind, "choices"):
            row.append(trial.suggest_categorical(name, kind.choices))
        else:
            row.append(trial.suggest_int(name, kind.low, kind.high))
    return np.array(row, np.int32)


class _Sampled:
    """What asks a sampler of optuna, on a study in memory."""

    def __init__(self, space: Space, make: Callable[[int], Any], objectives: int):
        self._space, self._make, self._objectives = space, make, objectives
        with quiet() as module:
            self._study = module.create_study(
                directions=["maximize"] * objectives, sampler=make(0), study_name="effjax"
            )
            self._kinds = distributions(space)
        self._open: dict[bytes, list[Any]] = {}
        self._valid, self._sample = jax.jit(space.valid), jax.jit(space.sample)

    def ask(self, key: Array) -> np.ndarray:
        """What the sampler proposes; what the constraint refuses is asked for again."""
        with quiet() as module:
            for i in range(_TRIES):
                words = np.asarray(jax.random.key_data(jax.random.fold_in(key, i)))
                self._study.sampler = self._make(int(words[-1]))
                if i == _TRIES - 1:  # the sampler knows no constraint: at last a uniform draw
                    drawn = np.asarray(self._sample(key)).tolist()
                    self._study.enqueue_trial(dict(zip(self._space.names, drawn, strict=True)))
                trial = self._study.ask()
                genes = suggest(self._space, self._kinds, trial)
                if bool(self._valid(genes)):
                    break
                self._study.tell(trial, state=module.trial.TrialState.FAIL)
        self._open.setdefault(genes.tobytes(), []).append(trial)
        return genes

    def tell(self, genes: np.ndarray, value: Any) -> None:
        """The value goes to the study.

        Raises:
          SetupError: there are more or fewer objectives than the strategy was made for.
        """
        found = list(np.atleast_1d(np.asarray(value, float)))
        if len(found) != self._objectives:
            raise SetupError(
                f"the value is {value}; this strategy was made for {self._objectives} objectives."
            )
        trial = self._open[np.asarray(genes, np.int32).tobytes()].pop(0)
        with quiet():
            self._study.tell(trial, found)


class TPE(_Sampled):
    """Tree-structured Parzen estimator: draws where good trials are denser than bad ones.

    Args:
      space: of the search; genes whose values are increasing numbers are treated as ordered.
      initial: uniform draws at first.
      **settings: of `optuna.samplers.TPESampler`.

    Raises:
      SetupError: optuna is not installed.

    Reference: Bergstra et al., 2011, "Algorithms for hyper-parameter optimization"; as in optuna,
      with one density over all genes (Falkner et al., 2018, https://arxiv.org/abs/1807.01774).
    """

    def __init__(self, space: Space, initial: int = 10, **settings: Any):
        asked = {"multivariate": True, "n_startup_trials": initial, **settings}
        if any(parent is not None for parent in space.parents):
            asked.setdefault("group", True)  # densities of genes that are active together

        def make(seed: int) -> Any:
            return optuna().samplers.TPESampler(seed=seed, **asked)

        super().__init__(space, make, 1)


class NSGA2(_Sampled):
    """NSGA-II: evolution towards the front of several objectives; tell it tuples.

    Args:
      space: of the search.
      objectives: how many; larger is better, so costs are told with a minus.
      population: of a generation.
      **settings: of `optuna.samplers.NSGAIISampler`.

    Raises:
      SetupError: fewer than one objective; optuna is not installed.

    Reference: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002.
    """

    def __init__(self, space: Space, objectives: int = 2, population: int = 50, **settings: Any):
        if objectives < 1 or population < 2:
            raise SetupError(
                f"objectives={objectives}, population={population}; NSGA-II has 1 objective and a "
                "population of 2, or more."
            )

        def make(seed: int) -> Any:
            sampler = optuna().samplers.NSGAIISampler
            return sampler(seed=seed, population_size=population, **settings)

        super().__init__(space, make, objectives)


class _Pruned:
    """A pruner of optuna as a stopper."""

    def __init__(self, make: Callable[[Any], Any]):
        with quiet() as module:
            self._study = module.create_study(
                direction="maximize", pruner=make(module.pruners), study_name="effjax"
            )
        self._trials: dict[int, Any] = {}
        self._last: dict[int, float] = {}

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether optuna prunes the trial."""
        if number not in self._trials:
            self._trials[number] = self._study.ask()
        trial = self._trials[number]
        trial.report(value, step)
        self._last[number] = value
        return trial.should_prune()

    def end(self, number: int) -> None:
        """The trial is over."""
        if number in self._last:
            with quiet():
                self._study.tell(self._trials[number], self._last[number])


class ASHA(_Pruned):
    """Asynchronous successive halving: at each rung only the best 1 / `reduction` go on.

    Rungs are at the steps first · reduction^k. A trial that reaches one is stopped unless it is
    among the best 1 / reduction of all that have reached it so far; with one trial at a time, this
    is successive halving that never waits for a rung to fill.

    Args:
      first: the step of the first rung.
      reduction: of trials from a rung to the next.

    Raises:
      SetupError: first below 1, or a reduction below 2; optuna is not installed.

    Reference: Li et al., "A system for massively parallel hyperparameter tuning", 2020,
      https://arxiv.org/abs/1810.05934.
    """

    def __init__(self, first: int = 1, reduction: int = 3):
        _check(first, reduction)
        super().__init__(
            lambda pruners: pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=reduction, min_early_stopping_rate=0
            )
        )


class Hyperband(_Pruned):
    """Several ASHAs side by side, whose first rungs come later and later; trials are dealt out.

    Args:
      last: the step at which trials end by themselves.
      first: the step of the first rung of the first bracket.
      reduction: of trials from a rung to the next.

    Raises:
      SetupError: as for `ASHA`, or a last step before the first.

    Reference: Li et al., "Hyperband", 2018, https://arxiv.org/abs/1603.06560.
    """

    def __init__(self, last: int, first: int = 1, reduction: int = 3):
        _check(first, reduction)
        if last < first:
            raise SetupError(f"the last step is {last}, before the first rung at {first}.")
        super().__init__(
            lambda pruners: pruners.HyperbandPruner(
                min_resource=first, max_resource=last, reduction_factor=reduction
            )
        )


def _check(first: int, reduction: int) -> None:
    if first < 1 or reduction < 2:
        raise SetupError(
            f"first={first}, reduction={reduction}: a rung is at step 1 or later, and at least "
            "every other trial ends there."
        )
