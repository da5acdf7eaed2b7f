"""The taint analysis: which values of a program are computed from weights, and which from data.

Three values are enough. Neutral: constants, the model's state, random keys. A weight: computed from
params leaves and not from data, through whatever operations. Data: all that depends on the batch.
Joining takes the later of these.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from effjax import jaxprs


class Taint(NamedTuple):
    """What a value is computed from: data, else weights, else (no leaves) neither."""

    data: bool = False
    leaves: frozenset[int] = frozenset()  # indices of params leaves
    stacked: frozenset[int] = frozenset()  # depths of the scans that slice them


NEUTRAL = Taint()
DATA = Taint(data=True)


def join(taints: Sequence[Taint]) -> Taint:
    """The taint of a value computed from values with these."""
    if any(t.data for t in taints):
        return DATA
    leaves = frozenset().union(*(t.leaves for t in taints))
    return Taint(False, leaves, frozenset().union(*(t.stacked for t in taints)))


# A function inside an equation, the taints of its inputs, and how many scans it stands in.
Entry = tuple[jaxprs.Body, list[Taint], int]


class Flow:
    """Follows taints through jaxprs and remembers them, since loops ask until nothing changes."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[jaxprs.Jaxpr, list[Taint]]] = {}

    def outputs(self, jaxpr: jaxprs.Jaxpr, inputs: Sequence[Taint], depth: int) -> list[Taint]:
        """The taints of a jaxpr's outputs."""
        asked = (id(jaxpr), tuple(inputs), depth)
        if asked not in self._known:

            def step(eqn: jaxprs.Eqn, taints: list[Taint]) -> list[Taint]:
                inner = [self.outputs(b.jaxpr, i, d) for b, i, d in self.enter(eqn, taints, depth)]
                return leave(eqn, taints, inner, depth)

            # The jaxpr is kept, so that its id stays its own.
            self._known[asked] = jaxpr, follow(jaxpr, inputs, step)
        return self._known[asked][1]

    def enter(self, eqn: jaxprs.Eqn, taints: list[Taint], depth: int) -> list[Entry]:
        """The functions inside an equation, as they are met in execution."""
        found = jaxprs.parts(eqn)
        if isinstance(found, jaxprs.Scan):
            first, last = found.consts, found.consts + found.carry
            xs = [t._replace(stacked=t.stacked | {depth}) if t.leaves else t for t in taints[last:]]
            inputs = self._settle(found.body, [*taints[:last], *xs], first, last, depth + 1)
            return [(found.body, inputs, depth + 1)]
        if isinstance(found, jaxprs.While):
            first = found.condition_consts
            inputs = taints[first:]
            inputs = self._settle(found.body, inputs, found.body_consts, len(inputs), depth)
            condition = [*taints[:first], *inputs[found.body_consts :]]
            return [(found.condition, condition, depth), (found.body, inputs, depth)]
        if isinstance(found, jaxprs.Cond):
            return [(branch, taints[1:], depth) for branch in found.branches]
        return [] if found is None else [(found.body, taints, depth)]

    def _settle(
        self, body: jaxprs.Body, inputs: list[Taint], first: int, last: int, depth: int
    ) -> list[Taint]:
        """A loop body's inputs, with the carry (from first to last) at its fixed point."""
        while True:
            outs = self.outputs(body.jaxpr, inputs, depth)
            carry = [join(pair) for pair in zip(inputs[first:last], outs, strict=False)]
            if carry == inputs[first:last]:
                return inputs
            inputs = [*inputs[:first], *carry, *inputs[last:]]


def leave(
    eqn: jaxprs.Eqn, taints: list[Taint], inner: list[list[Taint]], depth: int
) -> list[Taint]:
    """The taints of an equation's outputs, given those of the functions inside it."""
    found = jaxprs.parts(eqn)
    if found is None:
        return [join(taints)] * len(eqn.outvars)
    if isinstance(found, jaxprs.Cond):
        return [join([taints[0], *outs]) for outs in zip(*inner, strict=True)]
    if isinstance(found, jaxprs.While):
        carry = taints[found.condition_consts + found.body_consts :]
        return [join(pair) for pair in zip(carry, inner[1], strict=True)]
    if isinstance(found, jaxprs.Scan):
        outs = [t._replace(stacked=t.stacked - {depth}) for t in inner[0]]
        carry = taints[found.consts :][: found.carry]
        return [join(p) for p in zip(carry, outs, strict=False)] + outs[found.carry :]
    return inner[0]


def follow(
    jaxpr: jaxprs.Jaxpr,
    inputs: Sequence[Taint],
    step: Callable[[jaxprs.Eqn, list[Taint]], list[Taint]],
) -> list[Taint]:
    """The taints of a jaxpr's outputs; `step` says what an equation makes of its inputs'."""
    env = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Taint:  # literals and constants are neutral
        return NEUTRAL if jaxprs.is_literal(atom) else env.get(atom, NEUTRAL)

    for eqn in jaxpr.eqns:
        outs = step(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]
