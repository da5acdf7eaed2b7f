"""Models in integers: `ej.quantize.integer` against the same models in float32.

Trained with `qat` at 8 bits with static ranges and calibrated on one batch: an MLP, one whose
weights no cache holds, a CNN with BatchNorm, a transformer block (its projections; then also
attention's products), and a depthwise-separable CNN. For each and each batch: milliseconds of the
float32 model, of the integer one, and of evaluation under `qat`, which rounds floats; how many
times faster integers are; how far the outputs are from those under `qat`, in units of an 8-bit grid
over them; and bytes. And how much faster XLA's own product of matrices is in int8: integer programs
are made of such products, with the weights transposed, which makes few rows faster still.

Convolutions are timed in the ways XLA can be asked for them: "integer" is what `integer` does on
CPU, where convolutions of few channels are matrix products of patches and depthwise ones sums of
shifted products; "XLA int8" has the int8 convolutions themselves; "float" has grouped convolutions
on rounded floats. XLA's depthwise int8 convolution is slower than its float one, which is why one
would leave it in float; the shifted products are faster than both, because they are one fused loop.

Expected: what int8 gives depends on the processor. On a core with AVX-512 VNNI and without AMX,
where XLA's int8 product takes 1.4 to 1.5 times less than its float32 one: 1.5 to 2 times for the
MLP, up to 3.8 for the wide one, 1.3 to 2.3 for the CNN, 1.3 to 1.9 for the transformer and 6 to 8
for the depthwise CNN.
Cost: 4 minutes of one CPU core.
Command: taskset -c 1 python -m experiments bench.integer
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
ASKED = {"mlp": 3.0, "cnn": 2.0, "transformer": 1.5}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    kinds: tuple[str, ...] = ("mlp", "wide mlp", "cnn", "transformer", "attention", "depthwise")
    batches: tuple[int, ...] = (1, 8, 32, 128)
    samples: int = 15
    save: bool = True

    def __post_init__(self) -> None:
        check(self, batches=(1, 10**4), samples=(1, 1000))


class MLP(nn.Module):
    """Three hidden layers."""

    units: int = 1024

    @nn.compact
    def __call__(self, x, train):
        for i in range(3):
            x = nn.relu(nn.Dense(self.units, name=f"hidden{i}")(x))
        return nn.Dense(10, name="head")(x)


class CNN(nn.Module):
    """Convolutions of 32, 64, 64, 128 and 128 channels with BatchNorm, on 32x32 images."""

    @nn.compact
    def __call__(self, x, train):
        for i, (features, stride) in enumerate([(32, 1), (64, 2), (64, 1), (128, 2), (128, 1)]):
            x = nn.Conv(features, (3, 3), stride, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


class Block(nn.Module):
    """A transformer encoder block of width 256 with 4 heads, on 64 tokens."""

    @nn.compact
    def __call__(self, x, train):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(h)
        h = nn.relu(nn.Dense(1024, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(256, name="down")(h)


class Depthwise(nn.Module):
    """A stem and four depthwise-separable layers with BatchNorm, on 32x32 images."""

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.relu(nn.BatchNorm(use_running_average=not train)(x))

        x = norm(nn.Conv(32, (3, 3), 2, use_bias=False, name="stem")(x))
        for i, (features, stride) in enumerate([(64, 1), (128, 2), (128, 1), (256, 2)]):
            groups = x.shape[-1]
            kwargs = {"feature_group_count": groups, "use_bias": False}
            x = norm(nn.Conv(groups, (3, 3), stride, **kwargs, name=f"depthwise{i}")(x))
            x = norm(nn.Conv(features, (1, 1), use_bias=False, name=f"pointwise{i}")(x))
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (MLP, (784,), {}),
    "wide mlp": (functools.partial(MLP, 4096), (784,), {}),
    "cnn": (CNN, (32, 32, 3), {}),
    "transformer": (Block, (64, 256), {}),
    "attention": (Block, (64, 256), {"products": True}),
    "depthwise": (Depthwise, (32, 32, 3), {}),
}
SUMS = {"int8": jnp.int32, "float32": jnp.float32}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "cnn": {"XLA int8": {"backend": "tpu"}},
    "depthwise": {"XLA int8": {"backend": "tpu"}, "float": {"grouped": "float"}},
}


def run(config: Config) -> dict[str, Any]:
    """Measures, and writes `experiments/results/bench_integer_<platform>.json`."""
    rows = [row for kind in config.kinds for row in measure(kind, config)]
    result = {
        "config": as_dict(config),
        "rows": rows,
        "products": products(config),
        "asked": ASKED,
        "load": os.getloadavg(),
        "provenance": provenance(config),
    }
    if config.save:
        write_json(RESULTS / f"bench_integer_{jax.default_backend()}.json", result)
    return result


def products(config: Config) -> list[dict[str, float]]:
    """How many times as fast XLA multiplies [batch, 1024] by [1024, 1024] in int8 as in float32: of
    programs that are such products and little more, the bound. One row is padded to two, which is
    faster in int8."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.integers(-127, 128, (1024, 1024)), jnp.int8)
    dot = jax.jit(lambda x, w: jax.lax.dot(x, w, preferred_element_type=SUMS[x.dtype.name]))
    rows = []
    for size in config.batches:
        x = jnp.asarray(rng.integers(-127, 128, (max(size, 2), 1024)), jnp.int8)
        calls = {
            "int8": functools.partial(dot, x, w),
            "float32": functools.partial(dot, x[:size].astype(jnp.float32), w.astype(jnp.float32)),
        }
        found = ej.latency(calls, batch_size=size, samples=config.samples)
        ms = {name: 1e3 * time.median for name, time in found.items()}
        rows.append({"batch": size, "times_faster": ms["float32"] / ms["int8"], **ms})
        print(f"product, batch {size}: {rows[-1]['times_faster']:.2f}x", flush=True)
    return rows


