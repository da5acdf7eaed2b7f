"""Verified before written: a file appears if its engine computes what the frozen model does."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import ExportError
from effjax.export import litert, onnx, stablehlo
from effjax.export.files import write_together
from effjax.export.marker import tapped
from effjax.quantize.frozen import Distance, Frozen, compare

FORMATS = {".onnx": "onnx", ".tflite": "litert", ".stablehlo": "stablehlo"}

# In the names of the kernels that multiply: of a pool or a sum there may be others.
PRODUCTS = ("CONV", "GEMM", "MATMUL", "MAT_MUL", "FULLY_CONNECTED", "GATHER")

Call = Callable[[Mapping[str, np.ndarray]], Any]


class Bound(NamedTuple):
    """What a file may differ by from the frozen model, on its example.

    units: the share of each quantizer's integers that are the same to one unit.
    agreement: how often the largest output is the same one; of a small example, all but one.
    mean: of the outputs' absolute differences, in mean magnitudes of the outputs.
    """

    units: float = 0.995
    agreement: float = 0.999
    mean: float = 0.01


class Deployed(NamedTuple):
    """A file that was written, and what was found before.

    format: "onnx", "litert" or "stablehlo".
    nbytes: of the file, and of what lies beside it.
    integers: bytes of the model's integers; see `Frozen.nbytes`.
    distance: of the engine's outputs to the frozen model's, on its example.
    units: the smallest share of a quantizer's integers that are the same to one unit; 1.0 for
      StableHLO, which is the same program.
    kernels, integer_kernels: how many operations the engine runs, and on integers, by kind; none
      for StableHLO.
    seconds: the median time of a batch, whose size is `batch`.
    """

    path: Path
    format: str
    nbytes: int
    integers: int
    distance: Distance
    units: float
    kernels: dict[str, int]
    integer_kernels: dict[str, int]
    seconds: float
    batch: int


def deploy(
    frozen: Frozen,
    path: str | Path,
    *,
    batch: int | None = None,
    bound: Bound | None = None,
    repeats: int = 10,
) -> Deployed:
    """Writes a frozen model as a file that an engine runs, after running it.

    The model is converted in memory, run by its engine on the example, and compared with the frozen
    function: the outputs, and the integers of every quantizer, which a second conversion makes
    outputs as well. Then the file appears under its name, whole; or an error says what is wrong,
    and what was there before stays.

    Args:
      frozen: see `ej.quantize.freeze`.
      path: ends in ".onnx" (ONNX Runtime, OpenVINO), ".tflite" (LiteRT) or ".stablehlo" (jax; with
        its weights beside it).
      batch: the only size of batch; left out, any, and in LiteRT, which needs one, 1.
      bound: what may differ.
      repeats: timed runs.

    Raises:
      ExportError: an unknown suffix; an engine that is not installed, or cannot express the model;
        outputs or integers beyond the bound; fewer integer kernels than sites with integers; a
        place that cannot be written to.
    """
    path, bound = Path(path), bound or Bound()
    kind = FORMATS.get(path.suffix)
    if kind is None:
        raise ExportError(
            f"{path.name} has the suffix {path.suffix!r}; the format follows from it: {FORMATS}."
        )
    example, units = frozen.example, 1.0
    count = min(len(x) for x in example.values())
    if kind == "litert":
        batch = batch or 1
    size = min(count, batch or count)
    if batch is not None and count < batch:
        raise ExportError(
            f"the example has {count} rows, which are no batch of {batch}. Freeze with batches of "
            "that many, or export a smaller one."
        )
    reference = jax.jit(frozen.apply)(frozen.weights, example)
    files, call, kernels, integers = _BUILDERS[kind](frozen, path, batch)
    distance = compare(_cut(reference, count - count % size), _chunks(call, example, size))
    if kind != "stablehlo":
        _check_kernels(frozen, kind, integers)
        units = _check_layers(frozen, kind, batch, size, bound.units)
    _check_outputs(path, distance, bound)
    seconds = _median(call, {n: x[:size] for n, x in example.items()}, repeats)
    nbytes = write_together(files)
    return Deployed(
        path, kind, nbytes, frozen.nbytes, distance, units, kernels, integers, seconds, size
    )


def function(frozen: Frozen) -> Callable[..., Any]:
    """The marked function of the inputs alone, {name: array}, its weights constants."""
    weights = frozen.floats()
    return lambda inputs: frozen.marked(weights, inputs)


def shapes(frozen: Frozen, batch: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Its argument, for one size of batch or any."""
    size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    inputs = frozen.example.items()
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in inputs}


def engine(path: str | Path) -> Call:
    """A written file in its engine, as a function of {name: array}."""
    path = Path(path)
    kind = FORMATS[path.suffix]
    if kind == "stablehlo":
        return stablehlo.load_stablehlo(path).run()
    return _caller(onnx if kind == "onnx" else litert, path.read_bytes())


