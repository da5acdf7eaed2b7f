"""Population-based training in one program, in separate processes, and against random search.

An MLP on Fashion-MNIST, whose learning rate and weight decay are searched for: 8 members of 20
rounds of 100 steps. After each round the worst quarter copies the best quarter, and perturbs what
it copies by 0.8 or 1.2, or draws it anew (probability 1/4). Four arms of the same number of steps:

- PBT in one program (`effjax.population`, exploit and explore by a gather over its states);
- PBT with a process for each member, which share weights and scores through files, round by round.
  From the same seeds it should decide the same, event by event: the processes run the same program;
- random search: the same first draws, which stay as they are;
- random search with the learning rate annealed by a cosine, which is what people use.

The winner is picked on 2,000 validation images; the table has its accuracy on the test set.

Published (Jaderberg et al.): PBT finds better networks than random search with the same number of
steps and workers, in every domain they tried (for example +1% on machine translation), by schedules
of the hyper-parameters that fall as training goes on.

Command: python -m experiments pbt
Cost: 4 minutes on 2 CPU cores.

Paper: Jaderberg et al., "Population based training of neural networks", 2017,
  https://arxiv.org/abs/1711.09846.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from effjax.report import Column, Table, summarise, welch
from experiments.harness.config import check
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.pbt_task import PRIORS, Plan, Task, apart, together
from experiments.sparse_report import Panel, panels_plot, publish

NAME = "pbt"
PBT, APART, RANDOM, ANNEALED = "PBT", "PBT, processes", "random", "random, cosine"


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: searches of each arm in one process.
      processes: of them, how many are done in separate processes as well.
      seed: the first.
      members, rounds, steps: of the population, of the search, and of a round.
      batch: images a step.
      hidden: units of the network.
      fraction: of the members that copy in each round.
      validation: images that a score is the accuracy on.
      dataset: "digits" is small.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 5
    processes: int = 3
    seed: int = 0
    members: int = 8
    rounds: int = 20
    steps: int = 100
    batch: int = 64
    hidden: int = 64
    fraction: float = 0.25
    validation: int = 2000
    dataset: Literal["digits", "fashion_mnist"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(self, seeds=(1, 1000), processes=(0, self.seeds), members=(2, 1000))
        check(self, rounds=(1, 10_000), steps=(1, 10**6), batch=(1, 10_000), hidden=(1, 10_000))
        check(self, fraction=(1e-6, 0.5), validation=(1, 10_000))


def plan(config: Config, seed: int) -> Plan:
    """One search."""
    c = config
    sizes = (c.members, c.rounds, c.steps, c.batch, c.hidden, c.fraction, c.validation)
    return Plan(c.dataset, *sizes, seed)


def run(config: Config) -> dict[str, Any]:
    """Searches with all arms, or goes on, and reports."""
    here = open_run(NAME, config)
    rows: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        task = Task(plan(config, seed))
        for name, evolving, cosine in (
            (PBT, True, False), (RANDOM, False, False), (ANNEALED, False, True)
        ):  # fmt: skip
            part = here.part(f"{name.replace(', ', '-')}-{seed}")
            if (found := part.summary()) is None:
                found = together(task, part, task.hypers(cosine), evolving)
                part.finish(found)
            rows.append(row(name, seed, found))
        if seed < config.seed + config.processes:
            rows.append(row(APART, seed, _apart(here, config, seed)))
        say(", ".join(f"{r['name']} {r['accuracy']:.4f}" for r in rows if r["seed"] == seed))
    results: dict[str, Any] = {"rows": rows, "columns": [c._asdict() for c in COLUMNS]}
    results |= {"baseline": RANDOM, "tests": tests(rows)}
    publish(here, results, tables, figures, config.save)
    return results["tests"]


def _apart(here: Run, config: Config, seed: int) -> dict[str, Any]:
    part = here.part(f"processes-{seed}")
    if (found := part.summary()) is None:
        shutil.rmtree(part.path / "shared", ignore_errors=True)
        found = apart(plan(config, seed), part.path / "shared")
        shutil.rmtree(part.path / "shared")
        part.finish(found)
    return found


def row(name: str, seed: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """A search as a row, with its events."""
    last = found["rounds"][-1]["score"]
    best = [round(float(max(r["score"])), 5) for r in found["rounds"]]
    events = [{k: r[k] for k in ("parent", "score", "before")} for r in found["rounds"]]
    return {
        "name": name,
        "seed": seed,
        "accuracy": 100 * found["accuracy"],
        "validation": 100 * max(last),
        "seconds": found["seconds"],
        "rounds": best,
        "schedule": schedule(found["rounds"], int(np.argmax(last))),
        "events": events,
    }


def schedule(rounds: list[dict[str, Any]], winner: int) -> dict[str, list[float]]:
    """The hyper-parameters that the winner's weights were trained with, round by round."""
    found: dict[str, list[float]] = {name: [] for name in PRIORS}
    member = winner
    for number in reversed(range(len(rounds))):
        if number + 1 < len(rounds):
            member = rounds[number]["parent"][member]
        for name, values in found.items():
            values.insert(0, rounds[number]["before"][name][member])
    return found


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f"),
    Column("validation", "validation accuracy (%)", ".2f"),
    Column("seconds", "wall time (s)", ".0f", "min"),
)


