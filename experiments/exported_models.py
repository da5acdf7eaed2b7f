"""Exported models: what four kinds of network classify in three engines, beside evaluation in JAX.

An MLP, a residual CNN with BatchNorm, MobileNetV2's blocks (depthwise convolutions, ReLU6) and a
vision transformer are trained briefly on Fashion-MNIST with 8-bit QAT and static ranges (of
activations from least to largest, as the engines have them), frozen, and exported for ONNX Runtime,
LiteRT and jax. Each file classifies all 10,000 test images. Written
down are the accuracy under QAT's evaluation, of the frozen function and of each file; how often the
file predicts the frozen function's class; the share of the integers that are the same to one unit,
of the layer that differs most; and bytes, beside those of the integers. Training is short: accuracy
is compared within a row, and is not what these networks reach.

Expected (what is asked of the exports): the file's classes are the frozen function's for 99.9% of
the test images and its accuracy QAT's within 0.1 points, for all kinds; 99.5% of each layer's
integers the same to one unit, for the CNN.
Cost: 40 minutes of one CPU core.
Command: python -m experiments exported_models --keep

Paper: Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", 2018, https://arxiv.org/abs/1712.05877.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.export.verify import FORMATS, deploy, engine
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches, standardized
from experiments.harness.config import check
from experiments.harness.exporting import frozen_call, predictions
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import mlp, mobilenet, resnet, vit
from experiments.sparse_report import cross_entropy, publish, scores

NAME = "exported_models"
KINDS = ("mlp", "cnn", "depthwise", "transformer")
SIZE = 500  # images at a time where a file takes any number


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      kinds: of network.
      steps: of training.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule.
      seeds: how many trainings of each.
      seed: the first.
      images: test images, the first of them.
      keep: whether results go to experiments/results.
    """

    kinds: tuple[str, ...] = KINDS
    steps: int = 1_500
    batch: int = 64
    learning_rate: float = 2e-3
    seeds: int = 3
    seed: int = 0
    images: int = 10_000
    keep: bool = False

    def __post_init__(self) -> None:
        check(self, steps=(1, 10**6), batch=(1, 10**4), learning_rate=(1e-8, 10))
        check(self, seeds=(1, 100), images=(1, 10_000))


def model(kind: str) -> ej.Model:
    """One of the four networks, for images of 28 x 28."""
    if kind == "mlp":
        return mlp.model(mlp.Spec())
    if kind == "cnn":
        return resnet.model(resnet.Spec(stages=(16, 32, 64), blocks=1, channels=1))
    if kind == "depthwise":
        table = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 1, 2))
        return mobilenet.model(
            mobilenet.Spec(width=0.5, classes=10, table=table, last=128, channels=1)
        )
    return vit.model(
        vit.Spec(features=96, heads=(3, 3), hidden=(192, 192), size=28, patch=7, channels=1)
    )


def run(config: Config) -> dict[str, Any]:
    """Trains, exports and classifies."""
    here, images = open_run(NAME, config), data.load("fashion_mnist")
    rows = []
    for kind in config.kinds:
        for seed in range(config.seed, config.seed + config.seeds):
            rows += one(here.part(f"{kind}-seed{seed}"), kind, seed, images, config)
    return publish(here, {"rows": rows}, tables, lambda results, source: {}, config.keep)


def one(
    here: Run, kind: str, seed: int, images: data.Dataset, config: Config
) -> list[dict[str, Any]]:
    """One training, and a row for each format."""
    own = model(kind)
    transform = ej.chain(quant=ej.quantize.qat(8, 8, ranges="static", symmetric=False))
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    batches = make_batches(images.train.as_dict(), config.batch, seed, **images.standard)
    state = ej.init_state(jax.random.key(seed), own, transform, tx, batches.example)
    step = ej.make_step(own.apply, transform, cross_entropy, tx)
    state = fit(here, step, state, batches, steps=config.steps).state
    some = {name: x[: config.images] for name, x in images.test.as_dict().items()}
    evaluate = evaluator(ej.make_eval(own.apply, transform, scores), some, **images.standard)
    arrays, shift, scale = jax.tree.map(jnp.asarray, (some, images.shift, images.scale))
    test = np.asarray(standardized(arrays, shift, scale)["image"])
    frozen = ej.quantize.freeze(
        own.apply, transform, state, [batches(jnp.int32(i)) for i in range(8)]
    )
    wanted = predictions(frozen_call(frozen), test, SIZE)
    common = {
        "kind": kind,
        "seed": seed,
        "evaluation": evaluate(state)["accuracy"],
        "frozen": float(np.mean(wanted == some["label"])),
    }
    rows = []
    for suffix, name in FORMATS.items():
        file = deploy(frozen, here.path / f"model{suffix}")
        found = predictions(engine(file.path), test, 1 if name == "litert" else SIZE)
        rows.append(
            {
                **common,
                "format": name,
                "accuracy": float(np.mean(found == some["label"])),
                "agreement": float(np.mean(found == wanted)),
                "units": file.units,
                "bytes": file.nbytes,
                "integers": file.integers,
                "integer_kernels": sum(file.integer_kernels.values()),
                "kernels": sum(file.kernels.values()),
            }
        )
        say(f"{kind} seed {seed} {name}: {rows[-1]}")
    return rows


COLUMNS = (
    Column("evaluation", "QAT, %", ".2f", scale=100),
    Column("frozen", "frozen, %", ".2f", scale=100),
    Column("accuracy", "file, %", ".2f", scale=100),
    Column("agreement", "same class as frozen, %", ".3f", scale=100),
    Column("units", "within one unit, %", ".3f", scale=100),
    Column("bytes", "bytes", ",.0f"),
    Column("overhead", "bytes over the integers'", ".2f"),
    Column("integer_kernels", "integer kernels", ".0f"),
)


def tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """One row for each kind and format."""
    rows = [
        {
            **row,
            "name": f"{row['kind']}, {row['format']}",
            "overhead": row["bytes"] / row["integers"],
        }
        for row in results["rows"]
    ]
    return {NAME: summarise(rows, COLUMNS)}
