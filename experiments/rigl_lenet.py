"""RigL on LeNet-300-100 and MNIST, against static masks, SET and the dense network.

The first two layers are sparse from the first step to the last, 99% and 89.1%, with random masks to
begin with; the output layer is dense. Every so many steps RigL drops weights of small magnitude and
grows those of large gradient. In the end most input pixels and many hidden units have no connection
left; what is left of the network is stored as bit masks and float32 values.

Published (table 2 of the paper's version of 2021): error 1.44-1.48%, 408-100-69 units left, 87.0%
of the weights between them zero, 31,914 bytes. The 87% are those of the network that is left; of
all 266,200 weights of LeNet-300-100 they are 97.6%. A second set of arms reads the number the other
way, 87% of all weights with the ERK budget, and has to come out more accurate, and larger.

As in the paper's code: 200 epochs of SGD with Nesterov momentum 0.9, batches of 100, L2 1e-4,
learning rate 0.2, a third of it from 37.5% of the run on and a ninth from 47.5%, pixels in [0, 1];
masks move every 100 steps until 42% of the run, a fraction of 0.3 with cosine annealing. 5,000 of
the 60,000 images are held out, for the curves; nothing is chosen by them. The test set is used
once, at the end of each training. Shorter runs are worse in both, error and size: masks that move
less often leave more pixels and units with a connection.

Command: python -m experiments rigl_lenet
Cost: 20 minutes on 2 CPU cores (18 trainings of 110,000 steps).

Paper: Evci et al., "Rigging the lottery: making all tickets winners", 2020,
https://arxiv.org/abs/1911.11134, appendix B.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.core import PyTree
from effjax.prune.flops import flops
from effjax.report import Column, Table, summarise
from effjax.report.canvas import new_figure, set_footer, style
from effjax.select import leaves, map_named
from experiments.harness import data
from experiments.harness.batches import Batches, evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run, read_metrics
from experiments.models import mlp
from experiments.sparse_report import cross_entropy, error_curves, publish, scores

NAME = "rigl_lenet"
DENSE, RIGL, SET, STATIC = "dense", "RigL", "SET", "static"
RIGL_ERK, STATIC_ERK = "RigL, ERK 87%", "static, ERK 87%"
ARMS = (RIGL, SET, STATIC, RIGL_ERK, STATIC_ERK)
PUBLISHED = {"name": "RigL, published", "error": 0.0148, "bytes": 31_914, "sparsity left": 0.870}
PUBLISHED |= {"inputs": 408, "first": 100, "second": 69}


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      arms: which of `ARMS`; the dense network is always there.
      seeds: runs of each arm.
      seed: the first.
      epochs: passes over the 55,000 training images.
      batch: images a step.
      learning_rate: at the beginning.
      l2: weight of the kernels' L2 norm.
      sparsity: of the first layer; the second one has 0.9 times as much.
      whole: of all weights in the arms with the ERK budget.
      every: steps from one move of the masks to the next.
      alpha: the fraction of connections that move at first.
      dataset: "mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    arms: tuple[str, ...] = ARMS
    seeds: int = 3
    seed: int = 0
    epochs: int = 200
    batch: int = 100
    learning_rate: float = 0.2
    l2: float = 1e-4
    sparsity: float = 0.99
    whole: float = 0.87
    every: int = 100
    alpha: float = 0.3
    dataset: Literal["mnist", "digits"] = "mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            epochs=(1, 10_000),
            batch=(1, 1_000),
            learning_rate=(1e-8, 10),
            l2=(0, 1),
            sparsity=(0, 0.999),
            whole=(0, 0.999),
            every=(1, 10**6),
            alpha=(0, 1),
        )
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ConfigError(f"there are no arms {unknown}; there are {list(ARMS)}.")


def transforms(config: Config, steps: int) -> dict[str, ej.Transform]:
    """The arms."""
    end = max(2, round(5 / 12 * steps))
    moves: dict[str, Any] = {"end": end, "every": config.every, "alpha": config.alpha}
    # The paper's sparsities, and those of the ERK budget, which leaves the output layer dense too.
    paper: dict[str, Any] = {
        "budget": ej.prune.budgets.by_path({"^dense_0/": 1.0, "^dense_1/": 0.9}),
        "select": "^dense_./kernel$",
    }
    erk: dict[str, Any] = {"budget": "erk", "select": "kernel$"}
    members = {
        RIGL: ej.prune.rigl(config.sparsity, **moves, **paper),
        SET: ej.prune.set_(config.sparsity, **moves, **paper),
        STATIC: ej.prune.static(config.sparsity, **paper),
        RIGL_ERK: ej.prune.rigl(config.whole, **moves, **erk),
        STATIC_ERK: ej.prune.static(config.whole, **erk),
    }
    return {DENSE: ej.chain(), **{name: ej.chain(prune=members[name]) for name in config.arms}}


class Trainer:
    """One arm: what is compiled for it serves all seeds."""

    def __init__(self, name: str, transform: ej.Transform, config: Config, images: data.Dataset):
        self.name, self.transform, self.config = name, transform, config
        self.model = mlp.model(mlp.Spec(inputs=images.train.image[0].size))
        pixels = {"scale": 1.0 / images.train.image.max()}

        def batches(seed: int) -> Batches:
            return make_batches(images.train.as_dict(), config.batch, seed, **pixels)

        self.batches = batches
        steps = self.steps = config.epochs * batches(0).per_epoch
        rate = optax.piecewise_constant_schedule(
            config.learning_rate, {round(0.375 * steps): 1 / 3, round(0.475 * steps): 1 / 3}
        )
        self.tx = tx = optax.chain(
            optax.add_decayed_weights(config.l2, mask=_kernels),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )
        example = batches(0).example
        self.step = ej.make_step(self.model.apply, transform, cross_entropy, tx)
        self.init = jax.jit(lambda key: ej.init_state(key, self.model, transform, tx, example))
        measured = ej.make_eval(self.model.apply, transform, scores)
        self.validate, self.test = (
            evaluator(measured, split.as_dict(), size=5_000, prefix=prefix, **pixels)
            for split, prefix in ((images.validation, "validation/"), (images.test, "test/"))
        )

    def part(self, seed: int) -> str:
        """The name of a seed's folder."""
        return f"{self.name.replace(',', '').replace('%', '').replace(' ', '-')}-seed{seed}"

    def train(self, part: Run, seed: int) -> tuple[ej.TrainState, ej.TrainState, dict[str, Any]]:
        """The states before and after training, and the last metrics."""
        start = self.init(jax.random.key(seed))

        def evaluate(state: ej.TrainState) -> dict[str, float]:
            found = self.validate(state)
            return {**found, **self.test(state)} if int(state.step) == self.steps else found

        fitted = fit(
            part,
            self.step,
            start,
            self.batches(seed),
            steps=self.steps,
            evaluate=evaluate,
            eval_every=max(1, self.steps // 25),
            checkpoint_every=max(1, self.steps // 2),
            log_every=max(1, self.steps // 100),
            mode="block",  # without convolutions, a loop on the device is faster on CPU too
        )
        return start, fitted.state, fitted.metrics

    def row(self, state: ej.TrainState, metrics: dict[str, Any], seed: int) -> dict[str, Any]:
        """What is reported of one training."""
        params = ej.export(self.transform, state)
        masks = masks_of(state)
        one = {"image": jnp.zeros((1, *self.batches(0).data["image"].shape[1:]))}
        cost = flops(self.model.apply, params, state.model_state, one, masks)
        dense_gradients = self.name.startswith(RIGL)
        step = cost.rigl(self.config.every - 1) if dense_gradients else cost.step()
        small, _ = shrunk(params)
        kernels = [x for path, x in leaves(small).items() if path.endswith("kernel")]
        weights = sum(x.size for path, x in leaves(params).items() if path.endswith("kernel"))
        left = sum(int(np.count_nonzero(x)) for x in kernels)
        return {
            "name": self.name,
            "seed": seed,
            "part": self.part(seed),
            "layers": {
                path: {"sparsity": 1.0 - np.count_nonzero(x) / x.size, "bits": 32}
                for path, x in leaves(params).items()
                if path.endswith("kernel")
            },
            "error": 1.0 - metrics["test/accuracy"],
            "validation error": 1.0 - metrics["validation/accuracy"],
            "bytes": ej.footprint(small).totals.bytes,
            "sparsity": 1.0 - left / weights,
            "sparsity left": 1.0 - left / sum(x.size for x in kernels),
            "inputs": kernels[0].shape[0],
            "first": kernels[0].shape[1],
            "second": kernels[1].shape[1],
            "train flops": step / (3 * cost.dense),
            "flops": cost.sparse,
        }


def _kernels(tree: PyTree) -> PyTree:
    return map_named(lambda path, leaf: path.endswith("kernel"), tree)


def masks_of(state: ej.TrainState) -> dict[str, jax.Array]:
    """An arm's masks, none for the dense one."""
    return state.transform["prune"]["mask"] if "prune" in state.transform else {}


def shrunk(params: PyTree) -> tuple[PyTree, np.ndarray]:
    """The network without pixels and hidden units that no weight connects to its output.

    A unit that nothing comes in to has the constant value relu(bias), which goes into the biases of
    the next layer: the outputs stay what they were.

    Args:
      params: of `models.mlp` with two hidden layers, pruned weights 0.

    Returns:
      NumPy params of the same structure, and the pixels that are left: the first kernel's rows.
    """
    names = ("dense_0", "dense_1", "head")
    kernels = [np.asarray(params[n]["kernel"]) for n in names]
    biases = [np.asarray(params[n]["bias"]) for n in names]
    pixels, before = np.arange(len(kernels[0])), -1
    while before != sum(k.size for k in kernels):
        before = sum(k.size for k in kernels)
        for i in (0, 1):
            fed = np.any(kernels[i] != 0, axis=0)
            constant = np.where(fed, 0.0, np.maximum(biases[i], 0.0))
            biases[i + 1] = biases[i + 1] + constant.astype(np.float32) @ kernels[i + 1]
            stays = fed & np.any(kernels[i + 1] != 0, axis=1)
            kernels[i], biases[i] = kernels[i][:, stays], biases[i][stays]
            kernels[i + 1] = kernels[i + 1][stays]
        seen = np.any(kernels[0] != 0, axis=1)
        kernels[0], pixels = kernels[0][seen], pixels[seen]
    layers = zip(names, kernels, biases, strict=True)
    return {name: {"kernel": k, "bias": b} for name, k, b in layers}, pixels


def run(config: Config) -> dict[str, Any]:
    """Trains all arms, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    held = 0.2 if config.dataset == "digits" else 1 / 12
    images = data.load(config.dataset, seed=config.seed, validation=held)
    steps = config.epochs * (len(images.train.label) // config.batch)
    rows: list[dict[str, Any]] = []
    pixels: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, transform in transforms(config, steps).items():
        trainer = Trainer(name, transform, config, images)
        for seed in range(config.seed, config.seed + config.seeds):
            start, end, metrics = trainer.train(here.part(trainer.part(seed)), seed)
            rows.append(trainer.row(end, metrics, seed))
            for when, state in (("start", start), ("end", end)):
                if "dense_0/kernel" in masks_of(state):
                    count = np.asarray(masks_of(state)["dense_0/kernel"]).sum(axis=1)
                    pixels.setdefault(name, {}).setdefault(when, []).append(count.tolist())
            records = read_metrics(here.path / trainer.part(seed) / "metrics.jsonl")
            looks = [r for r in records if "validation/accuracy" in r]
            found = curves.setdefault(name, {"steps": [r["step"] for r in looks], "error": []})
            found["error"].append([round(1 - r["validation/accuracy"], 6) for r in looks])
        mine = [row for row in rows if row["name"] == name]
        errors, stored = ([row[k] for row in mine] for k in ("error", "bytes"))
        say(f"{name}: test error {np.mean(errors):.2%}, {np.mean(stored):,.0f} bytes")
    results = {"rows": rows, "steps": steps, "seconds": time.monotonic() - began}
    results |= {"published": PUBLISHED, "pixels": pixels, "curves": curves}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": DENSE}
    publish(here, results, tables, figures, config.save)
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        errors, stored = ([r[k] for r in rows if r["name"] == name] for k in ("error", "bytes"))
        found[name] = f"test error {np.mean(errors):.2%}, {np.mean(stored):,.0f} bytes"
    return found


COLUMNS = (
    Column("error", "test error (%)", ".2f", None, 100),
    Column("bytes", "stored bytes", ",.0f"),
    Column("sparsity", "zeros of all weights (%)", ".1f", None, 100),
    Column("inputs", "pixels left", ".0f"),
    Column("first", "units left: first", ".0f"),
    Column("second", "second", ".0f"),
    Column("sparsity left", "zeros between them (%)", ".1f", None, 100),
    Column("train flops", "training FLOPs (dense = 1)", ".3f"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """All arms, with the published row."""
    config = results["config"]
    caption = (
        f"LeNet-300-100 on {config['dataset']}, {config['epochs']} epochs; mean ± standard "
        f"deviation of {config['seeds']} seeds. Published: 200 epochs, final error. Stored: bit "
        "masks and float32 values of what is left once pixels and units without a path to the "
        "output are taken out. Training FLOPs with zeros skipped, by the paper's formula."
    )
    rows = [*results["rows"], {**results["published"], "seed": 0}]
    return {NAME: summarise(rows, COLUMNS, caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Where the connections of the input layer are, and errors in training."""
    plot = error_curves(results["curves"], "validation error (%)", source, 2.2)
    found = {f"{NAME}_pixels": pixel_plot(results, source)} if results["pixels"] else {}
    return {**found, f"{NAME}_curves": plot}


def pixel_plot(results: dict[str, Any], source: Mapping[str, Any]) -> Any:
    """Connections of each input pixel: means over seeds."""
    pixels = results["pixels"]
    shown = [("Random masks", next(iter(pixels)), "start")]
    shown += [(f"{name}, trained", name, "end") for name in (SET, RIGL) if name in pixels]
    counts = [np.mean(pixels[name][when], axis=0) for _, name, when in shown]
    side = round(len(counts[0]) ** 0.5)
    # The few pixels with the most connections would leave all others dark.
    top = float(np.percentile(counts[-1], 99))
    with style():
        figure, first = new_figure(1.6 * len(shown) + 0.6, 2.1)
        first.remove()
        for axes, count, (title, *_) in zip(
            figure.subplots(1, len(shown)), counts, shown, strict=True
        ):
            drawn = axes.imshow(count.reshape(side, side), vmin=0, vmax=top, cmap="viridis")
            axes.set_title(title, loc="center")
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        bar = figure.colorbar(drawn, ax=figure.axes, shrink=0.8, pad=0.02, extend="max")
        bar.set_label("connections of a pixel")
        bar.outline.set_visible(False)
        set_footer(figure, source)
    return figure
