"""Quantization-aware training here and in qwix, one Flax model, one process.

Both quantize weights (one scale for each output channel) and activations (one scale for the batch)
of every layer to 8 bits, with dynamic ranges. qwix is asked for effjax's grid: ranges divided by
127 rather than 127.5. It multiplies integers in the forward pass, effjax rounded floats or, with
`qat(forward="integer")`, integers too: both are timed. What both compute is compared first, loss
and gradients, under the same residuals: qwix's `use_original_residuals=False`, whose gradients are
taken at the rounded operands. After several layers of BatchNorm with a batch's statistics, the last
bits of sums decide which way values are rounded, so that the distance to float32 stands beside; bit
for bit, layer by layer, they are compared in `tests/quantize/qwix_test.py`. qwix's default,
gradients of matrix products at the operands as they were, is timed as well, against
`qat(residuals="float")`.

Expected: with integers a time per step of at most 1.05 times qwix's, a time to trace and compile of
at most 1.3 times.
Cost: 5 minutes of one CPU core.
Command: taskset -c 1 python -m experiments bench.quantize --samples 60
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix

import effjax as ej
from experiments.harness.provenance import provenance, write_json
from experiments.models import cnn, mlp

RESULTS = Path(__file__).parents[1] / "results"
SAME_GRID = f"absmax,{127.5 / 127!r}"
# Ours by options of `qat`, and what each is compared with.
OURS: dict[str, dict[str, Any]] = {
    "floats, rounded residuals": {},
    "floats, float residuals": {"residuals": "float"},
    "integers, rounded residuals": {"forward": "integer"},
    "integers, float residuals": {"residuals": "float", "forward": "integer"},
}
PAIRS = (
    ("floats, rounded residuals", "qwix, rounded residuals"),
    ("integers, rounded residuals", "qwix, rounded residuals"),
    ("floats, float residuals", "qwix, float residuals"),
    ("integers, float residuals", "qwix, float residuals"),
    ("floats, rounded residuals", "float32"),
    ("integers, rounded residuals", "float32"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    batch: int = 64
    width: float = 0.5
    units: int = 512
    samples: int = 20
    rounds: int = 3
    compiles: int = 3
    save: bool = True

    def __post_init__(self) -> None:
        if min(self.batch, self.units, self.samples, self.rounds, self.compiles) < 1:
            raise ValueError("batch, units, samples, rounds and compiles are at least 1")


def models(config: Config) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """{name: (module without dropout, shape of an image)}."""
    small = cnn.Spec(config.width, dropout=0.0)
    layers = mlp.Spec(784, (config.units, config.units))
    return {
        "CNN": (cnn.LinenCNN(small), (32, 32, 3)),
        "MLP": (mlp.LinenMLP(layers), (28, 28, 1)),
    }


def quantized_by_qwix(module: nn.Module, rounded_residuals: bool) -> nn.Module:
    """The module under qwix's provider, on effjax's grid."""
    per_tensor = {"lhs_disable_channelwise_axes": True}
    rule = qwix.QtRule(
        weight_qtype=jnp.int8,
        act_qtype=jnp.int8,
        weight_calibration_method=SAME_GRID,
        act_calibration_method=SAME_GRID,
        additional_qt_config=per_tensor | {"use_original_residuals": not rounded_residuals},
    )
    return qwix.quantize_model(module, qwix.QtProvider([rule]))


def objective(module: nn.Module) -> Callable[..., Any]:
    """`(params, model_state, batch) -> (loss, model_state)` as a Flax user writes it."""

    def loss(params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, **model_state}
        logits, model_state = module.apply(
            variables, batch["image"], train=True, mutable=list(model_state)
        )
        return cross_entropy(logits, batch), model_state

    return loss


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def flax_step(module: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A train step of Flax and optax."""
    gradient = jax.value_and_grad(objective(module), has_aux=True)

    def step(params, model_state, opt, batch):
        (loss, model_state), grads = gradient(params, model_state, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), model_state, opt, loss

    return step


def compile_seconds(make: Callable[[], Callable[..., Any]], args: Any, times: int) -> float:
    """Median time to trace, lower and compile a new function."""
    taken = []
    for _ in range(times):
        jax.clear_caches()
        began = time.perf_counter()
        jax.jit(make()).lower(*args).compile()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def apart(one: Any, other: Any, before: Any) -> float:
    """How far two steps from the same weights are apart, in norms of the second step."""
    differ = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, one, other))
    return float(differ / optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, other, before)))


