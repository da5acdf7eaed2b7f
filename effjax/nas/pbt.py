"""Population-based training: the worst runs become copies of the best, and explore from there.

All functions are pure and jittable, with the population as leading axis, so that a whole round
(evaluation aside) is one program: nothing is read back to decide who copies whom.

    hypers = draw(key, priors, K)
    runs = effjax.population(build, hypers)
    for round in range(rounds):
        for _ in range(steps):
            states, metrics = runs.step(states, batch, hypers=hypers)
        scores = runs.evaluate(states, validation, hypers=hypers)["accuracy"]
        states, hypers, event = evolve(fold_in(key, round), states, hypers, score, priors)

Reference: Jaderberg et al., "Population based training of neural networks", 2017,
  https://arxiv.org/abs/1711.09846.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.errors import SetupError
from effjax.mapped import stack
from effjax.step import TrainState

Hypers = dict[str, Array]


class Prior(NamedTuple):
    """Where a hyper-parameter is drawn from, and what it stays in: uniform from low to high.

    log: uniform in the logarithm.
    """

    low: float
    high: float
    log: bool = False


class Event(NamedTuple):
    """What a round decided; of every run, [K].

    parent: int32, whose copy the run now is; its own number if it went on.
    score: float32, what was compared.
    before, after: {name: float32}, the hyper-parameters it was trained with, and those it goes on
      with.
    """

    parent: Array
    score: Array
    before: Hypers
    after: Hypers


def draw(key: Array, priors: Mapping[str, Prior], size: int) -> Hypers:
    """Hyper-parameters of a new population: {name: float32 [size]}.

    Raises:
      SetupError: no priors, bounds without order, a logarithm of what is not positive.

    Example:
      >>> import jax
      >>> from effjax.nas import pbt
      >>> hypers = pbt.draw(jax.random.key(0), {"lr": pbt.Prior(1e-4, 1e-1, log=True)}, 8)
      >>> hypers["lr"].shape
      (8,)
    """
    check_priors(priors)
    return {name: _from_prior(k, prior, size) for name, k, prior in _named(key, priors)}


def truncation(key: Array, scores: Array, fraction: float = 0.2) -> Array:
    """Truncation selection: who goes on with whose weights.

    Each of the worst `fraction` of the population copies one of the best `fraction`, drawn
    uniformly; all others go on. Equal scores are ranked by the runs' numbers. A score that is not
    a number is the worst.

    Args:
      scores: float [K], larger is better.
      fraction: at most a half; at least one run copies.

    Returns:
      int32 [K], the parent of each run.

    Raises:
      SetupError: fewer than 2 runs, or a fraction outside (0, 0.5].
    """
    (size,) = scores.shape
    if size < 2 or not 0 < fraction <= 0.5:
        raise SetupError(
            f"truncation selection of {fraction} of {size} runs; give 2 runs or more, and a "
            "fraction above 0 and up to 0.5."
        )
    count = max(1, int(fraction * size))
    order = jnp.argsort(jnp.where(jnp.isnan(scores), -jnp.inf, scores), stable=True)
    drawn = jax.random.randint(key, (count,), 0, count)
    parents = jnp.arange(size, dtype=jnp.int32)
    return parents.at[order[:count]].set(order[size - count :][drawn].astype(jnp.int32))


def explore(
    key: Array,
    hypers: Hypers,
    moved: Array,
    priors: Mapping[str, Prior],
    factors: tuple[float, float] = (0.8, 1.2),
    resample: float = 0.25,
) -> Hypers:
    """Perturbs the hyper-parameters of the runs that moved, each by itself.

    With probability `resample` one is drawn anew from its prior; else it is multiplied by one of
    the factors, by a fair coin, and kept within the prior's bounds.

    Args:
      hypers: {name: [K]}; those without a prior stay as they are.
      moved: bool [K].

    Raises:
      SetupError: a prior of no hyper-parameter; see also `draw`.
    """
    check_priors(priors, hypers)
    found = dict(hypers)
    for name, k, prior in _named(key, priors):
        old = hypers[name]
        which, coin, fresh = jax.random.split(k, 3)
        times = jnp.where(jax.random.bernoulli(coin, 0.5, old.shape), factors[1], factors[0])
        perturbed = jnp.clip(old * times, prior.low, prior.high)
        again = jax.random.bernoulli(which, resample, old.shape)
        new = jnp.where(again, _from_prior(fresh, prior, old.shape[0]), perturbed)
        found[name] = jnp.where(moved, new, old).astype(old.dtype)
    return found


def copied(states: Any, parents: Array) -> Any:
    """The states of a population whose runs are copies of their parents, by a gather.

    The random key of each run stays its own, so that copies see other dropout masks.

    Args:
      states: of `effjax.population`, side by side or mapped.
      parents: int [K].
    """
    if isinstance(states, TrainState):
        own: Any = states
        chosen = jax.tree.map(lambda x: x[parents], own._replace(step=(), key=()))
        return chosen._replace(step=own.step, key=own.key)
    bare = stack([own._replace(step=(), key=()) for own in states])
    return tuple(
        jax.tree.map(lambda x, k=k: x[parents[k]], bare)._replace(step=own.step, key=own.key)
        for k, own in enumerate(states)
    )


def decide(
    key: Array,
    hypers: Hypers,
    scores: Array,
    priors: Mapping[str, Prior],
    *,
    fraction: float = 0.2,
    factors: tuple[float, float] = (0.8, 1.2),
    resample: float = 0.25,
) -> Event:
    """Who copies whom and what is explored: `evolve` without states, for runs that are elsewhere.

    Args: see `evolve`.
    """
    first, second = jax.random.split(key)
    parents = truncation(first, scores, fraction)
    moved = parents != jnp.arange(len(parents))
    inherited = {name: values[parents] for name, values in hypers.items()}
    after = explore(second, inherited, moved, priors, factors, resample)
    return Event(parents, jnp.asarray(scores, jnp.float32), hypers, after)


def evolve(
    key: Array, states: Any, hypers: Hypers, scores: Array, priors: Mapping[str, Prior], **how: Any
) -> tuple[Any, Hypers, Event]:
    """Exploit and explore: one round's end, for all runs.

    Jit it with the priors bound: `jax.jit(functools.partial(evolve, priors=priors))`. It depends on
    its arguments alone, so a search that is resumed from states, hyper-parameters and the round's
    key decides what it would have decided.

    Args:
      key: of this round.
      states: of `effjax.population`, side by side or mapped.
      hypers: {name: [K]}.
      scores: [K], larger is better.
      priors: {name: Prior}; hyper-parameters without one go with the copies and stay as they are.
      **how: `fraction` of `truncation`; `factors` and `resample` of `explore`.

    Returns:
      The states and hyper-parameters to go on with, and what was decided.
    """
    event = decide(key, hypers, scores, priors, **how)
    return copied(states, event.parent), event.after, event


def check_priors(priors: Mapping[str, Prior], hypers: Mapping[str, Any] | None = None) -> None:
    """Raises SetupError for priors that cannot be meant."""
    if not priors:
        raise SetupError("population-based training needs a prior of at least one hyper-parameter.")
    for name, (low, high, log) in priors.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
            raise SetupError(
                f"the prior of {name} is from {low} to {high}{', logarithmic' * log}; it needs "
                "low < high, and low > 0 where it is logarithmic."
            )
        if hypers is not None and name not in hypers:
            raise SetupError(f"there is a prior of {name}, but the hypers are {sorted(hypers)}.")


def _named(key: Array, priors: Mapping[str, Prior]) -> list[tuple[str, Array, Prior]]:
    """(name, key, prior), in the names' order."""
    return [(n, jax.random.fold_in(key, i), priors[n]) for i, n in enumerate(sorted(priors))]


def _from_prior(key: Array, prior: Prior, size: int) -> Array:
    low, high = (math.log(prior.low), math.log(prior.high)) if prior.log else prior[:2]
    drawn = jax.random.uniform(key, (size,), minval=low, maxval=high)
    return jnp.clip(jnp.exp(drawn) if prior.log else drawn, prior.low, prior.high)
