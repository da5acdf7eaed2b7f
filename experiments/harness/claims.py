"""Who does which run of a sweep: locks that the operating system takes back from a dead process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Claims:
    """A folder of lock files, one for each name that can be claimed.

    A claim is an flock on the file, not the file: it ends with the process that holds it, killed or
    not, so that there are no stale ones, and the files stay where they are (removing one would let
    two processes hold locks on two files of one name). On NFS, Linux makes an flock a lock on the
    server: it holds between hosts where the server's lock service runs, and a host that loses power
    keeps its claims until its lease ends (NFSv4: about 90 s). Mounted with `nolock` or
    `local_lock=flock`, hosts do not see each other's claims: share a sweep within one host there.

    Args:
      folder: made when something is claimed.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Holds a name within this, or gives False if another process, or thread, holds it.

        Args:
          name: a file's name.
          wait: until it is free, instead of giving False.
        """
        if fcntl is None:
            yield True
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                mine = False
            else:
                mine = True
            yield mine
        finally:
            os.close(file)  # which ends the lock


def shared() -> bool:
    """Whether claims are seen by other processes: not on Windows, which has no flock."""
    return fcntl is not None
