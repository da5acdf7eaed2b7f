"""Eleven ways to distil one teacher into one student, and the best two in one compressed step.

A small strided CNN learns Fashion-MNIST alone and from a CNN of four times its widths: by its
logits (KL, DKD, DIST, squared error), by its features (FitNets' hint, attention transfer, NST, VID)
and by relations between images (similarity-preserving, RKD, CRD). All arms have the same steps,
batches and schedule; the teacher is the same for all. The weights of the losses are those of Tian
et al.'s comparison and the papers', made for CIFAR-100, and are not tuned.

Then the best loss of logits and the best of features or relations together, with pruning to 80%
sparsity and int8 quantization-aware training: all in one step, against the same techniques one
after another (distil; prune and fine-tune; quantize and fine-tune), with as many steps in all.

Published, for orientation (Tian et al., table 1, WRN-40-2 to WRN-16-2 on CIFAR-100, accuracy in per
cent): teacher 75.61, student 73.26, KD 74.92, FitNet 73.58, AT 74.08, SP 73.83, RKD 73.35, VID
74.11, NST 73.68, CRD 75.48; Zhao et al.: DKD 76.24; Huang et al.: DIST 75.51.

5,000 of the 60,000 training images are held out: by them the best two are chosen. The test set is
used once, at the end of each training.

Command: python -m experiments distill_methods
Cost: 30 minutes on 2 CPU cores (49 trainings).

Papers: Tian et al., "Contrastive representation distillation", 2020,
https://arxiv.org/abs/1910.10699; those of the losses are named in `effjax.distill`.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.core import PyTree
from effjax.distill import Match
from effjax.report import Column, Table, summarise
from effjax.report.canvas import COLOURS, GREY, MARKERS, new_figure, set_footer, style
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import strided
from experiments.sparse_report import cross_entropy, publish, scores

NAME = "distill_methods"
TEACHER, ALONE = "teacher", "student alone"
JOINT, SEQUENTIAL = "all in one step", "one after another"
LOGITS = ("KD", "DKD", "DIST", "logit MSE")
INNER = ("FitNet", "AT", "NST", "VID", "SP", "RKD", "CRD")
METHODS = (*LOGITS, *INNER)
PUBLISHED = {
    TEACHER: 75.61,
    ALONE: 73.26,
    "KD": 74.92,
    "DKD": 76.24,
    "DIST": 75.51,
    "FitNet": 73.58,
    "AT": 74.08,
    "NST": 73.68,
    "VID": 74.11,
    "SP": 73.83,
    "RKD": 73.35,
    "CRD": 75.48,
}


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm.
      seed: the first.
      methods: which of `METHODS`.
      epochs: passes over the 55,000 training images, of each arm and of each of the three steps
        that follow one another; all in one step has as many as these together.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule; a third of it to fine-tune.
      temperature: of the losses of logits.
      sparsity: of the compressed arms.
      channels: of the student's convolutions.
      hidden: units of its dense layer.
      larger: the teacher's sizes over the student's.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    methods: tuple[str, ...] = METHODS
    epochs: int = 5
    batch: int = 128
    learning_rate: float = 3e-3
    temperature: float = 4.0
    sparsity: float = 0.8
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 64
    larger: int = 4
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            epochs=(1, 10_000),
            batch=(2, 10_000),
            learning_rate=(1e-8, 10),
            temperature=(1e-3, 1e3),
            sparsity=(0, 0.99),
            channels=(1, 4_096),
            hidden=(1, 65_536),
            larger=(1, 64),
        )
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ConfigError(f"there are no methods {unknown}; there are {list(METHODS)}.")
        if not set(self.methods) & set(LOGITS) or not set(self.methods) & set(INNER):
            raise ConfigError(
                f"methods {list(self.methods)}: give one of logits, {list(LOGITS)}, and one of "
                f"features or relations, {list(INNER)}, to combine."
            )


def matches(method: str, temperature: float) -> dict[str, Match]:
    """The terms of a method: what is tapped, the loss, and its weight."""
    losses, last = ej.distill, "conv_2"
    out, features = ("@outputs", "@outputs"), ("head:in", "head:in")
    found = {
        "KD": [Match(*out, partial(losses.kl, temperature=temperature), 0.9)],
        "DIST": [Match(*out, losses.dist, 2.0)],
        "logit MSE": [Match(*out, losses.mse, 0.1)],
        "FitNet": [Match(last, last, losses.projected(losses.hint), 1.0)],
        "AT": [Match(f"conv_{i}", f"conv_{i}", losses.attention_transfer, 1e3) for i in (1, 2)],
        "NST": [Match(last, last, losses.nst, 50.0)],
        "VID": [Match(last, last, losses.variational(), 1.0)],
        "SP": [Match(*features, losses.similarity, 3e3)],
        "RKD": [
            Match(*features, losses.rkd_distance, 25.0),
            Match(*features, losses.rkd_angle, 50.0),
        ],
        "CRD": [Match(*features, losses.embedded(losses.crd), 0.8)],
    }[method]
    return {f"{method.replace(' ', '_')}_{i}": match for i, match in enumerate(found)}


def distillation(
    teacher: ej.Model, methods: tuple[str, ...], temperature: float
) -> dict[str, ej.Transform]:
    """{name: transform} of one method or several; DKD takes the labels, and is one by itself."""
    found: dict[str, ej.Transform] = {}
    if "DKD" in methods:
        found["dkd"] = ej.distill.logits(teacher.apply, ej.distill.dkd, temperature=temperature)
    terms: dict[str, Match] = {}
    for method in methods:
        if method != "DKD":
            terms |= matches(method, temperature)
    if terms:
        found["kd"] = ej.distill.features(teacher.apply, terms)
    return found


class Trainer:
    """One chain of transforms; what is compiled for it serves all seeds."""

    def __init__(
        self,
        members: Mapping[str, ej.Transform],
        model: ej.Model,
        config: Config,
        images: data.Dataset,
        epochs: int,
        rate: float = 1.0,
    ):
        self.model = model
        self.members: dict[str, Any] = dict(members)
        self.transform = transform = ej.chain(**self.members)
        self.batches = make_batches(images.train.as_dict(), config.batch, 0, **images.standard)
        self.steps = steps = epochs * self.batches.per_epoch
        self.tx = tx = optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0.0, rate * config.learning_rate, max(1, steps // 20), steps
            ),
            weight_decay=1e-4,
        )
        example = self.batches.example

        def init(key: jax.Array, frozen: PyTree) -> ej.TrainState:
            return ej.init_state(key, model, transform, tx, example, frozen)

        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = ej.make_step(model.apply, transform, cross_entropy, tx)
        measured = ej.make_eval(model.apply, transform, scores)
        self.validate, self.test = (
            evaluator(measured, s.as_dict(), size=1_000, prefix=prefix, **images.standard)
            for s, prefix in ((images.validation, "validation/"), (images.test, "test/"))
        )

    def train(
        self, part: Run, seed: int, teacher: PyTree = None, start: ej.TrainState | None = None
    ) -> tuple[ej.TrainState, dict[str, Any]]:
        """The trained state and its last metrics; begins with the weights of `start`."""
        kinds = {"kd", "dkd"} & set(self.members)
        frozen = dict.fromkeys(sorted(kinds), teacher) if kinds else None
        state = self.init(jax.random.key(seed), frozen)
        if start is not None:
            state = state._replace(
                vars=state.vars._replace(model=start.vars.model), model_state=start.model_state
            )

        def evaluate(state: ej.TrainState) -> dict[str, float]:
            found = self.validate(state)
            return {**found, **self.test(state)} if int(state.step) == self.steps else found

        fitted = fit(
            part,
            self.step,
            state,
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=self.steps,
            frozen=frozen,
            evaluate=evaluate,
            eval_every=max(1, self.steps // 5),
            checkpoint_every=self.steps,
            log_every=max(1, self.steps // 50),
        )
        return fitted.state, fitted.metrics


class Bench:
    """The teacher, the student, and the rows of all arms."""

    def __init__(self, config: Config, here: Run):
        held = 0.2 if config.dataset == "digits" else 1 / 12
        self.config, self.here, self.rows = config, here, list[dict[str, Any]]()
        self.images = images = data.load(config.dataset, seed=config.seed, validation=held)
        larger = tuple(config.larger * c for c in config.channels)
        self.large = strided.model(
            strided.Spec(larger, config.larger * config.hidden, images.classes)
        )
        self.small = strided.model(strided.Spec(config.channels, config.hidden, images.classes))
        self.teacher: Any = None

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def trainer(self, members: Mapping[str, ej.Transform], epochs: int = 1, **how: Any) -> Trainer:
        """Of the student, for so many times the config's epochs."""
        return Trainer(
            members, self.small, self.config, self.images, epochs * self.config.epochs, **how
        )

    def distilled(self, *methods: str) -> dict[str, ej.Transform]:
        return distillation(self.large, methods, self.config.temperature)

    def part(self, name: str, seed: int) -> Run:
        return self.here.part(f"{name.replace(' ', '-')}-seed{seed}")

    def note(self, name: str, seed: int, trainer: Trainer, state: Any, last: Any) -> None:
        """Adds the row of a finished training."""
        params = ej.export(trainer.transform, state)
        facts = trainer.transform.describe(state.vars.model, state.vars.extra, state.transform)
        cost = ej.footprint(params, facts=facts, model_state=state.model_state).totals
        self.rows.append(
            {
                "name": name,
                "seed": seed,
                "accuracy": last["test/accuracy"],
                "validation": last["validation/accuracy"],
                "bytes": cost.bytes,
                "parameters": cost.parameters,
                "nonzeros": cost.nonzeros,
            }
        )

    def mean(self, name: str, key: str) -> float:
        return float(np.mean([row[key] for row in self.rows if row["name"] == name]))

    def arm(self, name: str, members: Mapping[str, ej.Transform], epochs: int = 1) -> None:
        """Trains all seeds of one arm."""
        since, trainer = time.monotonic(), self.trainer(members, epochs)
        for seed in self.seeds:
            state, last = trainer.train(self.part(name, seed), seed, self.teacher)
            self.note(name, seed, trainer, state, last)
        took = time.monotonic() - since
        say(f"{name}: {self.mean(name, 'accuracy'):.2%} ({took:.0f} s)")

    def teach(self) -> None:
        """Trains the teacher, which is the same for all."""
        config = self.config
        trainer = Trainer({}, self.large, config, self.images, 2 * config.epochs)
        state, last = trainer.train(self.part(TEACHER, config.seed), config.seed)
        self.note(TEACHER, config.seed, trainer, state, last)
        self.teacher = ej.distill.Teacher(state.vars.model, state.model_state)
        say(f"{TEACHER}: {last['test/accuracy']:.2%}")

    def joint(self, methods: tuple[str, ...]) -> None:
        """Distilled, pruned and quantized in one step."""
        steps = 3 * self.trainer({}).steps
        members = {**self.distilled(*methods), "prune": self.gradual(steps)}
        members["quant"] = ej.quantize.qat(8, 8, start=steps // 3)
        self.arm(JOINT, members, 3)

    def gradual(self, steps: int) -> ej.Transform:
        begin, end = steps // 5, max(steps // 5 + 1, 2 * steps // 3)
        return ej.prune.magnitude(self.config.sparsity, begin, end, max(1, steps // 40))

    def sequential(self, methods: tuple[str, ...]) -> None:
        """Distilled; then pruned; then quantized with the masks as they are."""
        first = self.trainer(self.distilled(*methods))
        second = self.trainer({"prune": self.gradual(first.steps)}, rate=1 / 3)
        for seed in self.seeds:
            state, _ = first.train(self.part("sequential distilled", seed), seed, self.teacher)
            state, _ = second.train(self.part("sequential pruned", seed), seed, start=state)
            kept = {
                path: jnp.abs(x)
                for path, x in ej.select.leaves(ej.export(second.transform, state)).items()
                if path in state.transform["prune"]["mask"]
            }
            members = {
                "prune": ej.prune.static(self.config.sparsity, scores=kept, budget="uniform"),
                "quant": ej.quantize.qat(8, 8),
            }
            third = self.trainer(members, rate=1 / 3)
            state, last = third.train(self.part(SEQUENTIAL, seed), seed, start=state)
            self.note(SEQUENTIAL, seed, third, state, last)
        say(f"{SEQUENTIAL}: {self.mean(SEQUENTIAL, 'accuracy'):.2%}")


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    bench = Bench(config, open_run(NAME, config))
    bench.teach()
    bench.arm(ALONE, {})
    for method in config.methods:
        bench.arm(method, bench.distilled(method))
    best = tuple(
        max((m for m in config.methods if m in kind), key=lambda m: bench.mean(m, "validation"))
        for kind in (LOGITS, INNER)
    )
    bench.arm(" + ".join(best), bench.distilled(*best))
    bench.joint(best)
    bench.sequential(best)
    results: dict[str, Any] = {"rows": bench.rows, "best": best, "published": PUBLISHED}
    results |= {"baseline": ALONE, "seconds": time.monotonic() - began}
    results["columns"] = [column._asdict() for column in COLUMNS]
    publish(bench.here, results, tables, figures, config.save)
    names = (ALONE, *best, JOINT, SEQUENTIAL)
    return {"best": " + ".join(best)} | {name: bench.mean(name, "accuracy") for name in names}


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("bytes", "stored size (kB)", ".1f", "min", 1e-3),
    Column("nonzeros", "non-zeros", ",.0f", "min"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Arms down: accuracy, what is stored, and accuracies of the published comparison."""
    config, known = results["config"], results["published"]
    rows = [
        {**r, "published": known[r["name"]]} if r["name"] in known else r for r in results["rows"]
    ]
    columns = (*COLUMNS, Column("published", "(CIFAR-100, published)", ".2f"))
    caption = (
        f"{config['dataset']}, {config['epochs']} epochs, mean ± standard deviation of "
        f"{config['seeds']} seeds with one teacher. {JOINT} and {SEQUENTIAL}: "
        f"{' + '.join(results['best'])}, {config['sparsity']:.0%} sparsity and int8, "
        f"{3 * config['epochs']} epochs in all."
    )
    return {NAME: summarise(rows, columns, heading="method", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of every method, against the student alone."""
    found: dict[str, np.ndarray] = {
        name: np.array([100 * row["accuracy"] for row in results["rows"] if row["name"] == name])
        for name in dict.fromkeys(row["name"] for row in results["rows"])
    }
    alone = found.pop(ALONE)
    del found[TEACHER]
    compressed = (JOINT, SEQUENTIAL)
    names = [*(n for n in found if n not in compressed), *compressed]
    with style():
        figure, axes = new_figure(3.5, 0.22 * len(names) + 0.9)
        axes.axvline(alone.mean(), color=GREY, linewidth=1.0, dashes=(5, 2), zorder=1)
        low, high = alone.mean() - _deviation(alone), alone.mean() + _deviation(alone)
        axes.axvspan(low, high, color=GREY, alpha=0.12, linewidth=0)
        axes.annotate(
            ALONE, (alone.mean(), 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=6, color=GREY,
        )  # fmt: skip
        for place, name in enumerate(reversed(names)):
            kind = 0 if name in LOGITS else 1 if name in INNER else 2
            axes.errorbar(
                found[name].mean(),
                place,
                xerr=_deviation(found[name]),
                color=COLOURS[kind],
                marker=MARKERS[kind],
                markersize=4,
                capsize=1.6,
                elinewidth=0.8,
                linestyle="none",
            )
        axes.set_yticks(range(len(names)), names[::-1])
        axes.set_xlabel("test accuracy (%)")
        set_footer(figure, source)
    return {NAME: figure}


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
