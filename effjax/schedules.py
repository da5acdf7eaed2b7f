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
    return _polynomial(3, final, begin, end, initial, "the cubic sparsity schedule")


def linear(final: Scalar, begin: int, end: int, initial: Scalar = 0.0) -> Schedule:
    """The linear schedule: as much in every step as in any other.

    s_t = s_i + (s_f - s_i) * (t - begin) / (end - begin) for begin <= t <= end, 0 before, s_f
    after.

    Args:
      final: s_f, the fraction of zeros at `end`, in [0, 1).
      begin: first step at which weights are pruned.
      end: step at which s_f is reached.
      initial: s_i, the sparsity at `begin`.

    Raises:
      ScheduleError: the window ends before it begins, or a sparsity is outside [0, 1).

    Example:
      >>> import effjax as ej
      >>> [round(float(ej.schedules.linear(0.8, 1, 5)(t)), 4) for t in range(7)]
      [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    """
    return _polynomial(1, final, begin, end, initial, "the linear sparsity schedule")


def _polynomial(
    power: int, final: Scalar, begin: int, end: int, initial: Scalar, what: str
) -> Schedule:
    check_window(begin, end, what)
    check_fraction(final, "the final sparsity")
    check_fraction(initial, "the initial sparsity")

    def schedule(step: Array) -> Array:
        progress = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0.0, 1.0)
        sparsity = final + (initial - final) * (1.0 - progress) ** power
        return jnp.where(jnp.asarray(step) < begin, 0.0, sparsity).astype(jnp.float32)

    return schedule


def one_shot(final: Scalar, begin: int = 0) -> Schedule:
    """All at once: s_t = 0 for t < begin, and s_f from then on.

    Args:
      final: s_f, the fraction of zeros, in [0, 1).
      begin: the step at which weights are pruned.

    Raises:
      ScheduleError: it begins before step 0, or the sparsity is outside [0, 1).

    Example:
      >>> import effjax as ej
      >>> [round(float(ej.schedules.one_shot(0.8, 2)(t)), 4) for t in range(4)]
      [0.0, 0.0, 0.8, 0.8]
    """
    Window.once(begin).check("the one-shot sparsity schedule")
    check_fraction(final, "the sparsity")

    def schedule(step: Array) -> Array:
        return jnp.where(jnp.asarray(step) < begin, 0.0, final).astype(jnp.float32)

    return schedule


def periodic(schedule: Schedule, every: int, begin: int = 0, end: int | None = None) -> Schedule:
    """A schedule whose value is taken anew every so many steps and held in between: a staircase.

    The value at step t is that of `schedule` at the last step at or before t in
    `Window(begin, end, every)`; 0 before `begin`, and that of `end` after it. Followed in a window
    of the same numbers, masks move to exactly these values, and between two moves the target
    reported is the sparsity there is.

    Args:
      schedule: any function from the step to a sparsity, for example `cubic(...)`.
      every: steps from one value to the next.
      begin: the first step at which a value is taken.
      end: the last one, which counts whether `every` divides the window or not; None for ever.

    Raises:
      ScheduleError: the window ends before it begins, or `every` is not positive.

    Example:
      >>> import effjax as ej
      >>> stairs = ej.schedules.periodic(ej.schedules.linear(0.8, 0, 8), every=3, end=8)
      >>> [round(float(stairs(t)), 4) for t in range(10)]
      [0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.8, 0.8]
    """
    Window(begin, end, every).check("the periodic sparsity schedule")

    def held(step: Array) -> Array:
        step = jnp.asarray(step, jnp.int32)
        last = step - (step - begin) % every
        if end is not None:
            last = jnp.where(step >= end, end, last)
        found = schedule(jnp.maximum(last, begin))
        return jnp.where(step < begin, 0.0, found).astype(jnp.float32)

    return held


def cyclic(
    final: Scalar,
    begin: int,
    end: int,
    compressed: int,
    decompressed: int | None = None,
    *,
    low: Scalar = 0.0,
    last: int | None = None,
) -> Schedule:
    """Alternating phases of pruned and of whole weights, as in AC/DC.

    From `begin` on: `compressed` steps at sparsity s_f, `decompressed` steps at `low`, and again;
    0 before `begin`. From `end - last` on it is s_f whatever the phase, so that training ends
    compressed: with c and d the lengths of the phases,

        s_t = s_f if (t - begin) mod (c + d) < c or t >= end - last, and low otherwise.

    Masks have to move at the steps where phases begin: a window of `every` steps that divides c, d
    and (end - last - begin).

    Args:
      final: s_f, the fraction of zeros in compressed phases, in [0, 1).
      begin: the first step of the first compressed phase; before it the model is dense (warm-up).
      end: the step at which all phases are over; s_f from then on.
      compressed: steps in a compressed phase.
      decompressed: steps in a decompressed phase; by default as many.
      low: the sparsity in decompressed phases; the paper's is 0.
      last: steps of the last, compressed phase before `end`; by default `compressed`.

    Raises:
      ScheduleError: the window ends before it begins, a phase is not positive or does not fit into
        the window, or a sparsity is outside [0, 1).

    Example:
      >>> import effjax as ej
      >>> phases = ej.schedules.cyclic(0.9, begin=2, end=10, compressed=2)
      >>> [round(float(phases(t)), 4) for t in range(12)]
      [0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]

    Reference: Peste et al., "AC/DC: Alternating compressed/decompressed training of deep neural
    networks", 2021, https://arxiv.org/abs/2106.12379.
    """
    check_window(begin, end, "the cyclic sparsity schedule")
    check_fraction(final, "the sparsity of compressed phases")
    check_fraction(low, "the sparsity of decompressed phases")
    decompressed = compressed if decompressed is None else decompressed
    last = compressed if last is None else last
    if compressed < 1 or decompressed < 1 or not 0 <= last <= end - begin:
        raise ScheduleError(
            f"phases of {compressed} steps compressed and {decompressed} decompressed, with the "
            f"last {last} of steps {begin} to {end} compressed; phases have 1 step or more, and "
            f"the last one has to fit into the {end - begin} steps of the window."
        )

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.int32)
        pruned = (step - begin) % (compressed + decompressed) < compressed
        sparsity = jnp.where(pruned | (step >= end - last), final, low)
        return jnp.where(step < begin, 0.0, sparsity).astype(jnp.float32)

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
