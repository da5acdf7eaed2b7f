"""Which results of runs to show, and how: units, and which end is better."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.errors import RunError
from experiments.harness.summaries import Finished, is_number

if TYPE_CHECKING:
    from effjax.report import Column

_NOT_RESULTS = {"name", "series", "seed", "part", "layers", "folder", "experiment"}
_BEST = {
    "accuracy": "max",
    **dict.fromkeys(("loss", "error", "perplexity", "bytes", "macs", "flops"), "min"),
    **dict.fromkeys(("parameters", "nonzeros", "latency", "seconds", "remaining"), "min"),
}
_QUALITIES = ("accuracy", "error", "perplexity", "loss")
_COSTS = ("bytes", "effective_macs", "macs", "flops", "remaining", "parameters", "latency")
_UNITS = {  # key: label, format, scale
    "bytes": ("stored size (KB)", ",.1f", 1e-3),
    "latency": ("latency (ms)", ".3g", 1e3),
    **{key: (key.replace("_", " "), ",.0f", 1.0) for key in ("parameters", "nonzeros", "macs")},
}
_ALSO = {"kb": "bytes", "size": "bytes", "params": "parameters", "ms": "latency"}


def declared_columns(runs: Sequence[Finished]) -> "dict[str, Column]":
    """The columns that summaries declare, the first of a key."""
    from effjax.report import Column

    found: dict[str, Column] = {}
    for run in runs:
        for entry in run.summary.get("columns", []):
            try:
                column = Column(**entry)
            except TypeError as error:
                raise RunError(
                    f"{run.path / 'summary.json'} declares a column {entry!r} that is none: "
                    f"{error}. A column has {list(Column._fields)}."
                ) from error
            found.setdefault(column.key, column)
    return found


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of results that are a number in some row."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in _NOT_RESULTS)
    return [key for key in keys if any(is_number(row.get(key)) for row in rows)]


def known_as(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The result's key that a person means by another word: kb is bytes."""
    return key if key in numbers(rows) else _ALSO.get(key.lower(), key)


def default_keys(
    rows: Sequence[Mapping[str, Any]],
    declared: "Mapping[str, Column]",
    axes: "Sequence[Column | None]",
) -> list[str]:
    """The table's columns: those declared, else the numbers that all rows have; and both axes."""
    known = numbers(rows)
    shared = [key for key in known if all(is_number(row.get(key)) for row in rows)]
    quality, cost = ([axis.key] if axis else [] for axis in axes)
    chosen = [key for key in declared if key in known] or shared
    if len({row["experiment"] for row in rows}) > 1:  # what one alone has is no comparison
        chosen = [
            key
            for key in chosen
            if len({row["experiment"] for row in rows if is_number(row.get(key))}) > 1
        ]
    if not (chosen or quality or cost):
        raise RunError(
            f"these runs have no result in common; choose some with --columns: {', '.join(known)}."
        )
    first = [key for key in quality if key not in chosen]
    return list(dict.fromkeys([*first, *chosen, *cost]))


def choose(
    role: str,
    asked: str | None,
    rows: Sequence[Mapping[str, Any]],
    declared: "Mapping[str, Column]",
) -> "Column | None":
    """The column of quality or cost, with its better end; None where none is asked or known."""
    known, usual = numbers(rows), _QUALITIES if role == "quality" else _COSTS
    if asked is None:
        end = "max" if role == "quality" else "min"
        exact = [key for key in usual if key in known]
        near = [key for word in usual for key in known if word in key.replace(" ", "_")]
        said = [key for key in known if key in declared and declared[key].best == end]
        found = next(iter([*exact, *near, *said]), None)
    else:
        found = known_as(asked, rows)
    if found is None:
        return None
    if found not in known:
        near = difflib.get_close_matches(str(asked), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RunError(f"no run has the {role} {asked!r}.{hint} There are: {', '.join(known)}.")
    column = column_of(found, rows, declared)
    usually: Any = "max" if role == "quality" else "min"
    return column._replace(best=column.best or _better(found) or usually)


def column_of(
    key: str, rows: Sequence[Mapping[str, Any]], declared: "Mapping[str, Column]"
) -> "Column":
    from effjax.report import Column

    if key in declared:
        return declared[key]
    best = _better(key)
    if key in _UNITS:
        label, form, scale = _UNITS[key]
        return Column(key, label, form, best, scale)
    return Column(key, key, ".4g", best)


def _better(key: str) -> Any:
    """Which end is better, as far as a key's words say."""
    return next((end for word, end in _BEST.items() if word in key), None)
