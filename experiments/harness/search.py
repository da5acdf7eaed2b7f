"""`python -m experiments search NAME --over bits=2..8 --maximize accuracy`: a search by optuna.

    runs/searches/<id>/trials.db            the storage, where no other is given
                      /<experiment>/<id>/   the folder of each training, as it always is
                      /table.csv            all trials
                      /claims/              who does which training

Each worker is the same command. They share nothing but the storage, and on one host or file system
the folder, where no training is done twice and a killed one goes on from its checkpoint.
"""

import argparse
import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from effjax.nas import Choice, Space
from effjax.nas.optuna_search import optuna, quiet
from effjax.report import write_text
from experiments.harness.claims import Claims
from experiments.harness.config import as_dict, config_hash
from experiments.harness.errors import ConfigError, ExperimentError, UsageError
from experiments.harness.grid import fixed_fields, parse_over, parse_values, replace
from experiments.harness.progress import say
from experiments.harness.runs import check_name, default_id, read_json, runs_below, runs_root
from experiments.harness.storage import open_study, shown
from experiments.harness.studies import RETRIES, Refused, Trials

_DESCRIPTION = """Searches an experiment's fields for the best results. The same command again goes
on with the same search, and given in several terminals, or with one --storage on several hosts, it
is done by as many workers."""
_INSIDE = "."  # of a field's name, `outer.inner`; names of a space have no dots
_BETWEEN = "/"


class Asked(NamedTuple):
    """What is searched: the space, and the config that stands for the fields outside of it."""

    experiment: str
    module: Any
    base: Any
    space: Space
    objectives: dict[str, str]  # {name among the results: "maximize" or "minimize"}

    @property
    def record(self) -> dict[str, Any]:
        """The search as JSON, one entry a thing that may differ."""
        fields = (name.replace(_BETWEEN, _INSIDE) for name in self.space.dimensions)
        space = self.space.to_json() + ("" if self.space.constraint is None else " constrained")
        return {
            "experiment": self.experiment,
            "space": space,
            "objectives": self.objectives,
            **fixed_fields(self.base, fields),
        }

    def config(self, found: Mapping[str, Any]) -> Any:
        """The experiment's config of a configuration of the space."""
        config = self.base
        try:
            for name, value in found.items():
                config = replace(config, name.replace(_BETWEEN, _INSIDE), value)
        except ConfigError as error:
            raise Refused(str(error)) from error
        return config


def main(name: str, module: Any, words: Sequence[str]) -> int:
    """Does a search, or a worker's share of it; returns the exit code: 0, or 1 where trials failed.

    Args:
      name: the experiment's.
      module: its module; a `SPACE` in it is what is searched where there is no `--over`.
      words: of the command line, after the name.
    """
    parser = _parser(name)
    options, fixed = parser.parse_known_args(list(words))
    asked = _asked(name, module, options, fixed, parser.prog)
    record = asked.record
    id = options.id or f"{name}-{config_hash(record)}"
    check_name(id, "a search's id")
    path = (runs_root() / "searches" / id).absolute()
    path.mkdir(parents=True, exist_ok=True)
    url = options.storage or f"sqlite:///{path / 'trials.db'}"
    claims = Claims(path / "claims")
    with claims.claim("study", wait=True), quiet():
        sampler = _sampler(options.strategy, asked)
        study = open_study(url, id, record, list(asked.objectives.values()), sampler)
    say(f"{asked.space}\n{options.trials} trials in {shown(url)}; trainings in {path}")
    trials = Trials(study, url, asked.space, options.trials, options.grace)
    with runs_below(path):
        trials.work(_evaluation(asked, claims))
    rows = [_row(asked, trial) for trial in trials.results()]
    _write(path, rows)
    _print(asked, rows, path)
    if lost := trials.given_up():
        say(
            f"given up: trials {lost}; {RETRIES + 1} workers died of each. Was there memory enough?"
        )
    return 1 if lost or any(row["error"] for row in rows) else 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments search {name}", description=_DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("--over", nargs="*", action="extend", default=[], metavar="FIELD=VALUES",
        help="what to choose from: values a,b,c or a range of whole numbers 0..4; by default the "
        "experiment's SPACE")  # fmt: skip
    add("--maximize", nargs="+", default=[], metavar="RESULT", help="results that should be large")
    add("--minimize", nargs="+", default=[], metavar="RESULT", help="results that should be small")
    add("--trials", type=int, default=50, help="of all workers together")
    add("--strategy", choices=("tpe", "random", "nsga2"), help="by default TPE for one objective, "
        "and NSGA-II for several")  # fmt: skip
    add("--storage", metavar="URL", help="sqlite:///FILE, postgresql://..., mysql://..., or a "
        "journal's FILE.log; by default an SQLite file in the search's folder")  # fmt: skip
    add("--grace", type=float, default=60.0, metavar="SECONDS",
        help="after so long without a sign of life a worker's trial is tried again")  # fmt: skip
    add("--id", help="the search's folder below runs/searches, and the study's name")
    parser.epilog = "Further --FIELD VALUE words fix fields for all trials."
    return parser


