"""Hinton's distillation on MNIST: a small network learns from a large, well regularised one.

The teacher has two hidden layers of 1200 units and is trained with dropout (0.2 of the pixels, 0.5
of the hidden units), a bound on the norm of each unit's weights, and images moved by up to two
pixels. The student has two of 800 units and no regularisation, and sees the images as they are:
alone with the labels, and with the teacher's softened outputs as well. What the teacher knows of
moved images reaches the student through these outputs alone.

Published test errors (of 10,000): teacher 67, student alone 146, student distilled 74.

Not in the paper are students that are told more, and still see no moved image: the mean of the
teacher's logits over the 25 moves that it was trained with, and that mean over all seeds' teachers,
an ensemble. Nor is the other way to learn of moves, to see them: augmentation and distillation in
one step, beside augmentation alone.

What differs from the paper, which gives few details: Adam with a cosine schedule; each seed has a
teacher of its own. As in the paper, all 60,000 training images are trained on. The test images
choose nothing in a run: what is reported is a training's last step, and an arm's temperature is the
one with fewest errors on 10,000 images held out of the training of a teacher and of its students.
The arm with moved images has the temperature of the plain one, the ensemble's that of the mean. A
student's epochs, rate and alpha were compared by hand on the held-out images, after first attempts
that had looked at test errors; the ensemble was added when the other arms' results were known.

Command: python -m experiments distill_mnist
Cost: 4 hours on 2 CPU cores: a teacher takes half an hour, a student a minute or two.

Papers: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531, section 3; Radosavovic et al., "Data Distillation", 2018,
https://arxiv.org/abs/1712.04440, for the mean over moves.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.core import PyTree
from effjax.distill.cache import LOGITS
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.batches import Batches, evaluator, make_batches, standardized
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run, read_metrics
from experiments.models import mlp
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish, scores

NAME = "distill_mnist"
TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"
PUBLISHED = {TEACHER: 67, ALONE: 146, DISTILLED: 74}
# Not in the paper:
AVERAGED, FROM_AVERAGED = "teacher, mean over moves", "student distilled, mean over moves"
ENSEMBLE, FROM_ENSEMBLE = "all teachers, mean over moves", "student distilled, all teachers"
MOVED, ALONE_MOVED = "student distilled, images moved", "student alone, images moved"

CHOSEN = (DISTILLED, FROM_AVERAGED)  # a temperature is chosen for these
CACHED = (*CHOSEN, FROM_ENSEMBLE)  # what the teacher says is computed once
STUDENTS = (ALONE, *CACHED, ALONE_MOVED, MOVED)
ARMS = (TEACHER, AVERAGED, ENSEMBLE, *STUDENTS)


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm.
      seed: the first.
      epochs: a student's passes over the training images.
      teacher_epochs: a teacher's; with dropout and moved images it needs more of them.
      batch: images a step.
      learning_rate: a student's largest, of a cosine schedule.
      teacher_rate: a teacher's.
      temperatures: of the softened outputs; of several, the one with fewest held-out errors.
      held_out: the fraction of the training images on which a temperature is chosen.
      held_out_seeds: students by which it is chosen, for each temperature.
      alpha: weight of the distillation term; the labels have 1 - alpha.
      teacher: units of each of the teacher's hidden layers.
      student: the student's.
      max_norm: bound on the norm of the weights into a hidden unit of the teacher.
      shift: pixels by which the teacher's images are moved, at most.
      dataset: "mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 5
    seed: int = 0
    epochs: int = 40
    teacher_epochs: int = 280
    batch: int = 128
    learning_rate: float = 3e-3
    teacher_rate: float = 1e-3
    temperatures: tuple[float, ...] = (10.0, 20.0, 40.0, 80.0)
    held_out: float = 1 / 6
    held_out_seeds: int = 3
    alpha: float = 0.5
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
            teacher_rate=(1e-8, 10),
            temperatures=(1e-3, 1e3),
            held_out=(0.01, 0.9),
            held_out_seeds=(1, 100),
            alpha=(0, 1),
            teacher=(1, 10_000),
            student=(1, 10_000),
            max_norm=(1e-3, 1e6),
            shift=(0, 10),
        )
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ConfigError(
                f"temperatures are {self.temperatures}; give one, or several different ones to "
                "choose from."
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


def moved(batch: PyTree, i: jax.Array, pixels: int) -> PyTree:
    """The i-th of the (2 pixels + 1)^2 moves that `ej.augment.translate(pixels)` draws from."""
    image, side = batch["image"], 2 * pixels + 1
    around = [(0, 0), (pixels, pixels), (pixels, pixels), (0, 0)]
    padded = jnp.pad(image, around, mode="reflect")
    return {
        **batch,
        "image": jax.lax.dynamic_slice(padded, (0, i // side, i % side, 0), image.shape),
    }


class Task(NamedTuple):
    """Which images are trained on, and which are counted."""

    train: data.Split
    test: data.Split
    classes: int

    @property
    def pixels(self) -> dict[str, Any]:
        """To 0 .. 1."""
        return {"scale": 1.0 / self.train.image.max()}

    def network(self, hidden: tuple[int, ...], **dropout: float) -> ej.Model:
        """With these hidden layers."""
        return mlp.model(mlp.Spec(self.train.image[0].size, hidden, self.classes, **dropout))


class Trainer:
    """One arm: what is compiled for it serves all seeds."""

    def __init__(self, name: str, config: Config, task: Task, temperature: float = 1.0):
        self.name, self.config, self.task = name, config, task
        teacher = task.network(config.teacher, dropout=0.5, inputs_dropout=0.2)
        teaches = name == TEACHER
        self.model = model = teacher if teaches else task.network(config.student)
        epochs = config.teacher_epochs if teaches else config.epochs
        self.steps = steps = epochs * (len(task.train.label) // config.batch)
        members: dict[str, Any] = {}
        weight = 1.0
        if name in (TEACHER, MOVED, ALONE_MOVED):
            members["augment"] = ej.augment.images(ej.augment.translate(config.shift))
        if name in (*CACHED, MOVED):
            weight = 1 - config.alpha
            source = ej.distill.Cached(task.classes, 0) if name in CACHED else teacher.apply
            members["kd"] = ej.distill.logits(source, temperature=temperature, alpha=config.alpha)
        transform = ej.chain(**members)

        def loss(logits: jax.Array, batch: PyTree) -> jax.Array:
            return weight * cross_entropy(logits, batch)

        rate = config.teacher_rate if teaches else config.learning_rate
        bound = [bounded_norm(config.max_norm)] if teaches else []
        tx = optax.chain(optax.adam(optax.cosine_decay_schedule(rate, steps)), *bound)
        self.step = ej.make_step(model.apply, transform, loss, tx)
        example = self.batches(0, {}).example
        if name in CACHED:
            example[LOGITS] = jax.ShapeDtypeStruct((config.batch, task.classes), jnp.float32)
        self.init = jax.jit(
            lambda key, frozen: ej.init_state(key, model, transform, tx, example, frozen)
        )
        self.test = self._evaluator(model.apply, transform)

    def over_moves(self, apply: Any) -> Any:
        """The mean of logits over the moves that a teacher is trained with."""
        shift = self.config.shift
        return ej.distill.views(
            apply, lambda batch, i: moved(batch, i, shift), (2 * shift + 1) ** 2, combine="logits"
        )

    def batches(self, seed: int, targets: Mapping[str, Any]) -> Batches:
        """The training images, with what the teacher says of them."""
        arrays = self.task.train.as_dict() | dict(targets)
        return make_batches(arrays, self.config.batch, seed, **self.task.pixels)

    def _evaluator(self, apply: Any, transform: ej.Transform) -> Any:
        measured = ej.make_eval(apply, transform, scores)
        images = self.task.test.as_dict()
        return evaluator(measured, images, size=5_000, prefix="test/", **self.task.pixels)

    def train(
        self, part: Run, seed: int, frozen: PyTree = None, targets: Mapping[str, Any] | None = None
    ) -> tuple[ej.TrainState, int]:
        """The trained state, and its errors on the test images."""
        fitted = fit(
            part,
            self.step,
            self.init(jax.random.key(seed), frozen),
            self.batches(seed, targets or {}),
            steps=self.steps,
            frozen=frozen,
            evaluate=self.test,
            eval_every=max(1, self.steps // 20),
            checkpoint_every=max(1, self.steps // 6),
            log_every=max(1, self.steps // 100),
            mode="block",  # without convolutions, a loop on the device is faster on CPU too
        )
        return fitted.state, self.errors(fitted.metrics)

    def errors(self, metrics: Mapping[str, Any]) -> int:
        """How many test images are classified wrongly."""
        return round((1 - metrics["test/accuracy"]) * len(self.task.test.label))

    def errors_of_mean(self, *teachers: ej.TrainState) -> int:
        """Those of the mean over the moves of one teacher, or of several."""
        several = ej.distill.ensemble(*[self.model.apply] * len(teachers), combine="logits")
        state, weights = teachers[0], ej.distill.Teacher.join(*map(weights_of, teachers))
        joined = state._replace(
            vars=state.vars._replace(model=weights.params), model_state=weights.model_state
        )
        return self.errors(self._evaluator(self.over_moves(several), ej.chain())(joined))

    def targets(self, part: Run, state: ej.TrainState) -> dict[str, Mapping[str, Any]]:
        """What the teacher says of the training images as they are, and on average over moves."""
        return {
            arm: ej.distill.write_cache(
                part.path / folder,
                apply,
                weights_of(state),
                {"image": self.task.train.image},
                dtype="float32",
                batch=1_000,
                prepare=lambda rows: standardized(rows, jnp.float32(0), **self.task.pixels),
            ).arrays
            for arm, folder, apply in (
                (DISTILLED, "logits", self.model.apply),
                (FROM_AVERAGED, "mean-logits", self.over_moves(self.model.apply)),
            )
        }


def weights_of(state: ej.TrainState) -> ej.distill.Teacher:
    """A trained teacher's."""
    return ej.distill.Teacher(state.vars.model, state.model_state)


