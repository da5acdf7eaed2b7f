"""A progress bar with the loss, the speed and the time left; silent where nobody watches."""

import os
import sys
import time
from importlib.util import find_spec
from typing import Any


def watched() -> bool:
    """Whether a person sees a bar: in a terminal or a notebook that can draw one, and not in CI."""
    notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    return (notebook or sys.stderr.isatty()) and not os.environ.get("CI")


def say(message: str) -> None:
    """A line for the person at the terminal, or for the log."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """A bar over the steps of one training.

    Args:
      label: what is trained.
      start: the step it goes on from.
      steps: the step it ends at.
      show: by default, whether anyone watches.
    """

    def __init__(self, label: str, start: int, steps: int, show: bool | None = None):
        self.began = time.monotonic()
        self._drawn = 0.0
        self._bar: Any = None
        if watched() if show is None else show:
            self._bar = _bar()
            self._task = self._bar.add_task(label, total=steps, completed=start, loss="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float | None = None) -> None:
        """Moves the bar, at most 10 times a second; the loss is the last one known."""
        now = time.monotonic()
        if self._bar is None or (loss is None and now - self._drawn < 0.1):
            return
        self._drawn = now
        fields = {} if loss is None else {"loss": f"loss {loss:.4g}"}
        self._bar.update(self._task, completed=step, **fields)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    return Rich(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
