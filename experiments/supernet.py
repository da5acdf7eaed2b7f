"""One supernet, many networks: found on shared weights, against training each of them alone.

A small residual network (52 thousand weights) is trained on Fashion-MNIST, images of 14 x 14 (means
of 2 x 2 pixels), as a supernet: what is elastic is what Once-for-All has elastic, the channels
inside each block (a quarter, a half, all), kernels of 3 and 5 with trained matrices, and 1 or 2
blocks in each of two stages; 1,764 networks in one set of weights, by the sandwich rule with
in-place distillation. Its networks are then judged on validation images, with BatchNorm's
statistics measured anew for each, by NSGA-II and by random search; under three budgets of
multiply-accumulates the best by validation is chosen, and reported on the test set: with the
supernet's weights as they are, and tuned, trained for some steps more as a network of its own.

The second supernet goes on from the first one's weights, with bits (3, 4, 8) of five parts of the
network and sparsities (0, 0.5, 0.75) of the two stages as further genes, 3.9 million networks;
budgets are stored bytes. An architecture is a vector of integers and an argument of every program:
the number of compilations is checked.

What is chosen is compared with
- alone: the same network from scratch, with as many steps as its supernet (of the second kind:
  those of both, the first as many of them dense and with 8 bits);
- random search: networks drawn at random within the budget and trained alone, the best of them by
  validation; all of them together take as many passes through a network as the supernets (which
  take `2 + samples` in each step) and the tuning of what was chosen. All that random search trained
  is also compared with the whole front of the supernet, and with what was tuned: the test accuracy
  of what is best by validation within any cost.

The chosen networks are cut out of the supernets, and their outputs, MACs and bytes compared with
what the view gives and what was counted. Those of the first seed are timed beside the largest.

Expected: within 1 point of alone, and above random search at equal cost. Published, for orientation
(ImageNet): BigNAS, without further training, 76.5 at 200 to 80.9 at 1,000 million MACs;
Once-for-All, tuned for 75 epochs, 80.0 below 600 million. A wider space is harder to share: where
the channels of the stem and between blocks are elastic too, all features of the smallest networks
have to serve the largest.

Trained alone, a network runs in the supernet's shapes, with zeros where it has no weights: it is
the same function with the same gradients, but its first weights are drawn for the larger layers.

Command: python -m experiments supernet
Cost: about three hours of one CPU core (78 trainings of 2,000 to 12,000 steps).

Papers: Cai et al., "Once-for-All", 2020, https://arxiv.org/abs/1908.09791; Yu et al., "BigNAS",
2020, https://arxiv.org/abs/2003.11142; Deb et al., NSGA-II, 2002.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax import nas
from effjax.core import PyTree
from effjax.report import Column, Table, summarise, welch
from effjax.report.statistics import hypervolume
from effjax.testing import compilations
from experiments.harness import data
from experiments.harness.batches import make_batches, standardized
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.provenance import write_json
from experiments.harness.runs import Run, open_run, read_json
from experiments.models import elastic as models
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish

NAME = "supernet"
SUPERNET, TUNED, ALONE, RANDOM = "supernet", "supernet, tuned", "alone", "random search"
ARMS = (SUPERNET, TUNED, ALONE, RANDOM)
SEARCHED = (SUPERNET, TUNED, RANDOM)
COSTS = {"shape": "macs", "joint": "bytes"}
INNER = (0.25, 0.5, 1.0)
BITS, SPARSITIES = (3, 4, 8), (0.0, 0.5, 0.75)


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: supernets of each kind.
      seed: the first.
      steps: of the first kind of supernet.
      further: of the second kind, which goes on from it.
      batch: images a step.
      samples: random networks a step, besides the largest and the smallest.
      alpha: weight of what the largest teaches them, beside that of its own loss.
      learning_rate: the largest, of a cosine schedule.
      further_rate: likewise, of the second kind.
      tuning: steps of a chosen network after its supernet.
      tuning_rate: the largest learning rate of these.
      trials: networks that each strategy judges.
      budgets: as fractions of what the largest network costs.
      drawn: random networks under each budget.
      judged: validation images that a trial sees, at most; as many as divide the test set.
      calibration: batches of 128 training images for BatchNorm's statistics.
      pixels: the images' height and width at most: means over squares of pixels.
      stem: channels of the first convolution.
      stages: channels of each stage.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    steps: int = 6_000
    further: int = 6_000
    batch: int = 64
    samples: int = 2
    alpha: float = 1.0
    learning_rate: float = 4e-3
    further_rate: float = 4e-3
    tuning: int = 2_000
    tuning_rate: float = 2e-3
    trials: int = 120
    budgets: tuple[float, ...] = (0.2, 0.35, 0.6)
    drawn: int = 2
    judged: int = 6_000
    calibration: int = 16
    pixels: int = 14
    stem: int = 8
    stages: tuple[int, ...] = (12, 24)
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            steps=(1, 1_000_000),
            further=(1, 1_000_000),
            batch=(1, 10_000),
            samples=(0, 10),
            alpha=(0, 1_000),
            learning_rate=(1e-8, 10),
            further_rate=(1e-8, 10),
            tuning=(1, 1_000_000),
            tuning_rate=(1e-8, 10),
            trials=(1, 100_000),
            drawn=(1, 100),
            judged=(1, 60_000),
            calibration=(1, 1_000),
            pixels=(4, 1_024),
            stem=(1, 1_024),
            stages=(1, 1_024),
        )
        if not self.budgets or not all(0 < b <= 1 for b in self.budgets):
            raise ConfigError(f"budgets are {self.budgets}; they are fractions of the largest.")

    @property
    def spec(self) -> models.Spec:
        """The largest network."""
        inner = tuple((width, width) for width in self.stages)
        kernels = tuple((5, 5) for _ in self.stages)
        return models.Spec(self.stem, self.stages, inner, kernels)


def dimensions(config: Config, kind: str) -> dict[str, Any]:
    """The elastic dimensions of a kind of supernet."""
    found = models.dimensions(config.spec, (1.0,), INNER, least=1, matrices=True)
    if kind == "joint":
        stages = range(len(config.stages))
        for part in ("stem", *(f"{name}_{s}" for s in stages for name in ("down", "block"))):
            found[f"bits_{part}"] = nas.Bits(f"^{part}.*kernel$", BITS, activations=8)
        for s in stages:
            stage = f"^block_{s}.*kernel$"
            found[f"sparsity_{s}"] = nas.Sparsity(stage, SPARSITIES)
    return found


class Start(NamedTuple):
    """What a training goes on from; without anything, from new weights.

    matrices: of elastic kernels.
    """

    params: PyTree = None
    model_state: PyTree = None
    matrices: PyTree = None

    @classmethod
    def of(cls, state: ej.TrainState) -> "Start":
        return cls(state.vars.model, state.model_state, matrices_of(state))


def matrices_of(state: ej.TrainState) -> PyTree:
    """A supernet's matrices of elastic kernels; None where it has none."""
    return state.vars.extra.get("nas", {}).get("matrices")


