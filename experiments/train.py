"""One training: a small CNN, pruned and quantized as asked; what sweeps are made of.

Gradual magnitude pruning and quantization-aware training in one step, with hyper-parameters that
are arguments of the program: a sweep over seeds, sparsities, bits and learning rates compiles once,
and `--together` trains its runs side by side as a population.

    python -m experiments sweep train --over sparsity=0,0.5,0.8,0.9 bits=32,8 seed=0..2
    python -m experiments export runs/train/ID --to onnx litert stablehlo
    python -m experiments report 'sweeps/train-*/train/*' --quality accuracy --cost bytes

Nothing is published for this network; see `quickstart` and `sparsity_curve` for results.

Command: python -m experiments train
Cost: 10 seconds on 2 CPU cores.

Papers: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878; Jacob et
al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
2018, https://arxiv.org/abs/1712.05877.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches, standardized
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.exporting import Trained, restore
from experiments.harness.loop import fit
from experiments.harness.runs import open_run
from experiments.harness.together import fit_together
from experiments.models import strided
from experiments.sparse_report import cross_entropy, scores

NAME = "train"
# Runs that differ in these alone may share one program.
TOGETHER = ("seed", "sparsity", "bits", "learning_rate")
FLOAT = 32


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      sparsity: fraction of zeros in the kernels, the first and last excepted.
      bits: of weights and activations; 32 trains in floating point.
      learning_rate: the largest, of a cosine schedule.
      epochs: passes over the training split.
      batch: images a step.
      dataset: "digits" needs no download.
      seed: of the weights, the batches' order and all other random numbers.
    """

    sparsity: float = 0.8
    bits: int = 8
    learning_rate: float = 3e-3
    epochs: int = 10
    batch: int = 64
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, sparsity=(0, 0.99), bits=(2, 32), learning_rate=(1e-8, 10))
        check(self, epochs=(1, 10_000), batch=(1, 10_000))


