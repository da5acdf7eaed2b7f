"""Mixed precision: which leaf gets how many bits, so that the loss suffers least within
a budget."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from effjax.core import PyTree
from effjax.errors import SetupError
from effjax.quantize.numerics import FLOAT
from effjax.select import KERNELS, select
from effjax.sites import Site

# {params path: {bits: what they cost, or what they do to the loss}}
Table = Mapping[str, Mapping[int, float]]


class Allocation(NamedTuple):
    """Bits for every leaf.

    bits: {params path: bits}, as `by_leaf` takes them.
    cost: what they cost together, at most the budget.
    loss: their sensitivities together, the least that the budget allows.
    """

    bits: dict[str, int]
    cost: float
    loss: float


def bit_costs(
    params: PyTree,
    sites: Iterable[Site],
    widths: Iterable[int],
    unit: Literal["bits", "bytes", "bitops"] = "bits",
    *,
    activations: int = 32,
    per_channel: bool = True,
    pattern: str = KERNELS,
) -> dict[str, dict[int, float]]:
    """What each leaf costs at each width.

    Args:
      params: arrays or ShapeDtypeStructs.
      sites: `ej.find_sites(apply, params, model_state, batch)`; for "bitops", which are counted for
        the whole batch, give it a batch of one example.
      widths: bits; 16 and more stand for the leaf's own dtype.
      unit: "bits" of the weights alone, so that a budget of 3 · (number of weights) is an average
        of 3 bits; "bytes" with the float32 scales beside them, as `ej.footprint` counts a leaf
        without zeros; "bitops", MACs times the bits of both operands.
      activations: bits of what the weights are multiplied with; read for "bitops".
      per_channel: whether a weight has a scale for each output channel.
      pattern: regular expression over params paths: which leaves, of those that reach a site.

    Returns:
      {path: {width: cost}}, for `allocate`.

    Raises:
      SelectorError: the pattern matches no leaf.
      SetupError: no widths, an unknown unit, or no leaf that reaches a site.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> apply = ej.from_function(lambda params, x: x @ params["kernel"], "x")
      >>> sites = ej.find_sites(apply, params, {}, {"x": jnp.ones((1, 4))})
      >>> ej.quantize.bit_costs(params, sites, (2, 4), "bytes")  # weights, and 2 scales of 4 bytes
      {'kernel': {2: 10.0, 4: 12.0}}
    """
    if unit not in ("bits", "bytes", "bitops"):
        raise SetupError(f"the unit is {unit!r}; costs are in 'bits', 'bytes' or 'bitops'.")
    widths = tuple(widths)
    if not widths:
        raise SetupError("there are no widths to choose from; give for example (2, 3, 4, 6, 8).")
    named = select(params, pattern, min_ndim=2)
    found: dict[str, dict[int, float]] = {}
    scales: dict[str, int] = {}
    macs: dict[str, int] = {}
    for site in sites:
        if site.weight is not None and site.leaf in named:
            macs[site.leaf] = macs.get(site.leaf, 0) + site.macs
            own = site.scales if per_channel else int(np.prod(site.stack))
            scales[site.leaf] = max(own, scales.get(site.leaf, 0))
    for path, leaf in named.items():
        if path not in macs:
            continue
        found[path] = {}
        size, own = int(np.prod(leaf.shape)), 8 * np.dtype(leaf.dtype).itemsize
        for width in widths:
            bits = own if width >= FLOAT else width
            bytes_ = -(-size * bits // 8) + (0 if width >= FLOAT else 4 * scales[path])
            cost = {"bits": size * bits, "bytes": bytes_, "bitops": macs[path] * bits * activations}
            found[path][width] = float(cost[unit])
    if not found:
        raise SetupError(f"none of the leaves {list(named)} reaches a site of those given.")
    return found


def allocate(sensitivity: Table, costs: Table, budget: float) -> Allocation:
    """The bits of every leaf that hurt the loss least within a budget: exact, not greedy.

        minimise sum_i sensitivity[i][b_i]  over the b_i,  subject to  sum_i costs[i][b_i] <= budget

    This is the multiple-choice knapsack problem. It is solved by dynamic programming over the
    leaves: of partial choices only those are kept that no other beats in both cost and loss, and
    whose loss with the linear relaxation's bound for the remaining leaves is below that of a known
    solution. Of equal solutions, the cheapest.

    Args:
      sensitivity: {path: {bits: loss}}; see `hawq`, `drop_one`. Need not fall with the bits.
      costs: the same paths and bits; see `bit_costs`.
      budget: in the unit of the costs.

    Raises:
      SetupError: different paths or bits in the two tables, numbers that are not finite, or a
        budget that not even the cheapest bits of every leaf meet.

    Example:
      >>> from effjax.quantize import allocate
      >>> loss = {"a": {2: 5.0, 4: 1.0}, "b": {2: 3.0, 4: 2.5}}
      >>> allocate(loss, {"a": {2: 20, 4: 40}, "b": {2: 20, 4: 40}}, budget=60).bits
      {'a': 4, 'b': 2}

    Reference: Yao et al., "HAWQ-V3: Dyadic neural network quantization", 2021,
    https://arxiv.org/abs/2011.10680 (bits by integer programming); Dudzinski and Walukiewicz,
    "Exact methods for the knapsack problem and its generalizations", 1987 (the bound).
    """
    options = _check(sensitivity, costs)
    least = sum(min(costs[path].values()) for path in options)
    if least > budget:
        cheapest = {path: min(costs[path].values()) for path in options}
        raise SetupError(
            f"no choice of bits meets the budget of {budget:,.6g}: the cheapest costs "
            f"{least:,.6g}, of which {cheapest}. Raise the budget, allow fewer bits, or select "
            "fewer leaves."
        )
    cost = [np.array([costs[p][b] for b in widths], np.float64) for p, widths in options.items()]
    loss = [
        np.array([sensitivity[p][b] for b in widths], np.float64) for p, widths in options.items()
    ]
    bounds = [_Relaxed.of(cost[i:], loss[i:]) for i in range(len(cost) + 1)]
    known = bounds[0].rounded(budget)
    slack = 1e-9 * sum(float(np.abs(x).max()) for x in loss)  # of sums in another order
    spent, total = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # (place of the choice before, option)
    for i in range(len(cost)):
        c = (spent[:, None] + cost[i]).ravel()
        v = (total[:, None] + loss[i]).ravel()
        rest = bounds[i + 1]
        able = np.flatnonzero(c + rest.least <= budget)
        able = able[v[able] + rest.bound(budget - c[able]) <= known + slack]
        able = able[np.lexsort((v[able], c[able]))]
        before = np.minimum.accumulate(np.concatenate([[np.inf], v[able]]))[:-1]
        able = able[v[able] < before]
        steps.append((able // len(cost[i]), able % len(cost[i])))
        spent, total = c[able], v[able]
    place = int(np.argmin(total))
    found = Allocation({}, float(spent[place]), float(total[place]))
    chosen: dict[str, int] = {}
    for (path, widths), (back, option) in zip(
        reversed(options.items()), reversed(steps), strict=True
    ):
        chosen[path] = widths[int(option[place])]
        place = int(back[place])
    return found._replace(bits={path: chosen[path] for path in options})


class _Relaxed(NamedTuple):
    """The linear relaxation for some leaves: their cheapest bits, then the best exchanges first.

    least, base: cost and loss of the cheapest bits.
    steps: (leaf, cost, loss) of each exchange along the leaves' lower convex hulls, steepest first.
    costs, losses: their running sums, from 0.
    """

    least: float
    base: float
    steps: list[tuple[int, float, float]]
    costs: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, cost: list[np.ndarray], loss: list[np.ndarray]) -> "_Relaxed":
        least = base = 0.0
        steps: list[tuple[int, float, float]] = []
        for i, (c, v) in enumerate(zip(cost, loss, strict=True)):
            order = np.lexsort((v, c))
            at = int(order[0])
            least, base = least + c[at], base + v[at]
            while True:
                better = [k for k in order if c[k] > c[at] and v[k] < v[at]]
                if not better:
                    break
                # The steepest; of equally steep ones the farthest.
                new = min(better, key=lambda k: ((v[k] - v[at]) / (c[k] - c[at]), -c[k]))
                steps.append((i, float(c[new] - c[at]), float(v[new] - v[at])))
                at = new
        steps.sort(key=lambda step: step[2] / step[1])
        costs = np.cumsum([0.0, *(step[1] for step in steps)])
        losses = np.cumsum([0.0, *(step[2] for step in steps)])
        return cls(float(least), float(base), steps, costs, losses)

    def bound(self, budget: np.ndarray) -> np.ndarray:
        """No choice within the budget has less loss."""
        return self.base + np.interp(budget - self.least, self.costs, self.losses)

    def rounded(self, budget: float) -> float:
        """The loss of a choice within the budget: the exchanges that fit, one after another."""
        room, loss, full = budget - self.least, self.base, set[int]()
        for leaf, cost, change in self.steps:
            if leaf not in full and cost <= room:
                room, loss = room - cost, loss + change
            else:
                full.add(leaf)
        return loss


def _check(sensitivity: Table, costs: Table) -> dict[str, list[int]]:
    """The widths that each path may have."""
    if set(sensitivity) != set(costs) or not costs:
        raise SetupError(
            f"sensitivities are of {sorted(sensitivity)} and costs of {sorted(costs)}; both need "
            "the same leaves. Select them by the same pattern."
        )
    options: dict[str, list[int]] = {}
    for path, own in costs.items():
        if set(own) != set(sensitivity[path]) or not own:
            raise SetupError(
                f"{path} has sensitivities at {sorted(sensitivity[path])} bits and costs at "
                f"{sorted(own)}; both need the same widths."
            )
        numbers = [*own.values(), *sensitivity[path].values()]
        if not np.all(np.isfinite(np.asarray(numbers, np.float64))):
            raise SetupError(
                f"the costs {dict(own)} and sensitivities {dict(sensitivity[path])} of {path} are "
                "not all finite; a loss that overflowed at few bits is better left out."
            )
        options[path] = sorted(own)
    return options
