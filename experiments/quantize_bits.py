"""Accuracy against bits, 8 to 1: after training (PTQ), and trained with QAT, LSQ and PACT.

A small CNN is trained on Fashion-MNIST in floating point, three seeds. From its weights each method
goes on at 8, 6, 4, 3, 2 and 1 bits of weights and activations; the first and last layer have 8
bits. PTQ calibrates with training images, by squared error, and trains nothing. QAT is
straight-through with static asymmetric ranges, at 1 bit XNOR-Net; LSQ trains the steps, PACT the
clipping bounds, each with a learning rate of their own. These three, and the float network that is
trained on for comparison, have the same further steps, batches and schedule. The bits are an
argument of the program: one compilation serves all of a method's.

Expected: QAT no worse than PTQ at any width; LSQ with 4 bits within 0.5 points of floating point,
with 2 bits within 3. Published, LSQ with VGG-small on CIFAR-10: float 93.34, w4a4 94.26, w3a3
93.89, w2a2 93.42.

The network is `models.strided` with 73 thousand weights. Learning rates were chosen with one seed
and with no search; the test set is used once, at the end of each training.

Command: python -m experiments quantize_bits
Cost: an hour on one CPU core that is shared with other work (57 trainings).

Papers: Jacob et al. 2018, https://arxiv.org/abs/1712.05877 (QAT); Esser et al. 2020,
https://arxiv.org/abs/1902.08153 (LSQ); Choi et al. 2018, https://arxiv.org/abs/1805.06085 (PACT);
Rastegari et al. 2016, https://arxiv.org/abs/1603.05279 (XNOR-Net).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import effjax as ej
from effjax.report import Column, Table, summarise
from experiments.arms import Arm, Build, Start, weights
from experiments.harness import data
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.progress import say
from experiments.harness.runs import open_run
from experiments.models import strided
from experiments.sparse_report import Panel, panels_plot, publish

NAME = "quantize_bits"
FLOAT, LONGER = "float", "float, trained on"
METHODS = ("PTQ", "QAT", "LSQ", "PACT")
ENDS = [(r"^(conv_0|head)/", ej.quantize.Bits(8, 8))]


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each method and width.
      seed: the first.
      bits: of weights and activations.
      epochs: passes over the 60,000 training images in floating point.
      further: passes of each method after them.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule, in floating point.
      further_rate: that of the methods.
      step_rate: of LSQ's steps.
      bound_rate: of PACT's bounds.
      calibration: training images that PTQ sees.
      channels: of the convolutions.
      hidden: units of the dense layer.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    bits: tuple[int, ...] = (8, 6, 4, 3, 2, 1)
    epochs: int = 5
    further: int = 3
    batch: int = 128
    learning_rate: float = 3e-3
    further_rate: float = 1e-3
    step_rate: float = 2e-4
    bound_rate: float = 1e-2
    calibration: int = 1_024
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 128
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            bits=(1, 8),
            epochs=(1, 10_000),
            further=(1, 10_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            further_rate=(1e-8, 10),
            step_rate=(1e-8, 10),
            bound_rate=(1e-8, 10),
            calibration=(1, 60_000),
            channels=(1, 4_096),
            hidden=(1, 65_536),
        )
        if len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"bits are {self.bits}; give each width once.")


def builds(config: Config) -> dict[str, tuple[Build, dict[str, float]]]:
    """{method: (what makes its transform from the bits, learning rates of its own)}."""
    q = ej.quantize
    static: dict[str, Any] = {"ranges": "static", "symmetric": False}
    return {
        LONGER: (lambda bits: ej.chain(), {}),
        "QAT": (lambda bits: ej.chain(quant=q.qat(bits, bits, rules=ENDS, **static)), {}),
        "LSQ": (
            lambda bits: ej.chain(quant=q.lsq(bits, bits, rules=ENDS)),
            {r"^extra/.*step/": config.step_rate},
        ),
        "PACT": (
            lambda bits: ej.chain(quant=q.pact(bits, bits, rules=ENDS)),
            {r"^extra/.*alpha/": config.bound_rate},
        ),
    }


def one_bit(bits: Any) -> ej.Transform:
    """XNOR-Net, whatever the bits."""
    return ej.chain(quant=ej.quantize.binary(1, 1, rules=ENDS))


class Bench:
    """The data, the network trained in floating point, and the rows of all arms."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        self.rows: list[dict[str, Any]] = []
        self.images = images = data.load(config.dataset, validation=0)
        self.model = strided.model(strided.Spec(config.channels, config.hidden, images.classes))
        self.starts: dict[int, Start] = {}

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def arm(self, build: Build, epochs: int, rate: float, apart: Mapping[str, float] = {}) -> Arm:
        config = self.config
        steps = epochs * (len(self.images.train.label) // config.batch)
        how: dict[str, Any] = {"steps": steps, "batch": config.batch, "learning_rate": rate}
        return Arm(self.model, self.images, build, apart=apart, **how)

    def note(self, method: str, bits: int, seed: int, accuracy: float) -> None:
        name = method if method in (FLOAT, LONGER) else f"{method} w{bits}a{bits}"
        row = {"name": name, "series": method, "method": method, "bits": bits, "seed": seed}
        self.rows.append({**row, "accuracy": accuracy})

    def begin(self) -> None:
        """Trains what the others begin with."""
        arm = self.arm(lambda bits: ej.chain(), self.config.epochs, self.config.learning_rate)
        for seed in self.seeds:
            state, last = arm.train(self.here.part(f"float-seed{seed}"), seed)
            self.starts[seed] = weights(state)
            self.note(FLOAT, 32, seed, last["test/accuracy"])
        self.tell(FLOAT, 32, time.monotonic())

    def calibrate(self) -> None:
        """PTQ at every width: as QAT, before any training."""
        config = self.config
        build, _ = builds(config)["QAT"]
        arm = self.arm(build, config.further, config.further_rate)
        crossed = self.arm(one_bit, config.further, config.further_rate)
        size = min(config.calibration, 256)
        batches = arm.examples(config.calibration // size, size)
        for bits in config.bits:
            begun, own = time.monotonic(), crossed if bits == 1 else arm
            for seed in self.seeds:
                state = own.begin(seed, bits, start=self.starts[seed])
                if bits > 1:
                    state = ej.quantize.calibrate(self.model.apply, build(bits), state, batches)
                self.note("PTQ", bits, seed, own.score(state, bits)["test/accuracy"])
            self.tell("PTQ", bits, begun)

    def further(self, method: str, build: Build, apart: Mapping[str, float]) -> None:
        """Trains a method at every width and seed."""
        config = self.config
        arm = self.arm(build, config.further, config.further_rate, apart)
        for bits in (32,) if method == LONGER else config.bits:
            begun, own = time.monotonic(), arm
            if method == "QAT" and bits == 1:
                own = self.arm(one_bit, config.further, config.further_rate)
            for seed in self.seeds:
                part = self.here.part(f"{method.split(',')[0]}-{bits}-seed{seed}")
                _, last = own.train(part, seed, bits, start=self.starts[seed])
                self.note(method, bits, seed, last["test/accuracy"])
            self.tell(method, bits, begun)

    def tell(self, method: str, bits: int, begun: float) -> None:
        mine = [r["accuracy"] for r in self.rows if (r["method"], r["bits"]) == (method, bits)]
        say(f"{method}, {bits} bits: {np.mean(mine):.2%} ({time.monotonic() - begun:.0f} s)")


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    bench = Bench(config)
    bench.begin()
    bench.calibrate()
    for method, (build, apart) in builds(config).items():
        bench.further(method, build, apart)
    results: dict[str, Any] = {"rows": bench.rows, "seconds": time.monotonic() - began}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": FLOAT}
    publish(bench.here, results, tables, figures, config.save)
    found = {method: accuracies(bench.rows, method) for method in METHODS}
    return {
        f"{bits} bits": ", ".join(f"{m} {found[m][bits].mean():.2f}%" for m in METHODS)
        for bits in config.bits
    }


COLUMNS = (Column("accuracy", "test accuracy (%)", ".2f", "max", 100),)


def accuracies(rows: list[dict[str, Any]], method: str) -> dict[int, np.ndarray]:
    """{bits: test accuracies in per cent, by seed}."""
    mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
    return {
        bits: np.array([100 * r["accuracy"] for r in mine if r["bits"] == bits])
        for bits in dict.fromkeys(r["bits"] for r in mine)
    }


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Methods down, bits across."""
    config, wide = results["config"], dict[tuple[str, int], dict[str, Any]]()
    for r in results["rows"]:
        row = wide.setdefault((r["method"], r["seed"]), {"name": r["method"], "seed": r["seed"]})
        row[str(r["bits"])] = r["accuracy"]
    columns = [Column("32", "float", ".2f", None, 100)]
    columns += [Column(str(b), f"w{b}a{b}", ".2f", None, 100) for b in config["bits"]]
    caption = (
        f"Test accuracy (%) on {config['dataset']}, {config['epochs']} epochs in floating point "
        f"and {config['further']} further ones, first and last layer of 8 bits; mean ± standard "
        f"deviation of {config['seeds']} seeds. QAT and PTQ at 1 bit: XNOR-Net."
    )
    return {NAME: summarise(wide.values(), columns, heading="method", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against bits: everything, and what is near floating point."""
    rows, bits = results["rows"], results["config"]["bits"]
    places = [float(place) for place in range(len(bits))]
    series = {}
    for method in METHODS:
        found = accuracies(rows, method)
        series[method] = (places, np.stack([found[b] for b in bits], axis=1))
    level = {name: accuracies(rows, name)[32] for name in (LONGER,)}
    ticks = {place: str(b) for place, b in zip(places, bits, strict=True)}
    panel = Panel(series, "bits of weights and activations", "test accuracy (%)", "", ticks, level)
    top = float(level[LONGER].mean())
    best = min(float(series["LSQ"][1].mean(0).min()), top - 1)
    near = (best - 0.3 * (top - best), top + 0.3 * (top - best))
    panels = [
        panel._replace(title="All widths"),
        panel._replace(title="Near floating point", limits=near),
    ]
    return {NAME: panels_plot(panels, source, width=7.0, height=3.0)}
