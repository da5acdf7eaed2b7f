"""Few labels: a student pre-trained by SimCLR without labels, then compressed in one step.

A small strided CNN learns Fashion-MNIST's 60,000 training images without their labels: two random
views of each image (crop, flip, brightness, contrast, erasing) are to have the nearest embeddings
in the batch (NT-Xent). Its last layer is then replaced by a fresh classifier, as SimCLRv2 does, and
the network is fine-tuned on 10 and 100 labelled images of each class: dense, and with pruning to
80% and int8 quantization-aware training in the same step. The same is trained from scratch, with
the same steps, labels and augmentation. Nothing is tuned, and the test set is used once, at the end
of each training.

Expected: pre-training gains most where labels are fewest, and keeps that under compression.
Published, for orientation (Chen et al. 2020, ImageNet, ResNet-50, top-5 accuracy in per cent, by
share of the labels): 1%: from scratch 48.4, SimCLR 75.5; 10%: from scratch 80.4, SimCLR 87.8.

Command: python -m experiments simclr
Cost: 10 minutes on 2 CPU cores that others share (3 pre-trainings, 24 fine-tunings).

Papers: Chen et al., "A simple framework for contrastive learning of visual representations", 2020,
https://arxiv.org/abs/2002.05709; "Big self-supervised models are strong semi-supervised learners",
2020, https://arxiv.org/abs/2006.10029.
"""

import dataclasses
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
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import strided
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish, scores

NAME = "simclr"
STARTS = ("from scratch", "SimCLR")
KINDS = ("dense", "80% sparse, int8")


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm; each pre-trains, and draws its labelled images.
      seed: the first.
      labels: labelled images of each class, one arm each.
      epochs: passes over the images without labels.
      views: images a step of pre-training, each of which is seen twice.
      temperature: of NT-Xent.
      embedding: units of the layer whose outputs are compared.
      steps: of fine-tuning, and of training from scratch.
      batch: labelled images a step.
      learning_rate: the largest, of a cosine schedule, in both phases.
      sparsity: of the compressed arms.
      channels: of the student's convolutions.
      hidden: units of its dense layer.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    labels: tuple[int, ...] = (10, 100)
    epochs: int = 5
    views: int = 256
    temperature: float = 0.5
    embedding: int = 64
    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    sparsity: float = 0.8
    channels: tuple[int, ...] = (16, 32, 64)
    hidden: int = 128
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            labels=(1, 10_000),
            epochs=(1, 10_000),
            views=(2, 10_000),
            temperature=(1e-3, 1e3),
            embedding=(1, 65_536),
            steps=(10, 1_000_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            sparsity=(0, 0.99),
            channels=(1, 4_096),
            hidden=(1, 65_536),
        )


