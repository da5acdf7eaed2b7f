"""Schedules that `optax.schedules` lacks: sparsity over training, and windows in which masks move.

A schedule is a function from the step (int32 scalar) to a float32 scalar, as in optax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from effjax.errors import ScheduleError

Scalar = float | Array
Schedule = Callable[[Array], Array]


def is_traced(value: Any) -> bool:
    """Whether a hyper-parameter is an array (perhaps traced, as in a population), whose value is
    not looked at when the transform is made."""
    return isinstance(value, Array)


def as_schedule(value: Scalar | Schedule) -> Schedule:
    """A constant as a schedule; a schedule as it is."""
    if callable(value):
        return value
    return lambda step: jnp.asarray(value, jnp.float32)


def check_window(begin: int, end: int, what: str) -> None:
    """Raises unless 0 <= begin < end."""
    if begin < 0 or end <= begin:
        raise ScheduleError(
            f"{what} begins at step {begin} and ends at step {end}; a window has 0 <= begin < end. "
            "Steps count from 0 and `end` is the step at which the final value is reached."
        )


def check_fraction(value: Scalar, what: str) -> None:
    """Raises unless value is in [0, 1); a traced value passes."""
    if not is_traced(value) and not 0.0 <= value < 1.0:
        raise ScheduleError(
            f"{what} is {value}; it is a fraction of zeros in [0, 1). "
            "For 80% zeros write 0.8; a layer cannot be removed whole by pruning its weights."
        )


def cubic(final: Scalar, begin: int, end: int, initial: Scalar = 0.0) -> Schedule:
    """The cubic sparsity schedule, fast at first and slow towards the end.

    s_t = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin))^3 for begin <= t <= end, s_i before
    (0 if t < begin), s_f after.

    Args:
      final: s_f, the fraction of zeros at `end`, in [0, 1).
      begin: first step at which weights are pruned.
      end: step at which s_f is reached.
      initial: s_i, the sparsity at `begin`.

    Raises:
      ScheduleError: the window ends before it begins, or a sparsity is outside [0, 1).

    Example:
      >>> import effjax as ej
      >>> [round(float(ej.schedules.cubic(0.8, 0, 4)(t)), 4) for t in range(6)]
      [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.
    """
    check_window(begin, end, "the cubic sparsity schedule")
    check_fraction(final, "the final sparsity")
    check_fraction(initial, "the initial sparsity")

    def schedule(step: Array) -> Array:
        progress = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0.0, 1.0)
        sparsity = final + (initial - final) * (1.0 - progress) ** 3
        return jnp.where(jnp.asarray(step) < begin, 0.0, sparsity).astype(jnp.float32)

    return schedule


class Window(NamedTuple):
    """The steps at which something is updated: `begin`, `begin + every`, ... and `end`.

    Without an end it goes on for ever; with `end == begin` it is that one step.
    """

    begin: int
    end: int | None
    every: int = 1

    @classmethod
    def once(cls, step: int) -> "Window":
        """The window of one step."""
        return cls(step, step)

    def check(self, what: str) -> "Window":
        """Itself, or ScheduleError if it ends before it begins or its stride is not positive."""
        if self.end != self.begin:
            check_window(self.begin, self.begin + 1 if self.end is None else self.end, what)
        elif self.begin < 0:
            raise ScheduleError(f"{what} happens at step {self.begin}; steps count from 0.")
        if self.every < 1:
            raise ScheduleError(f"{what} happens every {self.every} steps; use 1 or more.")
        return self

    def contains(self, step: Array) -> Array:
        """Whether the window updates at this step; always at `end`, so that the final value is met.

        Args:
          step: int32 scalar, or a Python integer.

        Returns:
          bool scalar.
        """
        due = (step >= self.begin) & ((step - self.begin) % self.every == 0)
        return due if self.end is None else (due & (step <= self.end)) | (step == self.end)