def tests(rows: list[dict[str, Any]]) -> dict[str, str]:
    """PBT against each other arm, and whether separate processes decided the same."""
    by = {(r["name"], r["seed"]): r for r in rows}
    mine = [r["accuracy"] for r in rows if r["name"] == PBT]
    found = {}
    for name in (RANDOM, ANNEALED):
        other = [r["accuracy"] for r in rows if r["name"] == name]
        gap = float(np.mean(mine) - np.mean(other))
        p = f", p = {welch(mine, other).p:.2g}" if len(mine) > 1 else ""
        found[f"{PBT} against {name}"] = f"{gap:+.2f} points{p}"
    pairs = [(r, by[PBT, r["seed"]]) for r in rows if r["name"] == APART]
    if pairs:
        rounds = [
            (a, b) for one, other in pairs
            for a, b in zip(one["events"], other["events"], strict=True)
        ]  # fmt: skip
        same = sum(a == b for a, b in rounds)
        found["processes"] = f"{same} of {len(rounds)} rounds equal those of one program"
    return found


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """The arms, side by side."""
    c = results["config"]
    caption = (
        f"Population-based training and random search on {c['dataset']}, {c['members']} members of "
        f"{c['rounds'] * c['steps']:,} steps; mean ± standard deviation over {c['seeds']} seeds "
        f"({c['processes']} in processes)."
    )
    return {NAME: summarise(results["rows"], COLUMNS, heading="search", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rates of the winners, and the best validation accuracy, against steps."""
    c = results["config"]
    where = [c["steps"] * (i + 1) for i in range(c["rounds"])]
    anneal = 0.5 * (1 + np.cos(np.pi * (np.array(where) - c["steps"] / 2) / where[-1]))
    rates: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for name in (PBT, RANDOM, ANNEALED):
        mine = [r for r in results["rows"] if r["name"] == name]
        rate = np.array([r["schedule"]["learning_rate"] for r in mine])
        rates[name] = (where, np.log10(rate * anneal if name == ANNEALED else rate))
        best[name] = (where, 100 * np.array([r["rounds"] for r in mine]))
    low = float(np.median(best[RANDOM][1][:, 0]))
    panels = [
        Panel(rates, "step", "log₁₀ learning rate", "of the winner's weights", bars=False),
        Panel(best, "step", "best validation accuracy (%)", bars=False, limits=(low, None)),
    ]
    return {NAME: panels_plot(panels, source, width=6.8, height=3.2)}
