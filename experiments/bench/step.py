"""What composing costs: a chained train step against the same maths written by hand in one go.

Two comparisons, each in one process, in turns: the `chain()` step against a plain optax step; and
pruning, int8 quantization-aware training and distillation as a chain against one hand-fused
function (masks, fake quantization at each layer, the distillation term, Adam, the masked update).
The model is a CNN on 32x32 images, in plain JAX. The timed steps move no masks.

Expected: ratios of at most 1.05, and 1.00 in compiled FLOPs for `chain()`.
Cost: 3 minutes on 2 CPU cores.
Command: python -m experiments bench.step
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import effjax as ej
from effjax.prune.budgets import keep
from effjax.prune.scores import magnitude
from effjax.prune.threshold import largest
from effjax.quantize import numerics
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[1] / "results"
TEMPERATURE, SPARSITY, BEGIN, END, EVERY = 4.0, 0.8, 100_000, 200_000, 100
Op = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    batch: int = 64
    width: int = 16
    samples: int = 30
    rounds: int = 3
    save: bool = True

    def __post_init__(self) -> None:
        if min(self.batch, self.width, self.samples, self.rounds) < 1:
            raise ValueError("batch, width, samples and rounds are at least 1")


def conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(params: Any, x: Array, conv: Op = conv, dot: Op = jnp.matmul) -> Array:
    """Two convolutions and a pool, three times, and a dense layer on the mean."""
    for block in ("a", "b", "c"):
        for layer in ("first", "second"):
            x = jax.nn.relu(conv(x, params[block][layer]["kernel"]))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return dot(x.mean(axis=(1, 2)), params["head"]["kernel"]) + params["head"]["bias"]


def weights(key: Array, width: int) -> Any:
    shapes = {}
    features = 3
    for block, out in (("a", width), ("b", 2 * width), ("c", 4 * width)):
        shapes[block] = {"first": (3, 3, features, out), "second": (3, 3, out, out)}
        features = out
    keys = iter(jax.random.split(key, 7))

    def kernel(shape: tuple[int, ...]) -> dict[str, Array]:
        scale = (2 / np.prod(shape[:-1])) ** 0.5
        return {"kernel": scale * jax.random.normal(next(keys), shape)}

    params: Any = {b: {n: kernel(s) for n, s in layers.items()} for b, layers in shapes.items()}
    return params | {"head": kernel((features, 10)) | {"bias": jnp.zeros(10)}}


def apply(params, model_state, batch, key, train):
    return network(params, batch["image"]), model_state


def cross_entropy(logits: Array, batch: Any) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def plain_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The train step that a user without effjax writes."""

    def step(params, opt, batch):
        loss, grads = jax.value_and_grad(
            lambda p: cross_entropy(network(p, batch["image"]), batch)
        )(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    return step


def fused_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Pruning, quantization and distillation by hand, in one function."""
    grid = numerics.grid(8)

    def quantized(x: Array, channels: tuple[int, ...] = ()) -> Array:
        scale = numerics.scale_of(numerics.absmax(x, channels), grid)
        return numerics.fake_quant(x, scale, grid)

    def quantized_conv(x: Array, kernel: Array) -> Array:
        return conv(quantized(x), quantized(kernel, (3,)))

    def quantized_dot(x: Array, kernel: Array) -> Array:
        return quantized(x) @ quantized(kernel, (1,))

    def objective(params, mask, batch, teacher):
        sparse = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, mask)
        logits = network(sparse, batch["image"], quantized_conv, quantized_dot)
        hard = jax.nn.log_softmax(lax.stop_gradient(network(teacher, batch["image"])) / TEMPERATURE)
        soft = jax.nn.log_softmax(logits / TEMPERATURE)
        kl = jnp.mean(jnp.sum(jnp.exp(hard) * (hard - soft), -1)) * TEMPERATURE**2
        return cross_entropy(logits, batch) + kl

    def step(step, params, mask, opt, batch, teacher):
        loss, grads = jax.value_and_grad(objective)(params, mask, batch, teacher)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        mask = lax.cond(moves(step), move, lambda _, mask: mask, (step, params), mask)

        def keep(tree):
            return jax.tree.map(lambda x, m: jnp.where(m, x, 0), tree, mask)

        adam, *rest = opt
        opt = (adam._replace(mu=keep(adam.mu), nu=keep(adam.nu)), *rest)
        return step + 1, keep(params), mask, opt, loss

    def moves(step: Array) -> Array:
        return (step >= BEGIN) & (step <= END) & ((step - BEGIN) % EVERY == 0)

    def move(now, mask):
        step, params = now
        sparsity = ej.schedules.cubic(SPARSITY, BEGIN, END)(step)
        kernels = {k: w for k, w in ej.select.leaves(params).items() if k.endswith("kernel")}
        sizes = {path: w.size for path, w in kernels.items()}
        scores = {path: magnitude(w) for path, w in kernels.items()}
        return ej.select.replace(
            mask, largest(scores, {p: keep(n, sparsity) for p, n in sizes.items()})
        )

    return step


def run(config: Config) -> dict[str, Any]:
    """Times both comparisons and writes `experiments/results/bench_step.json`."""
    keys = jax.random.split(jax.random.key(0), 4)
    image = jax.random.normal(keys[0], (config.batch, 32, 32, 3))
    batch = {"image": image, "label": jax.random.randint(keys[1], (config.batch,), 0, 10)}
    params, teacher = weights(keys[2], config.width), weights(keys[3], config.width)
    model = ej.Model(lambda key, batch: (params, {}), apply)
    tx = optax.adam(1e-3)
    compared = {
        "chain() / plain optax step": _empty(model, params, batch, tx),
        "prune + int8 + distil / hand-fused": _composed(model, params, batch, tx, teacher),
    }
    rows = []
    for name, (candidates, flops) in compared.items():
        ratios = []
        for _ in range(config.rounds):
            times = ej.latency(candidates, batch_size=config.batch, samples=config.samples)
            ours, theirs = (times[n].median for n in candidates)
            ratios.append(ours / theirs)
        found = times["ours"]
        rows.append(
            {
                "comparison": name,
                "time_ratio": float(np.median(ratios)),
                "time_ratios": ratios,
                "flops_ratio": flops,
                "ours_ms": 1e3 * found.median,
                "device": found.device,
            }
        )
        print(f"{name}: {np.median(ratios):.3f} x time, {flops:.4f} x FLOPs ({found})")
    result = {"config": dataclasses.asdict(config), "rows": rows, "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_step_{jax.default_backend()}.json", result)
    return result


def _empty(model, params, batch, tx) -> tuple[dict[str, Callable[[], Any]], float]:
    state = ej.init_state(jax.random.key(0), model, ej.chain(), tx, batch, params=params)
    ours = jax.jit(ej.make_step(apply, ej.chain(), cross_entropy, tx)).lower(state, batch).compile()
    opt = tx.init(params)
    theirs = jax.jit(plain_step(tx)).lower(params, opt, batch).compile()
    calls = {"ours": lambda: ours(state, batch), "theirs": lambda: theirs(params, opt, batch)}
    return calls, _flops(ours) / _flops(theirs)


def _composed(model, params, batch, tx, teacher) -> tuple[dict[str, Callable[[], Any]], float]:
    transform = ej.chain(
        prune=ej.prune.magnitude(SPARSITY, begin=BEGIN, end=END, every=EVERY, select="kernel$"),
        quant=ej.quantize.qat(),
        kd=ej.distill.logits(apply, temperature=TEMPERATURE),
    )
    frozen = {"kd": ej.distill.Teacher(teacher, {})}
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch, frozen, params=params)
    jitted = jax.jit(ej.make_step(apply, transform, cross_entropy, tx))
    ours = jitted.lower(state, batch, frozen).compile()
    mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    by_hand = (jnp.int32(0), params, mask, tx.init(params), batch, teacher)
    theirs = jax.jit(fused_step(tx)).lower(*by_hand).compile()
    (_, metrics), (*_, loss) = ours(state, batch, frozen), theirs(*by_hand)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    calls = {"ours": lambda: ours(state, batch, frozen), "theirs": lambda: theirs(*by_hand)}
    return calls, _flops(ours) / _flops(theirs)


def _flops(compiled: Any) -> float:
    return float((compiled.cost_analysis() or {})["flops"])