def measure(kind: str, config: Config) -> list[dict[str, Any]]:
    """A row for each batch size; all candidates are timed in turns."""
    module, shape, options = KINDS[kind]
    model = ej.from_linen(module())
    transform = ej.quantize.qat(ranges="static", **options)
    rng = np.random.default_rng(0)
    first = {"image": jnp.asarray(rng.normal(size=(8, *shape)), jnp.float32)}
    state = calibrated(model, transform, first)
    ways: dict[str, dict[str, Any]] = {"integer": {}, **WAYS.get(kind, {})}
    made = {
        n: ej.quantize.integer(model.apply, transform, state, first, **k) for n, k in ways.items()
    }
    params, model_state = state.vars.model, state.model_state

    @jax.jit
    def plain(params, model_state, batch):
        return model.apply(params, model_state, batch, state.key, False)[0]

    @jax.jit
    def rounded(state, batch):
        ctx = ej.Ctx(state.step, state.key, train=False)
        args = (state.vars, state.model_state, state.transform, batch, ctx)
        return ej.step.forward(model.apply, transform, *args).outputs

    rows: list[dict[str, Any]] = []
    for size in config.batches:
        batch = {"image": jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)}
        calls: dict[str, Callable[[], Any]] = {
            "float32": functools.partial(plain, params, model_state, batch),
            "qat": functools.partial(rounded, state, batch),
        }
        for name, small in made.items():
            calls[name] = functools.partial(predictor(small), small.weights, model_state, batch)
        view = calls["qat"]()
        away = jnp.abs(calls["integer"]() - view) / (jnp.abs(view).max() / 127)
        times = ej.latency(calls, batch_size=size, samples=config.samples)
        whole = times["float32"].median
        floats = sum(x.nbytes for x in jax.tree.leaves(params))
        rows.append(
            {
                "kind": kind,
                "batch": size,
                "ms": {name: 1e3 * time.median for name, time in times.items()},
                "times_faster": {n: whole / t.median for n, t in times.items() if n != "float32"},
                "units_from_qat": {"largest": float(away.max()), "mean": float(away.mean())},
                "bytes": {"float32": floats, "integer": made["integer"].nbytes},
                "runs": made["integer"].runs,
            }
        )
        shown = ", ".join(f"{n} {x:.2f}x" for n, x in rows[-1]["times_faster"].items())
        print(f"{kind}, batch {size}: {1e3 * whole:.3g} ms in float32; {shown}", flush=True)
    return rows


def predictor(small: ej.quantize.Integer) -> Callable[..., Any]:
    """The jitted integer model."""

    @jax.jit
    def predict(weights, model_state, batch):
        return small.apply(weights, model_state, batch, jax.random.key(0), False)[0]

    return predict


def calibrated(model: ej.Model, transform: ej.Transform, batch: Any) -> ej.TrainState:
    """A new model whose static ranges have seen one batch."""
    still = optax.sgd(0.0)
    state = ej.init_state(jax.random.key(0), model, transform, still, batch)
    step = jax.jit(ej.make_step(model.apply, transform, lambda x, _: jnp.mean(x**2), still))
    return step(state, batch)[0]
