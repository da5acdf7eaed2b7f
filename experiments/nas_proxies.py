"""Zero-cost proxies on NAS-Bench-201: how they rank 1,000 cells beside 200 epochs of training.

Every proxy scores the same random cells, untrained, on one batch of CIFAR-10; a score's ranking is
compared with that of the table's validation accuracies (means over seeds) by Spearman's rho, with a
95% bootstrap interval over cells. One compiled program scores all cells, as the network takes its
architecture as an array. Cells of which a proxy has no score (nothing reaches the outputs) rank
last. A cell's first seed is scored for all cells, two more (other weights, another batch) for the
first of them.

Published, on all 15,625 cells with networks of the benchmark's size (5 cells a stage, 16 channels,
32 x 32 pixels, batches of 64): synflow 0.74, jacob_cov 0.73, snip 0.58, grad_norm 0.58, grasp 0.48,
fisher 0.36; a notebook that the authors released beside their code has snip 0.60, grad_norm 0.59,
grasp 0.51, fisher 0.36. The networks here are smaller by default: 1 cell a stage, 16 channels,
images of 16 x 16 (means of 2 x 2 pixels), batches of 32; so the weights outside of the cells are a
larger part of them, and three proxies are shown for the cells' weights alone as well. Parameters
and MACs are those of the benchmark's size.

The convolutions of the authors' cells have biases, the benchmark's have none. That decides what
fisher is: where no edge leads to a convolution's input, its result is the bias, which has no
variance, and the derivative of the BatchNorm after it is 1 / √ε = 316. So cells with loose ends get
the largest scores, and "fisher, biases", the authors' fisher, is much below fisher.

The committed table has six of the proxies and one seed:
--proxies synflow jacob_cov snip grad_norm grasp naswot --seeds 1.

Beside it lies one of networks of the benchmark's own size, for the four that need it:
--depth 5 --pixels 32 --batch 64 --proxies snip grad_norm grasp fisher "fisher, biases" --seeds 1.
Networks of several cells a stage are loops over them, see `models/nasbench201_scanned.py`.

Command: python -m experiments nas_proxies
Cost: 15 minutes of one CPU core for the committed table and two to three hours for the one beside
  it; that of the whole was not measured.

Papers: Abdelfattah et al. 2021, https://arxiv.org/abs/2101.08134; Mellor et al. 2021,
https://arxiv.org/abs/2006.04647; Lin et al. 2021, https://arxiv.org/abs/2102.01063; Dong and Yang
2020, https://arxiv.org/abs/2001.00326.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import PyTree
from effjax.nas import proxies
from effjax.nas.tabular import EDGES, OPERATIONS
from effjax.report import Column, Table, spearman_interval, summarise
from experiments.harness import data
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.progress import say
from experiments.harness.runs import open_run
from experiments.harness.tables import load_table
from experiments.models import nasbench201 as bench
from experiments.models import nasbench201_scanned as scanned
from experiments.sparse_report import cross_entropy, publish

NAME = "nas_proxies"
PUBLISHED = {
    "synflow": 0.74,
    "jacob_cov": 0.73,
    "snip": 0.58,
    "grad_norm": 0.58,
    "grasp": 0.48,
    "fisher": 0.36,
}
# Beside three proxies stands what they are for the cells' weights alone.
CELLS = ", cells"
IN_CELLS = r"edge_.*/conv/kernel$"
# And beside fisher what it is in a network whose cells' convolutions have biases.
BIASES = ", biases"
# What one program scores, by a suffix of its records; two smaller programs compile faster than one.
PROGRAMS = {
    "": ("synflow", "jacob_cov", "snip", "grad_norm", "grasp", "naswot"),
    "-more": ("fisher", "zen", *(name + CELLS for name in ("snip", "grad_norm", "grasp"))),
    "-biases": ("fisher" + BIASES,),
}
ORDER = (
    *("synflow", "jacob_cov", "snip", "snip, cells", "grad_norm", "grad_norm, cells"),
    *("grasp", "grasp, cells", "fisher", "fisher, biases", "naswot", "zen"),
)
# These tell layers apart by their names, which loops over cells do not give.
BY_NAME = ("naswot", "zen")
SIZES = ("parameters", "MACs")
# ReLUs' outputs enter all convolutions but the first one and the shortcuts.
AFTER_RELU = r"(edge_.*|first|second)/conv/kernel$"


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      cells: random cells of the table.
      seed: of the choice of cells, and the first of weights and batches.
      seeds: of weights and batches.
      again: how many of the cells the seeds after the first one score.
      proxies: which.
      batch: images.
      width: channels of the first stage.
      depth: cells in a stage.
      pixels: the images' height and width, 32 or less: means over squares of pixels.
      dataset: "cifar10"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    cells: int = 1_000
    seed: int = 0
    seeds: int = 3
    again: int = 150
    proxies: tuple[str, ...] = ORDER
    batch: int = 32
    width: int = 16
    depth: int = 1
    pixels: int = 16
    dataset: str = "cifar10"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self, cells=(3, 15_625), seeds=(1, 100), again=(3, 15_625), batch=(2, 4096),
            width=(1, 1024), depth=(1, 100), pixels=(4, 32),
        )  # fmt: skip
        if self.again > self.cells:
            raise ConfigError(f"again is {self.again} of {self.cells} cells; it is at most that.")
        if unknown := sorted(set(self.proxies) - set(ORDER)):
            raise ConfigError(f"there are no proxies {unknown}; there are {list(ORDER)}.")
        if self.depth > 1 and (named := sorted(set(self.proxies) & set(BY_NAME))):
            raise ConfigError(
                f"depth is {self.depth} and the proxies have {named}: they tell layers apart by "
                "name, and networks of several cells a stage are loops. Name others: --proxies."
            )

    def programs(self) -> dict[str, tuple[str, ...]]:
        """What each program scores, by the suffix of its records."""
        found = {
            suffix: tuple(name for name in names if name in self.proxies)
            for suffix, names in PROGRAMS.items()
        }
        return {suffix: names for suffix, names in found.items() if names}


def stem(depth: int) -> str:
    """The results' name: those of networks of other depths lie beside the experiment's."""
    return NAME if depth == 1 else f"{NAME}_depth{depth}"


def active(edges: Array) -> dict[str, Array]:
    """How much the layers of each operation count."""
    return {
        f"edge_{start}{end}_{o}": edges[e, OPERATIONS.index(o)]
        for e, (start, end) in enumerate(EDGES)
        for o in bench.CONVOLUTIONS
    }


def scorer(spec: bench.Spec, names: Sequence[str]) -> Callable[..., dict[str, Array]]:
    """(edges, params, model_state, batch, key) -> {proxy: score}, one program for all cells."""
    apply = (bench if spec.cells == 1 else scanned).model(spec).apply
    ending = bench.model(replace(spec, features=True)).apply

    def zen(params: PyTree, rest: tuple[PyTree, PyTree], key: Array, counted: Any) -> Array:
        one, two = jax.random.split(key)
        drawn = proxies.gaussian(one, {name: x for name, x in params.items() if name != "head"})
        return proxies.zen(ending, drawn, *rest, two, active=counted)

    def fisher(params: PyTree, model_state: PyTree, batch: PyTree) -> Array:
        if spec.cells == 1:
            return proxies.fisher(apply, params, model_state, batch, cross_entropy)
        loops = scanned.model(spec, products=False).apply
        layers = {name: scanned.stack(spec, x) for name, x in model_state.items()}
        return proxies.fisher(loops, scanned.stack(spec, params), layers, batch, cross_entropy)

    def scores(
        edges: Array, params: PyTree, model_state: PyTree, batch: PyTree, key: Array
    ) -> dict[str, Array]:
        rest = (model_state, {**batch, "edges": edges})
        given, counted = (apply, params, *rest), active(edges)
        known: dict[str, Callable[[], Array]] = {
            "synflow": lambda: proxies.synflow(*given, keep="^edges$"),
            "jacob_cov": lambda: proxies.jacob_cov(*given),
            "snip": lambda: proxies.snip(*given, cross_entropy),
            "grad_norm": lambda: proxies.grad_norm(*given, cross_entropy),
            "grasp": lambda: proxies.grasp(*given, cross_entropy),
            "fisher": lambda: fisher(params, *rest),
            "fisher, biases": lambda: fisher(params, *rest),
            "naswot": lambda: proxies.naswot(*given, select=AFTER_RELU, active=counted),
            "zen": lambda: zen(params, rest, key, counted),
            "snip, cells": lambda: proxies.snip(*given, cross_entropy, select=IN_CELLS),
            "grad_norm, cells": lambda: proxies.grad_norm(*given, cross_entropy, select=IN_CELLS),
            "grasp, cells": lambda: proxies.grasp(*given, cross_entropy, select=IN_CELLS),
        }
        return {name: known[name]() for name in names}

    return jax.jit(scores)


def sizes(genes: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters and MACs of the cells' networks in the benchmark's size."""
    common, edges = bench.counts()
    # Convolutions of a cell have the same MACs in every stage, and in all five cells of it.
    macs = np.zeros((len(EDGES), len(OPERATIONS)))
    for o, size in bench.CONVOLUTIONS.items():
        macs[:, OPERATIONS.index(o)] = 15 * (size * 16 * 32) ** 2
    places = np.arange(len(EDGES))
    found = [table[places, genes].sum(axis=1) for table in (edges, macs)]
    return {"parameters": common + found[0], "MACs": found[1]}


class Bench:
    """The cells, the images, and the program that scores."""

    def __init__(self, config: Config):
        self.config = config
        self.here = open_run(stem(config.depth), config)
        self.table = load_table("cifar10")
        rng = np.random.default_rng([config.seed, 0xCE115])
        self.rows = rng.choice(len(self.table.genes), config.cells, replace=False)
        self.genes = self.table.genes[self.rows]
        found = data.load(config.dataset)
        self.images = found.train
        self.shift, self.scale = found.shift, found.scale
        self.spec = bench.Spec(
            width=config.width, cells=config.depth, channels=found.train.image.shape[-1]
        )
        self.scores = {
            program: scorer(self.spec_of(program), names)
            for program, names in config.programs().items()
        }
        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(
            lambda spec, key, batch: bench.model(spec).init(key, batch),
            static_argnums=0,
            compiler_options={"xla_backend_optimization_level": 0},
        )

    def spec_of(self, program: str) -> bench.Spec:
        """The network that a program scores."""
        return replace(self.spec, biases=program == "-biases")

    def begin(self, seed: int, program: str) -> tuple[PyTree, PyTree, dict[str, Array], Array]:
        """Weights, statistics, a batch, and a key: by the seed."""
        config = self.config
        rng = np.random.default_rng([seed, 0xBA7C4])
        chosen = rng.choice(len(self.images.label), config.batch, replace=False)
        image = data.shrunk(self.images.image[chosen], config.pixels)
        batch = {
            "image": jnp.asarray((image - self.shift) * self.scale),
            "label": jnp.asarray(self.images.label[chosen]),
        }
        init, key = jax.random.split(jax.random.key(seed))
        params, state = self.init(self.spec_of(program), init, batch)
        return params, state, batch, key

    def score(self, seed: int, count: int) -> dict[str, list[float]]:
        """{proxy: scores of the first cells}, going on where a killed run stopped."""
        found = dict[str, list[float]]()
        for program, scores in self.scores.items():
            part = self.here.part(f"seed{seed}{program}")
            done = part.metrics.read()
            begun, first = time.monotonic(), len(done)
            given = self.begin(seed, program) if first < count else ()
            while len(done) < count:
                fresh = [
                    jax.device_get(scores(jnp.asarray(bench.one_hot(cell)), *given))
                    for cell in self.genes[len(done) : min(len(done) + 25, count)]
                ]
                # JSON has neither NaN nor infinities: they are kept as texts.
                records = [
                    {n: float(x) if np.isfinite(x) else str(x) for n, x in one.items()}
                    for one in fresh
                ]
                part.metrics.append(records)
                done += records
                left = (time.monotonic() - begun) / (len(done) - first) * (count - len(done))
                say(f"{part.label}: {len(done)} of {count} cells, {left:.0f} s left")
            for name in self.config.programs()[program]:
                found[name] = [float(record[name]) for record in done[:count]]
        return found


