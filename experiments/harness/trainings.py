"""Training curves of finished runs, from the metrics.jsonl that each row points to."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.harness.errors import RunError
from experiments.harness.runs import read_metrics
from experiments.harness.summaries import is_number

if TYPE_CHECKING:
    from effjax.report import Column

Series = dict[str, tuple[list[float], list[list[float]]]]  # {name: (steps [n], values [seeds][n])}


class Trainings(NamedTuple):
    """Curves by name, what they show, and what could not be had."""

    curves: Series
    curve: "Column | None"
    notes: list[str]


def read_trainings(
    rows: Sequence[Mapping[str, Any]], quality: "Column | None", metric: str | None = None
) -> Trainings:
    """The curves of one metric, by default the quality on the validation split, else the loss.

    Of seeds that were looked at after different steps, the steps that all have count.

    Args:
      rows: with "name" and "folder".
      quality: what the report is about.
      metric: a key of metrics.jsonl.

    Raises:
      RunError: a metric that no run has.
    """
    logs = [(row["name"], read_metrics(row["folder"] / "metrics.jsonl")) for row in rows]
    keys = dict.fromkeys(k for _, log in logs for r in log for k, v in r.items() if is_number(v))
    keys.pop("step", None)
    if metric is not None and metric not in keys:
        raise RunError(
            f"no run recorded the metric {metric!r} in training; there are {list(keys)}."
        )
    wanted = [(metric,)] if metric else _wanted(quality)
    group = next((group for group in wanted if any(key in keys for key in group)), None)
    if group is None:
        return Trainings({}, None, [])
    by_name: dict[str, list[dict[float, float]]] = {}
    without = []
    for name, log in logs:
        own = next((key for key in group if any(key in record for record in log)), group[0])
        points = {r["step"]: float(r[own]) for r in log if is_number(r.get(own))}
        if points:
            by_name.setdefault(name, []).append(points)
        else:
            without.append(name)
    curves: Series = {}
    for name, seeds in by_name.items():
        steps = sorted(set.intersection(*map(set, seeds)))
        if len(steps) > 1:
            curves[name] = (steps, [[points[step] for step in steps] for points in seeds])
        else:
            without.append(name)
    missing = ", ".join(dict.fromkeys(without))
    note = f"No training curve of {group[0]!r}, or not of every seed: {missing}."
    return Trainings(curves, _column(group[0], quality), [note] if missing else [])


def _wanted(quality: "Column | None") -> list[tuple[str, ...]]:
    """Metrics in order of interest; those of one group are names of the same."""
    own = _plain(quality)
    first: list[tuple[str, ...]] = [(f"validation/{own}", "validation"), (own,)] if own else []
    return [*first, ("validation/accuracy",), ("validation/loss",), ("loss",)]


def _plain(quality: "Column | None") -> str:
    return quality.key.rpartition("/")[2] if quality else ""


def _column(key: str, quality: "Column | None") -> "Column":
    from effjax.report import Column

    plain = _plain(quality)
    if quality and key in (f"validation/{plain}", plain):
        unit = re.search(r" \([^()]*\)$", quality.label)
        split = "" if key == plain else "validation "
        return quality._replace(key=key, label=split + plain + (unit[0] if unit else ""))
    if key == "validation/accuracy":
        return Column(key, "validation accuracy (%)", ".2f", "max", 100)
    return Column(key, key.replace("/", " "), ".4g", "min" if "loss" in key else None)
