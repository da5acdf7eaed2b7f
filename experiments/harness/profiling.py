"""A profiler trace of some steps: `--profile N`."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

from experiments.harness.errors import UsageError
from experiments.harness.progress import say
from experiments.harness.runs import Run


class Asked:
    """How many steps are to be traced; of the first training that has so many."""

    def __init__(self, steps: int):
        self.steps = steps


_asked: ContextVar[Asked | None] = ContextVar("asked_profile", default=None)


@contextlib.contextmanager
def profile_steps(steps: int | None) -> Iterator[None]:
    """Within this, the first training leaves a trace of so many steps in its folder `profile`.

    Raises:
      UsageError: less than one step.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"--profile {steps}: give a number of steps, 1 or more.")
    token = _asked.set(None if steps is None else Asked(steps))
    try:
        yield
    finally:
        _asked.reset(token)


class Profile:
    """The trace of one training, which begins once its first step has been compiled and taken."""

    def __init__(self, run: Run):
        self._path = run.path / "profile"
        self._asked = _asked.get()
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def begin(self, at: int, first: int, until: int) -> int:
        """Begins the trace if it is time; returns where the next steps end for its sake."""
        if self._asked is None or not self._asked.steps or at == first:
            return until
        if not self._running:
            self._path.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._path))
            self._running = True
        return min(until, at + self._asked.steps)

    def took(self, steps: int) -> None:
        """Notes that so many steps are through."""
        if self._running and self._asked is not None:
            self._asked.steps -= steps
            if not self._asked.steps:
                self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._asked = None
            say(f"profile: {self._path} (tensorboard --logdir, or ui.perfetto.dev)")
