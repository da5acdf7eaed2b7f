"""Where a result comes from, in one line under everything that is written."""

from collections.abc import Mapping
from typing import Any


def footer(provenance: Mapping[str, Any] | None, separator: str = " · ") -> str:
    """Provenance as one line: `{"commit": "ab12", "jax": "0.10"}` is "commit ab12 · jax 0.10".

    Nested mappings are joined by dots; what is None or empty is left out.
    """
    return separator.join(f"{key} {value}" for key, value in flatten(provenance or {}))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) pairs of a nested mapping."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            if value:
                pairs.append((f"{prefix}{key}", ", ".join(map(str, value))))
        elif value is not None and value != "":
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs
