"""Accuracy against sparsity, 50% to 98%: nine ways to prune a small CNN on Fashion-MNIST.

Gradual magnitude pruning (each layer by itself, and by one global threshold), RigL, SET, static
masks, random pruning, top-k weights with a straight-through gradient (STE), and N:M patterns by
magnitude; with three seeds each, and the dense network. First and last layer stay dense, the budget
is uniform but for the global threshold, and all methods take the same steps, batches and schedule
of the learning rate. The sparsity is an argument of the program: one compilation serves all
sparsities and seeds of a method.

Published (jaxpruner, ResNet-50 on ImageNet, 80% uniform, top-1 accuracy): dense 76.67, magnitude
75.53, global 75.49, RigL 74.75, SET 74.57, STE 73.54, static 71.34, random 70.19. The order of the
methods is compared with it, by Kendall's rank correlation and pair by pair.

The network is small, and so are the runs: `models.strided` with 73 thousand weights, 5 epochs of
55,000 images, batches of 128. The longer thing is `--epochs 50`. 5,000 of the 60,000 training
images are held out and nothing is chosen by them; the test set is used once, at the end of each
training.

Command: python -m experiments sparsity_curve
Cost: 25 minutes on 2 CPU cores (117 trainings).

Papers: Lee et al., "JaxPruner: a concise library for sparsity research", 2023,
https://arxiv.org/abs/2304.14082 (the table); see `effjax.prune` for those of the methods.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.report import Column, Table, summarise, welch
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import strided
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish, scores

NAME = "sparsity_curve"
DENSE = "dense"
PUBLISHED = {
    "dense": 76.67,
    "magnitude": 75.53,
    "global magnitude": 75.49,
    "RigL": 74.75,
    "SET": 74.57,
    "STE": 73.54,
    "static": 71.34,
    "random": 70.19,
}
METHODS = tuple(name for name in PUBLISHED if name != DENSE)


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each method and sparsity.
      seed: the first.
      methods: which, of jaxpruner's table.
      sparsities: of the pruned layers.
      groups: the M of the 1:M patterns; their sparsity is 1 - 1/M.
      epochs: passes over the 55,000 training images.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule.
      moves: how often masks move in a run.
      channels: of the convolutions.
      hidden: units of the dense layer.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
    groups: tuple[int, ...] = (2, 4, 8)
    epochs: int = 5
    batch: int = 128
    learning_rate: float = 3e-3
    moves: int = 40
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 128
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            sparsities=(0, 0.999),
            groups=(2, 64),
            epochs=(1, 10_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            moves=(1, 10_000),
            channels=(1, 4_096),
            hidden=(1, 65_536),
        )
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ConfigError(f"there are no methods {unknown}; there are {list(METHODS)}.")


Build = Callable[[Array], ej.Transform]  # from a traced sparsity


def methods(config: Config, steps: int) -> dict[str, Build]:
    """{name: what makes its transform}. Masks move until 3/4 of the run."""
    prune, end = ej.prune, max(2, 3 * steps // 4)
    every = max(1, end // config.moves)
    gradual: dict[str, Any] = {"begin": steps // 10, "end": end, "every": every}
    moving: dict[str, Any] = {"end": end, "every": every, "budget": "uniform"}
    members: dict[str, Build] = {
        "magnitude": lambda s: prune.magnitude(s, **gradual),
        "global magnitude": lambda s: prune.magnitude(s, budget="global", **gradual),
        "RigL": lambda s: prune.rigl(s, **moving),
        "SET": lambda s: prune.set_(s, **moving),
        "STE": lambda s: prune.ste(s, every=10),
        "static": lambda s: prune.static(s, budget="uniform"),
        "random": lambda s: prune.random(s, **gradual),
    }
    for m in config.groups:
        members[f"1:{m}"] = patterned(m, gradual)

    def chained(build: Build) -> Build:
        return lambda sparsity: ej.chain(prune=build(sparsity))

    wanted = [*config.methods, *(f"1:{m}" for m in config.groups)]
    return {DENSE: lambda s: ej.chain(), **{name: chained(members[name]) for name in wanted}}


def patterned(m: int, gradual: dict[str, Any]) -> Build:
    """Magnitude pruning to 1:M, whose sparsity is its own."""
    return lambda s: ej.prune.magnitude(pattern=ej.prune.n_m(1, m), **gradual)


class Trainer:
    """One method: what is compiled for it serves all sparsities and seeds."""

    def __init__(self, name: str, build: Build, config: Config, images: data.Dataset):
        self.name, self.config = name, config
        spec = strided.Spec(config.channels, config.hidden, images.classes)
        model = strided.model(spec)
        self.batches = make_batches(images.train.as_dict(), config.batch, 0, **images.standard)
        self.steps = config.epochs * self.batches.per_epoch
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, max(1, self.steps // 20), self.steps
        )
        tx = optax.adamw(rate, weight_decay=1e-4)
        example = self.batches.example

        def init(key: Array, sparsity: Array) -> ej.TrainState:
            return ej.init_state(key, model, build(sparsity), tx, example)

        def step(state: ej.TrainState, batch: Any, sparsity: Array) -> Any:
            return ej.make_step(model.apply, build(sparsity), cross_entropy, tx)(state, batch)

        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = step
        # What evaluation sees are the masks, whatever sparsity they were made for.
        measured = ej.make_eval(model.apply, build(jnp.float32(0.5)), scores)
        self.validate, self.test = (
            evaluator(measured, s.as_dict(), size=1_000, prefix=prefix, **images.standard)
            for s, prefix in ((images.validation, "validation/"), (images.test, "test/"))
        )

    def train(self, part: Run, sparsity: float, seed: int) -> dict[str, Any]:
        """One training's row, or what an earlier process found of it."""
        asked = jnp.float32(sparsity)

        def evaluate(state: ej.TrainState) -> dict[str, float]:
            found = self.validate(state)
            return {**found, **self.test(state)} if int(state.step) == self.steps else found

        last = fit(
            part,
            self.step,
            self.init(jax.random.key(seed), asked),
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=self.steps,
            frozen=asked,
            evaluate=evaluate,
            eval_every=max(1, self.steps // 5),
            # Seconds long: a training that is stopped begins again.
            checkpoint_every=self.steps,
            log_every=max(1, self.steps // 50),
        ).metrics
        return {
            "name": self.name if self.name == DENSE else f"{self.name} {100 * sparsity:g}%",
            "series": self.name,
            "part": part.path.name,
            "method": self.name,
            "asked": sparsity,
            "seed": seed,
            "sparsity": last.get("prune/sparsity", 0.0),
            "left": 1.0 - last.get("prune/sparsity", 0.0),
            "accuracy": last["test/accuracy"],
            "validation": last["validation/accuracy"],
        }


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    held = 0.2 if config.dataset == "digits" else 1 / 12
    images = data.load(config.dataset, seed=config.seed, validation=held)
    steps = config.epochs * (len(images.train.label) // config.batch)
    rows: list[dict[str, Any]] = []
    for name, build in methods(config, steps).items():
        trainer, since = Trainer(name, build, config, images), time.monotonic()
        asked = {DENSE: (0.0,), **{f"1:{m}": (1 - 1 / m,) for m in config.groups}}
        for sparsity in asked.get(name, config.sparsities):
            for seed in range(config.seed, config.seed + config.seeds):
                part = f"{name.replace(' ', '-').replace(':', '-')}-{sparsity:g}-seed{seed}"
                rows.append(trainer.train(here.part(part), sparsity, seed))
            accuracy = np.mean([row["accuracy"] for row in rows[-config.seeds :]])
            say(f"{name} at {sparsity:.1%}: {accuracy:.2%} ({time.monotonic() - since:.0f} s)")
    results: dict[str, Any] = {"rows": rows, "steps": steps, "seconds": time.monotonic() - began}
    results |= {"published": PUBLISHED, "baseline": DENSE}
    results["columns"] = [column._asdict() for column in COLUMNS]
    results["order"] = {f"{s:g}": order(rows, s) for s in config.sparsities}
    publish(here, results, tables, figures, config.save)
    return {
        f"order at {float(s):.0%}": (
            f"Kendall's tau {found['tau']:+.2f} with jaxpruner's table, {found['agree']} of "
            f"{found['pairs']} pairs; told apart the other way round: "
            f"{', '.join(found['contrary']) or 'none'}"
        )
        for s, found in results["order"].items()
    }


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("left", "weights left in the pruned layers (%)", ".3g", "min", 100),
)  # of `python -m experiments report`


def accuracies(rows: list[dict[str, Any]], method: str, sparsity: float) -> np.ndarray:
    """Test accuracies in per cent, by seed."""
    mine = [r for r in rows if r["method"] == method and r["asked"] == sparsity]
    return np.array([100 * r["accuracy"] for r in sorted(mine, key=lambda r: r["seed"])])


def order(rows: list[dict[str, Any]], sparsity: float) -> dict[str, Any]:
    """How the order of the methods at a sparsity agrees with the published one.

    Returns:
      {"tau": Kendall's, over all pairs; "pairs", "agree": their numbers; "contrary": the pairs
      in the other order whose means differ by Welch's t-test at 5%, uncorrected; "ranking"}.
    """
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    found = {name: accuracies(rows, name, sparsity) for name in names}
    agree, contrary = 0, []
    pairs = list(itertools.combinations(names, 2))
    for better, worse in pairs:  # as published
        a, b = found[better], found[worse]
        agree += int(a.mean() > b.mean())
        if a.mean() < b.mean() and len(a) > 1 and welch(b.tolist(), a.tolist()).p < 0.05:
            contrary.append(f"{worse} > {better}")
    ranking = sorted(names, key=lambda name: -found[name].mean())
    return {
        "tau": 2 * agree / len(pairs) - 1 if pairs else 1.0,
        "pairs": len(pairs),
        "agree": agree,
        "contrary": contrary,
        "ranking": ranking,
    }


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Methods down and sparsities across, with the published column; and the N:M patterns."""
    config = results["config"]
    wide: dict[tuple[str, int], dict[str, Any]] = {}
    patterns = []
    for r in results["rows"]:
        if ":" in r["method"]:
            patterns.append({**r, "name": r["method"]})
            continue
        row = wide.setdefault((r["method"], r["seed"]), {"name": r["method"], "seed": r["seed"]})
        row["published"] = results["published"][r["method"]]
        places = config["sparsities"] if r["method"] == DENSE else [r["asked"]]
        row |= {f"{s:g}": r["accuracy"] for s in places}
    columns = [Column("published", "ResNet-50, 80% (published)", ".2f")]
    columns += [Column(f"{s:g}", f"{s:.0%}", ".2f", None, 100) for s in config["sparsities"]]
    agreement = "; ".join(
        f"{float(s):.0%}: {o['tau']:+.2f} ({o['agree']} of {o['pairs']} pairs)"
        for s, o in results["order"].items()
    )
    about = (
        f"Test accuracy (%) on {config['dataset']}, {config['epochs']} epochs; mean ± standard "
        f"deviation of {config['seeds']} seeds."
    )
    every = summarise(
        wide.values(),
        columns,
        caption=f"{about} Kendall's tau of the methods' order with the published one: {agreement}.",
    )
    found = {NAME: every}
    if patterns:
        shown = [
            Column("sparsity", "zeros (%)", ".1f", None, 100),
            Column("accuracy", "test accuracy (%)", ".2f", None, 100),
        ]
        found[f"{NAME}_n_m"] = summarise(patterns, shown, heading="N:M", caption=about)
    return found


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against sparsity: everything, and what is near the dense network."""
    rows, sparsities = results["rows"], results["config"]["sparsities"]

    def place(sparsity: float) -> float:
        return -float(np.log(1 - sparsity))

    places = [place(s) for s in sparsities]
    series: dict[str, Any] = {
        name: (places, np.stack([accuracies(rows, name, s) for s in sparsities], axis=1))
        for name in results["config"]["methods"]
    }
    groups = [1 - 1 / m for m in results["config"]["groups"]]
    if groups:
        found = [
            accuracies(rows, f"1:{m}", s)
            for m, s in zip(results["config"]["groups"], groups, strict=True)
        ]
        series["N:M by magnitude"] = ([place(s) for s in groups], np.stack(found, axis=1))
    ticks = {place(s): f"{s:.0%}" for s in sparsities}
    dense = accuracies(rows, DENSE, 0.0)
    weakest = min(float(values.mean(axis=0).min()) for _, values in series.values())
    strongest = max(float(values.mean(axis=0).min()) for _, values in series.values())
    near = strongest - 0.6 * abs(dense.mean() - strongest)
    panel = Panel(series, "zeros in the pruned layers", "test accuracy (%)", "", ticks)
    panel = panel._replace(level={"dense": dense})
    room = 0.05 * (dense.mean() - weakest)
    panels = [
        panel._replace(title="All methods", limits=(weakest - 2 * room, dense.mean() + 2 * room)),
        panel._replace(title="Near the dense network", limits=(near, None)),
    ]
    return {NAME: panels_plot(panels, source, width=7.0, height=3.2)}