class Trainer:
    """One chain of transforms with its loss; what is compiled for it serves all seeds."""

    def __init__(
        self,
        members: Mapping[str, ej.Transform],
        model: ej.Model,
        loss: Any,
        config: Config,
        steps: int,
    ):
        self.steps = steps
        named: dict[str, Any] = dict(members)
        self.transform = transform = ej.chain(**named)
        tx = optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0.0, config.learning_rate, max(1, steps // 20), steps
            ),
            weight_decay=1e-4,
        )
        self.step = ej.make_step(model.apply, transform, loss, tx)

        def init(key: jax.Array, example: PyTree, start: PyTree) -> ej.TrainState:
            params, model_state = start
            given = {"params": params, "model_state": model_state}
            return ej.init_state(key, model, transform, tx, example, **given)

        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})

    def train(
        self,
        part: Run,
        seed: int,
        batches: Any,
        start: PyTree = (None, None),
        evaluate: Any = None,
    ) -> tuple[ej.TrainState, dict[str, Any]]:
        """The trained state and its last metrics; begins with (params, model_state) of `start`."""
        state = self.init(jax.random.key(seed), batches.example, start)
        fitted = fit(
            part,
            self.step,
            state,
            dataclasses.replace(batches, key=jax.random.key(seed)),
            steps=self.steps,
            evaluate=evaluate,
            checkpoint_every=self.steps,
            log_every=max(1, self.steps // 50),
        )
        return fitted.state, fitted.metrics


def contrast(embeddings: jax.Array, temperature: float) -> jax.Array:
    """NT-Xent of a batch in which an example's two views are neighbours."""
    return ej.distill.nt_xent(embeddings[::2], embeddings[1::2], temperature)


def chosen(label: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Places of `each` random examples of every class (of all it has, where it has fewer)."""
    order = np.random.default_rng([seed, 0x1ABE1]).permutation(len(label))
    of_class = [order[label[order] == c][:each] for c in np.unique(label)]
    return np.sort(np.concatenate(of_class))


class Bench:
    """The data, the student with an embedding and with a classifier, and the rows of all arms."""

    def __init__(self, config: Config, here: Run):
        self.config, self.here, self.rows = config, here, list[dict[str, Any]]()
        self.images = images = data.load(config.dataset, seed=config.seed, validation=0.0)
        sizes = (config.channels, config.hidden)
        self.embedder = strided.model(strided.Spec(*sizes, config.embedding))
        self.classifier = strided.model(strided.Spec(*sizes, images.classes))
        largest = 16 if config.dataset == "digits" else 255
        self.black = jnp.asarray(-images.shift * images.scale)
        self.white = jnp.asarray((largest - images.shift) * images.scale)

    def views(self) -> dict[str, ej.Transform]:
        """Two strong views of each image."""
        aug, bounds = ej.augment, (self.black, self.white)
        operations = (
            aug.random_affine(degrees=10, scale=(1.0, 1.8), shift=0.15, fill=self.black),
            aug.flip(),
            aug.brightness(0.6, bounds),
            aug.contrast(0.6, bounds),
            aug.erasing(0.5, area=(0.02, 0.2)),
        )
        return {"twice": ej.distill.twice(), "augment": aug.images(*operations)}

    def weak(self) -> dict[str, ej.Transform]:
        """What images with labels are augmented by."""
        shift = ej.augment.translate(2 if self.config.dataset != "digits" else 1, "edge")
        return {"augment": ej.augment.images(ej.augment.flip(), shift)}

    def compression(self) -> dict[str, ej.Transform]:
        """Pruning and quantization, in the step that fine-tunes."""
        steps = self.config.steps
        begin, end, every = steps // 10, 2 * steps // 3, max(1, steps // 40)
        return {
            "prune": ej.prune.magnitude(self.config.sparsity, begin, end, every),
            "quant": ej.quantize.qat(8, 8, start=steps // 3),
        }

    def pretrain(self) -> list[PyTree]:
        """(params, model_state) of each seed, learnt without labels."""
        config, images = self.config, self.images
        batches = make_batches({"image": images.train.image}, config.views, 0, **images.standard)
        trainer = Trainer(
            self.views(),
            self.embedder,
            lambda outputs, batch: contrast(outputs, config.temperature),
            config,
            config.epochs * batches.per_epoch,
        )
        found = []
        for seed in self.seeds:
            state, last = trainer.train(self.here.part(f"pretrain-seed{seed}"), seed, batches)
            say(f"pre-trained with seed {seed}: NT-Xent {last['loss']:.3f}")
            found.append((state.vars.model, state.model_state))
        return found

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def with_head(self, pretrained: PyTree, seed: int) -> PyTree:
        """A pre-trained network with a fresh classifier as its last layer."""
        params, model_state = pretrained
        example = {"image": np.zeros((1, *self.images.train.image.shape[1:]), np.float32)}
        fresh, _ = jax.jit(self.classifier.init)(jax.random.key(seed), example)
        return {**params, "head": fresh["head"]}, model_state

    def finetune(self, pretrained: list[PyTree]) -> None:
        """Every arm: both starts, dense and compressed, with each number of labels."""
        config, images = self.config, self.images
        for kind, members in zip(KINDS, ({}, self.compression()), strict=True):
            given = {**self.weak(), **members}
            trainer = Trainer(given, self.classifier, cross_entropy, config, config.steps)
            measured = ej.make_eval(self.classifier.apply, trainer.transform, scores)
            test = evaluator(
                measured, images.test.as_dict(), size=1_000, prefix="test/", **images.standard
            )
            for start in STARTS:
                for each in config.labels:
                    for seed in self.seeds:
                        known = chosen(images.train.label, each, seed)
                        labelled = {n: x[known] for n, x in images.train.as_dict().items()}
                        size = min(config.batch, len(known))
                        batches = make_batches(labelled, size, 0, **images.standard)
                        begun = (None, None)
                        if start == "SimCLR":
                            begun = self.with_head(pretrained[seed - config.seed], seed)
                        where = f"{start}-{kind}-{each}-seed{seed}"
                        part = self.here.part(
                            where.replace(" ", "-").replace("%", "").replace(",", "")
                        )
                        state, last = trainer.train(part, seed, batches, begun, test)
                        self.note(trainer, state, last, start, kind, each, seed)
                    say(f"{start}, {kind}, {each} labels a class: {self.rows[-1]['accuracy']:.2%}")

    def note(self, trainer, state, last, start: str, kind: str, each: int, seed: int) -> None:
        """Adds the row of a finished training."""
        params = ej.export(trainer.transform, state)
        facts = trainer.transform.describe(state.vars.model, state.vars.extra, state.transform)
        cost = ej.footprint(params, facts=facts, model_state=state.model_state).totals
        self.rows.append(
            {
                "name": f"{start}, {kind}, {each} labels a class",
                "start": start,
                "kind": kind,
                "labels": each,
                "seed": seed,
                "accuracy": last["test/accuracy"],
                "bytes": cost.bytes,
                "nonzeros": cost.nonzeros,
            }
        )


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    bench = Bench(config, open_run(NAME, config))
    bench.finetune(bench.pretrain())
    results: dict[str, Any] = {"rows": bench.rows, "seconds": time.monotonic() - began}
    results["columns"] = [column._asdict() for column in COLUMNS]
    publish(bench.here, results, tables, figures, config.save)
    names = dict.fromkeys(row["name"] for row in bench.rows)
    return {n: float(np.mean([r["accuracy"] for r in bench.rows if r["name"] == n])) for n in names}


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("bytes", "stored size (kB)", ".1f", "min", 1e-3),
    Column("nonzeros", "non-zeros", ",.0f", "min"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Arms down: accuracy and what is stored."""
    config = results["config"]
    caption = (
        f"{config['dataset']}, {config['epochs']} epochs of SimCLR without labels, "
        f"{config['steps']} steps with labels; "
        f"mean ± standard deviation of {config['seeds']} seeds."
    )
    return {NAME: summarise(results["rows"], COLUMNS, heading="arm", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy by number of labels, of every start and kind."""
    labels = list(dict.fromkeys(row["labels"] for row in results["rows"]))
    places = list(range(len(labels)))
    series = {}
    for start in STARTS:
        for kind in KINDS:
            rows = [r for r in results["rows"] if (r["start"], r["kind"]) == (start, kind)]
            values = [[r["accuracy"] for r in rows if r["labels"] == n] for n in labels]
            series[f"{start}, {kind}"] = (places, 100 * np.transpose(values))
    ticks = {float(place): str(n) for place, n in zip(places, labels, strict=True)}
    panel = Panel(series, "labelled images of each class", "test accuracy (%)", ticks=ticks)
    return {NAME: panels_plot([panel], source, width=3.5, height=2.9)}
