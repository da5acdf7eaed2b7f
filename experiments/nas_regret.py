"""Search strategies on NAS-Bench-201: regret on three tables at equal simulated time.

Each strategy searches 15,625 cells until the simulated budget is spent: the time of 100 average
trainings of the data set's table. A training costs its tabulated seconds and gives the validation
accuracy (200 epochs) of one of the table's two or three seeds, drawn at random; the incumbent is
chosen by what was seen, and its regret is counted by the means over seeds, in points of accuracy.

Strategies: random search, local search, regularized evolution (population 10, tournament 3), TPE, a
predictor (Gaussian process), and ASHA and Hyperband on random draws. The table has no learning
curves, so fidelity is the number of seeds here: ASHA and Hyperband train a cell from one seed, and
from up to three where it is among the best third. That is not what they were made for (their
cheapest rung costs a whole training), and nothing is said of them where few epochs are cheap.

Published (Dong and Yang, test accuracy on CIFAR-10): random search 93.70, regularized evolution
93.92, the best cell 94.37: regrets of 0.67 and 0.45. The table here has no test accuracies, and
their searches saw accuracies after 12 epochs, about 100 of them.

Command: python -m experiments nas_regret
Cost: 15 minutes of one CPU core (100 seeds, 7 strategies, 3 tables).

Paper: Dong and Yang, "NAS-Bench-201", 2020, https://arxiv.org/abs/2001.00326.
"""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effjax import nas
from effjax.nas.tabular import at
from effjax.report import Column, Table, summarise, welch
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.progress import say
from experiments.harness.runs import open_run
from experiments.harness.tables import DATASETS, load_table
from experiments.sparse_report import Band, Panel, panels_plot, publish

NAME = "nas_regret"
RANDOM, EVOLUTION = "random", "evolution"
PUBLISHED = {RANDOM: 94.37 - 93.70, EVOLUTION: 94.37 - 93.92}
SHOWN = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet16-120"}
PLACES = 60  # where the curves are drawn, by the logarithm of time

Made = tuple[nas.Strategy, nas.Stopper | None, int]  # with the seeds of a whole trial
STRATEGIES: dict[str, Callable[[nas.Space], Made]] = {
    RANDOM: lambda space: (nas.RandomSearch(space), None, 1),
    "local": lambda space: (nas.LocalSearch(space), None, 1),
    EVOLUTION: lambda space: (nas.Evolution(space, 10, 3), None, 1),
    "TPE": lambda space: (nas.TPE(space), None, 1),
    "predictor": lambda space: (nas.PredictorSearch(space), None, 1),
    "ASHA (seeds)": lambda space: (nas.RandomSearch(space), nas.ASHA(1, 3), 3),
    "Hyperband (seeds)": lambda space: (nas.RandomSearch(space), nas.Hyperband(3), 3),
}


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: searches of each strategy and table.
      seed: the first.
      trainings: the budget, in average trainings of the table.
      tables: of NAS-Bench-201.
      strategies: which.
      jobs: processes that share the work.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 100
    seed: int = 0
    trainings: int = 100
    tables: tuple[str, ...] = DATASETS
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    jobs: int = 2
    save: bool = True

    def __post_init__(self) -> None:
        check(self, seeds=(1, 100_000), trainings=(2, 15_625), jobs=(1, 1000))
        for what, asked, known in (
            ("tables", self.tables, DATASETS),
            ("strategies", self.strategies, tuple(STRATEGIES)),
        ):
            if unknown := sorted(set(asked) - set(known)):
                raise ConfigError(f"there are no {what} {unknown}; there are {list(known)}.")


def places(config: Config) -> np.ndarray:
    """Fractions of the budget at which regret is noted: from two trainings on."""
    return np.geomspace(2 / config.trainings, 1, PLACES)


def search(name: str, dataset: str, seed: int, config: Config) -> dict[str, Any]:
    """One search's row, with its regret at `places`."""
    table = load_table(dataset)
    strategy, stopper, seeds = STRATEGIES[name](table.space)
    budget = config.trainings * float(table.seconds.mean())
    oracle = nas.Oracle(table, budget, seed)
    found = nas.Search(table.space, strategy, seed=seed, stopper=stopper)
    steps = list(nas.trace(found, oracle, seeds))
    # Before the first trial has ended, someone would have to take a cell at random.
    curve = at(budget * places(config), steps, before=table.best - float(table.means.mean()))
    row = {"name": name, "dataset": dataset, "seed": seed, "trials": len(steps)}
    return {**row, "regret": float(curve[-1]), "curve": [round(x, 4) for x in curve.tolist()]}


