"""Lottery tickets: train, prune the smallest weights, rewind, and again."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import PyTree
from effjax.errors import SelectorError, SetupError
from effjax.prune import budgets, masks
from effjax.prune.patterns import Pattern, unstructured
from effjax.schedules import check_fraction
from effjax.select import KERNELS, leaves
from effjax.select import select as select_leaves

Rewind = Literal["weights", "rate"]


class Ticket(NamedTuple):
    """What one round starts with: a pytree of arrays, to be saved and gone on from.

    round: int32 [], how often weights have been pruned.
    masks: {path: bool}, for `static(masks=...)`.
    params: the weights that this round starts from; pruned ones are 0.
    origin: the weights that are rewound to, unpruned.
    """

    round: Array
    masks: dict[str, Array]
    params: PyTree
    origin: PyTree


@dataclasses.dataclass(frozen=True)
class Lottery:
    """Iterative magnitude pruning: rounds of training, with some of what is left pruned in each.

    After r rounds a layer of n units has n - round(s_r n) of them, s_r = 1 - (1 - fraction)^r:
    those with the largest trained magnitudes among those it had. What is left then starts again

    - "weights": from where it started, at initialization, or at step k if `rewind_to` was told
      the weights at that step. Train it with the schedule from there on.
    - "rate": from where training left it, with the learning rate's schedule from the start.

    The training is yours: from a ticket to trained params.

        lottery = Lottery(0.2)
        ticket = lottery.start(params)
        for _ in range(5):
            trained = train(ticket.params, ej.chain(prune=ej.prune.static(masks=ticket.masks)))
            ticket = lottery.prune(ticket, trained)

    or, with each round's result as it comes, `for ticket, trained in lottery.play(ticket, train,
    5)`. A ticket is all that goes from round to round: save it with a `Checkpointer`, and go on
    from it. The masks are part of the train state, so that a step jitted with the first round's
    transform serves them all.

    fraction: of the units that are left, pruned in each round; or {pattern: fraction}, of which the
      first that matches a path counts. The paper prunes output layers by half of the others'.
    rewind: see above.
    budget: "uniform" (each layer for itself) or "global", all layers by one threshold.
    pattern: what is pruned together; left out, every weight by itself.
    select: a regular expression for the params paths that are pruned; all kernels by default.

    Raises:
      ScheduleError: a fraction outside [0, 1).
      SetupError: another way to rewind or budget; an N:M pattern; fractions by path with the global
        budget.

    Reference: Frankle and Carbin, "The lottery ticket hypothesis", 2019,
    https://arxiv.org/abs/1803.03635; rewinding to step k: Frankle et al., 2020,
    https://arxiv.org/abs/1912.05671; learning-rate rewinding: Renda, Frankle and Carbin,
    "Comparing rewinding and fine-tuning in neural network pruning", 2020,
    https://arxiv.org/abs/2003.02389.
    """

    fraction: float | Mapping[str, float] = 0.2
    rewind: Rewind = "weights"
    _: dataclasses.KW_ONLY
    budget: Literal["uniform", "global"] = "uniform"
    pattern: Pattern = dataclasses.field(default_factory=unstructured)
    select: str = KERNELS

    def __post_init__(self) -> None:
        for value in self._fractions().values():
            check_fraction(value, "the fraction pruned in a round")
        if self.rewind not in ("weights", "rate"):
            raise SetupError(f"rewind is {self.rewind!r}; it is 'weights' or 'rate'.")
        if self.budget not in ("uniform", "global"):
            raise SetupError(f"budget is {self.budget!r}; it is 'uniform' or 'global'.")
        if self.budget == "global" and isinstance(self.fraction, Mapping):
            raise SetupError(
                "one threshold for all layers has one fraction for all; give a number, or "
                "budget='uniform'."
            )
        if self.pattern.sparsity is not None:
            raise SetupError(
                "an N:M pattern has one sparsity, and a lottery raises it from round to round. "
                "Use static(scores=..., pattern=n_m(...)) for one round."
            )

    def start(self, params: PyTree) -> Ticket:
        """The first ticket: nothing is pruned.

        Args:
          params: the initial weights, as `model.init` makes them.

        Raises:
          SelectorError: nothing is selected, or a fraction is missing or matches nothing.
          SetupError: a leaf that the pattern does not fit.
        """
        found = select_leaves(params, self.select)
        for path, leaf in found.items():
            self.pattern.check(path, leaf.shape)
        self._by_path(list(found))
        kept = {path: jnp.ones(leaf.shape, bool) for path, leaf in found.items()}
        own = jax.tree.map(jnp.copy, (params, params))
        return Ticket(jnp.int32(0), kept, *own)

    def rewind_to(self, ticket: Ticket, params: PyTree) -> Ticket:
        """The ticket whose later rounds start from these weights, unpruned ones of step k in the
        first round."""
        _check_same(ticket.origin, params)
        return ticket._replace(origin=jax.tree.map(jnp.copy, params))

    def prune(self, ticket: Ticket, trained: PyTree) -> Ticket:
        """The next round's ticket.

        Args:
          ticket: of this round.
          trained: the params that training made of it.
        """
        _check_same(ticket.params, trained)
        named, done = leaves(trained), ticket.round + 1
        scores = {
            path: jnp.where(mask, jnp.abs(named[path]), -1.0) for path, mask in ticket.masks.items()
        }
        kept = self.pattern.choose(scores, lambda units: self._keep(units, done), signed=True)
        start = ticket.origin if self.rewind == "weights" else trained
        return ticket._replace(round=done, masks=kept, params=masks.apply(start, kept))

    def play(
        self, ticket: Ticket, train: Callable[[Ticket], PyTree], rounds: int
    ) -> Iterator[tuple[Ticket, PyTree]]:
        """Rounds one after another, until the ticket has been pruned `rounds` times and trained.

        Args:
          ticket: the first one, or one of a later round, to go on from.
          train: from a ticket to its trained params.
          rounds: how often weights are pruned in all; `rounds + 1` trainings from the start.

        Yields:
          (ticket, its trained params), the dense network's first.
        """
        while int(ticket.round) <= rounds:
            trained = train(ticket)
            yield ticket, trained
            if int(ticket.round) == rounds:
                return
            ticket = self.prune(ticket, trained)

    def _keep(self, units: Mapping[str, Array], done: Array) -> budgets.Budget:
        """How many units are kept after this many rounds."""
        rounds = done.astype(jnp.float32)
        each = {p: 1.0 - (1.0 - f) ** rounds for p, f in self._by_path(list(units)).items()}
        sizes = {path: x.size for path, x in units.items()}
        if self.budget == "global":
            return budgets.keep(sum(sizes.values()), next(iter(each.values())), len(sizes))
        return {path: budgets.keep(size, each[path]) for path, size in sizes.items()}

    def _fractions(self) -> Mapping[str, float]:
        return self.fraction if isinstance(self.fraction, Mapping) else {"": self.fraction}

    def _by_path(self, paths: list[str]) -> dict[str, float]:
        """{path: the fraction pruned in a round}"""
        fractions = self._fractions()
        found: dict[str, float] = {}
        for pattern, value in fractions.items():
            mine = [p for p in paths if p not in found and re.search(pattern, p)]
            if not mine:
                raise SelectorError(f"the fraction of {pattern!r} is that of no path of {paths}.")
            found |= dict.fromkeys(mine, value)
        if missing := [path for path in paths if path not in found]:
            raise SelectorError(
                f"no pattern of {list(fractions)} gives {missing} a fraction; end with one for ''."
            )
        return found


def _check_same(old: PyTree, new: PyTree) -> None:
    """Raises unless both trees have the same paths and shapes."""
    a, b = ({p: jnp.shape(x) for p, x in leaves(tree).items()} for tree in (old, new))
    if a != b:
        differ = sorted(p for p in {**a, **b} if a.get(p) != b.get(p))
        raise SetupError(
            f"the params given differ from the ticket's at {differ}: {[b.get(p) for p in differ]} "
            f"where it has {[a.get(p) for p in differ]}. Give the params alone, "
            "state.vars.model, of the model that the ticket was started with."
        )
