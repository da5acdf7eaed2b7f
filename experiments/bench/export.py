"""Exported models: ONNX and LiteRT at 8 bits against XLA and ONNX Runtime, in one process.

Four kinds, quantized after training's end by one batch (times and sizes do not depend on what was
learned): an MLP, a CNN with BatchNorm, a transformer block and a depthwise-separable CNN, those of
`bench.integer`. For each and each batch: milliseconds in XLA float32; in ONNX Runtime, the float
model, what its own `quantize_static` makes of it after its pre-processing, and our file; of the
same file in OpenVINO; in LiteRT. Then bytes, kernels on integers, and how far our files are from
the frozen function: of each layer the share of elements that are within one unit, and how often the
largest output is the same one. Bytes of a StableHLO program are those at 4 bits.

ONNX Runtime is timed with exact sums, and, as "fast", without: on CPUs without VNNI the faster
instruction saturates, and the outputs are others (`docs/deployment.md`).

On one core: on more, the threads of one engine wait for work in loops for milliseconds after a
call, and take cores from the next engine; ratios of the same two files then differed by a factor of
four from run to run.

Expected: on a core with AVX-512 VNNI, for one image and the CNN, ONNX Runtime float32 twice as fast
as XLA float32, its own quantizer and our file 6 times, LiteRT 7; for 32 images 1.2, 3.7 and 4. With
AMX, for 32 images, 1.5, 3.5, LiteRT 6 and OpenVINO 11.
Cost: 2 minutes of one CPU core.
Command: taskset -c 1 python -m experiments bench.export
"""

import dataclasses
import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.errors import ExportError
from effjax.export import litert, onnx
from effjax.export.marker import tapped
from effjax.export.stablehlo import to_stablehlo
from experiments.bench.integer import KINDS, RESULTS
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import cores, provenance, write_json

ENGINES = ("onnx", "onnxruntime", "openvino", "ai-edge-litert", "litert-converter")
LAYERS = ("stem", *(f"{k}{i}" for i in range(4) for k in ("depthwise", "pointwise")))
# What has BatchNorm, which is folded for engines that get the float model: into which layers.
NORMALIZED: dict[str, dict[str, str] | None] = {
    "cnn": None,  # by their names
    "depthwise": {layer: f"BatchNorm_{i}" for i, layer in enumerate(LAYERS)},
}
EXAMPLES = 64  # to calibrate on, and to compare outputs on


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    kinds: tuple[str, ...] = ("mlp", "cnn", "transformer", "depthwise")
    batches: tuple[int, ...] = (1, 32)
    samples: int = 50
    save: bool = True

    def __post_init__(self) -> None:
        check(self, batches=(1, 10**4), samples=(1, 1000))


def run(config: Config) -> dict[str, Any]:
    """Measures, and writes `experiments/results/bench_export_<platform>.json` and `.md`."""
    rows = [row for kind in config.kinds for row in measure(kind, config)]
    found = provenance(config)
    found["versions"] |= _versions()
    result = {
        "config": as_dict(config),
        "rows": rows,
        "load": os.getloadavg(),
        "provenance": found,
    }
    if config.save:
        name = f"bench_export_{jax.default_backend()}"
        write_json(RESULTS / f"{name}.json", result)
        (RESULTS / f"{name}.md").write_text(table(rows))
    return result


