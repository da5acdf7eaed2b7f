"""Packages that only some exports need: imported where they are used, with an error that helps."""

import importlib
import importlib.metadata
from types import ModuleType

from effjax.errors import ExportError

INSTALL = {
    "onnx": "pip install 'effjax[onnx]'",
    "litert": (
        "pip install 'effjax[litert]' && pip install --no-deps litert-converter==0.5.0 xdsl==0.28.0"
    ),
}


def need(module: str, extra: str) -> ModuleType:
    """A module of an optional extra.

    Raises:
      ExportError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(
            f"the export to {extra} needs the package {module.partition('.')[0]!r}, which cannot "
            f"be imported ({error}). Install it: {INSTALL[extra]}"
        ) from error
