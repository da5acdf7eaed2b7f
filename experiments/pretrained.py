"""A network trained on ImageNet, quantized after training: what one scale for a depthwise kernel
costs, and what mends it.

MobileNetV2 with torchvision's weights. Activations have 8 bits and one asymmetric range each, by
squared error over calibration images; weights have 8 bits, or 4 but in the first and last layer.
They are rounded with one scale for a tensor or one for each output channel; then with channels
equalised (which takes ReLU in the place of ReLU6), with biases corrected, and by GPTQ and AdaRound.
BatchNorms are folded in all arms, as a deployed model has them.

There are no ImageNet images to be had here. What is measured is agreement with the network in
floating point: the share of images that get the same of the 1,000 classes from both, and the
signal-to-noise ratio of each layer's outputs and of the logits. The images are CIFAR-10's, enlarged
bilinearly: calibration on training images, agreement on test images. A seed draws both.

Expected: with one scale for a tensor the network fails; with equalisation and bias correction it
does not. Published, top-1 on ImageNet (Nagel et al. 2019, tables 1 to 4): float 71.7, per tensor
0.1, per channel 70.7, equalised 69.9, and with bias correction 71.2 (w8a8).

Command: python -m experiments pretrained
Cost: 50 minutes of one CPU core.

Papers: Nagel et al. 2019, https://arxiv.org/abs/1906.04721; Nagel et al. 2020,
https://arxiv.org/abs/2004.10568; Frantar et al. 2023, https://arxiv.org/abs/2210.17323; Sandler et
al. 2018, https://arxiv.org/abs/1801.04381.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.core import PyTree
from effjax.quantize.fidelity import SITE_OUTPUTS
from effjax.report import Column, Table, summarise
from experiments.harness import data
from experiments.harness.config import check
from experiments.harness.progress import say
from experiments.harness.provenance import write_json
from experiments.harness.runs import open_run, read_json
from experiments.models import mobilenet
from experiments.sparse_report import Panel, panels_plot, publish

NAME = "pretrained"
ENDS = [(r"^(stem|head)/", ej.quantize.Bits(8, 8))]
TINY = mobilenet.Spec(0.25, 10, ((1, 16, 1, 1), (6, 24, 2, 2)), 64)  # random weights, for the tests


class Arm(NamedTuple):
    """One way of quantizing."""

    name: str
    bits: int
    per_channel: bool = False
    equalize: bool = False
    bias_correction: bool = False
    method: str = "nearest"


ARMS = (
    Arm("w8a8, per channel", 8, True),
    Arm("w8a8, per tensor", 8),
    Arm("w8a8, per tensor, bias correction", 8, bias_correction=True),
    Arm("w8a8, per tensor, equalised", 8, equalize=True),
    Arm("w8a8, per tensor, equalised, bias correction", 8, equalize=True, bias_correction=True),
    Arm("w4a8, per channel", 4, True),
    Arm("w4a8, per channel, bias correction", 4, True, bias_correction=True),
    Arm("w4a8, per channel, GPTQ, bias correction", 4, True, False, True, "gptq"),
    Arm("w4a8, per channel, AdaRound, bias correction", 4, True, False, True, "adaround"),
)
RELU = "float, ReLU for ReLU6"


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: draws of images.
      seed: the first.
      size: height and width that images are enlarged to.
      calibration: images that ranges, roundings and biases are fitted to.
      images: images on which networks are compared.
      batch: images at once.
      steps: of AdaRound, for each layer.
      weights: "imagenet", or "random" ones of a tiny network.
      dataset: whose images; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    size: int = 96
    calibration: int = 64
    images: int = 512
    batch: int = 32
    steps: int = 500
    weights: Literal["imagenet", "random"] = "imagenet"
    dataset: Literal["cifar10", "digits"] = "cifar10"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            size=(8, 512),
            calibration=(1, 10_000),
            images=(1, 10_000),
            batch=(1, 1_000),
            steps=(1, 100_000),
        )


class Bench:
    """The networks, with BatchNorms folded, and the rows of all arms."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        # What was finished before a kill is not done again.
        self.kept = self.here.path / "rows.json"
        self.rows: list[dict[str, Any]] = (read_json(self.kept) or {}).get("rows", [])
        self.transforms: dict[Any, ej.Transform] = {}
        self.programs: dict[Any, Any] = {}
        spec = mobilenet.Spec() if config.weights == "imagenet" else TINY
        relu = mobilenet.Spec(**{**vars(spec), "activation": "relu"})
        self.models = {False: mobilenet.model(spec), True: mobilenet.model(relu)}
        example = {"image": jnp.zeros((2, config.size, config.size, 3))}
        if config.weights == "imagenet":
            params, state = mobilenet.load_weights()
        else:
            params, state = self.models[False].init(jax.random.key(0), example)
        self.start = ej.quantize.fold_batchnorm(
            params, state, apply=self.models[False].apply, batch=example
        )
        self.data = data.load(config.dataset, validation=0)
        self.run = {
            relu: jax.jit(
                lambda v, batch, apply=m.apply: apply(*v, batch, jax.random.key(0), False)[0]
            )
            for relu, m in self.models.items()
        }

    def examples(self, split: str, count: int, seed: int) -> list[dict[str, Any]]:
        """Batches of enlarged images, standardised as the network has learnt."""
        config, images = self.config, getattr(self.data, split).image
        chosen = np.random.default_rng(seed).permutation(len(images))[:count]
        x = images[chosen].astype(np.float32) / (16 if images.max() <= 16 else 255)
        x = (np.broadcast_to(x, (*x.shape[:-1], 3)) - mobilenet.MEAN) / mobilenet.DEVIATION
        shape = (len(x), config.size, config.size, 3)
        x = np.asarray(jax.image.resize(x.astype(np.float32), shape, "bilinear"))
        return [{"image": part} for part in np.split(x, max(1, len(x) // config.batch))]

    def agreement(self, seed: int, name: str, got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
        """A row: how often the classes are the same, and the logits' signal-to-noise ratio."""
        same = float((got.argmax(-1) == want.argmax(-1)).mean())
        noise = max(float(((got - want) ** 2).sum()), 1e-20)
        decibels = float(10 * np.log10(float((want**2).sum()) / noise))
        return {"name": name, "seed": seed, "agreement": same, "logits": decibels}

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_json(self.kept, {"rows": self.rows})

    def seed(self, seed: int) -> None:
        """All arms with one draw of images."""
        config = self.config
        batches = self.examples("train", config.calibration, seed)
        test = self.examples("test", config.images, seed)
        want = np.concatenate([self.run[False](self.start, batch) for batch in test])
        relu = np.concatenate([self.run[True](self.start, batch) for batch in test])
        done = {row["name"] for row in self.rows if row["seed"] == seed}
        if RELU not in done:
            self.keep(self.agreement(seed, RELU, relu, want))
        for arm in ARMS:
            if arm.name in done:
                continue
            begun = time.monotonic()
            model, transform = self.models[arm.equalize], self.transform(arm)
            start = self.start
            if arm.equalize:
                start = ej.quantize.equalize(model.apply, *start, batches[0])
            small = ej.quantize.ptq(
                model,
                *start,
                batches,
                transform=transform,
                method=self.method(arm),
                bias_correction=arm.bias_correction,
            )
            evaluate = self.evaluate(arm)
            got = np.concatenate([evaluate(small.state, batch) for batch in test])
            row = self.agreement(seed, arm.name, got, want)
            layers = ej.quantize.signal_to_noise(model.apply, *small, test[0], reference=start)
            layers.pop(SITE_OUTPUTS)
            row |= {"worst": min(layers.values()), "median": float(np.median([*layers.values()]))}
            self.keep({**row, "layers": layers})
            say(
                f"{arm.name}: {row['agreement']:.1%}, logits {row['logits']:.1f} dB "
                f"({time.monotonic() - begun:.0f} s)"
            )

    def transform(self, arm: Arm) -> ej.Transform:
        """The arm's grids; the same object for arms that share them, and so their programs."""
        key = arm.bits, arm.per_channel
        if key not in self.transforms:
            self.transforms[key] = ej.chain(
                quant=ej.quantize.qat(
                    arm.bits,
                    8,
                    rules=ENDS,
                    ranges="static",
                    per_channel=arm.per_channel,
                    symmetric=False,
                )
            )
        return self.transforms[key]

    def method(self, arm: Arm) -> Any:
        """How the arm rounds weights: those of 4 bits, in one pass over the images."""
        few: dict[str, Any] = {"select": "^(block|last).*kernel$", "sequential": False}
        if arm.method == "adaround":
            return partial(ej.quantize.adaround, steps=self.config.steps, **few)
        return partial(ej.quantize.gptq, **few) if arm.method == "gptq" else arm.method

    def evaluate(self, arm: Arm) -> Any:
        """`(state, batch) -> logits` of the quantized network."""
        key = arm.bits, arm.per_channel, arm.equalize
        if key not in self.programs:
            apply, transform = self.models[arm.equalize].apply, self.transform(arm)

            def run(state: ej.TrainState, batch: PyTree) -> jax.Array:
                ctx = ej.Ctx(state.step, state.key, None, train=False)
                given = state.vars, state.model_state, state.transform, batch, ctx
                return ej.forward(apply, transform, *given).outputs

            self.programs[key] = jax.jit(run)
        return self.programs[key]


def run(config: Config) -> dict[str, Any]:
    """Quantizes every way, and reports."""
    began = time.monotonic()
    bench = Bench(config)
    for seed in range(config.seed, config.seed + config.seeds):
        bench.seed(seed)
    results: dict[str, Any] = {"rows": bench.rows, "seconds": time.monotonic() - began}
    publish(bench.here, results, tables, figures, config.save)
    found: dict[str, list[float]] = {}
    for row in bench.rows:
        found.setdefault(row["name"], []).append(row["agreement"])
    return {name: f"{np.mean(values):.1%}" for name, values in found.items()}


COLUMNS = (
    Column("agreement", "same class (%)", ".1f", "max", 100),
    Column("logits", "logits (dB)", ".1f", "max"),
    Column("median", "median layer (dB)", ".1f", "max"),
    Column("worst", "worst layer (dB)", ".1f", "max"),
)


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Arms down."""
    config = results["config"]
    caption = (
        f"MobileNetV2 quantized after training, against itself in floating point: the share of "
        f"{config['images']} images of {config['dataset']}, enlarged to {config['size']} pixels, "
        f"that get the same class, and signal-to-noise ratios. Fitted to {config['calibration']} "
        f"other images; mean ± standard deviation of {config['seeds']} draws of images."
    )
    rows = [{n: x for n, x in row.items() if n != "layers"} for row in results["rows"]]
    return {NAME: summarise(rows, COLUMNS, heading="quantization", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The signal-to-noise ratio of each layer's outputs."""

    def panel(names: list[str], title: str) -> Panel:
        series = {}
        for name in names:
            mine = [[*r["layers"].values()] for r in results["rows"] if r["name"] == name]
            values = np.array(mine)
            series[name.split(", ", 1)[1]] = (list(range(values.shape[1])), values)
        label = "signal-to-noise ratio (dB)"
        return Panel(series, "layer, in the order of execution", label, title, bars=False)

    wide = [arm.name for arm in ARMS if arm.bits == 8 and arm.name != ARMS[2].name]
    few = [arm.name for arm in ARMS if arm.bits == 4]
    panels = [panel(wide, "Weights of 8 bits"), panel(few, "Weights of 4 bits")]
    return {NAME: panels_plot(panels, source, width=7.0, height=3.9)}
