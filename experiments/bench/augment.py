"""Augmentation on the device against Pillow and NumPy on the host, and against dm-pix and augmax.

Each augmentation of `effjax.augment` on a batch of images, jitted, keys included; the same on the
host, as a data loader does it in one process (Pillow on each image, NumPy on the batch); and the
other two libraries' where they have it, jitted and mapped over the batch likewise. All in turns in
one process. The others' operations are the nearest that they have: their brightness adds where
ours multiplies, their rotations are by drawn angles as ours.

Then a train step of a small CNN, with batches as they are, and augmented inside the step.

dm-pix and augmax are compared where they are installed: pip install dm-pix augmax

Expected: RandAugment adds at most 15% to the CNN's step.
Cost: 4 minutes on 2 CPU cores (an estimate).
Command: python -m experiments bench.augment
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.core import Ctx
from experiments.bench.host_augment import HOST
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import provenance, write_json
from experiments.models import cnn
from experiments.sparse_report import cross_entropy

RESULTS = Path(__file__).parents[1] / "results"
TOKENS = ("token_dropout", "swap", "span_mask")
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      batch: images of size x size pixels and 3 channels, or token sequences of length 128.
      size: of the images.
      width: of the CNN whose step is timed.
      samples: of each time; medians are reported.
      rounds: of the step's comparison; the median ratio is reported.
      only: names of augmentations; all by default.
      save: whether to write experiments/results.
    """

    batch: int = 128
    size: int = 32
    width: float = 0.5
    samples: int = 15
    rounds: int = 3
    only: tuple[str, ...] = ()
    save: bool = True

    def __post_init__(self) -> None:
        check(self, batch=(2, 4096), size=(8, 512), width=(0.05, 4), samples=(1, 1000))
        check(self, rounds=(1, 100))
        if unknown := set(self.only) - set(operations(32)):
            raise ValueError(f"only: {sorted(unknown)} are none of {', '.join(operations(32))}.")


