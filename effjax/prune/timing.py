"""When masks move, and how sparse they are then."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.errors import ScheduleError
from effjax.prune.patterns import Pattern
from effjax.schedules import Scalar, Schedule, Window, as_schedule, check_fraction, cubic


class Timing(NamedTuple):
    """A sparsity for every step, and the steps at which masks are moved to meet it."""

    schedule: Schedule
    window: Window

    @property
    def final(self) -> float | None:
        """The sparsity at the last move (without one, at the first), None where it is traced."""
        window = self.window
        return known(self.schedule, window.begin if window.end is None else window.end)


def timing(
    sparsity: Scalar | Schedule | None,
    begin: int,
    end: int | None,
    every: int,
    initial: Scalar,
    pattern: Pattern,
) -> Timing:
    """The timing that the arguments of `prune.magnitude` mean.

    Raises:
      ScheduleError: see `prune.magnitude`.
    """
    plain = not isinstance(initial, Array) and initial == 0.0
    if pattern.sparsity is not None:
        found = _fixed(pattern.sparsity, sparsity, initial, begin, end, every)
    elif callable(sparsity := _given(sparsity)):
        if not plain:
            raise ScheduleError(
                f"initial={initial} goes with a final sparsity and the cubic schedule; a schedule "
                "of your own says itself where it starts."
            )
        found = Timing(sparsity, Window(begin, end, every))
    elif end is not None:
        found = Timing(cubic(sparsity, begin, end, initial), Window(begin, end, every))
    elif every == 1 and plain:
        check_fraction(sparsity, "the sparsity")
        found = Timing(as_schedule(sparsity), Window.once(begin))
    else:
        raise ScheduleError(
            f"pruning once, at step {begin}, has no use for every={every} and initial={initial}. "
            "For gradual pruning say when it is done: end=..."
        )
    found.window.check("pruning")
    for step in (begin, begin if end is None else end):
        if (value := known(found.schedule, step)) is not None:
            check_fraction(value, f"the sparsity at step {step}")
    return found


def steady(
    sparsity: Scalar | Schedule | None,
    begin: int,
    end: int | None,
    every: int,
    pattern: Pattern,
) -> Timing:
    """A sparsity that holds from the first step on, and masks that move in a window.

    Raises:
      ScheduleError: a sparsity outside [0, 1), or none; a window that ends before it begins.
    """
    if pattern.sparsity is not None:
        _check_fixed(pattern.sparsity, sparsity)
        sparsity = pattern.sparsity
    schedule = as_schedule(_given(sparsity))
    if (value := known(schedule, 0)) is not None:
        check_fraction(value, "the sparsity")
    return Timing(schedule, Window(begin, end, every).check("moving masks"))


def _given(sparsity: Scalar | Schedule | None) -> Scalar | Schedule:
    if sparsity is None:
        raise ScheduleError(
            "no sparsity is given, and the pattern does not fix one. Say how many weights are to "
            "be zero, for example 0.8."
        )
    return sparsity


def _fixed(
    fixed: float,
    sparsity: Scalar | Schedule | None,
    initial: Scalar,
    begin: int,
    end: int | None,
    every: int,
) -> Timing:
    """The timing of a pattern with a sparsity of its own: masks follow it whenever they move."""
    _check_fixed(fixed, sparsity)
    if isinstance(initial, Array) or initial != 0.0:
        raise ScheduleError(f"initial={initial} means nothing for a pattern of one sparsity.")
    if end is None and every != 1:
        raise ScheduleError(
            f"pruning once, at step {begin}, has no use for every={every}. For masks that are "
            "chosen again while training goes on say when that ends: end=..."
        )
    window = Window.once(begin) if end is None else Window(begin, end, every)
    return Timing(as_schedule(fixed), window)


def _check_fixed(fixed: float, sparsity: Scalar | Schedule | None) -> None:
    if sparsity is not None and (callable(sparsity) or isinstance(sparsity, Array)):
        raise ScheduleError(
            f"the pattern has a sparsity of its own, {fixed:g}, so that no schedule or traced "
            "sparsity can change it. Leave the sparsity out."
        )
    if sparsity is not None and abs(sparsity - fixed) > 1e-6:
        raise ScheduleError(
            f"the pattern has a sparsity of its own, {fixed:g}, but {sparsity} was asked for. "
            "Leave the sparsity out, or choose another N:M."
        )


def known(schedule: Schedule, step: int) -> float | None:
    """The schedule's value at a step, or None where it depends on a traced value."""
    with jax.ensure_compile_time_eval():
        value = schedule(jnp.int32(step))
    return None if isinstance(value, jax.core.Tracer) else float(value)
