"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from effjax.errors import ExportError


def write_together(files: Mapping[Path, bytes]) -> int:
    """Writes files, each under its name when all are on disk; returns their bytes.

    Raises:
      ExportError: a folder that cannot be written to.
    """
    ready: list[tuple[str, Path]] = []
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            ready.append((temporary, path))
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # as other files; temporary ones are private
        for temporary, path in ready:
            os.replace(temporary, path)
    except OSError as error:
        where = ", ".join(map(str, files))
        raise ExportError(
            f"{where} cannot be written: {error.strerror or error}. Nothing was left half-written; "
            "name a folder that you may write to, with room for the file."
        ) from error
    finally:
        for temporary, _ in ready:
            Path(temporary).unlink(missing_ok=True)
    return sum(map(len, files.values()))
