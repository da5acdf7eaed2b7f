"""What pruning costs: thresholds against a sort, patterns, steps that move no mask, and devices.

Four measurements. `thresholds`: masks of the largest magnitudes of one matrix, of ten layers by
one global threshold, and of each of the ten by itself, by `prune.threshold.largest` against
`jnp.sort` and `lax.top_k`, which may keep more where scores tie at the threshold; ours are checked
against a stable NumPy sort. `patterns`: N:M masks, and those of blocks and channels with their
scores, against one read of the weights (their sum) and against the least that a mask costs (one
read, one comparison, one write). `steps`: train steps between two moves of the masks, against the
same masked training without anything that could move them ("held") and against dense training;
states are donated, as in training. `devices`: the same update compiled for 8 virtual CPU devices.

Expected: at 10^7 weights 20 times faster than a sort, on CPU; a step that moves no mask within 2%
of the held one; between devices nothing but counts, and memory of a few shards.
Cost: 5 minutes on 2 CPU cores.
Command: python -m experiments bench.prune
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

import effjax as ej
from effjax.prune import budgets, masks, patterns, scores, threshold
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import provenance, write_json
from experiments.models import cnn, mlp

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
Tree = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed; add 100_000_000 to `sizes` where there is memory and time for its sorts."""

    sizes: tuple[int, ...] = (1_000_000, 10_000_000)
    sparsity: float = 0.8
    samples: int = 5
    steps: int = 40
    rounds: int = 3
    devices: int = 8
    save: bool = True

    def __post_init__(self) -> None:
        check(self, sizes=(1000, 10**9), sparsity=(0.0, 0.99), samples=(1, 1000))
        check(self, steps=(1, 10_000), rounds=(1, 100), devices=(2, 64))


def run(config: Config) -> dict[str, Any]:
    """Measures all four and writes `experiments/results/bench_prune_<platform>.json`."""
    result = {
        "config": as_dict(config),
        "thresholds": [row for size in config.sizes for row in thresholds(size, config)],
        "patterns": [row for size in config.sizes for row in shapes(size, config)],
        "steps": [step_row(name, config) for name in networks()],
        "devices": devices(config),
        "provenance": provenance(config),
    }
    if config.save:
        write_json(RESULTS / f"bench_prune_{jax.default_backend()}.json", result)
    return result


# Thresholds.


def layers(size: int) -> Tree:
    """Ten kernels with about `size` weights in all: five matrices and five convolutions."""
    side, channels = round((size / 10) ** 0.5), round((size / 90) ** 0.5)
    shapes = {f"dense_{i}": (side, side) for i in range(5)}
    return _normal(shapes | {f"conv_{i}": (3, 3, channels, channels) for i in range(5)})


def matrix(size: int) -> Tree:
    """One square kernel of about `size` weights."""
    return _normal({"kernel": (round(size**0.5),) * 2})


def _normal(shapes: dict[str, tuple[int, ...]]) -> Tree:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=s).astype(np.float32)) for n, s in shapes.items()}


def by_bisection(weights: Tree, keep: Any) -> Tree:
    return threshold.largest({path: jnp.abs(w) for path, w in weights.items()}, keep)


def by_order(kth: Callable[[Array, int], Array]) -> Callable[[Tree, Any], Tree]:
    """Masks from a function that gives the k-th largest of a flat array."""

    def find(weights: Tree, keep: Any) -> Tree:
        scores = {path: jnp.abs(w) for path, w in weights.items()}
        if isinstance(keep, dict):
            return {path: s >= kth(s.ravel(), keep[path]) for path, s in scores.items()}
        bound = kth(jnp.concatenate([s.ravel() for s in scores.values()]), keep)
        return {path: s >= bound for path, s in scores.items()}

    return find


METHODS: dict[str, Callable[[Tree, Any], Tree]] = {
    "bisection": by_bisection,
    "jnp.sort": by_order(lambda scores, k: jnp.sort(scores)[scores.size - k]),
    "lax.top_k": by_order(lambda scores, k: lax.top_k(scores, k)[0][-1]),
}