def compared(name: str, module: nn.Module, shape: tuple[int, ...], config: Config) -> list[Any]:
    """One model: what both compute, and how long they take."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(config.batch, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, config.batch)),
    }
    tx = optax.sgd(0.1)
    model = ej.from_linen(module)
    ours = {own: ej.chain(quant=ej.quantize.qat(**options)) for own, options in OURS.items()}
    params, stats = jax.jit(model.init)(jax.random.key(0), batch)
    first = next(iter(ours.values()))
    state = ej.init_state(
        jax.random.key(0), model, first, tx, batch, params=params, model_state=stats
    )

    # All programs read the same buffers: whichever comes first would find others cold.
    state = state._replace(vars=state.vars._replace(model=params), model_state=stats)
    args = (params, stats, tx.init(params), batch)
    programs: dict[str, tuple[Callable[[], Callable[..., Any]], tuple[Any, ...]]] = {
        label: (
            functools.partial(ej.make_step, model.apply, transform, cross_entropy, tx),
            (state, batch),
        )
        for label, transform in ours.items()
    }
    for label, rounded in (("qwix, rounded residuals", True), ("qwix, float residuals", False)):
        module_of = functools.partial(quantized_by_qwix, module, rounded)
        programs[label] = (functools.partial(_flax_step_of, module_of, tx), args)
    programs["float32"] = (lambda: flax_step(module, tx), args)
    compiled = {n: jax.jit(make()).lower(*a).compile() for n, (make, a) in programs.items()}
    calls = {n: functools.partial(compiled[n], *a) for n, (_, a) in programs.items()}

    # With plain gradient descent the step of the weights is the gradient.
    after = {own: compiled[own](state, batch) for own in OURS if "rounded" in own}
    others, _, _, loss = compiled["qwix, rounded residuals"](*args)
    plain, _, _, plain_loss = compiled["float32"](*args)
    rounds = [
        {n: t.median for n, t in _latency(calls, config).items()} for _ in range(config.rounds)
    ]
    building = {n: compile_seconds(*program, config.compiles) for n, program in programs.items()}
    rows = []
    for own, other in PAIRS:
        ratios = [found[own] / found[other] for found in rounds]
        rows.append(
            {
                "model": name,
                "own": own,
                "against": other,
                "step_ratio": float(np.median(ratios)),
                "step_ratios": ratios,
                "compile_ratio": building[own] / building[other],
                "step_ms": 1e3 * float(np.median([found[own] for found in rounds])),
                "compile_s": building[own],
            }
        )
        print(
            f"{name}, {own}, against {other}: step {np.median(ratios):.3f}, "
            f"compile {rows[-1]['compile_ratio']:.2f}"
        )
        if other == "qwix, rounded residuals":
            stepped, metrics = after[own]
            found = {
                "loss_difference": float(abs(metrics["loss"] / loss - 1)),
                "gradient_difference": apart(stepped.vars.model, others, params),
                "loss_difference_of_float32": float(abs(plain_loss / loss - 1)),
                "gradient_difference_of_float32": apart(plain, others, params),
            }
            rows[-1] |= found
            print(
                f"  loss apart {found['loss_difference']:.1e} of it (float32's "
                f"{found['loss_difference_of_float32']:.1e}), gradients "
                f"{found['gradient_difference']:.1e} "
                f"({found['gradient_difference_of_float32']:.1e})"
            )
    return rows


def _flax_step_of(
    make: Callable[[], nn.Module], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    return flax_step(make(), tx)


def _latency(calls: Mapping[str, Callable[[], Any]], config: Config) -> Any:
    return ej.latency(dict(calls), batch_size=config.batch, samples=config.samples)


def run(config: Config) -> dict[str, Any]:
    """Compares, times and writes `experiments/results/bench_quantize.json`."""
    rows = [r for n, (m, shape) in models(config).items() for r in compared(n, m, shape, config)]
    result = {"config": dataclasses.asdict(config), "rows": rows, "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_quantize_{jax.default_backend()}.json", result)
    return result
