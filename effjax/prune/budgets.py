"""Budgets: from a sparsity to how many units are kept, in each layer or in all together.

A unit is what a pattern keeps or prunes as one: a weight, a block, a channel. A network's sparsity
may be spread over its layers in many ways, the **allocations**: functions

    (layers {path: Layer}, scores {path: unit scores}, sparsity) -> Budget

of which `ALLOCATIONS` has those with names. What selects units (`patterns`) is told only the
numbers. Sparsities may be traced: nothing here looks at their values.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.errors import SelectorError, SetupError
from effjax.prune.counts import Count, count
from effjax.prune.threshold import ordered, unordered
from effjax.schedules import Scalar

# Of each layer by itself, or of all layers together.
Budget = Count | dict[str, Count]


class Layer(NamedTuple):
    """What allocations know of a weight array.

    shape: of the weights.
    units: how many things are kept or pruned together; the number of weights, unless the pattern
      has blocks or channels.
    macs: multiply-accumulates of one forward pass in which the weights take part when dense.
    """

    shape: tuple[int, ...]
    units: int
    macs: int | None = None

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


Layers = Mapping[str, Layer]
Allocation = Callable[[Layers, Mapping[str, Array], Scalar], Budget]


def uniform(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> dict[str, Count]:
    """The same sparsity in every layer: each keeps n - round(sparsity * n) of its n units.

    Example:
      >>> layers = {"a": Layer((5, 2), units=10), "b": Layer((15, 2), units=30)}
      >>> {path: int(kept) for path, kept in uniform(layers, {}, 0.8).items()}
      {'a': 2, 'b': 6}
    """
    return {path: keep(layer.units, sparsity) for path, layer in layers.items()}


def global_(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> Count:
    """One sparsity for all layers together: one threshold, which prunes them to different degrees.

    Units of all layers count alike. Where they are of different sizes (channels), the fraction of
    units pruned is not that of weights; `bytes` meets that.
    """
    return keep(sum(layer.units for layer in layers.values()), sparsity)


def erk(
    layers: Layers, scores: Mapping[str, Array], sparsity: Scalar, power: float = 1.0
) -> dict[str, Count]:
    """Erdos-Renyi-Kernel: layers with many weights for their dimensions are pruned more.

    A layer's density is min(1, eps * (sum of its dimensions / product of its dimensions)^power),
    with the one eps for which all layers together have the sparsity asked for: those that would
    be more than dense are dense, and the others make up for it.

    The weights kept are (1 - sparsity) * N of N, but for the rounding of each layer to units and
    float32's resolution of the total.

    Args:
      power: 0 is uniform, 1 the paper's.

    Example:
      >>> layers = {"a": Layer((10, 10), units=100), "b": Layer((40, 40), units=1600)}
      >>> {path: int(kept) for path, kept in erk(layers, {}, 0.9).items()}  # densities 0.34, 0.085
      {'a': 34, 'b': 136}

    Reference: Evci et al., "Rigging the lottery", 2020, https://arxiv.org/abs/1911.11134; Mocanu et
    al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018,
    https://arxiv.org/abs/1707.04780, for matrices.
    """
    raw = {p: (sum(x.shape) / max(x.size, 1)) ** power for p, x in layers.items()}
    paths = sorted(layers, key=lambda path: -raw[path])
    # With the k layers of the largest raw densities dense, the others share what is left of the
    # total: eps_k = (total - sizes of the dense) / (sum of raw * size of the others). The smallest
    # k for which none of the others is more than dense is the solution; all this in units of N.
    share = np.array([layers[path].size for path in paths], np.float64)
    share = share / max(share.sum(), 1.0)
    density = np.array([raw[path] for path in paths])
    dense = np.cumsum(share) - share
    others = np.cumsum((density * share)[::-1])[::-1]
    total = 1.0 - jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    eps = jnp.maximum(total - jnp.asarray(dense, jnp.float32), 0.0) / jnp.asarray(
        np.maximum(others, np.finfo(np.float32).tiny), jnp.float32
    )
    fits = eps * jnp.asarray(density, jnp.float32) <= 1.0
    solved = jnp.where(jnp.any(fits), eps[jnp.argmax(fits)], jnp.inf)
    found = jnp.minimum(1.0, solved * jnp.asarray(density, jnp.float32))
    return {path: keep(layers[path].units, 1.0 - found[i]) for i, path in enumerate(paths)}


Rule = Scalar | Callable[[Scalar], Scalar]


def by_path(rules: Mapping[str, Rule]) -> Allocation:
    """A sparsity of its own for each layer, by regular expressions.

    Args:
      rules: {pattern: multiplier or function}; the first pattern that matches a path
        (`re.search`) counts. A number multiplies the sparsity asked for, up to all units but one;
        a function of the sparsity replaces it: `lambda s: 0.5` is 0.5 at every move of the masks.

    Raises:
      SetupError: a multiplier that is negative.
      SelectorError: from the allocation, a layer that no pattern matches, or a pattern that is the
        first match of no layer.

    Example:
      >>> layers = {"conv/kernel": Layer((10,), 10), "dense/kernel": Layer((100,), 100)}
      >>> allocate = by_path({r"^conv": 0.5, r"": 1.0})
      >>> {path: int(kept) for path, kept in allocate(layers, {}, 0.8).items()}
      {'conv/kernel': 6, 'dense/kernel': 20}
    """
    for pattern, rule in rules.items():
        if isinstance(rule, int | float) and not rule >= 0:
            raise SetupError(
                f"the sparsity of {pattern!r} is multiplied by {rule}; use 0 (dense) or more."
            )

    def allocate(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> Budget:
        used = {path: _first(rules, path) for path in layers}
        if unused := sorted(set(rules) - set(used.values())):
            raise SelectorError(
                f"the patterns {unused} are the first match of no layer of {list(layers)}."
            )
        found = {}
        for path, layer in layers.items():
            rule = rules[used[path]]
            own = rule(sparsity) if callable(rule) else rule * jnp.asarray(sparsity, jnp.float32)
            found[path] = keep(layer.units, own)
        return found

    return allocate


def macs(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> dict[str, Count]:
    """The sparsity as the fraction of the dense multiply-accumulates that pruning saves.

    The units are kept that have the largest score for each multiply-accumulate they cost, see
    `cost`. A weight of an early convolution, used at many places, has to be that much better.

    Raises:
      SetupError: a layer whose MACs are not known.
    """
    costs = {}
    for path, layer in layers.items():
        if layer.macs is None:
            raise SetupError(
                f"a budget of MACs has to know those of {path}; no operation was found in which "
                "it meets data. Leave it out of the selector, or use another budget."
            )
        costs[path] = layer.macs
    return _by_cost(layers, scores, sparsity, costs)


def bytes(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> dict[str, Count]:
    """The sparsity as the fraction of the stored weights that pruning saves.

    All weights have the same width (see `cost` for others), and masks are not counted. Of single
    weights this is `global_`; of channels, it counts each with its size.
    """
    return _by_cost(layers, scores, sparsity, {path: x.size for path, x in layers.items()})


def cost(per_weight: Mapping[str, float]) -> Allocation:
    """A budget of any cost: the sparsity is the fraction of the dense cost that pruning saves.

    With the mean score of a unit's weights s, its weights n and its cost c, those units are kept
    that have the largest s * n / c, as many as fit into (1 - sparsity) of the total. That maximises
    the sum of the kept weights' scores, up to the last unit.

    Args:
      per_weight: {pattern: cost of one weight}, the first pattern that matches a path counts; for
        example bits, {r"^head": 8, r"": 4}.

    Raises:
      SetupError: a cost that is not positive.
      SelectorError: from the allocation, a layer that no pattern matches.
    """
    for pattern, each in per_weight.items():
        if not each > 0:
            raise SetupError(f"a weight of {pattern!r} costs {each}; use a positive number.")

    def allocate(layers: Layers, scores: Mapping[str, Array], sparsity: Scalar) -> Budget:
        costs = {p: x.size * per_weight[_first(per_weight, p)] for p, x in layers.items()}
        return _by_cost(layers, scores, sparsity, costs)

    return allocate


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "erk": erk,
    "global": global_,
    "macs": macs,
    "bytes": bytes,
}


def resolve(budget: str | Allocation) -> Allocation:
    """The allocation of a name; an allocation as it is."""
    if callable(budget):
        return budget
    if budget not in ALLOCATIONS:
        raise SetupError(
            f"budget is {budget!r}; it is one of {list(ALLOCATIONS)}, or a function such as "
            "by_path({...})."
        )
    return ALLOCATIONS[budget]


def _first(rules: Mapping[str, object], path: str) -> str:
    """The first pattern that matches."""
    for pattern in rules:
        if re.search(pattern, path):
            return pattern
    raise SelectorError(
        f"no pattern of {list(rules)} matches {path!r}. End the rules with an entry for '', which "
        "matches the rest."
    )


def _by_cost(
    layers: Layers, scores: Mapping[str, Array], sparsity: Scalar, costs: Mapping[str, float]
) -> dict[str, Count]:
    """How many units of each layer have the largest scores for their cost, within a total cost.

    A unit is kept where score >= price * (cost of one weight); the price is found by bisecting the
    bit patterns of floats. Where many units leave at once (equal scores), each layer gives up the
    same fraction of those it could.
    """
    paths = list(layers)
    patterns, _ = ordered({path: scores[path].astype(jnp.float32) for path in paths}, True)
    per_weight = np.array([costs[p] / max(layers[p].size, 1) for p in paths], np.float64)
    per_weight = per_weight / per_weight.max()
    shares = [costs[p] / max(layers[p].units, 1) / sum(costs.values()) for p in paths]
    per_unit = jnp.asarray(shares, jnp.float32)
    wanted = 1.0 - jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)

    def kept(price: Array) -> Array:
        """float32 [layers]: the units of each layer that are worth this price, at least one."""
        least = unordered(price) * jnp.asarray(per_weight, jnp.float32)
        [bound], _ = ordered({"": least}, True)
        counts = [count(x >= bound[i]).value() for i, x in enumerate(patterns)]
        return jnp.maximum(jnp.stack(counts), 1.0)

    def narrow(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(kept(middle) * per_unit) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    [infinite], _ = ordered({"": jnp.array([-jnp.inf, jnp.inf])}, True)
    low, high = lax.fori_loop(0, 32, narrow, (infinite[0], infinite[1] + 1))
    many, few = kept(low), kept(high)
    gap = jnp.sum((many - few) * per_unit)
    part = jnp.clip((wanted - jnp.sum(few * per_unit)) / jnp.maximum(gap, 1e-30), 0.0, 1.0)
    found = Count.rounded(few + part * (many - few))
    return {path: Count(found.high[i], found.low[i]) for i, path in enumerate(paths)}


def per_layer(sizes: Mapping[str, int], sparsity: Scalar) -> dict[str, Count]:
    """The same sparsity in every layer: each keeps n - round(sparsity * n) of its n weights."""
    return {path: keep(size, sparsity) for path, size in sizes.items()}


def overall(sizes: Mapping[str, int], sparsity: Scalar) -> Count:
    """One sparsity for all layers together, which are then pruned to different degrees."""
    return keep(sum(sizes.values()), sparsity)


def keep(size: int, sparsity: Scalar) -> Count:
    """How many of `size` weights are kept: size - round(sparsity * size), and at least one.

    The product is computed and rounded in float32, halves to the even number, so that a sparsity
    that is traced (a schedule, a population) gives the same count as the same number written down.
    Above 2^24 weights it is the nearest count that float32 resolves.

    Args:
      size: a number of weights.
      sparsity: float32 scalar in [0, 1); outside of it the nearest count that there can be is
        meant.

    Example:
      >>> int(keep(10, 0.75).value())  # round(7.5) = 8 are pruned
      2
    """
    zeros = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0) * jnp.float32(size)
    return Count.of(size).minus(Count.rounded(zeros).minimum(Count.of(max(size - 1, 0))))


def check_not_emptied(sizes: Mapping[str, int], sparsity: float) -> None:
    """Raises if a layer of one of these sizes would lose all its weights at this sparsity."""
    for path, size in sizes.items():
        if np.round(np.float32(sparsity) * np.float32(size)) >= size:
            raise SetupError(
                f"{path} has {size} weights, and a sparsity of {sparsity} would prune every one of "
                "them. Leave it out of the selector, or prune less."
            )