def thresholds(size: int, config: Config) -> list[dict[str, Any]]:
    """A row for each scope: milliseconds by method, and how many times ours is faster."""
    rows = []
    for scope in ("one leaf", "global", "layer"):
        weights = matrix(size) if scope == "one leaf" else layers(size)
        sizes = {path: w.size for path, w in weights.items()}
        keep: Any = int(budgets.keep(sum(sizes.values()), config.sparsity))
        if scope == "layer":
            keep = {p: int(budgets.keep(n, config.sparsity)) for p, n in sizes.items()}
        calls = {}
        for name, method in METHODS.items():
            compiled = jax.jit(lambda w, method=method, keep=keep: method(w, keep))
            calls[name] = lambda compiled=compiled, weights=weights: compiled(weights)
        _check_exact(calls["bisection"](), weights, keep)
        found = ej.latency(calls, batch_size=1, samples=config.samples, warmup=0)
        ms = {name: 1e3 * timed.median for name, timed in found.items()}
        faster = {f"vs {name}": ms[name] / ms["bisection"] for name in list(METHODS)[1:]}
        total = sum(sizes.values())
        rows.append({"weights": total, "scope": scope, "ms": ms, "times_faster": faster})
        shown = ", ".join(f"{name} {t:.1f} ms" for name, t in ms.items())
        ratios = ", ".join(f"{name} {r:.1f}x" for name, r in faster.items())
        print(f"{total:.1e} weights, {scope}: {shown}; {ratios}", flush=True)
    return rows


def _check_exact(found: Tree, weights: Tree, keep: Any) -> None:
    """Our masks are those of a stable sort, else their time means nothing."""
    groups = [[p] for p in weights] if isinstance(keep, dict) else [list(weights)]
    for group in groups:
        flat = np.concatenate([np.abs(np.asarray(weights[p])).ravel() for p in group])
        kept = keep[group[0]] if isinstance(keep, dict) else keep
        wanted = np.zeros(flat.size, bool)
        wanted[np.argsort(-flat, kind="stable")[:kept]] = True
        ours = np.concatenate([np.asarray(found[p]).ravel() for p in group])
        np.testing.assert_array_equal(ours, wanted)


# Patterns.


def shapes(size: int, config: Config) -> list[dict[str, Any]]:
    """A row for each pattern: milliseconds, and how many reads of the weights that is."""
    side = round(size**0.5 / 160) * 160
    weight = matrix(side * side)["kernel"]
    made = {
        "2:4": patterns.n_m(2, 4),
        "2:4 along the last axis": patterns.n_m(2, 4, axis=-1),
        "1:4": patterns.n_m(1, 4),
        "4:8": patterns.n_m(4, 8),
        "block 4x4": patterns.block((4, 4)),
        "block 32x32": patterns.block((32, 32)),
        "channel": patterns.channel(),
    }
    total = jax.jit(jnp.sum)
    compared = jax.jit(lambda w: jnp.abs(w) >= 1.0)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: total(weight),
        "comparison": lambda: compared(weight),
    }
    for name, pattern in made.items():
        calls[name] = functools.partial(jax.jit(functools.partial(_mask, pattern, config)), weight)
    found = ej.latency(calls, batch_size=1, samples=4 * config.samples)
    rows = []
    for name in made:
        reads, comparisons = (found[name].median / found[n].median for n in ("read", "comparison"))
        rows.append(
            {
                "weights": weight.size,
                "pattern": name,
                "ms": 1e3 * found[name].median,
                "reads": reads,
                "comparisons": comparisons,
            }
        )
        print(
            f"{weight.size:.1e} weights, {name}: {reads:.1f} reads, {comparisons:.1f} comparisons",
            flush=True,
        )
    return rows


def _mask(pattern: patterns.Pattern, config: Config, weight: Array) -> Array:
    layer = {"": budgets.Layer(weight.shape, pattern.units(weight.shape))}

    def allocate(units: Any) -> budgets.Budget:
        return budgets.uniform(layer, units, config.sparsity)

    return pattern.choose({"": scores.magnitude(weight)}, allocate)[""]


# Steps that move no mask.


def networks() -> dict[str, tuple[ej.Model, tuple[int, ...]]]:
    """By name: a model and the shape of its batch of images."""
    small = cnn.Spec(size=32, channels=3, stages=(16, 32), hidden=64, dropout=0.0)
    wide = mlp.Spec(inputs=3072, hidden=(1000, 1000))
    return {
        "cnn": (cnn.model(small), (64, 32, 32, 3)),
        "lenet-300-100": (mlp.model(), (128, 28, 28, 1)),
        "mlp of 4 million weights": (mlp.model(wide), (128, 32, 32, 3)),
    }


