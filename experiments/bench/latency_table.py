"""Predicted against measured latency, on networks that the predictor was not fitted to.

Sub-networks of a family of small CNNs (depth, widths, kernel sizes, plain or depthwise-separable
convolutions) are drawn at random. A table of latencies is filled for their sites; a linear model of
the table's sum, the number of sites and the bytes that they move is fitted to the measured times of
one part of the networks, and predicts the others'. Beside it, models of what is known without a
table: MACs, and MACs with bytes.

Published (Cai et al., ProxylessNAS): a lookup table per block predicts the latency of mobile
networks on a phone with a root mean square error of 0.75 ms on about 80 ms. There, blocks run one
after another; XLA's CPU backend runs a layer on several threads and fuses what follows it.

Expected: a mean error of 10% or less; a table is better than MACs.
Cost: 4 minutes on 2 CPU cores (an estimate); nothing else should run meanwhile.
Command: python -m experiments bench.latency_table
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import effjax as ej
from effjax.cost import LatencyTable, fit_latency, latency_features
from effjax.cost.predict import TABLE
from effjax.nas import Choice, Repeat, Space, When
from experiments.harness.config import check
from experiments.harness.progress import say
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SPACE = Space(
    {
        "stage": Repeat(
            3,
            {
                "blocks": Choice((1, 2, 3)),
                "width": Choice((8, 16, 32, 64)),
                "kernel": Choice((3, 5)),
                "kind": Choice(("plain", "separable")),
                "expand": When("kind", ("separable",), Choice((1, 2, 4))),
            },
        )
    }
)
MODELS = {
    "table": (TABLE, "sites", "bytes"),
    "table alone": (TABLE,),
    "MACs": ("macs",),
    "MACs and bytes": ("macs", "bytes", "sites"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How many networks are fitted and held out, and how they are measured.

    Attributes:
      fitted, held: networks.
      batch, size: images in a batch, and their side.
      samples: of every latency.
      seed: of the draws.
      save: whether to write the results.
    """

    fitted: int = 40
    held: int = 40
    batch: int = 8
    size: int = 32
    samples: int = 20
    seed: int = 0
    save: bool = True

    def __post_init__(self) -> None:
        check(self, fitted=(5, 10_000), held=(2, 10_000), batch=(1, 10_000), size=(8, 1024))
        check(self, samples=(1, 1000))


class Net(nn.Module):
    """A sub-network of the family. `[batch, side, side, 3] -> logits [batch, 10]`."""

    stages: tuple[dict[str, Any], ...]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for stage in self.stages:
            for block in range(stage["blocks"]):
                stride, width = (2, 2) if block == 0 else (1, 1), stage["width"]
                window = (stage["kernel"], stage["kernel"])
                if stage["kind"] == "plain":
                    x = self.unit(nn.Conv(width, window, stride, use_bias=False)(x))
                    continue
                inner = stage["expand"] * x.shape[-1]
                x = self.unit(nn.Conv(inner, (1, 1), use_bias=False)(x))
                x = nn.Conv(inner, window, stride, feature_group_count=inner, use_bias=False)(x)
                x = nn.Conv(width, (1, 1), use_bias=False)(self.unit(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))

    def unit(self, x: Array) -> Array:
        """What follows a convolution."""
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


def networks(config: Config) -> list[dict[str, Any]]:
    """Different networks, drawn uniformly."""
    wanted = config.fitted + config.held
    drawn = np.asarray(SPACE.sample(jax.random.key(config.seed), (4 * wanted,)))
    found = list({row.tobytes(): row for row in drawn}.values())[:wanted]
    return [SPACE.decode(row) for row in found]


def run(config: Config) -> dict[str, Any]:
    """Measures, fits and predicts; writes `experiments/results/bench_latency_table_<platform>`."""
    table = LatencyTable(samples=config.samples)
    batch = {"image": jnp.ones((config.batch, config.size, config.size, 3))}
    features, calls = [], {}
    for number, found in enumerate(networks(config)):
        model = ej.from_linen(Net(tuple(found["stage"])))
        params, state = _values(jax.eval_shape(model.init, jax.random.key(0), batch))
        features.append(latency_features(table, model.apply, params, batch, state))
        calls[str(number)] = _call(model, params, state, batch)
        if (number + 1) % 10 == 0:
            say(f"{number + 1} networks, {len(table)} operations in the table")
    # All in turns: a slow moment of the machine falls on all alike.
    times = ej.latency(calls, batch_size=config.batch, samples=config.samples)
    seconds = [times[name].median for name in calls]
    cut = config.fitted
    rows = []
    for name, use in MODELS.items():
        fitted = fit_latency(features[:cut], seconds[:cut], use)
        error = fitted.error(features[cut:], seconds[cut:])._asdict()
        inside = fitted.error(features[:cut], seconds[:cut]).mean
        rows.append({"name": name, **error, "fitted": inside, "model": fitted._asdict()})
    result: dict[str, Any] = {"rows": rows, "operations": len(table)}
    result |= {"features": features, "seconds": seconds, "device": times["0"].device}
    if config.save:
        path = RESULTS / f"bench_latency_table_{jax.default_backend()}.json"
        write_json(path, {**result, "provenance": provenance(config)})
    spread = f"{1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f} ms"
    return {"measured": spread, "operations": len(table)} | {
        r["name"]: f"{r['mean']:.1%} mean error, {r['worst']:.1%} worst, rank correlation "
        f"{r['spearman']:.3f}" for r in rows
    }  # fmt: skip


def _values(shapes: Any) -> Any:
    """Small random numbers: what they are does not matter, but zeros and NaNs may be quicker."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.01, 0.1, x.shape), x.dtype), shapes)


def _call(model: ej.Model, params: Any, state: Any, batch: Any) -> Any:
    predict = jax.jit(lambda p, s, b: model.apply(p, s, b, jax.random.key(0), False)[0])
    return lambda: predict(params, state, batch)
