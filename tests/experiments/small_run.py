"""A small real run for the tests that kill it: digits, an MLP with dropout, pruned and distilled.

Run as a program, it is what such a test starts again and again: `python small_run.py --steps 60`.
"""

import argparse
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import effjax as ej
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.data import load
from experiments.harness.errors import ExperimentError, Interrupted
from experiments.harness.loop import Fitted, fit
from experiments.harness.progress import say
from experiments.harness.runs import open_run


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(24)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 60
    checkpoint_every: int = 10
    eval_every: int = 20
    rate: float = 3e-3
    seed: int = 0


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def accuracy(logits, batch):
    return {"accuracy": (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)}


def setup(config: Config, loss: Any = cross_entropy) -> dict[str, Any]:
    """The arguments of `fit`."""
    data = load("digits", seed=config.seed)
    batches = make_batches(data.train.as_dict(), 32, config.seed, **data.standard)
    model, tx = ej.from_linen(MLP()), optax.adam(config.rate)
    teacher = ej.distill.Teacher(*jax.jit(lambda b: model.init(jax.random.key(99), b(0)))(batches))
    transform = ej.chain(
        kd=ej.distill.logits(model.apply, alpha=0.1),
        prune=ej.prune.magnitude(
            0.8, begin=0, end=max(2, config.steps // 2), every=5, select="kernel$"
        ),
    )
    frozen = {"kd": teacher}
    state = ej.init_state(
        jax.random.key(config.seed), model, transform, tx, batches.example, frozen
    )
    return {
        "step": ej.make_step(model.apply, transform, loss, tx, accuracy),
        "state": state,
        "batches": batches,
        "frozen": frozen,
        "steps": config.steps,
        "checkpoint_every": config.checkpoint_every,
        "eval_every": config.eval_every,
        "evaluate": evaluator(
            ej.make_eval(model.apply, transform, accuracy),
            data.validation.as_dict(),
            **data.standard,
            prefix="validation/",
            frozen=frozen,
        ),
    }


def run(config: Config) -> Fitted:
    folder = open_run("small", config)
    fitted = fit(folder, **setup(config))
    folder.finish(fitted.metrics)
    return fitted


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    try:
        run(Config(**vars(parser.parse_args())))
    except Interrupted as stop:
        say(stop.message)
        raise
    except ExperimentError as error:
        raise SystemExit(str(error)) from None