def part_name(*words: Any) -> str:
    """Of a run's part, from what tells it from others."""
    return "-".join(str(word).replace(",", "").replace(" ", "-") for word in words)


def choose(here: Run, config: Config) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The temperature of each arm, and the errors on held-out images that it was chosen by.

    Returns:
      {arm: temperature}, and of each temperature, seed and arm a row.
    """
    if len(config.temperatures) == 1:
        return dict.fromkeys((*CACHED, MOVED), config.temperatures[0]), []
    images = data.load(config.dataset, validation=config.held_out)
    task = Task(images.train, images.validation, images.classes)
    trainer = Trainer(TEACHER, config, task)
    part = here.part(part_name("held-out", TEACHER))
    state, _ = trainer.train(part, config.seed)
    targets = trainer.targets(part, state)
    rows: list[dict[str, Any]] = []
    for arm in CHOSEN:
        for temperature in config.temperatures:
            trainer = Trainer(arm, config, task, temperature)
            for seed in range(config.seed, config.seed + config.held_out_seeds):
                part = here.part(part_name("held-out", arm, f"T{temperature:g}", f"seed{seed}"))
                _, errors = trainer.train(part, seed, targets=targets[arm])
                rows.append(
                    {"name": arm, "temperature": temperature, "seed": seed, "errors": errors}
                )
            say(f"{arm}, T = {temperature:g}: {mean_errors(rows, arm, temperature):.1f} held out")
    best = {
        arm: min(config.temperatures, key=lambda t: mean_errors(rows, arm, t)) for arm in CHOSEN
    }
    return best | {FROM_ENSEMBLE: best[FROM_AVERAGED], MOVED: best[DISTILLED]}, rows


def mean_errors(rows: Sequence[Mapping[str, Any]], arm: str, temperature: float) -> float:
    """Over seeds."""
    found = [r["errors"] for r in rows if (r["name"], r["temperature"]) == (arm, temperature)]
    return float(np.mean(found))


def seeds(config: Config) -> range:
    """Those of each arm."""
    return range(config.seed, config.seed + config.seeds)


def run(config: Config) -> dict[str, Any]:
    """Chooses temperatures, trains the teachers and the students, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    temperatures, held_out = choose(here, config)
    images = data.load(config.dataset, validation=0)
    task = Task(images.train, images.test, images.classes)
    rows: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}

    def note(name: str, seed: int, errors: int, *models: ej.TrainState) -> None:
        cost = ej.footprint(tuple(model.vars.model for model in models)).totals
        counted = {"errors": errors, "error": errors / len(task.test.label)}
        sizes = {"parameters": cost.parameters, "bytes": cost.bytes}
        rows.append({"name": name, "seed": seed, **counted, **sizes})

    teachers: dict[int, ej.TrainState] = {}
    targets: dict[int, dict[str, Mapping[str, Any]]] = {}
    trainer = Trainer(TEACHER, config, task)
    for seed in seeds(config):
        part = here.part(part_name(TEACHER, f"seed{seed}"))
        teachers[seed], errors = trainer.train(part, seed)
        note(TEACHER, seed, errors, teachers[seed])
        note(AVERAGED, seed, trainer.errors_of_mean(teachers[seed]), teachers[seed])
        targets[seed] = trainer.targets(part, teachers[seed])
    all_teachers = [teachers[seed] for seed in seeds(config)]
    note(ENSEMBLE, config.seed, trainer.errors_of_mean(*all_teachers), *all_teachers)
    together = np.mean([targets[seed][FROM_AVERAGED][LOGITS] for seed in seeds(config)], axis=0)
    for name in STUDENTS:
        trainer = Trainer(name, config, task, temperatures.get(name, 1.0))
        for seed in seeds(config):
            part = here.part(part_name(name, f"seed{seed}"))
            frozen = {"kd": weights_of(teachers[seed])} if name == MOVED else None
            told = {LOGITS: together} if name == FROM_ENSEMBLE else targets[seed].get(name)
            state, errors = trainer.train(part, seed, frozen, told)
            note(name, seed, errors, state)
            looks = [r for r in read_metrics(part.metrics.path) if "test/accuracy" in r]
            found = curves.setdefault(name, {"steps": [r["step"] for r in looks], "errors": []})
            found["errors"].append([trainer.errors(r) for r in looks])
    means = {
        name: float(np.mean([r["errors"] for r in rows if r["name"] == name])) for name in ARMS
    }
    say(f"errors of {len(task.test.label)}: {means}")
    results: dict[str, Any] = {"rows": rows, "curves": curves, "published": PUBLISHED}
    results |= {"temperatures": temperatures, "held out": held_out}
    results |= {"test images": len(task.test.label), "seconds": time.monotonic() - began}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": ALONE}
    publish(here, results, tables, figures, config.save)
    return means


