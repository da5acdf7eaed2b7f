"""The survey's practitioner's guide: one CNN family on CIFAR-10, its three arms, and ours.

The guide trains seven widths of one CNN plainly, with augmentation, and with augmentation and
distillation from the widest, ships each in float32 and in int8 after training, and draws two
strategies on the plot of accuracy against size: Shrink-and-Improve and Grow-Improve-and-Shrink.
Here the same arms are run again, and three of ours: pruned, quantization-aware, and distilled,
pruned and quantized in one step.

Published (accuracy in per cent, float32 / int8): width 1.0 plain 84.42 / 84.52 at 5251 / 1334 KB;
0.25 plain 80.60 / 80.76, augmented 84.14 / 83.98, distilled 84.51 / 84.18 at 392 / 111 KB; 0.5
distilled 88.03 / 87.86 at 1374 / 359 KB; the teacher (1.4, augmented) 90.86. All of them are in
`guide_report.PUBLISHED`, and beside ours in the table.

`--scale` is the cost of a training as a fraction of the paper's 100 epochs of the whole training
split: both the epochs and the images are multiplied by its square root. Left out, it is 1 on a GPU
or TPU, with all widths; on a CPU 0.01 (10 epochs of 4,500 images), with three widths, of which the
widest is the teacher. A truncated run says so on the figure; its accuracies are far below the
published ones, and what can be compared is what each arm gains.

What differs from the paper on purpose: 5,000 of the 50,000 training images are a validation split,
the test set is used once, and the last epoch is what counts (the paper picks the best epoch on the
test set); every arm has the same schedule, a cosine; the student sees the teacher's softmax once
(the paper's code takes it twice); int8 after training scales each activation by its own batch, so
that no image is needed for calibration; three seeds in place of one.

Command: python -m experiments practitioners_guide
Cost: 60 minutes on 2 CPU cores (48 trainings of 350 steps).

Paper: Menghani, "Efficient Deep Learning: A Survey on Making Deep Learning Models Smaller, Faster,
and Better", 2021, https://arxiv.org/abs/2106.08962, section 4.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.core import PyTree
from experiments import guide_report as report
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import cnn
from experiments.sparse_report import cross_entropy, publish, scores

NAME = "practitioners_guide"
EPOCHS = 100
HELD_OUT = 5_000
WIDTHS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.4)
FEW_WIDTHS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm and width.
      seed: the first.
      scale: the cost of a training as a fraction of the paper's; left out, 1 on an accelerator and
        0.01 on a CPU.
      widths: of the family; the widest is the teacher. Left out, all seven at a scale of 0.1 and
        more, else 0.1, 0.25 and 0.5.
      batch: images a step.
      sparsity: of the pruned arms, whose widths go up to the teacher's.
      library: which of Flax's two the models are written in.
      latency_samples: timed rounds.
      dataset: "cifar10"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    scale: float | None = None
    widths: tuple[float, ...] | None = None
    batch: int = 128
    sparsity: float = 0.9
    library: cnn.Library = "linen"
    latency_samples: int = 20
    dataset: str = "cifar10"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            scale=(1e-6, 10),
            widths=(0.01, 8),
            batch=(1, 10_000),
            sparsity=(0, 0.99),
            latency_samples=(1, 10_000),
        )


@dataclass(frozen=True)
class Plan:
    """A config with what depends on the machine and the data filled in."""

    scale: float
    widths: tuple[float, ...]  # from the narrowest to the teacher
    epochs: int
    images: data.Dataset
    batch: int

    @property
    def steps(self) -> int:
        """Of one training."""
        return self.epochs * (len(self.images.train.label) // self.batch)

    def spec(self, width: float) -> cnn.Spec:
        """The member of the family; the narrowest of the paper has no dropout."""
        side, channels = self.images.train.image.shape[2:]
        shape: dict[str, Any] = {"size": side, "channels": channels}
        # A run of few steps needs BatchNorm statistics that follow faster.
        momentum = 0.99 if self.steps > 2_000 else 0.9
        dropout = 0.0 if width <= 0.05 else 0.15
        return cnn.Spec(width=width, dropout=dropout, momentum=momentum, **shape)


def make_plan(config: Config) -> Plan:
    """The plan of a config on this machine."""
    on_cpu = jax.default_backend() == "cpu"
    scale = config.scale if config.scale is not None else 0.01 if on_cpu else 1.0
    widths = config.widths or (WIDTHS if scale >= 0.1 else FEW_WIDTHS)
    held = 0.2 if config.dataset == "digits" else HELD_OUT / 50_000
    images = data.load(config.dataset, seed=config.seed, validation=held)
    share = math.sqrt(scale)
    rows = min(len(images.train.label), round(share * len(images.train.label)))
    chosen = np.random.default_rng(0).permutation(len(images.train.label))[:rows]
    train = data.Split(images.train.image[chosen], images.train.label[chosen])
    images = dataclasses.replace(images, train=train)
    batch = min(config.batch, rows)
    return Plan(scale, tuple(sorted(widths)), max(1, round(EPOCHS * share)), images, batch)


class Arm:
    """One way to train one width. What is compiled for it serves all seeds."""

    def __init__(self, kind: str, width: float, config: Config, plan: Plan):
        self.kind, self.width, self.plan, self.library = kind, width, plan, config.library
        self.name = f"{kind}, {width:g}"
        self.spec = plan.spec(width)
        self.model = model = cnn.model(self.spec, config.library)
        members = techniques(kind, width, config, plan)
        self.taught, self.integer = "kd" in members, "quant" in members
        self.transform = transform = ej.chain(**members)
        # What becomes of the others if their weights and activations are rounded after training.
        self.rounding = rounding = ej.chain(quant=ej.quantize.qat(8, 8))
        self.batches = make_batches(plan.images.train.as_dict(), plan.batch, 0, **RANGE)
        tx, example = optimizer(kind, width, plan), self.batches.example

        def init(key: jax.Array, frozen: PyTree) -> ej.TrainState:
            return ej.init_state(key, model, transform, tx, example, frozen)

        def init_rounded(key: jax.Array) -> ej.TrainState:
            return ej.init_state(key, model, rounding, optax.identity(), example)

        # Random numbers take XLA long to optimize and are drawn once.
        once = {"xla_backend_optimization_level": 0}
        self.init = jax.jit(init, compiler_options=once)
        self.init_rounded = jax.jit(init_rounded, compiler_options=once)
        self.step = ej.make_step(model.apply, transform, cross_entropy, tx)
        self.validate = self._accuracy(transform, plan.images.validation, "validation/")
        self.test = self._accuracy(transform, plan.images.test, "")
        self.test_rounded = self._accuracy(rounding, plan.images.test, "")

    def _accuracy(self, transform: ej.Transform, split: data.Split, prefix: str) -> Any:
        measured = ej.make_eval(self.model.apply, transform, scores)
        return evaluator(measured, split.as_dict(), size=1_000, prefix=prefix, **RANGE)

    def train(self, part: Run, seed: int, teacher: PyTree) -> ej.TrainState:
        """Trains one seed, or goes on with it."""
        frozen = {"kd": teacher} if self.taught else None
        steps = self.plan.steps
        return fit(
            part,
            self.step,
            self.init(jax.random.key(seed), frozen),
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=steps,
            frozen=frozen,
            evaluate=self.validate,
            eval_every=max(1, steps // 5),
            checkpoint_every=max(1, steps // 5),
            log_every=max(1, steps // 100),
        ).state

    def measure(self, state: ej.TrainState) -> dict[str, Any]:
        """What is shipped in float32 and in int8: test accuracy and bytes; and what it takes."""
        params = ej.export(self.transform, state)
        found: dict[str, Any] = {}
        if self.integer:
            found["int8"] = self.test(state)["accuracy"]
            cost = self._cost(params, self.transform, state)
            found["int8_bytes"] = cost.bytes
        else:
            found["float"] = self.test(state)["accuracy"]
            cost = self._cost(params, self.transform, state)
            found["float_bytes"] = cost.bytes
            rounded = self.init_rounded(jax.random.key(0))
            rounded = rounded._replace(
                vars=rounded.vars._replace(model=params), model_state=state.model_state
            )
            found["int8"] = self.test_rounded(rounded)["accuracy"]
            found["int8_bytes"] = self._cost(params, self.rounding, rounded).bytes
        costs = ("parameters", "nonzeros", "macs", "effective_macs")
        return found | {key: getattr(cost, key) for key in costs}

    def _cost(
        self, params: PyTree, transform: ej.Transform, state: ej.TrainState
    ) -> ej.cost.Totals:
        facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
        sites = find_sites(self.spec, self.library)
        return ej.footprint(params, sites, facts, model_state=state.model_state).totals


RANGE: dict[str, Any] = {"shift": 127.5, "scale": 1 / 127.5}  # pixels in [-1, 1]


def blank(spec: cnn.Spec, size: int) -> PyTree:
    """A batch without content."""
    return {"image": jnp.zeros((size, spec.size, spec.size, spec.channels))}


@functools.cache
def find_sites(spec: cnn.Spec, library: cnn.Library) -> tuple[ej.Site, ...]:
    """Where the weights of a network meet one image."""
    model, one = (
        cnn.model(spec, library),
        {"image": jnp.zeros((1, spec.size, spec.size, spec.channels))},
    )
    params, state = jax.eval_shape(model.init, jax.random.key(0), one)
    return ej.find_sites(model.apply, params, state, one)


def techniques(kind: str, width: float, config: Config, plan: Plan) -> dict[str, Any]:
    """What an arm's step is chained of."""
    if kind == report.PLAIN:
        return {}
    steps, members = plan.steps, {"augment": augmentation(width)}
    if kind in (report.DISTILLED, report.ALL):
        teacher = cnn.model(plan.spec(plan.widths[-1]), config.library).apply
        alpha = {0.05: 2.0, 0.1: 0.5}.get(width, 1.0)
        members["kd"] = ej.distill.logits(teacher, temperature=1.0, alpha=alpha)
    if kind in (report.PRUNED, report.ALL):
        begin, end, every = steps // 5, 2 * steps // 3, max(1, steps // 50)
        members["prune"] = ej.prune.magnitude(config.sparsity, begin, end, every)
    if kind in (report.QAT, report.ALL):
        members["quant"] = ej.quantize.qat(8, 8, ranges="static", start=steps // 3)
    return members


def augmentation(width: float) -> ej.Transform:
    """The guide's: flips; for widths from 0.25 shifts of up to 3 pixels; for wider ones than 1
    random erasing."""
    operations = [ej.augment.flip()]
    if width >= 0.25:
        operations.append(ej.augment.translate(3))
    if width > 1:
        operations.append(ej.augment.erasing(0.5))
    return ej.augment.images(*operations)


def optimizer(kind: str, width: float, plan: Plan) -> optax.GradientTransformation:
    """Adam with the guide's rates and L2 penalty, on a cosine schedule."""
    rate = 5e-3 if width <= 0.5 else 1e-3
    if width > 1 and kind == report.PLAIN:
        rate = 5e-4
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, plan.steps // 20), plan.steps)
    # The gradient of 1e-6 * |w|^2.
    penalty = optax.add_decayed_weights(0.0 if width <= 0.05 else 2e-6)
    return optax.chain(penalty, optax.adam(schedule))


def run(config: Config) -> dict[str, Any]:
    """Trains all arms, and reports."""
    began = time.monotonic()
    here, plan = open_run(NAME, config), make_plan(config)
    widest = plan.widths[-1]
    arms = arms_of(plan.widths)
    rows: list[dict[str, Any]] = []
    teachers: dict[int, PyTree] = {}
    seeds = range(config.seed, config.seed + config.seeds)
    for kind, width in arms:
        arm, since = Arm(kind, width, config, plan), time.monotonic()
        for seed in seeds:
            part = f"{kind.replace(' ', '-')}-{width:g}-seed{seed}"
            row = one(arm, here.part(part), seed, teachers, widest)
            rows.append({**row, "part": part, "series": kind})
        mine = [row["int8"] for row in rows[-config.seeds :]]
        say(f"{arm.name}: {np.mean(mine):.2%} in int8 ({time.monotonic() - since:.0f} s)")
    truncated = plan.scale < 1 or plan.widths != WIDTHS
    results: dict[str, Any] = {
        "rows": rows,
        "columns": [column._asdict() for column in report.COLUMNS],
        "baseline": report.PLAIN,
        "published": report.published(),
        "scale": plan.scale,
        "epochs": plan.epochs,
        "images": len(plan.images.train.label),
        "steps": plan.steps,
        "widths": plan.widths,
        "truncated": truncated,
        "latency": latency(config, plan),
        "seconds": time.monotonic() - began,
    }
    results |= report.findings(rows, plan.widths)
    publish(here, results, report.tables, report.figures, config.save)
    return report.headline(results)


def arms_of(widths: tuple[float, ...]) -> list[tuple[str, float]]:
    """The arms in the order in which they are trained; the teacher comes second.

    Sparse ones go up to the teacher's width: a wide sparse network takes the bytes of a narrow
    dense one.
    """
    *students, widest = widths
    arms = [(report.PLAIN, widest), (report.AUGMENTED, widest)]
    arms += [(kind, width) for width in students for kind in report.KINDS]
    return [*arms, *((kind, widest) for kind in report.KINDS if kind in report.SPARSE)]


def one(
    arm: Arm, part: Run, seed: int, teachers: dict[int, PyTree], widest: float
) -> dict[str, Any]:
    """One training's row, or what an earlier process found of it; a teacher is kept."""
    teaches = arm.kind == report.AUGMENTED and arm.width == widest
    before = part.summary()
    if before is not None and not teaches:
        return before["row"]
    state = arm.train(part, seed, teachers.get(seed))
    if teaches:
        teachers[seed] = ej.distill.Teacher(state.vars.model, state.model_state)
    row = {"name": arm.name, "kind": arm.kind, "width": arm.width, "seed": seed}
    row |= arm.measure(state)
    part.finish({"row": row})
    return row


def latency(config: Config, plan: Plan) -> dict[str, dict[str, Any]]:
    """Of each width's float32 forward pass on this device, at batch 1 and 32, in turns."""
    found = {}
    for size in (1, 32):
        calls = {f"{w:g}": forward(plan.spec(w), size, config.library) for w in plan.widths}
        timed = ej.latency(calls, batch_size=size, samples=config.latency_samples)
        found[f"batch {size}"] = {name: result.to_dict() for name, result in timed.items()}
    return found


def forward(spec: cnn.Spec, size: int, library: cnn.Library) -> Callable[[], jax.Array]:
    """A compiled forward pass on a batch of this size."""
    model, batch = cnn.model(spec, library), blank(spec, size)
    params, state = jax.jit(model.init)(jax.random.key(0), batch)
    compiled = jax.jit(lambda p, s, b: model.apply(p, s, b, jax.random.key(0), False)[0])
    return lambda: compiled(params, state, batch)
