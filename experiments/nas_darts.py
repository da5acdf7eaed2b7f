"""DARTS on NAS-Bench-201: its collapse, and remedies: beta-DARTS, DARTS-, DARTS+ and GDAS.

A network of all cells is trained on CIFAR-10, first order: even images of a batch train its
weights, odd ones, of another half of the training set, the logits of the operations. In regular
intervals the cell of the most probable operations is looked up: its validation accuracy after 200
epochs alone. Published: DARTS ends at the cell of six skip connections, which has 39.77%, in every
run; beta-DARTS, with a loss on the logits that grows from 0 to 50, at 91.55%; DARTS-, an additional
skip connection that fades to 0 during the search, at 91.03 ± 0.44%; GDAS, which samples one
operation an edge in every step, at 89.89 ± 0.08%. The best cell of the table has 91.61%. DARTS+ is
DARTS, ended when a cell has two skip connections.

Reduced: 3 cells a stage in place of 5, 8 channels in place of 16, images of 8 x 8 (means of 4 x 4
pixels), 3,000 steps of 32 + 32 images in place of 20,000 of 64 + 64. With one cell a stage and
images of 16 x 16 it was only some of the searches that collapsed. Logits learn faster: Adam's rate
times the steps is 9, where it is 6 as published. BatchNorm in the cells has no scale and shift, as
published. GDAS's temperature falls from 10 to 0.1. All but GDAS are one compiled program.

Command: python -m experiments nas_darts
Cost: half an hour of one CPU core; perhaps as much again with DARTS- and GDAS (--arms).

Papers: Liu et al. 2019, https://arxiv.org/abs/1806.09055; Dong and Yang 2020,
https://arxiv.org/abs/2001.00326; Ye et al. 2022, https://arxiv.org/abs/2203.01665; Chu et al. 2021,
https://arxiv.org/abs/2009.01027; Liang et al. 2019, https://arxiv.org/abs/1909.06035.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.nas.tabular import EDGES, OPERATIONS
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.batches import make_batches
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import open_run, read_metrics
from experiments.harness.tables import load_table
from experiments.models import nasbench201 as bench
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish

NAME = "nas_darts"


class Arm(NamedTuple):
    """A search.

    part: of the run's folder.
    published: the last cell's validation accuracy, in per cent.
    relax: see `ej.nas.darts`.
    auxiliary: how strong the additional skip connection is at first.
    temperature: at first and at last.
    decay: the largest strength of beta-decay, which grows to it from 0.
    """

    part: str
    published: float
    relax: str = "softmax"
    auxiliary: float = 0.0
    temperature: tuple[float, float] = (1.0, 1.0)
    decay: float = 0.0


ARMS = {
    "DARTS": Arm("darts", 39.77),
    "DARTS-": Arm("darts-minus", 91.03, auxiliary=1.0),
    "beta-DARTS": Arm("beta-darts", 91.55, decay=50.0),
    "GDAS": Arm("gdas", 89.89, relax="one_path", temperature=(10.0, 0.1)),
}
SKIP, FREE = OPERATIONS.index("skip"), ("none", "skip", "pool")

STOPPED = "DARTS+"


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      arms: "DARTS", with which DARTS+ comes, "beta-DARTS", "DARTS-", "GDAS".
      seeds: searches of each arm.
      seed: the first.
      steps: of a search.
      every: steps between looks at the table.
      batch: images of a step that train the weights, and as many that train the logits.
      images: of the training set, half of them for the logits.
      width: channels of the first stage.
      depth: cells in a stage.
      pixels: the images' height and width.
      learning_rate: of the weights, the largest of a cosine schedule.
      logit_rate: of the logits.
      dataset: "cifar10"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    arms: tuple[str, ...] = ("DARTS", "beta-DARTS")
    seeds: int = 3
    seed: int = 0
    steps: int = 3_000
    every: int = 100
    batch: int = 32
    images: int = 20_000
    width: int = 8
    depth: int = 3
    pixels: int = 8
    learning_rate: float = 0.025
    logit_rate: float = 3e-3
    dataset: str = "cifar10"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self, seeds=(1, 100), steps=(1, 10**6), every=(1, 10**6), batch=(1, 4096),
            images=(2, 50_000), width=(1, 1024), depth=(1, 100), pixels=(4, 32),
            learning_rate=(1e-8, 10), logit_rate=(1e-8, 10),
        )  # fmt: skip
        if unknown := set(self.arms) - set(ARMS):
            raise ConfigError(f"arms are {sorted(unknown)}; there are {list(ARMS)}.")


def interleaved(pairs: PyTree) -> PyTree:
    """Pairs of examples [n, 2, ...] as a batch [2 n, ...]: the second ones at odd places."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)


