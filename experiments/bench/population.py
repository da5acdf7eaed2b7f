"""What a population costs: K pruned runs side by side, mapped, and as separate runs in turn.

Each run trains with a learning rate and a sparsity of its own, traced: a fully connected network
and a small CNN on 8x8 digits. Times are of one step of all K runs; "separate" steps K states of
their own by one jitted step, which is what a loop over runs does. First calls include compilation.

Expected: on CPU mapping costs what separate runs cost, within 10%, and side by side is 2 to 4 times
slower for the CNN at K = 8; on an accelerator side by side is there to win.
Cost: 3 minutes on 2 CPU cores.
Command: python -m experiments bench.population
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from experiments.harness.config import as_dict, check
from experiments.harness.data import load
from experiments.harness.provenance import provenance, write_json
from experiments.models import cnn, mlp

RESULTS = Path(__file__).parents[1] / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    runs: tuple[int, ...] = (1, 4, 8)
    batch: int = 64
    samples: int = 15
    save: bool = True

    def __post_init__(self) -> None:
        check(self, runs=(1, 4096), batch=(1, 1024), samples=(1, 10_000))


def models() -> dict[str, ej.Model]:
    """The two networks, for 8x8 images of one channel."""
    small = cnn.Spec(size=8, channels=1, stages=(16, 32), hidden=64)
    return {"mlp": mlp.model(mlp.Spec(inputs=64)), "cnn": cnn.model(small)}


def builder(model: ej.Model) -> Callable[[Any], ej.Run]:
    """Runs that are pruned by magnitude, under Adam."""

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    def build(hyper: Any) -> ej.Run:
        transform = ej.chain(
            prune=ej.prune.magnitude(hyper["sparsity"], begin=100, end=1000, select="kernel$")
        )
        tx = optax.adam(hyper["lr"])

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch, frozen)

        return ej.Run(init, ej.make_step(model.apply, transform, loss, tx))

    return build


def run(config: Config) -> dict[str, Any]:
    """Times the networks and writes `experiments/results/bench_population_<platform>.json`."""
    data = load("digits").train
    batch = {
        "image": jnp.asarray(data.image[: config.batch], jnp.float32) / 16,
        "label": jnp.asarray(data.label[: config.batch]),
    }
    rows = []
    for name, model in models().items():
        for size in config.runs:
            row = {"model": name, "runs": size, **_row(builder(model), size, batch, config)}
            rows.append(row)
            shown = ", ".join(f"{n} {t:.2f} ms" for n, t in row["step_ms"].items())
            ratios = ", ".join(f"{n} {r:.2f}" for n, r in row["speed"].items())
            print(f"{name}, K = {size}: {shown}; speed against separate runs: {ratios}")
    result = {"config": as_dict(config), "rows": rows, "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_population_{jax.default_backend()}.json", result)
    return result


def _row(build: Callable[[Any], ej.Run], size: int, batch: Any, config: Config) -> dict[str, Any]:
    lr = np.linspace(1e-3, 1e-2, size)
    hypers = {"lr": jnp.asarray(lr, jnp.float32), "sparsity": jnp.linspace(0.5, 0.9, size)}
    keys = jax.random.split(jax.random.key(0), size)
    single = jax.jit(lambda hyper, state, batch: build(hyper).step(state, batch))
    populations = {m: ej.population(build, hypers, m) for m in ("map", "vmap")}
    apart = populations["map"].init(keys, batch)
    stacked = populations["map"].stack(apart)
    own = [jax.tree.map(lambda x, k=k: x[k], hypers) for k in range(size)]
    calls: dict[str, Callable[[], Any]] = {
        "separate": lambda: [single(h, s, batch) for h, s in zip(own, apart, strict=True)],
        "map": lambda: populations["map"].step(apart, batch),
        "vmap": lambda: populations["vmap"].step(stacked, batch),
    }
    first = {name: _seconds(call) for name, call in calls.items()}
    _check_equal(calls, size)
    found = ej.latency(calls, batch_size=size * config.batch, samples=config.samples)
    times = {name: 1e3 * timed.median for name, timed in found.items()}
    return {
        "step_ms": times,
        "speed": {name: times["separate"] / times[name] for name in ("map", "vmap")},
        "first_call_s": first,
        "device": found["map"].device,
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _check_equal(calls: dict[str, Callable[[], Any]], size: int) -> None:
    """The three ways agree, else their times mean nothing."""
    separate = [metrics["loss"] for _, metrics in calls["separate"]()]
    np.testing.assert_array_equal(calls["map"]()[1]["loss"], jnp.stack(separate))
    np.testing.assert_allclose(calls["vmap"]()[1]["loss"], jnp.stack(separate), rtol=1e-4)