def operations(size: int) -> dict[str, Any]:
    """{name: an operation on one image or sequence, or a transform of a batch}."""
    a = ej.augment
    return {
        "flip": a.flip(),
        "crop": a.crop(4),
        "translate": a.translate(4),
        "rotate": a.rotate(30.0),
        "shear": a.shear(0.3),
        "scale": a.scale(0.75, 1.5),
        **{n: getattr(a, n)(0.9) for n in ("brightness", "contrast", "colour", "sharpness")},
        **{n: getattr(a, n)(probability=1.0) for n in ("autocontrast", "equalise", "invert")},
        "solarise": a.solarise(128, 1.0),
        "posterise": a.posterise(4, 1.0),
        "erasing": a.erasing(1.0),
        "cutout": a.cutout(size // 2),
        "mixup": a.mixup(1.0, classes=10),
        "cutmix": a.cutmix(1.0, classes=10),
        "autoaugment": a.autoaugment("cifar10"),
        "randaugment": a.randaugment(2, 9),
        "trivialaugment": a.trivialaugment(),
        "augmix": a.augmix(),
        "token_dropout": a.token_dropout(0.1, mask=0),
        "swap": a.swap(1),
        "span_mask": a.span_mask(0.15, mask=0),
    }


def dm_pix(size: int) -> dict[str, Any]:
    """{name: the nearest of dm-pix, `(key, image) -> image`}."""
    pix = importlib.import_module("dm_pix")

    def crop(key: Array, image: Array) -> Array:
        padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
        return pix.random_crop(key, padded, (size, size, 3))

    def rotate(key: Array, image: Array) -> Array:
        angle = jax.random.uniform(key, (), minval=-0.52, maxval=0.52)
        return pix.rotate(image, angle, mode="constant")

    return {
        "flip": pix.random_flip_left_right,
        "crop": crop,
        "rotate": rotate,
        "brightness": lambda key, image: pix.random_brightness(key, image, 0.9),
        "contrast": lambda key, image: pix.random_contrast(key, image, 0.1, 1.9),
        "colour": lambda key, image: pix.random_saturation(key, image, 0.1, 1.9),
        "solarise": lambda key, image: pix.solarize(image, 0.5),
    }


def augmax(size: int) -> dict[str, Any]:
    """{name: the nearest of augmax, `(key, image) -> image`}."""
    library = importlib.import_module("augmax")
    return {
        "flip": library.HorizontalFlip(),
        "rotate": library.Rotate((-30, 30)),
        "brightness": library.RandomBrightness((-0.9, 0.9), p=1.0),
        "contrast": library.RandomContrast((-0.9, 0.9), p=1.0),
        "colour": library.ColorJitter(0.0, 0.0, 0.9, 0.0, p=1.0),
        "solarise": library.Solarization(0.5, p=1.0),
    }


PEERS = {"dm-pix": dm_pix, "augmax": augmax}


def installed(size: int) -> dict[str, dict[str, Any]]:
    """{library: its operations}, of those that are there."""
    found = {}
    for name, load in PEERS.items():
        try:
            found[name] = load(size)
        except ModuleNotFoundError as error:
            print(f"{name} is not compared: {error}. Install it: pip install {name}")
    return found


def mapped(operation: Any) -> Callable[[Array, Array], Array]:
    """An operation on each example of a batch, with keys of their own."""

    def run(key: Array, examples: Array) -> Array:
        if isinstance(operation, ej.Transform):
            label = jnp.zeros(len(examples), jnp.int32)
            ctx = Ctx(jnp.int32(0), key, None, train=True)
            return operation.batch({"image": examples, "label": label}, {}, ctx)["image"]
        return jax.vmap(operation)(jax.random.split(key, len(examples)), examples)

    return jax.jit(run)


def throughput(config: Config) -> list[dict[str, Any]]:
    """A row for each augmentation: examples a second here, on the host, and elsewhere."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.batch, config.size, config.size, 3), dtype=np.uint8)
    tokens = rng.integers(1, 1000, (config.batch, 128), dtype=np.int32)
    key, peers, rows = jax.random.key(0), installed(config.size), []
    for name, operation in operations(config.size).items():
        if config.only and name not in config.only:
            continue
        source = tokens if name in TOKENS else images
        given = jnp.asarray(tokens if name in TOKENS else images / np.float32(255))
        candidates = {"effjax": operation} | {n: p[name] for n, p in peers.items() if name in p}
        calls: dict[str, Call] = {}
        for who, candidate in candidates.items():
            calls[who] = _on_device(mapped(candidate), key, given)
        calls["host"] = _on_host(HOST[name], rng, source)
        times = ej.latency(calls, batch_size=config.batch, samples=config.samples)
        rates = {who: config.batch / found.median for who, found in times.items()}
        faster = {who: rates["effjax"] / rate for who, rate in rates.items() if who != "effjax"}
        rows.append({"name": name, "examples a second": rates, "times faster than": faster})
        ratios = ", ".join(f"{ratio:.2f}x {who}" for who, ratio in faster.items())
        print(f"{name}: {rates['effjax']:,.0f} a second; {ratios}", flush=True)
    return rows


def _on_device(run: Callable[[Array, Array], Array], key: Array, given: Array) -> Call:
    return lambda: run(key, given)


def _on_host(run: Any, rng: np.random.Generator, source: np.ndarray) -> Call:
    done = jnp.zeros(())  # nothing on the device to wait for

    def call() -> Array:
        run(rng, source)
        return done

    return call


def steps(config: Config) -> list[dict[str, Any]]:
    """What augmentation adds to a train step of the survey's CNN."""
    a = ej.augment
    augmentations = {
        "none": (),
        "crop, flip": (a.crop(4), a.flip()),
        "RandAugment": (a.randaugment(2, 9),),
        "AutoAugment": (a.autoaugment("cifar10"),),
    }
    rng = np.random.default_rng(0)
    shape = (config.batch, config.size, config.size, 3)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, shape) / 255, jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, config.batch)),
    }
    model, tx = cnn.model(cnn.Spec(config.width, size=config.size)), optax.adam(1e-3)
    calls: dict[str, Call] = {}
    for name, chosen in augmentations.items():
        transform = ej.chain(augment=a.images(*chosen)) if chosen else ej.chain()
        state = ej.init_state(jax.random.key(0), model, transform, tx, batch)
        step = jax.jit(ej.make_step(model.apply, transform, cross_entropy, tx))
        calls[name] = _step_of(step.lower(state, batch).compile(), state, batch)
    rounds = [
        ej.latency(calls, batch_size=config.batch, samples=config.samples)
        for _ in range(config.rounds)
    ]
    rows = []
    for name in augmentations:
        added = [found[name].median / found["none"].median - 1 for found in rounds]
        milliseconds = 1e3 * float(np.median([found[name].median for found in rounds]))
        rows.append({"name": name, "ms": milliseconds, "adds": float(np.median(added))})
        print(f"step, {name}: {milliseconds:.1f} ms, {np.median(added):+.1%}", flush=True)
    return rows


def _step_of(step: Callable[..., Any], state: Any, batch: Any) -> Call:
    return lambda: step(state, batch)


def run(config: Config) -> dict[str, Any]:
    """Times all, and writes `experiments/results/bench_augment_<platform>.json`."""
    result: dict[str, Any] = {"config": as_dict(config), "steps": steps(config)}
    result |= {"throughput": throughput(config), "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_augment_{jax.default_backend()}.json", result)
    return result