class Bench:
    """The data, the program of all searches, and the table."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        self.table = load_table("cifar10")
        found = data.load(config.dataset, validation=0)
        rng = np.random.default_rng([config.seed, 0xDA275])
        chosen = rng.choice(len(found.train.label), config.images // 2 * 2, replace=False)
        image = data.shrunk(found.train.image[chosen], config.pixels)
        pairs = {
            "image": image.reshape(-1, 2, *image.shape[1:]),
            "label": found.train.label[chosen].reshape(-1, 2),
        }
        self.batches = make_batches(pairs, config.batch, 0, shift=found.shift, scale=found.scale)
        spec = bench.Spec(
            width=config.width, cells=config.depth, channels=image.shape[-1], affine=False
        )
        self.model = bench.model(spec)
        schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
        self.tx = optax.partition(
            {
                "logits": optax.adamw(config.logit_rate, b1=0.5, weight_decay=1e-3),
                "weights": optax.chain(
                    optax.clip_by_global_norm(5.0),
                    optax.add_decayed_weights(3e-4),
                    optax.sgd(schedule, momentum=0.9),
                ),
            },
            lambda vars: ej.select.label_tree(vars, [("^extra/", "logits"), ("", "weights")]),
        )
        relaxations = {arm.relax for arm in ARMS.values()}
        self.steps = {relax: functools.partial(self.step, relax) for relax in relaxations}
        self.init = jax.jit(
            lambda key: ej.init_state(
                key, self.model, self.search("softmax", 0.0, (1.0, 1.0), 0.0), self.tx,
                jax.eval_shape(interleaved, self.batches.example),
            ),
            compiler_options={"xla_backend_optimization_level": 0},
        )  # fmt: skip

    def search(
        self, relax: str, strength: Any, temperature: tuple[Any, Any], decay: Any
    ) -> ej.Transform:
        """The search of an arm; all but the relaxation may be traced."""

        def auxiliary(step: Array) -> Array:
            return strength * (1 - step / self.config.steps)

        def heat(step: Array) -> Array:
            first, last = temperature
            return first + (last - first) * step / self.config.steps

        own = ej.nas.darts(
            {"edges": len(EDGES)}, OPERATIONS, relax=relax, auxiliary=auxiliary, temperature=heat,
            decay=lambda step: decay * step / self.config.steps,
        )  # fmt: skip
        return ej.chain(search=own)

    def step(self, relax: str, state: ej.TrainState, pairs: PyTree, given: PyTree) -> Any:
        own = self.search(relax, *given)
        return ej.make_step(self.model.apply, own, cross_entropy, self.tx)(
            state, interleaved(pairs)
        )

    def look(self, state: ej.TrainState) -> dict[str, float]:
        """The cell that is the most probable now, in the table."""
        with warnings.catch_warnings():  # the collapse is what is looked for
            warnings.simplefilter("ignore", ej.nas.CollapseWarning)
            genes = ej.nas.extract(state, OPERATIONS)["edges"]
        free = [OPERATIONS[g] in FREE for g in genes]
        return {
            "cell": float("".join(map(str, genes.tolist()))),
            "tabulated": self.table.mean(genes),
            "skips": float((genes == SKIP).sum()),
            "without weights": float(np.sum(free)),
        }

    def run(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """One search's looks at the table."""
        config, own = self.config, ARMS[arm]
        part = self.here.part(f"{own.part}-seed{seed}")
        batches = dataclasses.replace(self.batches, key=jax.random.key(seed))
        fit(
            part, self.steps[own.relax], self.init(jax.random.key(seed)), batches,
            steps=config.steps,
            frozen=jax.tree.map(jnp.float32, (own.auxiliary, own.temperature, own.decay)),
            evaluate=self.look, eval_every=config.every,
            checkpoint_every=max(1, config.steps // 4), log_every=config.every,
        )  # fmt: skip
        return [r for r in read_metrics(part.path / "metrics.jsonl") if "tabulated" in r]


def run(config: Config) -> dict[str, Any]:
    """Searches, and reports."""
    began = time.monotonic()
    found, rows = Bench(config), []
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in config.arms:
            looks = found.run(arm, seed)
            rows.append(row_of(arm, seed, looks))
            if arm == "DARTS":
                rows.append(row_of(STOPPED, seed, looks[: stop(looks)]))
    results: dict[str, Any] = {"rows": rows, "seconds": time.monotonic() - began}
    publish(found.here, results, tables, figures, config.save)
    return {
        f"{arm}": ", ".join(f"{r['final']:.2f}% ({r['cell']})" for r in rows if r["name"] == arm)
        for arm in dict.fromkeys(row["name"] for row in rows)
    }


def stop(looks: list[dict[str, Any]]) -> int:
    """How many looks DARTS+ takes: those before the cell has two skip connections, at least one."""
    return next((i for i, look in enumerate(looks) if i and look["skips"] >= 2), len(looks))


def row_of(name: str, seed: int, looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a search ended, and what was seen on the way."""
    last = looks[-1]
    row: dict[str, Any] = {"name": name, "seed": seed, "cell": f"{int(last['cell']):06d}"}
    if name in ARMS:
        row["published"] = ARMS[name].published
    for key in ("tabulated", "skips", "without weights"):
        row[key] = [round(look[key], 3) for look in looks]
    row |= {"steps": [look["step"] for look in looks], "last": last["step"]}
    row |= {"final": last["tabulated"], "final_skips": last["skips"]}
    say(f"{name}, seed {seed}: cell {row['cell']}, {row['final']:.2f}%")
    return {**row, "best": max(row["tabulated"])}


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Where the searches end."""
    columns = [
        Column("final", "accuracy of the last cell (%)", ".2f", "max"),
        Column("published", "published (%)", ".2f"),
        Column("best", "best during the search (%)", ".2f"),
        Column("final_skips", "skip connections of 6", ".1f"),
        Column("last", "steps", ",.0f"),
    ]
    config = results["config"]
    caption = (
        f"Differentiable search on NAS-Bench-201, {config['steps']} steps; tabulated validation "
        f"accuracy on CIFAR-10, mean ± standard deviation of {config['seeds']} seeds."
    )
    return {NAME: summarise(results["rows"], columns, heading="search", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Tabulated accuracy and skip connections of the most probable cell during the search."""
    rows = results["rows"]

    def series(key: str) -> dict[str, Any]:
        found = {}
        for arm in [arm for arm in ARMS if any(r["name"] == arm for r in rows)]:
            mine = [r for r in rows if r["name"] == arm]
            found[arm] = (mine[0]["steps"], np.array([r[key] for r in mine]))
        return found

    panels = [
        Panel(series("tabulated"), "step", "tabulated accuracy (%)", bars=False),
        Panel(series("skips"), "step", "skip connections of 6", bars=False, limits=(-0.2, 6.2)),
        Panel(
            series("without weights"), "step", "edges without weights of 6", bars=False,
            limits=(-0.2, 6.2),
        ),
    ]  # fmt: skip
    return {NAME: panels_plot(panels, source, width=8.0, height=2.8)}
