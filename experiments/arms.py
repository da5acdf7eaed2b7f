"""Arms of an experiment: trainings that differ in their transforms, and in nothing else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import effjax as ej
from effjax.core import PyTree
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.loop import fit
from experiments.harness.runs import Run
from experiments.sparse_report import cross_entropy, scores

Build = Callable[[Any], ej.Transform]
"""From a traced setting (bits, a sparsity, masks) to the transform that has it."""

Start = tuple[PyTree, PyTree]
"""What a training begins with: (params, model_state)."""


class Arm:
    """One transform on one task; what is compiled for it serves all its settings and seeds.

    AdamW, warmed up over a twentieth of the steps and then led to 0 by a cosine. Leaves that a
    pattern of `apart` matches have a constant rate of their own, and no weight decay.
    """

    def __init__(
        self,
        model: ej.Model,
        images: data.Dataset,
        build: Build,
        *,
        steps: int,
        batch: int,
        learning_rate: float,
        apart: Mapping[str, float] | None = None,
    ):
        self.model, self.build, self.steps = model, build, steps
        self.batches = make_batches(images.train.as_dict(), batch, 0, **images.standard)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, max(1, steps // 20), steps
        )
        rates: dict[str, Any] = {pattern: optax.adam(own) for pattern, own in (apart or {}).items()}
        rates["weights"] = optax.adamw(schedule, weight_decay=1e-4)
        rules = [*((pattern, pattern) for pattern in apart or ()), ("", "weights")]
        self.tx = tx = optax.partition(rates, lambda vars: ej.select.label_tree(vars, rules))
        example = self.batches.example

        def init(key: Array, setting: PyTree, frozen: PyTree, start: Start) -> ej.TrainState:
            params, model_state = start
            return ej.init_state(
                key,
                model,
                build(setting),
                tx,
                example,
                frozen,
                params=params,
                model_state=model_state,
            )

        def step(state: ej.TrainState, batch: PyTree, given: tuple[PyTree, PyTree]) -> Any:
            setting, frozen = given
            one = ej.make_step(model.apply, build(setting), cross_entropy, tx)
            return one(state, batch, frozen)

        def measured(given: tuple[ej.TrainState, PyTree], batch: PyTree, frozen: PyTree) -> Any:
            state, setting = given
            return ej.make_eval(model.apply, build(setting), scores)(state, batch, frozen)

        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = step
        self.test = evaluator(
            measured, images.test.as_dict(), size=1_000, prefix="test/", **images.standard
        )

    def begin(
        self, seed: int, setting: PyTree = 0.0, frozen: PyTree = None, start: Start = (None, None)
    ) -> ej.TrainState:
        """The state before training."""
        return self.init(jax.random.key(seed), arrays(setting), frozen, start)

    def examples(self, count: int, size: int) -> list[dict[str, Any]]:
        """Batches of training images that all seeds calibrate with."""
        batches = dataclasses.replace(self.batches, size=size)
        one = jax.jit(lambda batches, step: batches(step))
        return [one(batches, step) for step in range(count)]

    def score(self, state: ej.TrainState, setting: PyTree) -> dict[str, float]:
        """Of the test set."""
        return self.test((state, arrays(setting)))

    def train(
        self,
        part: Run,
        seed: int,
        setting: PyTree = 0.0,
        frozen: PyTree = None,
        start: Start = (None, None),
    ) -> tuple[ej.TrainState, dict[str, Any]]:
        """The trained state, and its last metrics, those of the test set among them."""
        asked = arrays(setting)
        fitted = fit(
            part,
            self.step,
            self.begin(seed, setting, frozen, start),
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=self.steps,
            frozen=(asked, frozen),
            evaluate=lambda state: self.score(state, asked),
            # Seconds long: a training that is stopped begins again.
            checkpoint_every=self.steps,
            log_every=max(1, self.steps // 50),
        )
        return fitted.state, fitted.metrics


def arrays(setting: PyTree) -> PyTree:
    """Numbers as float32 arrays, so that one program takes them all."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.float32(x), setting)


def weights(state: ej.TrainState) -> Start:
    """What another training begins with."""
    return state.vars.model, state.model_state