class Task:
    """A data set, a network, and its training as a function of traced hyper-parameters."""

    def __init__(self, dataset: str, epochs: int, batch: int):
        self.images = images = data.load(dataset, validation=0.2)
        self.batches = make_batches(images.train.as_dict(), batch, 0, **images.standard)
        self.steps = epochs * self.batches.per_epoch
        self.model = strided.model(strided.Spec(classes=images.classes))
        self.validate = self.accuracy(images.validation, "validation/")
        self.test = self.accuracy(images.test, "")

    def transform(self, sparsity: Any, bits: Any, **others: Any) -> ej.Transform:
        """Pruning and quantization; other hyper-parameters are not their matter."""
        begin, end = self.steps // 5, max(self.steps // 5 + 1, 2 * self.steps // 3)
        every = max(1, self.steps // 40)
        prune = ej.prune.magnitude(sparsity, begin, end, every)
        return ej.chain(prune=prune, quant=ej.quantize.qat(bits, bits, start=self.steps // 3))

    def build(self, hyper: Mapping[str, Any]) -> ej.Run:
        """The functions of a run; see `effjax.population`."""
        transform = self.transform(**hyper)
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, self.steps // 20), self.steps)
        tx = optax.adam(lambda step: hyper["learning_rate"] * shape(step))

        def init(key: Array, batch: Any, frozen: Any) -> ej.TrainState:
            return ej.init_state(key, self.model, transform, tx, batch)

        step = ej.make_step(self.model.apply, transform, cross_entropy, tx)
        return ej.Run(init, step)

    def init(self, key: Array, hyper: Any) -> ej.TrainState:
        """The state of one run."""
        return self.build(hyper).init(key, self.batches.example, None)

    def step(self, state: ej.TrainState, batch: Any, hyper: Any) -> Any:
        """A step whose hyper-parameters are arguments: one program serves all runs."""
        return self.build(hyper).step(state, batch)

    def accuracy(self, split: data.Split, prefix: str) -> Any:
        """From (state, hyper-parameters) to the means over a split; compiled once for all runs."""

        def evaluate(seen: Any, batch: Any, frozen: Any) -> Any:
            state, hyper = seen
            return ej.make_eval(self.model.apply, self.transform(**hyper), scores)(state, batch)

        return evaluator(evaluate, split.as_dict(), prefix=prefix, **self.images.standard)

    def validator(self, hyper: Any) -> Callable[[ej.TrainState], dict[str, float]]:
        """From a run's state to its means over the validation split."""
        return lambda state: self.validate((state, hyper))


@functools.cache
def task(dataset: str, epochs: int, batch: int) -> Task:
    """The task of a config; runs of one process share what is compiled for it."""
    return Task(dataset, epochs, batch)


def hypers(config: Config) -> dict[str, Array]:
    """The traced hyper-parameters."""
    return {
        "sparsity": jnp.float32(config.sparsity),
        "bits": jnp.int32(config.bits),
        "learning_rate": jnp.float32(config.learning_rate),
    }


def run(config: Config) -> dict[str, Any]:
    """Trains, or goes on, and reports."""
    here, shared = open_run(NAME, config), task(config.dataset, config.epochs, config.batch)
    hyper, key = hypers(config), jax.random.key(config.seed)
    state = fit(
        here,
        shared.step,
        shared.init(key, hyper),
        dataclasses.replace(shared.batches, key=key),
        frozen=hyper,
        evaluate=shared.validator(hyper),
        **schedule(shared),
    ).state
    results = measure(shared, state, config)
    here.finish(results)
    return results


def schedule(shared: Task) -> dict[str, Any]:
    """How long a training is, and how often it is looked at and saved."""
    steps = shared.steps
    every = {"eval_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 4)}
    return {"steps": steps, "log_every": max(1, steps // 50), **every}


def measure(shared: Task, state: ej.TrainState, config: Config) -> dict[str, Any]:
    """The test accuracy, and what is stored."""
    transform = shared.transform(config.sparsity, config.bits)
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    params = ej.export(transform, state)
    cost = ej.footprint(params, facts=facts, model_state=state.model_state).totals
    seen = (state, hypers(config))
    return {
        "accuracy": shared.test(seen)["accuracy"],
        "validation": shared.validate(seen)["validation/accuracy"],
        "bytes": cost.bytes,
        "parameters": cost.parameters,
        "nonzeros": cost.nonzeros,
    }


def trained(path: Path, config: Config) -> Trained:
    """What a run left, its ranges of activations fixed by calibration, for export."""
    if config.bits >= FLOAT:
        raise ConfigError(
            f"{path} was trained in floating point (bits={config.bits}); there are no integers to "
            "export. Train with --bits 8, or fewer."
        )
    shared, hyper = task(config.dataset, config.epochs, config.batch), hypers(config)
    begin = shared.init(jax.random.key(config.seed), hyper)
    state = restore(path / "checkpoints", begin, shared.steps)
    params = ej.export(shared.transform(config.sparsity, config.bits), state)
    batches = [shared.batches(jnp.int32(i)) for i in range(8)]
    small = ej.quantize.ptq(
        shared.model, params, state.model_state, batches, config.bits, config.bits
    )
    test = standardized(
        jax.tree.map(jnp.asarray, shared.images.test.as_dict()), *shared.images.standard.values()
    )
    held = {name: np.asarray(x) for name, x in test.items()}
    accuracy = shared.test((state, hyper))["accuracy"]
    return Trained(shared.model.apply, *small, batches, held, accuracy)


def train_together(configs: Sequence[Config]) -> None:
    """Trains runs that differ in nothing but `TOGETHER` as one population."""
    first = configs[0]
    shared = task(first.dataset, first.epochs, first.batch)
    own = [hypers(config) for config in configs]
    keys = jnp.stack([jax.random.key(config.seed) for config in configs])
    fit_together(
        [open_run(NAME, config) for config in configs],
        shared.build,
        {name: jnp.stack([h[name] for h in own]) for name in own[0]},
        keys,
        shared.batches,
        keys,
        evaluate=[shared.validator(h) for h in own],
        **schedule(shared),
    )
