"""Configurations: dataclasses with bounds, as plain dicts, and their hash."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from experiments.harness.errors import ConfigError

Bounds = tuple[float, float]


def check(config: Any, **bounds: Bounds) -> None:
    """Raises unless each named field lies within its (smallest, largest) value, both included.

    Call it in `__post_init__`. Of a tuple or list every entry is checked; None passes.

    Example:
      >>> import dataclasses
      >>> from experiments.harness.config import check
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     sparsity: float = 0.8
      ...     def __post_init__(self):
      ...         check(self, sparsity=(0.0, 0.99))
      >>> Config(sparsity=80)
      Traceback (most recent call last):
      experiments.harness.errors.ConfigError: sparsity is 80; it must be between 0.0 and 0.99.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        for entry in value if isinstance(value, (tuple, list)) else [value]:
            if entry is None:
                continue
            if (isinstance(entry, float) and math.isnan(entry)) or not low <= entry <= high:
                raise ConfigError(f"{name} is {value}; it must be between {low} and {high}.")


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass (or dict) as plain JSON values."""
    plain = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
    try:
        return json.loads(json.dumps(plain, default=_plain))
    except TypeError as error:
        raise ConfigError(f"{type(config).__name__} cannot be written as JSON: {error}.") from error


def config_hash(config: Any) -> str:
    """12 hex digits of the SHA-256 of a config, its `seed` left out.

    Runs that differ in nothing but the seed have the same hash, which is how a report finds the
    runs to average.
    """
    plain = {k: v for k, v in as_dict(config).items() if k != "seed"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def difference(old: Any, new: Any) -> str:
    """The fields in which two configs differ, for a message."""
    a, b = as_dict(old), as_dict(new)
    names = [*a, *(n for n in b if n not in a)]
    return ", ".join(
        f"{n}: {a.get(n, '(none)')!r} -> {b.get(n, '(none)')!r}"
        for n in names
        if a.get(n, ...) != b.get(n, ...)
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(f"{value!r:.60} is a {type(value).__name__}")
