"""Budgets: from a sparsity to how many units are kept, in each layer or in all together.

A unit is what a pattern keeps or prunes as one: a weight, a block, a channel. A network's sparsity
may be spread over its layers in many ways, the **allocations**: functions

    (layers {path: Layer}, scores {path: unit scores}, sparsity) -> Budget

of which `ALLOCATIONS` has those with names. What selects units (`patterns`) is told only the
numbers. A layer keeps at least one unit. Sparsities may be traced: nothing here looks at them.
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
from effjax.schedules import Scalar, is_traced

# Of each layer by itself, or of all layers together.
Budget = Count | dict[str, Count]


class Layer(NamedTuple):
    """What allocations know of a weight array.

    shape: of the weights.
    units: how many things are kept or pruned together; the number of weights, unless the pattern
      has blocks or channels.
    macs: multiply-accumulates of one forward pass in which the dense weights take part; may be
      traced.
    """

    shape: tuple[int, ...]
    units: int
    macs: Scalar | None = None

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


Layers = Mapping[str, Layer]
Scores = Mapping[str, Array]


Allocation = Callable[[Layers, Scores, Scalar], Budget]


def uniform(layers: Layers, scores: Scores, sparsity: Scalar) -> dict[str, Count]:
    """The same sparsity in every layer: each keeps n - round(sparsity * n) of its n units.

    Example:
      >>> layers = {"a": Layer((5, 2), units=10), "b": Layer((15, 2), units=30)}
      >>> {path: int(kept) for path, kept in uniform(layers, {}, 0.8).items()}
      {'a': 2, 'b': 6}
    """
    return {path: keep(layer.units, sparsity) for path, layer in layers.items()}


def global_(layers: Layers, scores: Scores, sparsity: Scalar) -> Count:
    """One sparsity for all layers together: one threshold, which prunes them to different degrees.

    Units of all layers count alike. Where they are of different sizes (channels), the fraction of
    units pruned is not that of weights; `bytes` meets that.
    """
    return keep(sum(layer.units for layer in layers.values()), sparsity, len(layers))


def erk(layers: Layers, scores: Scores, sparsity: Scalar, power: float = 1.0) -> dict[str, Count]:
    """Erdos-Renyi-Kernel: layers with many weights for their dimensions are pruned more.

    A layer's density is min(1, eps * (sum of its dimensions / product of its dimensions)^power),
    with the one eps for which all layers together have the sparsity asked for: those that would
    be more than dense are dense, and the others make up for it.

    Of N weights (1 - sparsity) * N are kept, but for the rounding of each layer to units and
    float32's resolution of the total.

    Args:
      power: 0 is uniform, 1 the paper's; `functools.partial(erk, power=0.5)` is an allocation.

    Example:
      >>> layers = {"a": Layer((10, 10), units=100), "b": Layer((40, 40), units=1600)}
      >>> {path: int(kept) for path, kept in erk(layers, {}, 0.9).items()}
      {'a': 34, 'b': 136}

    Reference: Evci et al., "Rigging the lottery", 2020, https://arxiv.org/abs/1911.11134. For
    matrices: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", 2018, https://arxiv.org/abs/1707.04780.
    """
    density = _erk_densities(layers, sparsity, power)
    return {path: keep(layer.units, 1.0 - density[path]) for path, layer in layers.items()}


def _erk_densities(layers: Layers, sparsity: Scalar, power: float) -> dict[str, Array]:
    """{path: density, float32 []}.

    With the k layers of the largest raw densities dense, the others share what is left:

        eps_k = (kept - sizes of the dense ones) / (sum of raw density * size of the others)

    and the solution is the smallest k for which none of the others is more than dense. All sizes
    are in units of the total, so that float32 resolves the total as well as it can.
    """
    raw = {p: (sum(x.shape) / max(x.size, 1)) ** power for p, x in layers.items()}
    paths = sorted(layers, key=lambda path: -raw[path])
    density = np.array([raw[path] for path in paths])
    size = np.array([layers[path].size for path in paths], np.float64)
    share = size / size.sum()
    dense = jnp.asarray(np.cumsum(share) - share, jnp.float32)
    others = jnp.asarray(np.cumsum((density * share)[::-1])[::-1], jnp.float32)
    kept = 1.0 - jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    eps = (kept - dense) / others
    found = eps * jnp.asarray(density, jnp.float32)  # of the densest of the others
    fits = found <= 1.0
    # Without any that fits nothing is pruned, up to rounding.
    chosen = jnp.where(jnp.any(fits), eps[jnp.argmax(fits)], jnp.inf)
    result = jnp.clip(chosen * jnp.asarray(density, jnp.float32), 0.0, 1.0)
    return {path: result[i] for i, path in enumerate(paths)}


Share = Scalar | Callable[[Scalar], Scalar]


def by_path(rules: Mapping[str, Share]) -> Allocation:
    """A sparsity of its own for each layer, by regular expressions.

    Args:
      rules: {pattern: multiplier or function}; the first pattern that matches a path
        (`re.search`) counts. A number multiplies the sparsity asked for, up to all units but one;
        a function of the sparsity replaces it: `lambda s: 0.5` is 0.5 at every move of the masks.

    Raises:
      SetupError: a multiplier that is negative.
      SelectorError: from the allocation, a layer that no pattern matches, or a pattern
        that is the first match of no layer.

    Example:
      >>> layers = {"conv/kernel": Layer((10,), 10), "dense/kernel": Layer((100,), 100)}
      >>> allocate = by_path({r"^conv": 0.5, r"": 1.0})
      >>> {path: int(kept) for path, kept in allocate(layers, {}, 0.8).items()}
      {'conv/kernel': 6, 'dense/kernel': 20}
    """
    for pattern, rule in rules.items():
        if not callable(rule) and not is_traced(rule) and not rule >= 0:
            raise SetupError(
                f"the sparsity of {pattern!r} is multiplied by {rule}; use 0 (dense) or more."
            )

    def allocate(layers: Layers, scores: Scores, sparsity: Scalar) -> dict[str, Count]:
        found = {}
        for path, pattern in _first_matches(rules, layers).items():
            rule = rules[pattern]
            own = rule(sparsity) if callable(rule) else rule * jnp.asarray(sparsity, jnp.float32)
            found[path] = keep(layers[path].units, own)
        return found

    return allocate


def macs(layers: Layers, scores: Scores, sparsity: Scalar) -> dict[str, Count]:
    """The sparsity as the fraction of the dense multiply-accumulates that pruning saves.

    The units are kept that have the largest score for each multiply-accumulate they cost, see
    `cost`: a weight of an early convolution, which is used at many places, has to be that much
    better. What a pruned channel saves in the layers after it is not counted.

    Raises:
      SetupError: a layer whose MACs are not known.
    """
    costs = {path: layer.macs for path, layer in layers.items() if layer.macs is not None}
    if missing := [path for path in layers if path not in costs]:
        raise SetupError(
            f"a budget of MACs has to know those of {missing}, and no operation was found in which "
            "they meet data. Leave them out of the selector, or use another budget."
        )
    return _by_cost(layers, scores, sparsity, costs)


def bytes(layers: Layers, scores: Scores, sparsity: Scalar) -> dict[str, Count]:
    """The sparsity as the fraction of the stored weights that pruning saves.

    All weights have the same width (see `cost` for others), and masks are not counted. Of single
    weights this is `global_`, but for which of equal scores are kept; of channels and blocks, it
    counts each with its size.
    """
    return _by_cost(layers, scores, sparsity, {path: x.size for path, x in layers.items()})


def cost(per_weight: Mapping[str, float]) -> Allocation:
    """A budget of any cost: the sparsity is the fraction of the dense cost that pruning saves.

    With s the mean score of a unit's weights, n their number and c their cost, those units are kept
    that have the largest s * n / c, as many as fit into (1 - sparsity) of the total. That maximises
    the sum of the kept weights' scores, up to the last unit.

    Args:
      per_weight: {pattern: cost of one weight}, the first pattern that matches a path counts; for
        example bits, {r"^head": 8, r"": 4}.

    Raises:
      SetupError: a cost that is not positive.
      SelectorError: from the allocation, a layer that no pattern matches, or a pattern
        that is the first match of no layer.
    """
    for pattern, each in per_weight.items():
        if not each > 0:
            raise SetupError(f"a weight of {pattern!r} costs {each}; use a positive number.")

    def allocate(layers: Layers, scores: Scores, sparsity: Scalar) -> dict[str, Count]:
        matches = _first_matches(per_weight, layers)
        costs = {path: x.size * per_weight[matches[path]] for path, x in layers.items()}
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
    """The allocation of a name; an allocation as it is.

    Raises:
      SetupError: an unknown name.
    """
    if callable(budget):
        return budget
    if budget not in ALLOCATIONS:
        raise SetupError(
            f"budget is {budget!r}; it is one of {list(ALLOCATIONS)}, or a function such as "
            "budgets.by_path({...})."
        )
    return ALLOCATIONS[budget]


def _first_matches(rules: Mapping[str, object], layers: Layers) -> dict[str, str]:
    """{path: the first pattern that matches it}, every path and every pattern used."""
    found = {}
    for path in layers:
        matching = (pattern for pattern in rules if re.search(pattern, path))
        if (first := next(matching, None)) is None:
            raise SelectorError(
                f"no pattern of {list(rules)} matches {path!r}. End the rules with an entry for "
                "'', which matches the rest."
            )
        found[path] = first
    if unused := [pattern for pattern in rules if pattern not in found.values()]:
        raise SelectorError(
            f"the patterns {unused} are the first match of no layer of {list(layers)}."
        )
    return found


def _by_cost(
    layers: Layers, scores: Scores, sparsity: Scalar, costs: Mapping[str, Scalar]
) -> dict[str, Count]:
    """How many units of each layer have the largest scores for their cost, within a total cost.

    A unit is kept where score >= price * (cost of one weight); the price is found by bisecting the
    bit patterns of floats. Where many units leave at once (equal scores), each layer gives up the
    same fraction of those it could.
    """
    paths = list(layers)
    patterns, _ = ordered({path: scores[path].astype(jnp.float32) for path in paths}, signed=True)
    total = jnp.stack([jnp.asarray(costs[path], jnp.float32) for path in paths])
    per_unit = total / jnp.asarray([layers[path].units for path in paths], jnp.float32)
    per_unit = per_unit / jnp.sum(total)
    per_weight = total / jnp.asarray([layers[path].size for path in paths], jnp.float32)
    per_weight = per_weight / jnp.max(per_weight)
    wanted = 1.0 - jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)

    def kept(price: Array) -> Array:
        """float32 [layers]: the units of each layer that are worth this price, at least one."""
        [bound], _ = ordered({"": unordered(price) * per_weight}, signed=True)
        counts = [count(x >= bound[i]).value() for i, x in enumerate(patterns)]
        return jnp.maximum(jnp.stack(counts), 1.0)

    def narrow(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(kept(middle) * per_unit) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    [infinite], _ = ordered({"": jnp.array([-jnp.inf, jnp.inf], jnp.float32)}, signed=True)
    low, high = lax.fori_loop(0, 32, narrow, (infinite[0], infinite[1] + 1))
    many, few = kept(low), kept(high)
    gap = jnp.sum((many - few) * per_unit)
    part = jnp.clip((wanted - jnp.sum(few * per_unit)) / jnp.maximum(gap, 1e-30), 0.0, 1.0)
    found = Count.rounded(few + part * (many - few))
    return {path: Count(found.high[i], found.low[i]) for i, path in enumerate(paths)}


def keep(size: int, sparsity: Scalar, least: int = 1) -> Count:
    """How many of `size` units are kept: size - round(sparsity * size), and at least `least`.

    The product is computed and rounded in float32, halves to the even number, so that a sparsity
    that is traced (a schedule, a population) gives the same count as the same number written down.
    Above 2^24 units it is the nearest count that float32 resolves.

    Args:
      size: a number of units.
      sparsity: float32 scalar in [0, 1); outside of it the nearest count that there can be is
        meant.
      least: at most `size`.

    Example:
      >>> int(keep(10, 0.75).value())  # round(7.5) = 8 are pruned
      2
    """
    zeros = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0) * jnp.float32(size)
    return Count.of(size).minus(Count.rounded(zeros).minimum(Count.of(max(size - least, 0))))


def check_not_emptied(sizes: Mapping[str, int], sparsity: float) -> None:
    """Raises if a layer of one of these sizes would lose all its units at this sparsity."""
    for path, size in sizes.items():
        if _zeros(size, sparsity) >= size:
            raise SetupError(
                f"{path} has {size} weights, and a sparsity of {sparsity} would prune every one of "
                "them. Leave it out of the selector, or prune less."
            )


def _zeros(size: int, sparsity: float) -> int:
    """How many of `size` units `keep` prunes, before it spares any."""
    return int(np.round(np.float32(sparsity) * np.float32(size)))