def _several(task: tuple[str, str, range, Config]) -> list[dict[str, Any]]:
    name, dataset, seeds, config = task
    return [search(name, dataset, seed, config) for seed in seeds]


def run(config: Config) -> dict[str, Any]:
    """Searches, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    for dataset in config.tables:  # fetched once, before the processes look for them
        load_table(dataset)
    last = config.seed + config.seeds
    tasks = [
        (name, dataset, range(first, min(first + 25, last)), config)
        for dataset in config.tables
        for name in config.strategies
        for first in range(config.seed, last, 25)
    ]
    rows: list[dict[str, Any]] = []
    if config.jobs == 1:
        for task in tasks:
            rows += _several(task)
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(config.jobs, context) as pool:
            for task, found in zip(tasks, pool.map(_several, tasks), strict=True):
                rows += found
                mean = np.mean([row["regret"] for row in found])
                say(f"{task[1]}, {task[0]}, seeds {task[2]}: regret {mean:.3f}")
    curves = bands(rows)
    results: dict[str, Any] = {"rows": rows, "curves": curves, "published": PUBLISHED}
    results |= {"columns": [COLUMN._asdict()], "baseline": RANDOM}
    results |= {"tests": tests(rows), "seconds": time.monotonic() - began}
    publish(here, results, tables, figures, config.save)
    return results["tests"]


COLUMN = Column("regret", "regret (points)", ".3f", "min")


def bands(rows: list[dict[str, Any]]) -> dict[str, dict[str, Band]]:
    """{data set: {strategy: mean regret at `places`, and 1.96 standard errors}}, from the rows'
    curves, which are taken out."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        every = found.setdefault(row["dataset"], {})
        every.setdefault(row["name"], []).append(row.pop("curve"))

    def band(curves: list[list[float]]) -> Band:
        values, count = np.array(curves), len(curves)
        error = values.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else 0 * values[0]
        return Band(
            *([round(x, 4) for x in own.tolist()] for own in (values.mean(0), 1.96 * error))
        )

    return {
        dataset: {name: band(curves) for name, curves in every.items()}
        for dataset, every in found.items()
    }


def regrets(rows: list[dict[str, Any]], name: str, dataset: str) -> list[float]:
    """Final regrets, by seed."""
    return [r["regret"] for r in rows if (r["name"], r["dataset"]) == (name, dataset)]


def tests(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Each strategy against random search on each table: the difference of means, Welch's p."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        base = regrets(rows, RANDOM, dataset)
        for name in names:
            mine = regrets(rows, name, dataset)
            if name != RANDOM and len(base) > 1 and len(mine) > 1:
                gap = float(np.mean(base) - np.mean(mine))
                p = welch(base, mine).p
                found[f"{dataset}, {name}"] = f"{gap:+.3f} points better than random, p = {p:.1g}"
    return found


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Strategies down and tables across, beside the published regrets."""
    config = results["config"]
    wide: dict[tuple[str, int], dict[str, Any]] = {}
    for r in results["rows"]:
        row = wide.setdefault((r["name"], r["seed"]), {"name": r["name"], "seed": r["seed"]})
        row[r["dataset"]] = r["regret"]
        row["trials"] = r["trials"]
        if r["name"] in results["published"]:
            row["published"] = results["published"][r["name"]]
    columns = [Column(d, SHOWN[d], ".3f", "min") for d in config["tables"]]
    columns.append(Column("published", "CIFAR-10, test (published)", ".2f"))
    columns.append(Column("trials", "trials", ".0f"))
    caption = (
        f"Regret on NAS-Bench-201 in points of validation accuracy after the simulated time of "
        f"{config['trainings']} average trainings; mean ± standard deviation over "
        f"{config['seeds']} seeds."
    )
    return {NAME: summarise(wide.values(), columns, heading="strategy", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Mean regret against simulated time, with 95% bands of the mean."""
    config = results["config"]
    where = np.log10(np.geomspace(2, config["trainings"], PLACES))
    ticks = {
        float(np.log10(n)): str(n) for n in (2, 5, 10, 20, 50, 100, 200, 500)
        if n <= config["trainings"]
    }  # fmt: skip
    panels = []
    for dataset in config["tables"]:
        every = results["curves"][dataset]
        lines = {name: (where, Band(*every[name])) for name in config["strategies"]}
        top = 1.2 * max(band[0][PLACES // 4] for band in every.values())
        panels.append(
            Panel(
                dict[str, Any](lines),
                "simulated time (average trainings)",
                "regret (points)",
                SHOWN[dataset],
                ticks,
                bars=False,
                limits=(0, top),
            )
        )
    return {NAME: panels_plot(panels, source, width=3.2 * len(panels), height=3.2)}