def step_row(name: str, config: Config) -> dict[str, Any]:
    """Milliseconds of a dense, a held and an effjax step, and the ratios to the last."""
    model, shape = networks()[name]
    image = jax.random.normal(jax.random.key(0), shape)
    batch = {"image": image, "label": jnp.arange(shape[0]) % 10}
    # The masks move in step 0, which is not timed, and then not before step 10^6.
    sparsity, late = config.sparsity, 10**6
    gradual = ej.prune.magnitude(sparsity, end=late, every=late, initial=sparsity, select="kernel$")
    held = gradual._replace(update=_held, report=lambda vars, state, aux, ctx: {})
    calls: dict[str, Callable[[], Any]] = {
        "dense": _trainer(model, ej.chain(), None, batch),
        "held": _trainer(model, ej.chain(prune=gradual), ej.chain(prune=held), batch),
        "effjax": _trainer(model, ej.chain(prune=gradual), ej.chain(prune=gradual), batch),
    }
    ratios: dict[str, list[float]] = {"held": [], "dense": []}
    for _ in range(config.rounds):
        found = ej.latency(calls, batch_size=shape[0], samples=config.steps)
        for other, seen in ratios.items():
            seen.append(found["effjax"].median / found[other].median)
    ms = {n: 1e3 * timed.median for n, timed in found.items()}
    overhead = {f"vs {n}": float(np.median(seen)) - 1 for n, seen in ratios.items()}
    shown = ", ".join(f"{n} {t:.2f} ms" for n, t in ms.items())
    print(f"{name}: {shown}; overhead {_percent(overhead)}", flush=True)
    return {"network": name, "ms": ms, "overhead": overhead, "ratios": ratios}


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:+.1f}%" for name, share in shares.items())


def _held(vars, opt, state, grads, aux, ctx):
    """The update of masked training whose masks never move."""
    return vars._replace(model=masks.apply(vars.model, state["mask"])), opt, state


def _trainer(model, first, then, batch) -> Callable[[], Any]:
    """Calls that train on: one step of the first transform, and from there on of the second."""
    tx = optax.adam(1e-3)

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    def step_of(transform):
        step = ej.make_step(model.apply, transform, loss, tx)
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    state = ej.init_state(jax.random.key(0), model, first, tx, batch)
    begin = step_of(first)
    step = begin if then is None or then is first else step_of(then)
    state, _ = begin(state, batch)

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return state.vars, metrics

    return call


# Devices.


def devices(config: Config) -> list[dict[str, Any]]:
    """What `sharded` finds in a process of its own that has that many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={config.devices}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
    }
    code = f"from experiments.bench.prune import main; main({config.devices}, {config.sparsity})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the process with {config.devices} devices failed:\n{done.stderr}")
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        moved = ", ".join(f"{count} {name}" for name, count in row["collectives"].items())
        print(
            f"{row['devices']} devices, {row['scope']}: {moved or 'nothing moved'} of at most "
            f"{row['largest_collective']} numbers each; {row['temp_in_shards']:.2f} shards of "
            "temporary memory",
            flush=True,
        )
    return rows


def main(count: int, sparsity: float) -> None:
    """Prints `sharded` as JSON."""
    print(json.dumps(sharded(count, sparsity)))


def sharded(count: int, sparsity: float, size: int = 1_000_000) -> list[dict[str, Any]]:
    """Compiles the masks of ten sharded layers and says what moves between devices."""
    mesh = jax.make_mesh((count // 2, 2), ("data", "model"))
    weights = {path: w[..., : w.shape[-1] // count * count] for path, w in layers(size).items()}
    lying = {path: jax.device_put(w, _last_axis(mesh, w)) for path, w in weights.items()}
    shard = sum(w.addressable_shards[0].data.nbytes for w in lying.values())
    rows = []
    sizes = {path: w.size for path, w in weights.items()}
    every: dict[str, Any] = {
        "global": budgets.keep(sum(sizes.values()), sparsity),
        "layer": {path: budgets.keep(size, sparsity) for path, size in sizes.items()},
    }
    for scope, keep in every.items():
        compiled = jax.jit(lambda w, keep=keep: by_bisection(w, keep)).lower(lying).compile()
        ours, alone = compiled(lying), jax.jit(lambda w, keep=keep: by_bisection(w, keep))(weights)
        jax.tree.map(np.testing.assert_array_equal, ours, alone)
        kinds = re.findall(
            r"= (\([^)]*\)|\S+) (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text() or ""
        )
        numbers = [
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for shape, _ in kinds
            for dims in re.findall(r"\[([\d,]*)\]", shape)
        ]
        names = [name for _, name in kinds]
        rows.append(
            {
                "devices": count,
                "scope": scope,
                "collectives": {name: names.count(name) for name in sorted(set(names))},
                "largest_collective": max(numbers, default=0),
                "temp_in_shards": cast(Any, compiled.memory_analysis()).temp_size_in_bytes / shard,
            }
        )
    return rows


def _last_axis(mesh: Any, w: Array) -> NamedSharding:
    axes = (None,) * (w.ndim - 1)
    return NamedSharding(mesh, PartitionSpec(*axes, ("data", "model")))


if __name__ == "__main__":
    run(Config())