COLUMNS = (
    Column("errors", "test errors", ".0f", "min"),
    Column("error", "error (%)", ".2f", "min", 100),
    Column("parameters", "parameters", ",.0f", "min"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Test errors, beside the published ones; held-out errors, by temperature."""
    config = results["config"]
    columns = (
        *COLUMNS[:2],
        Column("published", "(published errors)", ".0f"),
        Column("temperature", "temperature", "g"),
        COLUMNS[2],
    )
    known, chosen = results["published"], results["temperatures"]
    rows = [
        row
        | ({"published": known[row["name"]]} if row["name"] in known else {})
        | ({"temperature": chosen[row["name"]]} if row["name"] in chosen else {})
        for row in results["rows"]
    ]
    caption = (
        f"{config['dataset']}: errors on {results['test images']:,} test images, mean ± standard "
        f"deviation over {config['seeds']} seeds; {config['epochs']} epochs, the teacher's "
        f"{config['teacher_epochs']}. Published: one seed."
    )
    found = {NAME: summarise(rows, columns, caption=caption)}
    if results["held out"]:
        by: dict[tuple[float, int], dict[str, Any]] = {}
        for row in results["held out"]:
            t, seed = row["temperature"], row["seed"]
            cells = by.setdefault((t, seed), {"name": f"{t:g}", "seed": seed})
            cells[row["name"]] = row["errors"]
        found[f"{NAME}_temperature"] = summarise(
            by.values(),
            [Column(arm, arm, ".1f", "min") for arm in CHOSEN],
            heading="temperature",
            caption=f"{config['dataset']}: errors on the {config['held_out']:.1%} of the training "
            "images that neither the teacher nor its students were trained on, mean ± standard "
            f"deviation over {config['held_out_seeds']} students of one teacher.",
        )
    return found


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out errors by temperature, and the students' test errors in training."""
    held_out, panels = results["held out"], []
    if held_out:
        temperatures = sorted({row["temperature"] for row in held_out})
        by_arm = {
            arm: [
                [r["errors"] for r in held_out if (r["name"], r["temperature"]) == (arm, t)]
                for t in temperatures
            ]
            for arm in CHOSEN
        }
        where = np.log2(temperatures).tolist()
        panels.append(
            Panel(
                {arm: (where, np.array(errors).T) for arm, errors in by_arm.items()},
                "temperature",
                "held-out errors",
                "Choice of the temperature",
                dict(zip(where, (f"{t:g}" for t in temperatures), strict=True)),
            )
        )
    curves = results["curves"]
    means = [np.mean(curve["errors"], axis=0) for curve in curves.values()]
    teachers = [row["errors"] for row in results["rows"] if row["name"] == TEACHER]
    panels.append(
        Panel(
            {name: (curve["steps"], np.array(curve["errors"])) for name, curve in curves.items()},
            "step",
            "test errors",
            "Training of the students",
            level={TEACHER: teachers},
            bars=False,
            limits=(0, 2.0 * max(mean[-1] for mean in means)),
        )
    )
    return {NAME: panels_plot(panels, source, width=7.0, height=3.2)}
