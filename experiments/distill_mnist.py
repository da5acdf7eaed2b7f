"""Hinton's distillation on MNIST: a small network learns from a large, well regularised one.

The teacher has two hidden layers of 1200 units and is trained with dropout (0.2 of the pixels, 0.5
of the hidden units), a bound on the norm of each unit's weights, and images moved by up to two
pixels. The student has two of 800 units and no regularisation, and sees the images as they are:
alone with the labels, and with the teacher's softened outputs at temperature 20 as well. What the
teacher knows of moved images reaches the student through these outputs alone.

Published test errors (of 10,000): teacher 67, student alone 146, student distilled 74.

A fourth arm, which is not in the paper, distils with the teacher's moved images: augmentation and
distillation in one step. It came after the results in experiments/results were measured: they have
the paper's three arms.

What differs from the paper, which gives few details: Adam with a cosine schedule; three seeds, each
with a teacher of its own. As in the paper, all 60,000 training images are trained on. The test
errors in training are drawn, and choose nothing: what is reported is a training's last step.

Command: python -m experiments distill_mnist
Cost: 80 minutes on 2 CPU cores for the paper's arms (3 trainings of 280 epochs, 6 of 150), and
  3 trainings of 150 epochs more for the fourth.

Paper: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531, section 3.
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
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.batches import Batches, evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run, read_metrics
from experiments.models import mlp
from experiments.sparse_report import cross_entropy, error_curves, publish, scores

NAME = "distill_mnist"
TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"
MOVED = "student distilled, images moved"  # not in the paper
PUBLISHED = {TEACHER: 67, ALONE: 146, DISTILLED: 74}
ARMS = (*PUBLISHED, MOVED)


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm.
      seed: the first.
      epochs: a student's passes over the training images.
      teacher_epochs: a teacher's; with dropout and moved images it needs more of them.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule.
      temperature: of the softened outputs.
      alpha: weight of the distillation term; the labels have 1 - alpha.
      teacher: units of each of the teacher's hidden layers.
      student: the student's.
      max_norm: bound on the norm of the weights into a hidden unit of the teacher.
      shift: pixels by which the teacher's images are moved, at most.
      dataset: "mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    epochs: int = 150
    teacher_epochs: int = 280
    batch: int = 128
    learning_rate: float = 1e-3
    temperature: float = 20.0
    alpha: float = 0.9
    teacher: tuple[int, ...] = (1200, 1200)
    student: tuple[int, ...] = (800, 800)
    max_norm: float = 3.5
    shift: int = 2
    dataset: Literal["mnist", "digits"] = "mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            epochs=(1, 10_000),
            teacher_epochs=(1, 10_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            temperature=(1e-3, 1e3),
            alpha=(0, 1),
            teacher=(1, 10_000),
            student=(1, 10_000),
            max_norm=(1e-3, 1e6),
            shift=(0, 10),
        )


def bounded_norm(bound: float) -> optax.GradientTransformation:
    """After each update, kernels' columns longer than `bound` are scaled to it; last in a chain.

    Reference: Srivastava et al., "Dropout", 2014, section 5.1.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def one(step: jax.Array, w: jax.Array) -> jax.Array:
            if w.ndim != 2:
                return step
            new = w + step
            norms = jnp.linalg.norm(new, axis=0)
            return new * jnp.minimum(1.0, bound / jnp.maximum(norms, 1e-12)) - w

        return jax.tree.map(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Trainer:
    """One arm: what is compiled for it serves all seeds."""

    def __init__(self, name: str, config: Config, images: data.Dataset):
        self.name, self.config = name, config
        size = images.train.image[0].size
        large = mlp.Spec(size, config.teacher, images.classes, dropout=0.5, inputs_dropout=0.2)
        teacher = mlp.model(large)
        self.model = model = (
            teacher
            if name == TEACHER
            else mlp.model(mlp.Spec(size, config.student, images.classes))
        )
        epochs = config.teacher_epochs if name == TEACHER else config.epochs
        self.steps = steps = epochs * (len(images.train.label) // config.batch)
        members: dict[str, Any] = {}
        weight = 1.0
        if name in (TEACHER, MOVED):
            members["augment"] = ej.augment.images(ej.augment.translate(config.shift))
        if name in (DISTILLED, MOVED):
            weight = 1 - config.alpha
            members["kd"] = ej.distill.logits(
                teacher.apply, temperature=config.temperature, alpha=config.alpha
            )
        transform = ej.chain(**members)
        pixels = {"scale": 1.0 / images.train.image.max()}

        def batches(seed: int) -> Batches:
            return make_batches(images.train.as_dict(), config.batch, seed, **pixels)

        def loss(logits: jax.Array, batch: PyTree) -> jax.Array:
            return weight * cross_entropy(logits, batch)

        rate = optax.cosine_decay_schedule(config.learning_rate, steps)
        bound = [bounded_norm(config.max_norm)] if name == TEACHER else []
        tx = optax.chain(optax.adam(rate), *bound)
        example = batches(0).example
        self.batches = batches
        self.step = ej.make_step(model.apply, transform, loss, tx)
        self.init = jax.jit(
            lambda key, frozen: ej.init_state(key, model, transform, tx, example, frozen)
        )
        measured = ej.make_eval(model.apply, transform, scores)
        self.test = evaluator(measured, images.test.as_dict(), size=5_000, prefix="test/", **pixels)

    def train(self, part: Run, seed: int, frozen: PyTree) -> tuple[ej.TrainState, dict[str, Any]]:
        """The trained state, and the last metrics."""
        fitted = fit(
            part,
            self.step,
            self.init(jax.random.key(seed), frozen),
            self.batches(seed),
            steps=self.steps,
            frozen=frozen,
            evaluate=self.test,
            eval_every=max(1, self.steps // 20),
            checkpoint_every=max(1, self.steps // 6),
            log_every=max(1, self.steps // 100),
            mode="block",  # without convolutions, a loop on the device is faster on CPU too
        )
        return fitted.state, fitted.metrics


def run(config: Config) -> dict[str, Any]:
    """Trains the teachers and the students, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    images = data.load(config.dataset, validation=0)
    rows: list[dict[str, Any]] = []
    teachers: dict[int, ej.distill.Teacher] = {}
    curves: dict[str, Any] = {}
    for name in ARMS:
        trainer = Trainer(name, config, images)
        for seed in range(config.seed, config.seed + config.seeds):
            part = here.part(f"{name.replace(',', '').replace(' ', '-')}-seed{seed}")
            frozen = {"kd": teachers[seed]} if name in (DISTILLED, MOVED) else None
            state, metrics = trainer.train(part, seed, frozen)
            if name == TEACHER:
                teachers[seed] = ej.distill.Teacher(state.vars.model, state.model_state)
            error = 1 - metrics["test/accuracy"]
            cost = ej.footprint(state.vars.model).totals
            rows.append(
                {
                    "name": name,
                    "seed": seed,
                    "part": part.path.name,
                    "errors": round(error * len(images.test.label)),
                    "error": error,
                    "parameters": cost.parameters,
                    "bytes": cost.bytes,
                }
            )
            looks = [r for r in read_metrics(part.metrics.path) if "test/accuracy" in r]
            found = curves.setdefault(name, {"steps": [r["step"] for r in looks], "error": []})
            found["error"].append([round(1 - r["test/accuracy"], 6) for r in looks])
        mine = [row["errors"] for row in rows if row["name"] == name]
        say(f"{name}: {np.mean(mine):.0f} errors of {len(images.test.label)}: {mine}")
    results: dict[str, Any] = {"rows": rows, "curves": curves, "published": PUBLISHED}
    results |= {"test images": len(images.test.label), "seconds": time.monotonic() - began}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": ALONE}
    publish(here, results, tables, figures, config.save)
    return {name: float(np.mean([r["errors"] for r in rows if r["name"] == name])) for name in ARMS}


COLUMNS = (
    Column("errors", "test errors", ".0f", "min"),
    Column("error", "error (%)", ".2f", "min", 100),
    Column("parameters", "parameters", ",.0f", "min"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Test errors, beside the published ones."""
    config = results["config"]
    columns = (*COLUMNS[:2], Column("published", "(published errors)", ".0f"), COLUMNS[2])
    known = results["published"]
    rows = [
        {**row, "published": known[row["name"]]} if row["name"] in known else row
        for row in results["rows"]
    ]
    caption = (
        f"{config['dataset']}: errors on {results['test images']:,} test images, mean ± standard "
        f"deviation over {config['seeds']} seeds; {config['epochs']} epochs, the teacher's "
        f"{config['teacher_epochs']}; temperature {config['temperature']:g}. Published: one seed."
    )
    return {NAME: summarise(rows, columns, caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Test errors in training."""
    plot = error_curves(results["curves"], "test error (%)", source, 2.5)
    return {NAME: plot}
