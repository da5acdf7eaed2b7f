"""Where block-sparse products pay: `BlockSparse.matmul` against the dense product.

For each matrix, batch, block size and sparsity, with the kept blocks at random: milliseconds of
both, and how many times faster the sparse one is. Two structures: "even", where every column of
blocks keeps equally many, as pruning column by column gives, and "uneven", where the blocks are
drawn from the whole matrix, so that columns are filled up to the fullest one (one batch size).

Expected: on 2 CPU cores it pays at batch 1 from a sparsity of 0.5 on with any block; with blocks of
128 from 0.5 at any batch; of 64 from 0.7 to 0.8; of 32 from 0.7 at batch 32 and 0.8 to 0.9 at 256;
of 16 from 0.8 to 0.9. With uneven columns later, and with blocks of 32 not always.
Cost: 1 minute on 2 CPU cores.
Command: python -m experiments bench.block_sparse
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import effjax as ej
from effjax.prune.block_sparse import BlockSparse
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    shapes: tuple[tuple[int, int], ...] = ((1024, 1024), (4096, 1024))
    batches: tuple[int, ...] = (1, 32, 256)
    blocks: tuple[int, ...] = (16, 32, 64, 128)
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    uneven_batch: int = 32
    samples: int = 11
    save: bool = True

    def __post_init__(self) -> None:
        check(self, batches=(1, 10**6), blocks=(1, 4096), sparsities=(0.0, 1.0))
        check(self, samples=(1, 1000))


def run(config: Config) -> dict[str, Any]:
    """Measures, and writes `experiments/results/bench_block_sparse_<platform>.json`."""
    rows = [
        row
        for shape in config.shapes
        for batch in config.batches
        for row in measure(shape, batch, "even", config)
    ]
    for shape in config.shapes:
        rows += measure(shape, config.uneven_batch, "uneven", config)
    result = {
        "config": as_dict(config),
        "rows": rows,
        "crossover": crossover(rows),
        "load": os.getloadavg(),
        "provenance": provenance(config),
    }
    if config.save:
        write_json(RESULTS / f"bench_block_sparse_{jax.default_backend()}.json", result)
    return result


def mask(
    shape: tuple[int, int], block: int, sparsity: float, structure: str, rng: np.random.Generator
) -> np.ndarray:
    """Random kept blocks, bool [in, out]: the same number in each column, or in all."""
    rows, columns = (-(-n // block) for n in shape)
    order = rng.random((rows, columns))
    if structure == "even":
        grid = order.argsort(0).argsort(0) < max(1, round((1 - sparsity) * rows))
    else:
        kept = max(1, round((1 - sparsity) * rows * columns))
        grid = (order.ravel().argsort().argsort() < kept).reshape(rows, columns)
    return np.kron(grid, np.ones((block, block), bool))[: shape[0], : shape[1]].astype(bool)


def measure(
    shape: tuple[int, int], batch: int, structure: str, config: Config
) -> list[dict[str, Any]]:
    """A row for each block and sparsity; all of one block are timed in turns with the dense one."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(batch, shape[0])).astype(np.float32))
    dense, product = jax.jit(lambda x, w: x @ w), jax.jit(lambda x, s: s.matmul(x))
    rows = []
    for block in config.blocks:
        calls: dict[str, Callable[[], Array]] = {"dense": lambda: dense(x, w)}
        found = {}
        for sparsity in config.sparsities:
            kept = mask(shape, block, sparsity, structure, rng)
            sparse = BlockSparse.from_dense(w, kept, block)
            wanted = x @ jnp.where(kept, w, 0)
            np.testing.assert_allclose(product(x, sparse), wanted, atol=2e-3, rtol=1e-3)
            calls[str(sparsity)] = functools.partial(product, x, sparse)
            found[str(sparsity)] = sparse
        times = ej.latency(calls, batch_size=batch, samples=config.samples)
        whole = times["dense"].median
        for name, sparse in found.items():
            rows.append(
                {
                    "shape": list(shape),
                    "batch": batch,
                    "block": block,
                    "structure": structure,
                    "sparsity": float(name),
                    "work": sparse.work,
                    "ms": {"dense": 1e3 * whole, "sparse": 1e3 * times[name].median},
                    "times_faster": whole / times[name].median,
                }
            )
        shown = ", ".join(f"{row['sparsity']}: {row['times_faster']:.2f}x" for row in rows[-5:])
        print(
            f"{shape[0]}x{shape[1]}, batch {batch}, blocks {block}, {structure}: {shown}",
            flush=True,
        )
    return rows


def crossover(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case the smallest sparsity from which on the sparse product is never slower."""
    cases: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = (*row["shape"], row["batch"], row["block"], row["structure"])
        cases.setdefault(key, []).append(row)
    found = []
    for (size, out, batch, block, structure), group in cases.items():
        pays: float | None = None
        for row in sorted(group, key=lambda row: -row["sparsity"]):
            if row["times_faster"] < 1.0:
                break
            pays = row["sparsity"]
        case = {"shape": [size, out], "batch": batch, "block": block, "structure": structure}
        found.append({**case, "pays_from": pays})
    return found