def run(config: Config) -> dict[str, Any]:
    """Scores every cell, and reports."""
    began = time.monotonic()
    found = Bench(config)
    accuracy = found.table.means[found.rows]
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        count = config.cells if seed == config.seed else config.again
        scores = found.score(seed, count)
        for name in sorted(scores, key=ORDER.index):
            values = scores[name]
            agreed = spearman_interval(values, accuracy[:count], seed=config.seed)
            first = spearman_interval(
                values[: config.again], accuracy[: config.again], seed=config.seed
            )
            rows.append(
                {"name": name, "seed": seed, **agreed._asdict(), "subset": first.rho,
                 "without": int(np.sum(~np.isfinite(values)))}
            )  # fmt: skip
    for name, size in sizes(found.genes).items():
        agreed = spearman_interval(size, accuracy, seed=config.seed)
        rows.append({"name": name, "seed": config.seed, **agreed._asdict(), "without": 0})
    results: dict[str, Any] = {"rows": rows, "published": PUBLISHED}
    results["genes"] = ["".join(map(str, g)) for g in found.genes.tolist()]
    results["seconds"] = time.monotonic() - began
    publish(found.here, results, tables, figures, config.save)
    return {
        r["name"]: f"{r['rho']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        for r in rows
        if r["seed"] == config.seed
    }


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Proxies down; rho with its interval, what was published, and over seeds."""
    config, wide = results["config"], []
    for r in results["rows"]:
        row = {"name": r["name"], "seed": r["seed"]}
        if "subset" in r:
            row["subset"] = r["subset"]
        if r["seed"] == config["seed"]:
            mine = [s for s in results["rows"] if s["name"] == r["name"]]
            shared = {key: r[key] for key in ("rho", "low", "high")}
            published = results["published"].get(r["name"].split(",")[0])
            for own in mine:
                extra = {} if published is None else {"published": published}
                wide.append(
                    {"name": r["name"], "seed": own["seed"], **shared, **extra,
                     **({"subset": own["subset"]} if "subset" in own else {})}
                )  # fmt: skip
    columns = [
        Column("rho", "Spearman's rho", ".2f", None),
        Column("low", "95% from", ".2f", None),
        Column("high", "to", ".2f", None),
        Column("published", "published", ".2f", None),
    ]
    several = config["seeds"] > 1
    cells = "cell" if config["depth"] == 1 else "cells"
    if several:
        columns.append(Column("subset", f"{config['again']} cells, {config['seeds']} seeds", ".2f"))
    caption = (
        f"Proxies against validation accuracy on CIFAR-10 of {config['cells']} random cells of "
        f"NAS-Bench-201; {config['depth']} {cells} a stage of {config['width']} channels, "
        f"{config['batch']} images of {config['pixels']} x {config['pixels']} pixels. Intervals by "
        "bootstrap over cells"
    )
    caption += "; last column, mean ± standard deviation over seeds." if several else ", one seed."
    return {stem(config["depth"]): summarise(wide, columns, heading="proxy", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Rho with intervals beside the published values."""
    from effjax.report.canvas import COLOURS, GREY, new_figure, set_footer, style

    first = [r for r in results["rows"] if r["seed"] == results["config"]["seed"]]
    places = np.arange(len(first))
    rho = np.array([r["rho"] for r in first])
    bars = np.abs(np.array([[r["low"] for r in first], [r["high"] for r in first]]) - rho)
    with style():
        figure, axes = new_figure(6.0, 3.0)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.errorbar(
            places, rho, yerr=bars, fmt="o", color=COLOURS[0], markersize=4, capsize=2,
            label="here, with 95% interval",
        )  # fmt: skip
        names = [r["name"].split(",")[0] for r in first]
        known = [i for i, name in enumerate(names) if name in results["published"]]
        axes.plot(
            places[known], [results["published"][names[i]] for i in known], "_",
            color=COLOURS[1], markersize=16, markeredgewidth=2, label="published",
        )  # fmt: skip
        axes.set_xticks(places, [r["name"] for r in first], rotation=30, ha="right")
        axes.set_ylabel("Spearman's rho with accuracy")
        axes.legend(frameon=False)
        set_footer(figure, source)
    return {stem(results["config"]["depth"]): figure}