Built = tuple[dict[Path, bytes], Call, dict[str, int], dict[str, int]]


def _by_engine(module: Any, convert: Any, frozen: Frozen, path: Path, batch: int | None) -> Built:
    data = convert(function(frozen), shapes(frozen, batch))
    return {path: data}, _caller(module, data), module.kernels(data), module.integer_kernels(data)


def _caller(module: Any, data: bytes) -> Call:
    run = module.run(data)
    # In the order in which jax flattens a dict.
    return lambda inputs: run(*(inputs[name] for name in sorted(inputs)))


def _stablehlo(frozen: Frozen, path: Path, batch: int | None) -> Built:
    program = stablehlo.to_stablehlo(frozen, batch=batch)
    return stablehlo.files(path, program), program.run(), {}, {}


_BUILDERS: dict[str, Callable[[Frozen, Path, int | None], Built]] = {
    "onnx": functools.partial(_by_engine, onnx, onnx.to_onnx),
    "litert": functools.partial(_by_engine, litert, litert.to_litert),
    "stablehlo": _stablehlo,
}


def _cut(outputs: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x[:count], outputs)


def _chunks(call: Call, example: Mapping[str, np.ndarray], size: int) -> list[np.ndarray]:
    """The outputs for all whole batches of the example."""
    count = min(len(x) for x in example.values())
    found = []
    for start in range(0, count - count % size, size):
        outputs = call({n: x[start : start + size] for n, x in example.items()})
        found.append([np.asarray(x) for x in jax.tree.leaves(outputs)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _check_kernels(frozen: Frozen, kind: str, integers: Mapping[str, int]) -> None:
    """A quantizer that vanished leaves a layer in floating point."""
    sites = [site.path for site in frozen.sites if site.integer]
    # Without a grid of its own, the layer that gives the outputs is LiteRT's in floating point.
    rounded = {name.partition(":output")[0] for name in frozen.quantizers if ":output" in name}
    free = int(kind == "litert" and bool(sites) and sites[-1] not in rounded)
    count = sum(n for name, n in integers.items() if any(p in name.upper() for p in PRODUCTS))
    if count < len(sites) - free:
        raise ExportError(
            f"of {len(sites)} sites with integers the engine runs {dict(integers)} in integers: "
            "quantizers vanished in the conversion. No file was written. The sites are "
            f"{sites}; leave out those that the engine cannot run with the quantizer's `select`."
        )


def _check_layers(frozen: Frozen, kind: str, batch: int | None, size: int, least: float) -> float:
    """The smallest share of a quantizer's integers that are the same to one unit."""
    example = frozen.example
    every = tapped(function(frozen))
    names = list(jax.eval_shape(every, shapes(frozen, size))[1])
    module, convert = (onnx, onnx.to_onnx) if kind == "onnx" else (litert, litert.to_litert)
    call = _caller(module, convert(every, shapes(frozen, batch)))
    found = dict(zip(names, _chunks(call, example, size)[-len(names) :], strict=True))
    wanted = jax.device_get(jax.jit(frozen.observe)(frozen.weights, example))
    dotted = {name.replace("/", "."): name for name in wanted}
    shares = {}
    for label, got in found.items():
        name = dotted.get(label.rpartition("/")[2], "")
        if not name:
            continue
        scale = frozen.quantizers[name].scale
        want = np.round(wanted[name][: len(got)] / scale)
        shares[name] = float(np.mean(np.abs(np.round(got / scale) - want) <= 1))
    if low := {name: share for name, share in shares.items() if share < least}:
        raise ExportError(
            f"the engine's integers are not those of the frozen model: {low} of them agree to one "
            f"unit, {least} were asked for. No file was written. Compare these layers with "
            "Frozen.observe."
        )
    return min(shares.values(), default=math.nan)


def _check_outputs(path: Path, distance: Distance, bound: Bound) -> None:
    most = max(1.0 - bound.agreement, 1.0 / max(distance.examples, 1))
    if distance.mean > bound.mean * distance.scale or 1.0 - distance.agreement > most:
        raise ExportError(
            f"{path.name} would not compute what the frozen model does: {distance}, where {bound} "
            "was asked for. No file was written. Look for an operation that the engine computes "
            "differently, layer by layer with Frozen.observe."
        )


def _median(call: Call, inputs: Mapping[str, np.ndarray], repeats: int) -> float:
    times = []
    for _ in range(max(repeats, 1)):
        began = time.perf_counter()
        jax.block_until_ready(jax.tree.map(jnp.asarray, call(inputs)))
        times.append(time.perf_counter() - began)
    return float(np.median(times))
