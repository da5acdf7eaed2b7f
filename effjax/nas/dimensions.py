"""What a search space is made of: choices, ranges, conditions and repeated cells, as plain data."""

import math
from typing import Any, NamedTuple

from effjax.errors import SetupError


class Choice(NamedTuple):
    """One of some values: numbers, texts, booleans or None."""

    values: tuple[Any, ...]


class Integer(NamedTuple):
    """A whole number from low to high, both included, in steps."""

    low: int
    high: int
    step: int = 1


class Float(NamedTuple):
    """One of `levels` numbers from low to high, equally far apart, or in their logarithms."""

    low: float
    high: float
    levels: int = 101
    log: bool = False


class When(NamedTuple):
    """A dimension that exists only if an earlier one beside it has one of these values."""

    name: str
    values: tuple[Any, ...]
    then: Any  # a Choice, Integer or Float; in a supernet, what is elastic


class Repeat(NamedTuple):
    """So many copies of the same dimensions: cells that are chosen one by one."""

    times: int
    dimensions: dict[str, Any]


def values_of(name: str, dimension: Any) -> tuple[Any, ...]:
    """All values of a Choice, Integer or Float, in order.

    Raises:
      SetupError: it has none, has one twice, or is no dimension.
    """
    match dimension:
        case Choice(values):
            found = tuple(values)
        case Integer(low, high, step):
            if step < 1:
                raise SetupError(f"{name} has the step {step}; a step is 1 or more.")
            found = tuple(range(low, high + 1, step))
        case Float(low, high, levels, log):
            if levels < 2 or not low < high or (log and low <= 0):
                raise SetupError(
                    f"{name} is {dimension}; it needs low < high, 2 or more levels, and low > 0 "
                    "where it is logarithmic."
                )
            a, b = (math.log(low), math.log(high)) if log else (low, high)
            inner = (a + (b - a) * i / (levels - 1) for i in range(1, levels - 1))
            found = (low, *(math.exp(x) if log else x for x in inner), high)
        case _:
            raise SetupError(
                f"{name} is {dimension!r}; a dimension is a Choice, Integer, Float, When or Repeat."
            )
    if not found:
        raise SetupError(f"{name} is {dimension} and has no values; give it one or more.")
    if len({(type(v), v) for v in found}) < len(found):
        raise SetupError(f"{name} has a value twice, which would be drawn twice as often: {found}.")
    return found


def to_plain(dimension: Any) -> dict[str, Any]:
    """A dimension as JSON values; `from_plain` reads it."""
    content = dimension._asdict()
    if isinstance(dimension, When):
        content["then"] = to_plain(dimension.then)
    elif isinstance(dimension, Repeat):
        content["dimensions"] = {n: to_plain(d) for n, d in dimension.dimensions.items()}
    return {"kind": type(dimension).__name__, **content}


def from_plain(content: dict[str, Any]) -> Any:
    """The dimension that `to_plain` wrote."""
    rest: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k != "kind"
    }
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Choice, Integer, Float, When, Repeat)}
    if content.get("kind") not in kinds:
        raise SetupError(f"{content} is no dimension; its kind is one of {sorted(kinds)}.")
    if "then" in rest:
        rest["then"] = from_plain(rest["then"])
    if "dimensions" in rest:
        rest["dimensions"] = {n: from_plain(d) for n, d in rest["dimensions"].items()}
    return kinds[content["kind"]](**rest)
