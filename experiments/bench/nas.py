"""Search spaces: candidates drawn and mutated per second, jitted, on the device at hand.

Two spaces: the cell of NAS-Bench-201 (6 genes of 5 values), and a compressed network with
conditional bits and sparsities (24 genes).

Expected: 10^6 candidates a second or more, each drawn and mutated, on CPU.
Cost: 10 seconds.
Command: python -m experiments bench.nas
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from effjax.nas import Choice, Float, Integer, Repeat, Space, When
from experiments.harness.config import check
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SPACES = {
    "NAS-Bench-201": Space({"edge": Repeat(6, {"op": Integer(0, 4)})}),
    "compressed network": Space(
        {
            "layer": Repeat(
                8,
                {
                    "method": Choice(("none", "quantize", "prune")),
                    "bits": When("method", ("quantize",), Integer(2, 8)),
                    "sparsity": When("method", ("prune",), Float(0.5, 0.95, 10)),
                },
            )
        }
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How many candidates a call, and how many calls are timed."""

    candidates: int = 100_000
    samples: int = 9
    save: bool = True

    def __post_init__(self) -> None:
        check(self, candidates=(1, 10**8), samples=(1, 1000))


def run(config: Config) -> dict[str, Any]:
    """Medians, written to `experiments/results/bench_nas_<platform>.json`."""
    rows = [_row(name, space, config) for name, space in SPACES.items()]
    result = {"rows": rows, "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_nas_{jax.default_backend()}.json", result)
    return {row["name"]: f"{row['per second']:,.0f} a second" for row in rows}


def _row(name: str, space: Space, config: Config) -> dict[str, Any]:
    @jax.jit
    def both(key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        return space.mutate(second, space.sample(first, (config.candidates,)))

    both(jax.random.key(0)).block_until_ready()
    times = []
    for i in range(config.samples):
        began = time.perf_counter()
        both(jax.random.key(i)).block_until_ready()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    return {"name": name, "genes": len(space.names), "per second": config.candidates / median}
