"""Pruning, quantization, distillation and width search in one train step, on the digits data set.

A small CNN learns to read 1,797 handwritten digits of 8x8 pixels: alone, with each technique by
itself, and with all four in one jitted step, written as

    ej.chain(nas=ej.nas.width(...), prune=ej.prune.magnitude(...), quant=ej.quantize.qat(...),
             kd=ej.distill.logits(...))

All students see the same seeds, batches and number of steps. The width search ships the
sub-network with the fewest MACs among those within `tolerance` of the best one on the validation
split. The test split is used once, for the table. Tables (Markdown, LaTeX, CSV), figures (PNG, SVG)
and one HTML page are written into the run's folder. Stop it at any time: the same command goes on
where it was.

Command: python -m experiments quickstart

Expected, 3 seeds (test accuracy; stored size): teacher 99.0%, 400 KB; student 98.7%, 79 KB; with
distillation 98.7%; with 80% pruning 98.0%, 19 KB; with int8 98.6%, 21 KB; with width search 98.0%,
33 KB; with all four 98.1%, 7 KB, 11 times smaller than the student. One test image is 0.28 points.

Cost: less than 2 minutes on 2 CPU cores (about 80 seconds on an AMD EPYC).

Papers: Hinton et al. 2015 (distillation), Zhu and Gupta 2017 (gradual magnitude pruning), Jacob et
al. 2018 (quantization-aware training), Yu and Huang 2019 (weight-sharing widths).
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.core import PyTree
from effjax.report import layer_facts
from effjax.select import leaves
from experiments import quickstart_report as report
from experiments.harness import data
from experiments.harness.batches import Batches, make_batches, standardized
from experiments.harness.config import check
from experiments.harness.exporting import Trained, restore
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.harness.stepper import make_stepper
from experiments.models import cnn
from experiments.quickstart_report import ALL_FOUR

DIGITS = cnn.Spec(size=8, channels=1, dropout=0.0, momentum=0.9)
STUDENT = replace(DIGITS, stages=(16,), hidden=64)
TEACHER = replace(DIGITS, stages=(32, 64), hidden=128, dropout=0.2)
WIDTHS = (0.5, 0.75, 1.0)
LATENCY_BATCH = 128


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: how many runs of each arm.
      seed: the first of them.
      epochs: passes over the 1,150 training images.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule.
      sparsity: fraction of the kernels' weights that pruning removes.
      bits: of weights and activations.
      temperature, alpha: of the distillation.
      tolerance: accuracy that a smaller sub-network may lose on the validation split.
      library: which of Flax's two the models are written in.
      latency_samples: timed rounds.
    """

    seeds: int = 3
    seed: int = 0
    epochs: int = 18
    batch: int = 64
    learning_rate: float = 6e-3
    sparsity: float = 0.8
    bits: int = 8
    temperature: float = 4.0
    alpha: float = 1.0
    tolerance: float = 0.01
    library: cnn.Library = "linen"
    latency_samples: int = 30

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            epochs=(1, 10_000),
            batch=(1, 1_150),
            learning_rate=(1e-8, 10),
            sparsity=(0, 0.99),
            bits=(2, 8),
            temperature=(1e-2, 1e3),
            alpha=(0, 1e3),
            tolerance=(0, 1),
            latency_samples=(1, 10_000),
        )


def student_spec(width: int = 1) -> cnn.Spec:
    """The student; the teacher is `width` times as wide."""
    stages, hidden = (16 * width, 24 * width), 48 * width
    return cnn.Spec(size=8, channels=1, stages=stages, hidden=hidden, dropout=0.1, momentum=0.9)


class Data(NamedTuple):
    """The digits on the device."""

    batches: Callable[[int], Batches]  # by seed
    validation: PyTree  # one padded batch each, of one size: one program evaluates both
    test: PyTree


class Shipped(NamedTuple):
    """A trained model as it leaves the house."""

    spec: cnn.Spec
    params: PyTree
    model_state: PyTree
    footprint: ej.cost.Footprint


