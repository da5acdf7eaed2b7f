"""Training curves of finished runs, from the metrics.jsonl that each row points to."""

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
    chosen = metric or next((key for key in _wanted(quality) if key in keys), None)
    if chosen is None:
        return Trainings({}, None, [])
    by_name: dict[str, list[dict[float, float]]] = {}
    without = []
    for name, log in logs:
        points = {r["step"]: float(r[chosen]) for r in log if is_number(r.get(chosen))}
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
    notes = (
        [f"No training curve of {chosen!r}, or not of every seed: {missing}."] if missing else []
    )
    return Trainings(curves, _column(chosen, quality), notes)


def _wanted(quality: "Column | None") -> list[str]:
    own = _plain(quality)
    first = [f"validation/{own}", "validation", own] if own else []
    return [*first, "validation/accuracy", "validation/loss", "loss"]


def _plain(quality: "Column | None") -> str:
    return quality.key.rpartition("/")[2] if quality else ""


def _column(key: str, quality: "Column | None") -> "Column":
    from effjax.report import Column

    if quality and key in (f"validation/{_plain(quality)}", "validation", _plain(quality)):
        label = quality.label.replace("test", "validation") if "test" in quality.label else key
        return quality._replace(key=key, label=label)
    if key == "validation/accuracy":
        return Column(key, "validation accuracy (%)", ".2f", "max", 100)
    return Column(key, key.replace("/", " "), ".4g", "min" if "loss" in key else None)
