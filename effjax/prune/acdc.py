"""AC/DC: sparse and dense training in turn."""

import math

from effjax.core import Transform
from effjax.prune.budgets import Allocation
from effjax.prune.gradual import magnitude
from effjax.prune.patterns import Pattern
from effjax.schedules import Scalar, cyclic


def acdc(
    sparsity: Scalar,
    begin: int,
    end: int,
    compressed: int,
    decompressed: int | None = None,
    *,
    budget: str | Allocation = "uniform",
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """Alternating phases of sparse and of dense training; the last one is sparse.

    After a dense warm-up, from `begin` on: a compressed phase, whose masks are chosen by magnitude
    at its start; a decompressed one, in which what was pruned trains again from 0, with new
    moments; and so on. The last compressed phase goes on after `end`, for fine-tuning.

    Args:
      sparsity: of compressed phases, in [0, 1), perhaps traced.
      begin: the first step of the first compressed phase.
      end: where phases no longer change.
      compressed: steps of a compressed phase.
      decompressed: steps of a decompressed phase; by default as many.
      budget: as in `prune.magnitude`, and so are `pattern` and `select`.

    Returns:
      A Transform of kind "prune" with the gradients, the state and the report of `prune.magnitude`.

    Raises:
      ScheduleError: see `schedules.cyclic`.

    Example:
      >>> import effjax as ej
      >>> prune = ej.chain(prune=ej.prune.acdc(0.9, begin=100, end=1000, compressed=150))

    Reference: Peste et al., "AC/DC: alternating compressed/decompressed training of deep neural
    networks", 2021, https://arxiv.org/abs/2106.12379.
    """
    schedule = cyclic(sparsity, begin, end, compressed, decompressed)
    # Masks move where a phase begins, and perhaps within one, where they find what they found.
    lengths = (compressed, decompressed or compressed, end - compressed - begin)
    every = math.gcd(*lengths)
    return magnitude(schedule, begin, end, every, budget=budget, pattern=pattern, select=select)