class Arm:
    """One way to train. What is compiled for it serves all seeds."""

    def __init__(self, name: str, config: Config, spec: cnn.Spec, steps: int, **members: Any):
        self.name, self.config, self.spec, self.steps = name, config, spec, steps
        self.transform = transform = ej.chain(**members)
        self.model = model = cnn.model(spec, config.library)
        self.taught, self.elastic = "kd" in members, "nas" in members
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, max(1, steps // 10), steps
        )
        tx = optax.adamw(rate, weight_decay=1e-3)
        image = jnp.zeros((config.batch, 8, 8, 1))
        example = {"image": image, "label": jnp.zeros(config.batch, jnp.int32)}

        def init(key: jax.Array, frozen: PyTree) -> ej.TrainState:
            return ej.init_state(key, model, transform, tx, example, frozen)

        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = ej.make_step(model.apply, transform, cross_entropy, tx)
        self._evaluate = jax.jit(ej.make_eval(model.apply, transform, correct))
        if self.elastic:
            self._recalibrate = jax.jit(ej.nas.make_recalibrate(model.apply, transform))

    def part(self, seed: int) -> str:
        """The folder of a seed."""
        return f"{self.name.strip('+ ').replace(' ', '-').replace('%', '')}-seed{seed}"

    def done(self, run: Run, seeds: Sequence[int]) -> bool:
        """Whether an earlier process has trained all seeds."""
        parts = [run.path / self.part(seed) for seed in seeds]
        return all((part / "checkpoints" / str(self.steps)).exists() for part in parts)

    def compile(self, data: Data, teacher: PyTree) -> None:
        """Runs the programs that `train` needs once, on a state that is thrown away."""
        state = self.init(jax.random.key(0), {"kd": teacher} if self.taught else None)
        # On their device as `fit` has them, or jit would compile once more.
        state, teacher = jax.tree.map(lambda x: jax.device_put(x, x.sharding), (state, teacher))
        frozen, batches = {"kd": teacher} if self.taught else None, data.batches(0)
        self.accuracy(state, data.validation)
        make_stepper(self.step, state, batches, frozen)(state, batches, frozen, 1)

    def train(self, run: Run, seed: int, data: Data, teacher: PyTree) -> ej.TrainState:
        """Trains one seed, or goes on with it."""
        frozen = {"kd": teacher} if self.taught else None
        part = run.part(self.part(seed))
        state = self.init(jax.random.key(seed), frozen)
        return fit(
            part,
            self.step,
            state,
            data.batches(seed),
            steps=self.steps,
            frozen=frozen,
            evaluate=lambda state: {"validation": self.accuracy(state, data.validation)},
            eval_every=max(1, self.steps // 10),
            checkpoint_every=max(1, self.steps // 2),
            log_every=max(1, self.steps // 50),
        ).state

    def accuracy(self, state: ej.TrainState, batch: PyTree) -> float:
        """The fraction of a batch that is classified rightly."""
        return float(self._evaluate(state, batch)["accuracy"].value)

    def choose(
        self, state: ej.TrainState, batches: Batches, validation: PyTree
    ) -> tuple[ej.TrainState, cnn.Spec]:
        """The network to ship: of a search, the cheapest of those that validate well enough."""
        if not self.elastic:
            return state, self.spec
        space = ej.nas.width_space(state.vars.model, cnn.width_groups(self.spec), WIDTHS)
        some = jax.vmap(batches)(jnp.arange(4))
        found = []
        for arch in space.enumerate():
            narrow = self._recalibrate(ej.nas.subnet(state, arch), some)
            spec = cnn.narrowed(self.spec, space.channels(arch).tolist())
            macs = sum(site.macs for site in sites(spec, self.config.library))
            found.append((macs, -self.accuracy(narrow, validation), spec, narrow))
        enough = min(lost for _, lost, *_ in found) + self.config.tolerance
        _, _, spec, narrow = min((f for f in found if f[1] <= enough), key=lambda f: f[:2])
        return narrow, spec

    def ship(self, state: ej.TrainState, spec: cnn.Spec) -> Shipped:
        """The exported params, cut to the chosen width, and what they cost."""
        library = self.config.library
        facts = self.transform.describe(state.vars.model, state.vars.extra, state.transform)
        exported = ej.export(self.transform, state)
        params, model_state = cnn.cut(exported, state.model_state, self.spec, spec, library)
        channels = {path: leaf.shape[-1] for path, leaf in leaves(params).items()}
        # A scale for each channel that is left; how sparse the cut weights are is counted.
        kept = {
            path: {**fact, "scales": min(fact.get("scales", 0), channels[path]), "sparsity": 0.0}
            for path, fact in facts.items()
        }
        cost = ej.footprint(params, sites(spec, library), kept, model_state=model_state)
        return Shipped(spec, params, model_state, cost)


def make_arms(config: Config, steps: int) -> list[Arm]:
    """The teacher, the student, the student with each technique, and with all four."""
    small, wide = STUDENT, TEACHER
    # Masks move while the learning rate is high, and the rest of the run heals what they cut.
    begin, end, every = steps // 5, 2 * steps // 3, max(1, steps // 20)
    teacher = cnn.model(wide, config.library).apply
    nas = ej.nas.width(cnn.width_groups(small), WIDTHS, samples=1)
    prune = ej.prune.magnitude(config.sparsity, begin, end, every, select="kernel$")
    quant = ej.quantize.qat(config.bits, config.bits, ranges="static", start=steps // 3)
    kd = ej.distill.logits(teacher, temperature=config.temperature, alpha=config.alpha)
    members: dict[str, dict[str, ej.Transform]] = {
        "student": {},
        "+ distillation": {"kd": kd},
        f"+ pruning {config.sparsity:.0%}": {"prune": prune},
        f"+ int{config.bits}": {"quant": quant},
        "+ width search": {"nas": nas},
        ALL_FOUR: {"nas": nas, "prune": prune, "quant": quant, "kd": kd},
    }
    students = [Arm(name, config, small, steps, **chosen) for name, chosen in members.items()]
    return [Arm("teacher", config, wide, steps), *students]


def cross_entropy(logits: jax.Array, batch: PyTree) -> jax.Array:
    """The task's loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def correct(logits: jax.Array, batch: PyTree) -> dict[str, jax.Array]:
    """1 for each image that is classified rightly."""
    return {"accuracy": (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)}


def trained(path: Path, config: Config) -> Trained:
    """What the first seed of all four techniques left, cut to its chosen width, for export."""
    digits = load(config)
    steps = config.epochs * digits.batches(0).per_epoch
    arms = make_arms(config, steps)
    arm, seed = next(arm for arm in arms if arm.name == ALL_FOUR), config.seed
    stranger = arms[0].init(jax.random.key(0), None)  # any teacher has the right shapes
    teacher = {"kd": ej.distill.Teacher(stranger.vars.model, stranger.model_state)}
    begin = arm.init(jax.random.key(seed), teacher)
    state = restore(path / arm.part(seed) / "checkpoints", begin, steps)
    chosen, spec = arm.choose(state, digits.batches(seed), digits.validation)
    shipped = arm.ship(chosen, spec)
    model = cnn.model(spec, config.library)
    quant = ej.chain(quant=dict(arm.transform.members)["quant"])
    batches = [digits.batches(seed)(jnp.int32(i)) for i in range(8)]
    cut = ej.init_state(
        jax.random.key(seed),
        model,
        quant,
        optax.identity(),
        batches[0],
        params=shipped.params,
        model_state=shipped.model_state,
    )
    # Ranges belong to sites, whose names stay.
    own = {**cut.transform["quant"]}
    own |= {kind: chosen.transform["quant"][kind] for kind in ("ranges", "count")}
    rows = np.asarray(digits.test["valid"])
    test = {name: np.asarray(digits.test[name])[rows] for name in ("image", "label")}
    accuracy = arm.accuracy(chosen, digits.test)
    return Trained(
        model.apply, quant, cut._replace(transform={"quant": own}), batches, test, accuracy
    )


@functools.cache
def sites(spec: cnn.Spec, library: cnn.Library) -> tuple[ej.Site, ...]:
    """Where the weights of a network meet one image."""
    model, one = cnn.model(spec, library), {"image": jnp.zeros((1, 8, 8, 1))}
    params, state = jax.eval_shape(model.init, jax.random.key(0), one)
    return ej.find_sites(model.apply, params, state, one)


def load(config: Config) -> Data:
    """The digits: 1,150 images to train, 287 to choose by, 360 to report."""
    digits = data.load("digits", seed=config.seed, validation=0.2)
    size = max(len(digits.validation.label), len(digits.test.label))

    def whole(split: data.Split) -> PyTree:
        rows = len(split.label)
        filled = {n: np.resize(x, (size, *x.shape[1:])) for n, x in split.as_dict().items()}
        batch = {**filled, "valid": np.arange(size) < rows}
        shift, scale = jnp.asarray(digits.shift), jnp.asarray(digits.scale)
        return standardized(jax.tree.map(jnp.asarray, batch), shift, scale)

    def batches(seed: int) -> Batches:
        return make_batches(digits.train.as_dict(), config.batch, seed, **digits.standard)

    return Data(batches, whole(digits.validation), whole(digits.test))


def measure(models: dict[str, Shipped], config: Config) -> dict[str, ej.cost.Latency]:
    """The latency of each model's float kernels on this device, in turns."""
    images = {"image": jnp.ones((LATENCY_BATCH, 8, 8, 1))}

    def candidate(shipped: Shipped) -> Callable[[], jax.Array]:
        apply = cnn.model(shipped.spec, config.library).apply
        predict = jax.jit(lambda p, s: apply(p, s, images, jax.random.key(0), False)[0])
        return lambda: predict(shipped.params, shipped.model_state)

    candidates = {name: candidate(shipped) for name, shipped in models.items()}
    return ej.latency(candidates, batch_size=LATENCY_BATCH, samples=config.latency_samples)


def compiled_ahead(arms: Sequence[Arm], wanted: Sequence[Arm], data: Data) -> Generator[Arm]:
    """The arms in order, those wanted compiled when they come.

    XLA compiles on one core, and a small model trains on little more than one: the next arm is
    compiled while this one trains.
    """
    stranger = arms[0].init(jax.random.key(0), None)  # any teacher has the right shapes
    teacher = ej.distill.Teacher(stranger.vars.model, stranger.model_state)
    compiler = futures.ThreadPoolExecutor(max_workers=1)
    try:
        jobs = {arm.name: compiler.submit(arm.compile, data, teacher) for arm in wanted}
        for arm in arms:
            if arm.name in jobs:
                jobs[arm.name].result()
            yield arm
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)


def run(config: Config) -> dict[str, Any]:
    """Trains all arms, and reports."""
    began = time.monotonic()
    here, digits = open_run("quickstart", config), load(config)
    steps = config.epochs * digits.batches(0).per_epoch
    seeds = range(config.seed, config.seed + config.seeds)
    rows: list[dict[str, Any]] = []
    first: dict[str, Shipped] = {}
    teachers: dict[int, PyTree] = {}
    arms = make_arms(config, steps)
    unfinished = [arm for arm in arms if not arm.done(here, seeds)]
    with contextlib.closing(compiled_ahead(arms, unfinished, digits)) as ready:
        for arm in ready:
            since = time.monotonic()
            for seed in seeds:
                state = arm.train(here, seed, digits, teachers.get(seed))
                teachers.setdefault(seed, ej.distill.Teacher(state.vars.model, state.model_state))
                chosen, spec = arm.choose(state, digits.batches(seed), digits.validation)
                shipped = arm.ship(chosen, spec)
                first.setdefault(arm.name, shipped)
                accuracy = {
                    "accuracy": arm.accuracy(chosen, digits.test),
                    "validation": arm.accuracy(chosen, digits.validation),
                }
                totals = shipped.footprint.totals._asdict()
                width = {"stages": list(spec.stages), "hidden": spec.hidden}
                which = {"name": arm.name, "seed": seed, "part": arm.part(seed)}
                layers = {"layers": layer_facts(shipped.footprint.to_dict())}
                rows.append({**which, **accuracy, **totals, **width, **layers})
            mine = [row["accuracy"] for row in rows if row["name"] == arm.name]
            seconds = time.monotonic() - since
            say(f"{arm.name:<16} test accuracy {np.mean(mine):.2%} ({seconds:.1f} s)")
    latency = measure(first, config)
    for row in rows:
        row["latency"] = latency[row["name"]].median
    footprints = {name: shipped.footprint for name, shipped in first.items()}
    return report.write(here, rows, footprints, latency, time.monotonic() - began)
