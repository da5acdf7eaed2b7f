"""ONNX Runtime: a file run, and what of it is computed on integers."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from effjax.errors import ExportError
from effjax.export.extras import need
from effjax.export.onnx_graph import OPSET

# What of an optimized graph computes on integers, by the names of ONNX and of ONNX Runtime.
INTEGER = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "ConvInteger",
    "MatMulInteger",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
    "QLinearSoftmax",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
)


def session(
    data: bytes, threads: int = 1, exact: bool | None = None, save: Path | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of a file's bytes.

    Args:
      data: the file's bytes.
      threads: of one call.
      exact: whether weights are made uint8, which takes up to 2.3 times the time, so that sums are
        exact on CPUs without VNNI: the faster instruction saturates there at 16 bits, which costs
        accuracy without a warning. Left out, only where this CPU's sums are not exact without.
      save: where to write the graph as ONNX Runtime optimized it.

    Raises:
      ExportError: onnxruntime is not installed, or refuses the file.
    """
    ort = need("onnxruntime", "onnx")
    exact = _saturates() if exact is None else exact
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    if save is not None:
        options.optimized_model_filepath = str(save)
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the file: {error}") from error


@functools.cache
def _saturates() -> bool:
    """Whether ONNX Runtime's faster products of uint8 and int8 are wrong on this CPU: one is
    computed, of the largest integers."""
    helper = need("onnx.helper", "onnx")

    def info(name: str, dtype: str, size: int) -> Any:
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, code, [1, size])

    largest = need("onnx.numpy_helper", "onnx").from_array(np.full((64, 16), 127, np.int8), "b")
    product = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph(
        [product], "product", [info("a", "uint8", 64)], [info("y", "int32", 16)], [largest]
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    (found,) = run(model.SerializeToString(), exact=False)(np.full((1, 64), 255, np.uint8))
    return bool((found != 64 * 255 * 127).any())


def run(
    data: bytes, threads: int = 1, exact: bool | None = None
) -> Callable[..., list[np.ndarray]]:
    """The file in ONNX Runtime, as a function of NumPy arrays in the order of its inputs."""
    loaded = session(data, threads, exact)
    names = [x.name for x in loaded.get_inputs()]

    def call(*arrays: Any) -> list[np.ndarray]:
        return loaded.run(None, {n: np.asarray(x) for n, x in zip(names, arrays, strict=True)})

    return call


def kernels(data: bytes) -> dict[str, int]:
    """How many operations of each kind ONNX Runtime runs, after its own optimizations."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(data, exact=False, save=path)
        model = need("onnx", "onnx").load(str(path))
    return dict(Counter(node.op_type for node in model.graph.node))


def integer_kernels(data: bytes) -> dict[str, int]:
    """Those of `kernels` that compute on integers."""
    return {op: n for op, n in kernels(data).items() if op in INTEGER}
