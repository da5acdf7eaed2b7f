"""Files that are there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` at the end.

    Where the block raises, or the process dies, what was at `path` before is still there: a reader
    sees the old file or the new one, never half of one.

    Example:
      >>> import pathlib, tempfile
      >>> from effjax.report import whole
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "a.txt"
      ...     with whole(path) as temporary:
      ...         _ = temporary.write_text("all of it")
      ...     path.read_text()
      'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave the name and no bytes
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text with `whole`, and returns the path."""
    path = Path(path)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
