"""SIGTERM and SIGINT as a request to stop at the next step."""

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """Within this, a first SIGTERM or SIGINT only sets `signum`; a second one acts as it used to.

    Clusters and Colab send SIGTERM some seconds before they take a machine away. Outside of the
    main thread, where Python cannot handle signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()
