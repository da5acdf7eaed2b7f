"""Models as they are shipped."""

from effjax.export.packed import Packed, load_packed, save_packed

__all__ = ["Packed", "load_packed", "save_packed"]