class Trainer:
    """Trains with transforms that differ in an architecture: one program for all."""

    def __init__(self, model: ej.Model, transform: ej.Transform, batches: Any, alone: bool):
        self.model, self.transform, self.batches = model, transform, batches

        def optimizer(steps: Array, rate: Array) -> optax.GradientTransformation:
            def schedule(count: Array) -> Array:
                warm = jnp.minimum(1.0, 20 * (count + 1) / steps)
                return rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))

            return optax.adamw(schedule, weight_decay=1e-4)

        def init(key: Array, start: Start) -> ej.TrainState:
            tx, example = optimizer(jnp.float32(1), jnp.float32(1)), batches.example
            given = {"params": start.params, "model_state": start.model_state}
            state = ej.init_state(key, model, transform, tx, example, **given)
            if start.matrices is None:
                return state
            extra = {**state.vars.extra, "nas": {"matrices": start.matrices}}
            return state._replace(vars=state.vars._replace(extra=extra))

        def step(state: ej.TrainState, batch: PyTree, given: Mapping[str, Array]) -> Any:
            if alone:
                first = state.step < given["until"]
                arch = jnp.where(first, given["first"], given["last"])
                state = nas.subnet(state, arch)
            tx = optimizer(given["steps"], given["rate"])
            return ej.make_step(model.apply, transform, cross_entropy, tx)(state, batch)

        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = step

    def train(
        self, part: Run, seed: int, steps: int, rate: float, start: Start, **given: Any
    ) -> ej.TrainState:
        """The trained state."""
        frozen = {"steps": jnp.float32(steps), "rate": jnp.float32(rate), **given}
        return fit(
            part,
            self.step,
            self.init(jax.random.key(seed), start),
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=steps,
            frozen=frozen,
            checkpoint_every=max(1, min(steps, 300)),
            log_every=max(1, steps // 50),
        ).state


class Bench:
    """The data, and the supernets of one kind."""

    def __init__(self, config: Config, kind: str, here: Run, images: data.Dataset):
        self.config, self.kind, self.here, self.images = config, kind, here, images
        self.model = models.model(dataclasses.replace(config.spec, classes=images.classes))
        size = min(config.batch, len(images.train.label))
        batches = make_batches(images.train.as_dict(), size, 0, **images.standard)
        one = {n: x[:1] for n, x in self.standard(images.train, 1).items()}
        self.net = nas.Supernet(self.model, one, dimensions(config, kind), symmetric=False)
        self.costs = nas.Costs(self.net)
        self.cost = COSTS[kind]
        self.limit = getattr(self.costs(self.net.architecture()), self.cost)
        elastic = ej.chain(nas=nas.elastic(self.net, samples=config.samples, alpha=config.alpha))
        fixed = ej.chain(nas=nas.fixed(self.net, self.net.architecture()))
        self.supernet = Trainer(self.model, elastic, batches, alone=False)
        self.alone = Trainer(self.model, fixed, batches, alone=True)
        self._judges = {
            SUPERNET: self._judge(elastic),
            ALONE: self._judge(fixed),
        }
        count = min(128, size)
        rows = [self.standard(images.train, count, i) for i in range(config.calibration)]
        self.calibration = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    def standard(self, split: data.Split, size: int, place: int = 0) -> dict[str, Array]:
        """Images in the order of a split."""
        part = slice(place * size, (place + 1) * size)
        batch = {n: jnp.asarray(x[part]) for n, x in split.as_dict().items()}
        own = (jnp.asarray(self.images.shift), jnp.asarray(self.images.scale))
        return standardized(batch, *own)

    def _judge(self, transform: ej.Transform) -> Any:
        recalibrated = nas.make_recalibrate(self.model.apply, transform)

        def scored(outputs: Array, batch: PyTree) -> dict[str, Array]:
            right = jnp.argmax(outputs, -1) == batch["label"]
            return {"accuracy": right.astype(jnp.float32)}

        evaluate = ej.make_eval(self.model.apply, transform, scored)

        def recalibrate(state: ej.TrainState, arch: Array, batches: PyTree) -> ej.TrainState:
            return recalibrated(nas.subnet(state, arch), batches)

        def accuracy(state: ej.TrainState, batch: PyTree) -> Array:
            return evaluate(state, batch)["accuracy"].value

        return jax.jit(recalibrate), jax.jit(accuracy)

    def judge(
        self, state: ej.TrainState, arch: np.ndarray, arm: str = SUPERNET, test: bool = False
    ) -> float:
        """The accuracy of an architecture on validation images, or on all test images."""
        recalibrate, accuracy = self._judges[arm]
        own = recalibrate(state, jnp.asarray(arch), self.calibration)
        split = self.images.test if test else self.images.validation
        parts = len(split.label) // self.size if test else 1
        found = [float(accuracy(own, self.standard(split, self.size, i))) for i in range(parts)]
        return float(np.mean(found))

    @functools.cached_property
    def size(self) -> int:
        """Images that are judged at once: one size for one program, which divides the test set."""
        every = len(self.images.test.label)
        most = min(self.config.judged, len(self.images.validation.label), every)
        return next(size for size in range(most, 0, -1) if every % size == 0)

    def search(self, seed: int, state: ej.TrainState) -> list[dict[str, Any]]:
        """The trials of both strategies."""
        population = max(2, min(20, self.config.trials // 4))
        strategies: dict[str, nas.Strategy] = {
            "NSGA-II": nas.NSGA2(self.net, objectives=2, population=population),
            "random": nas.RandomSearch(self.net),
        }
        rows: list[dict[str, Any]] = []
        for name, strategy in strategies.items():
            file = self.here.path / f"{self.kind}-{name}-seed{seed}.jsonl"
            search = nas.Search(self.net, strategy, file, seed=seed)
            while len(search.values) < self.config.trials:
                trial = search.pending[0] if search.pending else search.ask()
                cost = getattr(self.costs(trial.genes), self.cost)
                reached = self.judge(state, trial.genes)
                search.tell(trial, (reached, -float(np.log(cost))))
            for number, value in search.values.items():
                genes = search.trials[number].genes
                own = {"strategy": name, "seed": seed, "genes": genes.tolist()}
                cost = int(getattr(self.costs(genes), self.cost))
                rows.append({**own, "validation": np.atleast_1d(value)[0], "cost": cost})
        return rows

    def within(self, budget: float) -> float:
        return budget * self.limit

    def drawn(self, seed: int) -> dict[float, list[np.ndarray]]:
        """Different architectures at random, some within each budget."""
        found: dict[float, list[np.ndarray]] = {b: [] for b in sorted(self.config.budgets)}
        taken: set[bytes] = set()
        many = np.asarray(self.net.draw(jax.random.key(seed + 1_000), 4_096))
        for budget, archs in found.items():
            for arch in many:
                fits = getattr(self.costs(arch), self.cost) <= self.within(budget)
                if fits and arch.tobytes() not in taken and len(archs) < self.config.drawn:
                    archs.append(arch)
                    taken.add(arch.tobytes())
            if len(archs) < self.config.drawn:
                raise ConfigError(f"hardly a network costs less than {budget} of the largest.")
        return found


class Trained(NamedTuple):
    """A network and its accuracies; `steps` are its own, none of the supernet's."""

    arch: np.ndarray
    validation: float
    test: float
    steps: int


class Study:
    """Both kinds of supernets, and the rows of all arms."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        self.images = data.smaller(data.load(config.dataset), config.pixels)
        self.rows: list[dict[str, Any]] = []
        self.trials: dict[str, list[dict[str, Any]]] = {kind: [] for kind in COSTS}
        self.fronts: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self.largest: dict[str, int] = {}
        self.compiled: dict[str, int] = {}
        self.timed: dict[str, Callable[[], Any]] = {}

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def run(self) -> None:
        """Everything, the supernets first."""
        starts = dict.fromkeys(self.seeds, Start())
        for kind in COSTS:
            bench = Bench(self.config, kind, self.here, self.images)
            self.largest[kind] = int(bench.limit)
            chosen: dict[tuple[int, float], np.ndarray] = {}
            names = ("one", "recalibrate", "accuracy")
            with _counting(names) as counts:
                for seed in self.seeds:
                    state = self.train(bench, seed, starts[seed])
                    starts[seed] = Start.of(state)
                    chosen |= self.choose(bench, seed, state)
            self.compiled |= {f"{kind}: {n}": c for n, c in counts().items()}
            if many := {n: c for n, c in counts().items() if c > 1}:
                raise AssertionError(f"an architecture was compiled for: {many}")
            for (seed, budget), arch in chosen.items():
                one = self.from_scratch(bench, ALONE, seed, budget, 0, arch)
                self.note(bench, ALONE, seed, budget, one)
                one = self.tune(bench, seed, budget, arch, starts[seed])
                self.note(bench, TUNED, seed, budget, one)
                self.add(bench, TUNED, seed, one)
            for seed in self.seeds:
                self.random(bench, seed)

    def random(self, bench: Bench, seed: int) -> None:
        """Random search: within each budget the best by validation of all that was trained."""
        found = [
            self.from_scratch(bench, RANDOM, seed, budget, i, arch)
            for budget, archs in bench.drawn(seed).items()
            for i, arch in enumerate(archs)
        ]
        costs = [self.add(bench, RANDOM, seed, one) for one in found]
        for budget in self.config.budgets:
            within = [
                one for one, cost in zip(found, costs, strict=True) if cost <= bench.within(budget)
            ]
            self.note(bench, RANDOM, seed, budget, max(within, key=lambda one: one.validation))

    def add(self, bench: Bench, arm: str, seed: int, one: Trained) -> int:
        """Adds a network to its arm's front; its cost."""
        cost = int(getattr(bench.costs(one.arch), bench.cost))
        facts = {"kind": bench.kind, "arm": arm, "seed": seed, "cost": cost}
        self.fronts.append({**facts, "validation": one.validation, "accuracy": one.test})
        return cost

    def train(self, bench: Bench, seed: int, start: Start) -> ej.TrainState:
        config, began = self.config, time.monotonic()
        first = bench.kind == "shape"
        steps = config.steps if first else config.further
        rate = config.learning_rate if first else config.further_rate
        part = self.here.part(f"{bench.kind}-supernet-seed{seed}")
        state = bench.supernet.train(part, seed, steps, rate, start)
        say(f"{bench.kind} supernet, seed {seed}: {time.monotonic() - began:.0f} s")
        return state

    def choose(
        self, bench: Bench, seed: int, state: ej.TrainState
    ) -> dict[tuple[int, float], np.ndarray]:
        """The best by validation under each budget."""
        began = time.monotonic()
        trials = bench.search(seed, state)
        self.trials[bench.kind] += trials
        for trial in improving(trials):
            reached = bench.judge(state, np.array(trial["genes"], np.int32), test=True)
            self.fronts.append({**trial, "kind": bench.kind, "arm": SUPERNET, "accuracy": reached})
        found = {}
        for budget in self.config.budgets:
            within = [t for t in trials if t["cost"] <= bench.within(budget)]
            if not within:
                raise ConfigError(f"no trial costs less than {budget} of the largest.")
            best = max(within, key=lambda t: t["validation"])
            arch = np.array(best["genes"], np.int32)
            found[seed, budget] = arch
            accuracy = bench.judge(state, arch, test=True)
            self.note(bench, SUPERNET, seed, budget, Trained(arch, best["validation"], accuracy, 0))
            self.extract(bench, seed, budget, arch, state)
        say(f"{bench.kind} search, seed {seed}: {time.monotonic() - began:.0f} s")
        return found

    def extract(
        self, bench: Bench, seed: int, budget: float, arch: np.ndarray, state: ej.TrainState
    ) -> None:
        """The chosen network as one of its own, which must give the same outputs."""
        recalibrate, _ = bench._judges[SUPERNET]
        own = recalibrate(state, jnp.asarray(arch), bench.calibration)
        spec = dataclasses.replace(self.config.spec, classes=self.images.classes)
        batch = bench.standard(self.images.validation, 64)
        found = nas.extract_subnet(
            bench.net,
            arch,
            lambda config, channels: models.model(models.chosen(spec, config, channels)),
            own.vars.model,
            own.model_state,
            batch,
            matrices=matrices_of(own),
        )
        if seed == self.config.seed and bench.kind == "shape":
            self.timed[f"MACs ≤ {budget:.0%}"] = predictor(found.model, found, batch)
            self.timed["largest"] = predictor(bench.model, state, batch)
        facts = {}
        if found.quantizer is not None:
            setup = ej.Setup(found.model.apply, found.model_state, batch)
            q = found.quantizer.init(jax.random.key(0), found.params, setup)[1]
            facts = found.quantizer.describe(found.params, {}, q)
        size = ej.footprint(found.params, facts=facts, model_state=found.model_state)
        one = jax.tree.map(lambda x: x[:1], batch)
        sites = ej.find_sites(found.model.apply, found.params, found.model_state, one)
        self.points.append(
            {
                "kind": bench.kind,
                "seed": seed,
                "budget": budget,
                "config": found.config,
                "difference": found.difference,
                "bytes": size.totals.bytes,
                "macs": sum(site.macs for site in sites),
            }
        )
        exact = bench.costs(arch)
        assert exact.macs == self.points[-1]["macs"], "the extracted network multiplies as counted"
        assert exact.bytes >= self.points[-1]["bytes"], "no more is stored than was counted"

    def from_scratch(
        self, bench: Bench, arm: str, seed: int, budget: float, number: int, arch: np.ndarray
    ) -> Trained:
        """An architecture from scratch."""
        config, joint = self.config, bench.kind == "joint"
        steps = config.steps + (config.further if joint else 0)
        if arm == RANDOM:
            passes = (2 + config.samples) * steps + config.tuning * len(config.budgets)
            steps = passes // (config.drawn * len(config.budgets))
        # Dense and of 8 bits, as long as a share of the steps of the supernets was.
        first = arch.copy()
        for gene, name in enumerate(bench.net.names):
            if name.startswith(("bits", "sparsity")):
                first[gene] = len(bench.net.values[gene]) - 1
        share = config.steps / (config.steps + config.further) if joint else 0.0
        rates = {"until": jnp.int32(share * steps), "first": jnp.asarray(first)}
        part = self.part(bench, f"{arm}-{budget}-{number}", arch, seed)
        own = seed + 100 * number
        return self.fitted(bench, part, own, arch, steps, config.learning_rate, Start(), **rates)

    def tune(
        self, bench: Bench, seed: int, budget: float, arch: np.ndarray, supernet: Start
    ) -> Trained:
        """A chosen network trained further, from its supernet's weights."""
        seen = bench.net.view(supernet.params, jnp.asarray(arch), supernet.matrices)
        start = Start(seen, supernet.model_state)
        part = self.part(bench, f"{TUNED.replace(',', '')}-{budget}-0", arch, seed)
        config, never = self.config, {"until": jnp.int32(0), "first": jnp.asarray(arch)}
        return self.fitted(
            bench, part, seed, arch, config.tuning, config.tuning_rate, start, **never
        )

    def part(self, bench: Bench, name: str, arch: np.ndarray, seed: int) -> Run:
        """Where a training is kept: an interrupted one is gone on with for the same genes alone."""
        genes = hashlib.sha256(arch.astype(np.int32).tobytes()).hexdigest()[:8]
        return self.here.part(f"{bench.kind}-{name.replace(' ', '-')}-{genes}-seed{seed}")

    def fitted(
        self,
        bench: Bench,
        part: Run,
        seed: int,
        arch: np.ndarray,
        steps: int,
        rate: float,
        start: Start,
        **given: Array,
    ) -> Trained:
        """An architecture trained as a network of its own, unless it is done, and judged."""
        began = time.monotonic()
        done = read_json(part.path / "result.json")
        if done is None:
            last = jnp.asarray(arch)
            state = bench.alone.train(part, seed, steps, rate, start, last=last, **given)
            done = {"genes": arch.tolist(), "validation": bench.judge(state, arch, ALONE)}
            done["test"] = bench.judge(state, arch, ALONE, test=True)
            write_json(part.path / "result.json", done)
        say(f"{part.label}: {done['test']:.2%}, {time.monotonic() - began:.0f} s")
        return Trained(arch, done["validation"], done["test"], steps)

    def note(self, bench: Bench, arm: str, seed: int, budget: float, one: Trained) -> None:
        """Adds a row."""
        arch = one.arch
        costs = {n: int(x) for n, x in bench.costs(arch)._asdict().items()}
        unit = "MACs" if bench.cost == "macs" else "bytes"
        row = {
            "name": f"{unit} ≤ {budget:.0%}, {arm}",
            "kind": bench.kind,
            "arm": arm,
            "budget": budget,
            "seed": seed,
            "genes": arch.tolist(),
            "validation": float(one.validation),
            "accuracy": one.test,
            "steps": one.steps,
            **costs,
        }
        self.rows.append(row)
        say(f"{row['name']}, seed {seed}: {one.test:.2%}, {costs[bench.cost]:,} {unit}")


def predictor(model: ej.Model, weights: Any, batch: PyTree) -> Callable[[], Any]:
    """A network's outputs for a batch, compiled; what is timed. Of a TrainState or an Extracted."""
    state = isinstance(weights, ej.TrainState)
    params = weights.vars.model if state else weights.params
    call = jax.jit(lambda p, s, b: model.apply(p, s, b, jax.random.key(0), False)[0])
    return lambda: call(params, weights.model_state, batch)


@contextlib.contextmanager
def _counting(names: Sequence[str]) -> Iterator[Callable[[], dict[str, int]]]:
    """How often each jitted function of these names is compiled."""
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(compilations(name)) for name in names}
        yield lambda: {name: len(own) for name, own in found.items()}


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    study = Study(config)
    study.run()
    rows = study.rows
    # The trials themselves are in the run's folder.
    results: dict[str, Any] = {"rows": rows, "points": study.points}
    results |= {"fronts": study.fronts, "largest": study.largest}
    results["along"] = {kind: along(study.fronts, kind) for kind in COSTS}
    results |= {"compiled": study.compiled, "seconds": time.monotonic() - began}
    timed = ej.latency(study.timed, batch_size=64)
    results["latency"] = {name: found.to_dict() for name, found in timed.items()}
    results["volumes"] = {kind: volumes(study.trials[kind]) for kind in COSTS}
    results["against"] = {
        kind: {
            f"{own} against {other}": against(rows, kind, own, other)
            for own in (SUPERNET, TUNED)
            for other in (ALONE, RANDOM)
        }
        for kind in COSTS
    }
    results |= {"columns": [column._asdict() for column in COLUMNS]}
    publish(study.here, results, tables, figures, config.save)
    return {
        f"{kind}, points of {a}": x for kind, y in results["against"].items() for a, x in y.items()
    }


def accuracies(rows: list[dict[str, Any]], kind: str, arm: str) -> dict[float, np.ndarray]:
    """{budget: test accuracies in per cent, by seed}."""
    mine = sorted(
        (r for r in rows if (r["kind"], r["arm"]) == (kind, arm)), key=lambda r: r["seed"]
    )
    return {
        budget: np.array([100 * r["accuracy"] for r in mine if r["budget"] == budget])
        for budget in dict.fromkeys(r["budget"] for r in mine)
    }


def against(rows: list[dict[str, Any]], kind: str, arm: str, to: str) -> dict[str, Any]:
    """{budget: points that an arm's network is above another arm's, and Welch's p}."""
    own, other = accuracies(rows, kind, arm), accuracies(rows, kind, to)
    found: dict[str, Any] = {}
    for budget, values in own.items():
        found[str(budget)] = {"points": float((values - other[budget]).mean())}
        if len(values) > 1:
            found[str(budget)]["p"] = float(welch(values.tolist(), other[budget].tolist()).p)
    return found


def improving(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cost, those that are better on validation images than all that cost no more."""
    found: list[dict[str, Any]] = []
    for trial in sorted(trials, key=lambda t: (t["cost"], -t["validation"])):
        if not found or trial["validation"] > found[-1]["validation"]:
            found.append(trial)
    return found


def along(fronts: list[dict[str, Any]], kind: str, places: int = 40) -> dict[str, Any]:
    """{"cost": from the cheapest that all found to the dearest; an arm: test accuracies in per cent
    of its best network by validation that costs no more, [seeds, places]}."""
    mine = [f for f in fronts if f["kind"] == kind]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in mine:
        groups.setdefault((point["arm"], point["seed"]), []).append(point)
    first = max(min(p["cost"] for p in group) for group in groups.values())
    costs = np.geomspace(first, max(f["cost"] for f in mine), places).round().astype(int)
    found: dict[str, Any] = {"cost": costs.tolist(), **{arm: [] for arm in SEARCHED}}
    for (arm, _), group in sorted(groups.items()):
        best = [improving([p for p in group if p["cost"] <= cost])[-1] for cost in costs]
        found[arm].append([100 * point["accuracy"] for point in best])
    return found


def volumes(trials: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{strategy: hypervolume over log cost and validation accuracy, by seed}, in per cent of the
    box of all trials."""
    cost = np.log([t["cost"] for t in trials])
    value = np.array([t["validation"] for t in trials])
    box = (cost.max() - cost.min()) * (value.max() - value.min()) or 1.0
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(t["strategy"] for t in trials):
        for seed in dict.fromkeys(t["seed"] for t in trials):
            mine = [i for i, t in enumerate(trials) if (t["strategy"], t["seed"]) == (name, seed)]
            points = [(cost[i], value[i]) for i in mine]
            volume = hypervolume(points, (cost.max(), value.min()), (False, True))
            found.setdefault(name, []).append(100 * volume / box)
    return found


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("macs", "MACs (thousands)", ".0f", "min", 1e-3),
    Column("bytes", "stored kB", ".1f", "min", 1e-3),
    Column("steps", "own steps", ".0f", "min"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Budgets and arms down."""
    config, against = results["config"], results["against"]
    differences = "; ".join(
        f"{kind}, {arms}: "
        + ", ".join(f"{float(b):.0%} {x['points']:+.2f}" for b, x in own.items())
        for kind, found in against.items()
        for arms, own in found.items()
    )
    apart = "; ".join(
        f"{kind}, {arm} {np.mean(own[arm]) - np.mean(own[RANDOM]):+.2f}"
        for kind, own in results["along"].items()
        for arm in (SUPERNET, TUNED)
    )
    times = ", ".join(f"{n} {x['median'] * 1e3:.2f} ms" for n, x in results["latency"].items())
    caption = (
        f"{config['dataset']}: supernets of {config['steps']} steps, and {config['further']} more "
        "with bits and sparsities, of "
        f"{2 + config['samples']} networks of {config['batch']} images; mean ± standard deviation "
        f"of {config['seeds']} seeds. Percentage points of {differences}. "
        f"Above random search at all costs on average: {apart}. "
        f"64 images take, in floating point, {times}."
    )
    rows = sorted(results["rows"], key=lambda r: (r["kind"] == "joint", r["budget"]))
    return {NAME: summarise(rows, COLUMNS, heading="budget", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy by budget, and the best within any cost, of both kinds."""
    rows, budgets = results["rows"], results["config"]["budgets"]
    places = [float(i) for i in range(len(budgets))]
    panels = []
    for kind, title in (("shape", "Widths, kernels, depths"), ("joint", "Bits and sparsities too")):
        series = {}
        for arm in ARMS:
            found = accuracies(rows, kind, arm)
            series[arm] = (places, np.stack([found[b] for b in budgets], axis=1))
        ticks = {place: f"{b:.0%}" for place, b in zip(places, budgets, strict=True)}
        unit = "MACs" if COSTS[kind] == "macs" else "stored bytes"
        panels.append(Panel(series, f"{unit}, of the largest's", "test accuracy (%)", title, ticks))
    fronts = []
    for kind, own in results["along"].items():
        places = [cost / results["largest"][kind] for cost in own["cost"]]
        series = {arm: (places, np.array(own[arm])) for arm in SEARCHED}
        unit = "MACs" if COSTS[kind] == "macs" else "stored bytes"
        fronts.append(Panel(series, f"{unit}, of the largest's", "test accuracy (%)", bars=False))
    return {
        NAME: panels_plot(panels, source, width=7.0, height=3.0),
        f"{NAME}_fronts": panels_plot(fronts, source, width=7.0, height=3.0),
    }
