"""Pruned, then quantized after training; against pruned, quantized and taught in one step.

A small CNN is trained on Fashion-MNIST in floating point, three seeds. Then it is compressed to 80%
sparsity and 8, 4, 3 or 2 bits, in four ways that train on for as many steps:

- pruned all the while, then quantized without training (prune, then PTQ);
- pruned for half of them, then quantization-aware training with the masks kept (what TFMOT calls
  pruning-preserving QAT);
- pruned and quantized in one step throughout;
- the same, with a larger network as its teacher.

Expected: what quantization after training loses, training with it wins back. Published (TensorFlow
Model Optimization Toolkit, MobileNetV1 on ImageNet, int8): float 70.99, prune then PTQ 67.82,
pruning-preserving QAT 70.29. MobileNetV1's depthwise layers suffer at 8 bits; this network has
none, and shows the gap at 2 and 3.

First and last layer have 8 bits, and are pruned as the others are. The test set is used once, at
the end of each training.

Command: python -m experiments joint_compression
Cost: less than an hour on one CPU core that is shared with other work (49 trainings).

Source of the published numbers: https://www.tensorflow.org/model_optimization/guide/combine
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

import effjax as ej
from effjax.core import PyTree
from effjax.report import Column, Table, summarise
from experiments.arms import Arm, Build, Start, weights
from experiments.harness import data
from experiments.harness.config import check
from experiments.harness.progress import say
from experiments.harness.runs import open_run
from experiments.models import strided
from experiments.sparse_report import Panel, panels_plot, publish

NAME = "joint_compression"
FLOAT, TEACHER = "float", "teacher"
AFTER, KEPT = "prune, then PTQ", "prune, then QAT"
JOINT, TAUGHT = "prune + QAT", "prune + QAT + KD"
WAYS = (AFTER, KEPT, JOINT, TAUGHT)
ENDS = [(r"^(conv_0|head)/", ej.quantize.Bits(8, 8))]


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each way; all have one teacher.
      seed: the first.
      sparsity: of every layer.
      bits: of weights and activations.
      epochs: passes over the 60,000 training images in floating point.
      further: passes of each way after them, an even number.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule, in floating point.
      further_rate: that of the ways.
      temperature: of the teacher's outputs.
      channels: of the convolutions.
      hidden: units of the dense layer.
      larger: the teacher's sizes over the student's.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    sparsity: float = 0.8
    bits: tuple[int, ...] = (8, 4, 3, 2)
    epochs: int = 5
    further: int = 6
    batch: int = 128
    learning_rate: float = 3e-3
    further_rate: float = 2e-3
    temperature: float = 4.0
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 128
    larger: int = 4
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            sparsity=(0, 0.99),
            bits=(2, 8),
            epochs=(1, 10_000),
            further=(2, 10_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            further_rate=(1e-8, 10),
            temperature=(1e-3, 1e3),
            channels=(1, 4_096),
            hidden=(1, 65_536),
            larger=(1, 64),
        )


class Bench:
    """The data, the networks trained in floating point, and the rows of all ways."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        self.rows: list[dict[str, Any]] = []
        self.images = images = data.load(config.dataset, validation=0)
        self.per_epoch = len(images.train.label) // config.batch
        larger = tuple(config.larger * c for c in config.channels)
        self.small = strided.model(strided.Spec(config.channels, config.hidden, images.classes))
        self.large = strided.model(
            strided.Spec(larger, config.larger * config.hidden, images.classes)
        )
        self.starts: dict[int, Start] = {}

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def arm(self, build: Build, epochs: int, rate: float, model: ej.Model | None = None) -> Arm:
        how: dict[str, Any] = {"batch": self.config.batch, "learning_rate": rate}
        steps = epochs * self.per_epoch
        return Arm(model or self.small, self.images, build, steps=steps, **how)

    def further(self, build: Build, share: float = 1.0) -> Arm:
        """After floating point, for a share of the further epochs."""
        return self.arm(build, round(share * self.config.further), self.config.further_rate)

    def pruning(self, share: float = 1.0) -> ej.Transform:
        """Gradual, until two thirds of a share of the further epochs."""
        steps = round(share * self.config.further) * self.per_epoch
        begin, end = steps // 10, max(steps // 10 + 1, 2 * steps // 3)
        return ej.prune.magnitude(self.config.sparsity, begin, end, max(1, steps // 40))

    def note(self, way: str, bits: int, seed: int, accuracy: float, **more: Any) -> None:
        name = way if way in (FLOAT, TEACHER) else f"{way}, {bits} bits"
        row = {"name": name, "way": way, "bits": bits, "seed": seed, "accuracy": accuracy}
        self.rows.append({**row, **more})

    def measure(self, arm: Arm, way: str, bits: int, seed: int, state: Any, last: Any) -> None:
        """Adds the row of a finished training, with what is stored."""
        transform = arm.build(self.setting(bits, state))
        params = ej.export(transform, state)
        facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
        cost = ej.footprint(params, facts=facts, model_state=state.model_state).totals
        stored = {"bytes": cost.bytes, "nonzeros": cost.nonzeros}
        self.note(way, bits, seed, last["test/accuracy"], **stored)

    @staticmethod
    def setting(bits: int, state: ej.TrainState | None = None) -> PyTree:
        """The bits, and the masks of a state that has been pruned."""
        masks = {} if state is None else state.transform.get("prune", {}).get("mask", {})
        return {"bits": bits, "masks": masks}

    def dense(self) -> PyTree:
        """Trains what the ways begin with; returns the teacher."""
        config = self.config
        plain = lambda setting: ej.chain()  # noqa: E731
        first = self.arm(plain, config.epochs, config.learning_rate)
        longer = self.further(plain)
        for seed in self.seeds:
            state, _ = first.train(self.here.part(f"float-seed{seed}"), seed)
            self.starts[seed] = weights(state)
            part = self.here.part(f"float-longer-seed{seed}")
            state, last = longer.train(part, seed, start=self.starts[seed])
            self.measure(longer, FLOAT, 32, seed, state, last)
        teaching = self.arm(plain, 2 * config.epochs, config.learning_rate, self.large)
        state, last = teaching.train(self.here.part("teacher"), config.seed)
        self.measure(teaching, TEACHER, 32, config.seed, state, last)
        return ej.distill.Teacher(state.vars.model, state.model_state)

    def after(self) -> None:
        """Pruned; then quantized without training."""
        pruned = self.further(lambda setting: ej.chain(prune=self.pruning()))
        masked = self.further(masked_qat, 0.5)
        batches = masked.examples(4, min(256, self.config.batch * 2))
        for seed in self.seeds:
            part = self.here.part(f"pruned-seed{seed}")
            state, _ = pruned.train(part, seed, start=self.starts[seed])
            for bits in self.config.bits:
                asked = self.setting(bits, state)
                found = masked.begin(seed, asked, start=weights(state))
                transform = masked.build(asked)
                found = ej.quantize.calibrate(self.small.apply, transform, found, batches)
                self.measure(masked, AFTER, bits, seed, found, masked.score(found, asked))
        self.tell(AFTER)

    def kept(self) -> None:
        """Pruned for half of the steps; then quantized with the masks as they are."""
        pruned = self.further(lambda setting: ej.chain(prune=self.pruning(0.5)), 0.5)
        masked = self.further(masked_qat, 0.5)
        for seed in self.seeds:
            part = self.here.part(f"half-pruned-seed{seed}")
            state, _ = pruned.train(part, seed, start=self.starts[seed])
            for bits in self.config.bits:
                part = self.here.part(f"kept-{bits}-seed{seed}")
                asked = self.setting(bits, state)
                found, last = masked.train(part, seed, asked, start=weights(state))
                self.measure(masked, KEPT, bits, seed, found, last)
        self.tell(KEPT)

    def joint(self, teacher: PyTree = None) -> None:
        """Everything in one step."""
        config, way = self.config, JOINT if teacher is None else TAUGHT

        def build(setting: PyTree) -> ej.Transform:
            members: dict[str, Any] = {"prune": self.pruning(), "quant": qat(setting["bits"])}
            if teacher is not None:
                members["kd"] = ej.distill.logits(self.large.apply, temperature=config.temperature)
            return ej.chain(**members)

        arm = self.further(build)
        frozen = None if teacher is None else {"kd": teacher}
        for bits in config.bits:
            for seed in self.seeds:
                part = self.here.part(f"{'joint' if teacher is None else 'taught'}-{bits}-{seed}")
                start = self.starts[seed]
                state, last = arm.train(part, seed, self.setting(bits), frozen, start)
                self.measure(arm, way, bits, seed, state, last)
        self.tell(way)

    def tell(self, way: str) -> None:
        for bits in self.config.bits:
            say(f"{way}, {bits} bits: {accuracies(self.rows, way, bits).mean():.2f}%")


def qat(bits: jax.Array) -> ej.Transform:
    """Static ranges; the first and the last layer have 8 bits."""
    return ej.quantize.qat(bits, bits, rules=ENDS, ranges="static", symmetric=False)


def masked_qat(setting: PyTree) -> ej.Transform:
    """The masks as they are, and QAT."""
    return ej.chain(prune=ej.prune.static(masks=setting["masks"]), quant=qat(setting["bits"]))


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    bench = Bench(config)
    teacher = bench.dense()
    bench.after()
    bench.kept()
    bench.joint()
    bench.joint(teacher)
    results: dict[str, Any] = {"rows": bench.rows, "seconds": time.monotonic() - began}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": FLOAT}
    publish(bench.here, results, tables, figures, config.save)
    return {
        f"{bits} bits": ", ".join(
            f"{way} {accuracies(bench.rows, way, bits).mean():.2f}%" for way in WAYS
        )
        for bits in config.bits
    }


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("bytes", "stored size (kB)", ".1f", "min", 1e-3),
)


def accuracies(rows: list[dict[str, Any]], way: str, bits: int) -> np.ndarray:
    """Test accuracies in per cent, by seed."""
    mine = [r for r in rows if (r["way"], r["bits"]) == (way, bits)]
    return np.array([100 * r["accuracy"] for r in sorted(mine, key=lambda r: r["seed"])])


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Ways and bits down: accuracy, and what is stored."""
    config = results["config"]
    caption = (
        f"{config['dataset']}, {config['sparsity']:.0%} sparsity, first and last layer of 8 bits; "
        f"{config['epochs']} epochs in floating point and {config['further']} further ones. Mean ± "
        f"standard deviation of {config['seeds']} seeds. Published (MobileNetV1, ImageNet, int8): "
        "float 70.99, prune then PTQ 67.82, pruning-preserving QAT 70.29."
    )
    return {NAME: summarise(results["rows"], COLUMNS, heading="way", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against bits."""
    rows, bits = results["rows"], results["config"]["bits"]
    places = [float(place) for place in range(len(bits))]
    series = {
        way: (places, np.stack([accuracies(rows, way, b) for b in bits], axis=1)) for way in WAYS
    }
    ticks = {place: str(b) for place, b in zip(places, bits, strict=True)}
    level = {FLOAT: accuracies(rows, FLOAT, 32)}
    x = "bits of weights and activations"
    panel = Panel(series, x, "test accuracy (%)", ticks=ticks, level=level)
    return {NAME: panels_plot([panel], source, width=3.5, height=3.0)}