def _asked(name: str, module: Any, options: Any, fixed: Sequence[str], prog: str) -> Asked:
    objectives = dict.fromkeys(options.maximize, "maximize")
    objectives |= dict.fromkeys(options.minimize, "minimize")
    if not objectives:
        raise UsageError("a search needs --maximize RESULT or --minimize RESULT: one it reports.")
    if len(objectives) < len(options.maximize) + len(options.minimize):
        raise UsageError("a result is named twice among --maximize and --minimize.")
    if options.trials < 1 or not options.grace > 0:
        raise UsageError(
            f"--trials {options.trials} --grace {options.grace}: give at least 1 trial, and a "
            "positive number of seconds."
        )
    space = None if options.over else getattr(module, "SPACE", None)
    over = parse_over(options.over) if space is None else {}
    base, values = parse_values(module.Config, over, fixed, prog)
    if space is None:
        named = {field.replace(_INSIDE, _BETWEEN): Choice(tuple(v)) for field, v in values.items()}
        space = Space(named)
    return Asked(name, module, base, space, objectives)


def _sampler(strategy: str | None, asked: Asked) -> Any:
    """A sampler with a seed of its own: workers with one seed would propose the same."""
    samplers = optuna().samplers
    if strategy == "random":
        return samplers.RandomSampler()
    if strategy == "nsga2" or (strategy is None and len(asked.objectives) > 1):
        return samplers.NSGAIISampler()
    conditional = any(parent is not None for parent in asked.space.parents)
    # What other workers are at counts as bad meanwhile, so that they spread out.
    return samplers.TPESampler(multivariate=True, group=conditional, constant_liar=True)


def _evaluation(asked: Asked, claims: Claims) -> Callable[[dict[str, Any]], list[float]]:
    """The training of a configuration: its objectives, from the run's folder where it is done."""

    def evaluate(found: dict[str, Any]) -> list[float]:
        config = asked.config(found)
        id = default_id(config)
        summary = runs_root() / asked.experiment / id / "summary.json"
        with claims.claim(id, wait=True):
            if (results := read_json(summary)) is None:
                say(", ".join(f"{name}={value}" for name, value in found.items()))
                asked.module.run(config)
                results = read_json(summary)
        return _objectives(asked, results, os.fspath(summary))

    return evaluate


def _objectives(asked: Asked, results: dict[str, Any] | None, path: str) -> list[float]:
    if results is None:
        raise UsageError(
            f"{asked.experiment} leaves no {path}: an experiment that is searched opens its run "
            "with `open_run` and ends with `finish`."
        )
    numbers = {n: x for n, x in results.items() if isinstance(x, (int, float))}
    if missing := [name for name in asked.objectives if name not in numbers]:
        raise UsageError(f"{missing} are no numbers among the results; those are {list(numbers)}.")
    values = [float(numbers[name]) for name in asked.objectives]
    if not all(map(math.isfinite, values)):
        raise ExperimentError(f"the results are {values}")
    return values


def _row(asked: Asked, trial: Any) -> dict[str, Any]:
    """A trial as a line of the table."""
    row: dict[str, Any] = {"trial": trial.user_attrs.get("retry_of", trial.number)}
    if trial.values is not None:
        row |= dict(zip(asked.objectives, trial.values, strict=True))
    for name, values in zip(asked.space.names, asked.space.values, strict=True):
        if name in trial.params:
            row[name.replace(_BETWEEN, _INSIDE)] = as_dict({"x": values[trial.params[name]]})["x"]
    return row | {"error": trial.user_attrs.get("error", "")}


def _write(path: Any, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path / "table.csv", text.getvalue())


def _print(asked: Asked, rows: list[dict[str, Any]], path: Any) -> None:
    signs = {o: 1 if way == "maximize" else -1 for o, way in asked.objectives.items()}
    scores = {
        i: [sign * row[o] for o, sign in signs.items()]
        for i, row in enumerate(rows)
        if not row["error"]
    }
    best = [
        i
        for i, own in scores.items()
        if not any(
            all(a >= b for a, b in zip(other, own, strict=True)) and other != own
            for other in scores.values()
        )
    ]
    print("best:" if len(signs) == 1 else "front:")
    for i in best:
        print("  " + ", ".join(f"{n}={x}" for n, x in rows[i].items() if n != "error"))
    print(f"table: {path / 'table.csv'}")
    print(f"report: python -m experiments report {path / asked.experiment}")
    for row in rows:
        if row["error"]:
            say(f"failed: trial {row['trial']}: {row['error']}")
