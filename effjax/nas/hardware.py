"""Accuracy against cost in a search: the MnasNet reward, and configurations that cost too much."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.search import Strategy


def mnasnet_reward(
    accuracy: Any, cost: Any, target: float, below: float = -0.07, above: float = -0.07
) -> Array:
    """accuracy · (cost / target)^w, with w = `below` where cost <= target, and `above` elsewhere.

    The defaults are the paper's soft constraint: a network that costs twice as much is as good if
    it is about 5% more accurate, relatively. Its hard constraint is below=0, above=-1.

    Args:
      accuracy: [...], larger is better, of one scale (fractions or percent) in one search.
      cost: [...], positive: seconds, MACs, bytes.
      target: what the cost should be.
      below, above: the exponents, not positive.

    Returns:
      float32 [...].

    Raises:
      SetupError: a target that is not positive, or positive exponents.

    Example:
      >>> from effjax.nas import mnasnet_reward
      >>> [round(float(mnasnet_reward(0.8, c, 2.0, 0.0, -1.0)), 3) for c in (1.0, 2.0, 4.0)]
      [0.8, 0.8, 0.4]

    Reference: Tan et al., "MnasNet", 2019, https://arxiv.org/abs/1807.11626.
    """
    if not target > 0 or below > 0 or above > 0:
        raise SetupError(
            f"target={target}, below={below}, above={above}: the target is positive, and the "
            "exponents are 0 or negative, so that a smaller cost is never worse."
        )
    ratio = jnp.asarray(cost, jnp.float32) / target
    return accuracy * ratio ** jnp.where(ratio <= 1, below, above)


def within(costs: Mapping[str, Any], limits: Mapping[str, float]) -> Array:
    """Whether costs keep hard limits: boolean [...], costs[name] <= limits[name] for all names.

    Raises:
      SetupError: a limit on a cost that is not there.

    Example:
      >>> from effjax.nas import within
      >>> bool(within({"macs": 1e6, "bytes": 4e5}, {"macs": 2e6}))
      True
    """
    if lost := [name for name in limits if name not in costs]:
        raise SetupError(f"there are limits on {lost}, but the costs are {list(costs)}.")
    kept = [jnp.asarray(costs[name]) <= limit for name, limit in limits.items()]
    return jnp.all(jnp.stack(jnp.broadcast_arrays(*kept)), axis=0) if kept else jnp.array(True)


class Constrained:
    """A strategy that proposes only what is accepted: costs are looked at before the training.

    What the strategy proposes and `accept` refuses is dropped, and it is asked again; it is told
    only of what was evaluated. A space's own `constraint` is better where the cost can be written
    as a traced function of the genes; this takes any Python function, such as a predicted latency.

    Args:
      strategy: a new one.
      accept: from one vector, int32 [genes], to a bool; a pure function, for a search to go on.
      tries: how often the strategy is asked before that is an error.

    Raises:
      SetupError: fewer than one try; from `ask`: nothing that was proposed is accepted.

    Example:
      >>> import jax
      >>> from effjax.nas import Constrained, Integer, RandomSearch, Space
      >>> space = Space({"width": Integer(1, 64)})
      >>> narrow = Constrained(RandomSearch(space), lambda genes: genes[0] < 8)
      >>> bool(narrow.ask(jax.random.key(0))[0] < 8)
      True
    """

    def __init__(self, strategy: Strategy, accept: Callable[[np.ndarray], Any], tries: int = 1000):
        if tries < 1:
            raise SetupError(f"tries={tries}; a strategy is asked at least once.")
        self.strategy, self.accept, self.tries = strategy, accept, tries

    def ask(self, key: Array) -> np.ndarray:
        """The strategy's next proposal that is accepted."""
        for number in range(self.tries):
            genes = self.strategy.ask(jax.random.fold_in(key, number))
            if bool(self.accept(genes)):
                return genes
        raise SetupError(
            f"of {self.tries} configurations that {type(self.strategy).__name__} proposed, none "
            f"was accepted; the last was {np.asarray(genes).tolist()}. The limits may be below "
            "what the smallest configuration costs: loosen them, or give more tries."
        )

    def tell(self, genes: np.ndarray, value: Any) -> None:
        """The value goes to the strategy."""
        self.strategy.tell(genes, value)