def measure(kind: str, config: Config) -> list[dict[str, Any]]:
    """A row for each batch size; all candidates are timed in turns."""
    module, shape, _ = KINDS[kind]
    model = ej.from_linen(module())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, *shape)).astype(np.float32)
    batch = {"image": jnp.asarray(x)}
    params, model_state = model.init(jax.random.key(0), batch)
    # Biases as training leaves them: those of zeros are left out by ONNX Runtime.
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.01, x.shape).astype(x.dtype) if x.ndim == 1 else x, params
    )
    small = ej.quantize.ptq(model, params, model_state, [batch])
    frozen = ej.quantize.freeze(model.apply, small.transform, small.state, [batch])
    weights = frozen.floats()
    if kind in NORMALIZED:
        params, model_state = ej.quantize.fold_batchnorm(params, model_state, NORMALIZED[kind])

    def marked(image):
        return frozen.marked(weights, {"image": image})

    def plain(image):
        batch = {"image": image}
        return model.apply(params, model_state, batch, jax.random.key(0), False)[0]

    (n,) = jax.export.symbolic_shape("n")
    any_size = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
    ours, floats = onnx.to_onnx(marked, any_size), onnx.to_onnx(plain, any_size)
    theirs = quantized(floats, x)
    wanted, values = jax.tree.map(np.asarray, jax.jit(tapped(marked))(x))
    scales = {name.replace("/", "."): own.scale for name, own in frozen.quantizers.items()}
    layers = onnx.run(onnx.to_onnx(tapped(marked), jax.ShapeDtypeStruct(x.shape, x.dtype)))(x)
    few = ej.quantize.ptq(model, params, model_state, [batch], 4, 8)
    small4 = ej.quantize.freeze(model.apply, few.transform, few.state, [batch])
    four_bits = {"integers of 4 bits": small4.nbytes, "StableHLO": to_stablehlo(small4).nbytes}
    rows: list[dict[str, Any]] = []
    for size in config.batches:
        part = x[:size]
        tflite = litert.to_litert(marked, jax.ShapeDtypeStruct(part.shape, part.dtype))
        engines = {
            "ORT float32": session(floats),
            **refusable("ORT quantize_static", theirs),
            "ORT quantize_static, fast": session(theirs, exact=False),
            "ONNX int8": session(ours),
            "ONNX int8, fast": session(ours, exact=False),
            "OpenVINO int8": openvino(ours),
            "LiteRT int8": litert.run(tflite, cores()),
        }
        outputs = {name: call(part)[0] for name, call in engines.items()}
        compiled = jax.jit(plain)
        calls: dict[str, Callable[[], Any]] = {
            "XLA float32": functools.partial(compiled, jnp.asarray(part)),
            **{name: functools.partial(call, part) for name, call in engines.items()},
        }
        times = ej.latency(calls, batch_size=size, samples=config.samples)
        whole = times["XLA float32"].median
        row: dict[str, Any] = {
            "kind": kind,
            "batch": size,
            "ms": {name: 1e3 * time.median for name, time in times.items()},
            "times_faster": {name: whole / time.median for name, time in times.items()},
            "bytes": {
                "integers": frozen.nbytes,
                "ORT float32": len(floats),
                "ORT quantize_static": len(theirs),
                "ONNX int8": len(ours),
                "LiteRT int8": len(tflite),
                **four_bits,
            },
            "integer_kernels": {
                "ORT quantize_static": onnx.integer_kernels(theirs),
                "ONNX int8": onnx.integer_kernels(ours),
                "LiteRT int8": litert.integer_kernels(tflite),
            },
            "layers_within_one_unit": _within(values, layers[1:], scales),
            "agreement": {
                name: float((found.argmax(-1) == wanted[:size].argmax(-1)).mean())
                for name, found in outputs.items()
            },
            "mean_difference": {
                name: float(np.abs(found - wanted[:size]).mean() / np.abs(wanted).mean())
                for name, found in outputs.items()
            },
        }
        rows.append(row)
        shown = ", ".join(f"{name} {x:.2f}x" for name, x in row["times_faster"].items())
        print(f"{kind}, batch {size}: {1e3 * whole:.3g} ms; {shown}", flush=True)
    return rows


def session(data: bytes, exact: bool = True) -> Callable[..., list[np.ndarray]]:
    """A file in ONNX Runtime, on all cores."""
    return onnx.run(data, cores(), exact)


def refusable(name: str, data: bytes) -> dict[str, Callable[..., list[np.ndarray]]]:
    """A file in ONNX Runtime, by its name; nothing where that cannot make its sums exact.

    It fails where layers share a zero point, as those of its own quantizer do in transformers.
    """
    try:
        return {name: session(data)}
    except ExportError as error:
        print(f"{name}: {error}", flush=True)
        return {}


def openvino(data: bytes) -> Callable[..., list[np.ndarray]]:
    """A file in OpenVINO, on all cores."""
    import openvino as engine

    core = engine.Core()
    compiled = core.compile_model(core.read_model(data), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda x: [compiled(x)[0]]


def quantized(floats: bytes, x: np.ndarray) -> bytes:
    """What ONNX Runtime's own quantizer makes of a float model, by its documented steps."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"input": x}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (Path(folder) / f"{i}.onnx" for i in range(3))
        plain.write_bytes(floats)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            made,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        return made.read_bytes()


def table(rows: list[dict[str, Any]]) -> str:
    """Times as fast as XLA float32, and bytes over the integers' own, as Markdown."""
    every = dict.fromkeys(name for row in rows for name in row["times_faster"])
    names = [name for name in every if name != "XLA float32"]
    lines = [
        "| model | batch | XLA float32 | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        found = row["times_faster"]
        times = " | ".join(f"{found[name]:.2f}x" if name in found else "-" for name in names)
        lines.append(
            f"| {row['kind']} | {row['batch']} | {row['ms']['XLA float32']:.3g} ms | {times} |"
        )
    lines += [
        "",
        "| model | integers, bytes | ONNX int8 | LiteRT int8 | of 4 bits, bytes | StableHLO "
        "| integer kernels in ONNX Runtime | least of a layer within one unit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in {row["kind"]: row for row in rows}.values():
        whole, few = row["bytes"]["integers"], row["bytes"]["integers of 4 bits"]
        kernels = ", ".join(f"{n} {op}" for op, n in row["integer_kernels"]["ONNX int8"].items())
        lines.append(
            f"| {row['kind']} | {whole} | {row['bytes']['ONNX int8'] / whole:.3f}x "
            f"| {row['bytes']['LiteRT int8'] / whole:.3f}x "
            f"| {few} | {row['bytes']['StableHLO'] / few:.3f}x | {kernels} "
            f"| {100 * min(row['layers_within_one_unit'].values()):.2f}% |"
        )
    return "\n".join(lines) + "\n"


def _within(
    values: Mapping[str, np.ndarray], found: list[np.ndarray], scales: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Of each quantizer, the share of elements at most one unit from the frozen function's."""
    return {
        name: float((np.abs(wanted - own) <= 1.01 * scales[name]).mean())
        for (name, wanted), own in zip(sorted(values.items()), found, strict=True)
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ENGINES}
