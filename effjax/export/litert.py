"""LiteRT: a frozen function as a .tflite file whose layers run on int8, without TensorFlow.

litert-converter reads the markers of frozen quantizers in StableHLO by itself. Its Python interface
is not documented, so one version is asked for, and every file is loaded before it is handed out.
"""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from effjax.core import PyTree
from effjax.errors import ExportError
from effjax.export.extras import need
from effjax.export.litert_requantize import through_floats
from effjax.export.litert_size import small
from effjax.export.marker import is_marker, scope_of
from effjax.jaxprs import Call, Eqn, Jaxpr, Remat, Ruled, is_literal, parts, rerun
from effjax.select import leaves

CONVERTER = "0.5.0"

# Weights of several axes on grids of 2 and 4 bits: the converter knows no convolutions with 2, and
# those with 4 compute other integers than with 8, which are the model's.
_SMALL_KERNEL = re.compile(
    r'(composite "quant\.fake_quant"[^\n]*dtype = )"i[24]"([^\n]*-> tensor<(?:\d+x){3,}f32>)'
)

# What moves, joins and converts, and multiplies nothing.
_PLAIN = ("QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE", "CONCATENATION", "SLICE")


def to_litert(fn: Callable[..., PyTree], *avals: PyTree) -> bytes:
    """The .tflite file of a function.

    A layer whose operands and result are quantized runs on int8; one without a quantizer on its
    result, as often the last, is computed in float32 from int8 weights. Matrices of 2 or 4 bits are
    packed; weights of more axes, as kernels of convolutions, take a byte each.

    Args:
      fn: a frozen model as a function of arrays, its weights among its constants.
      *avals: shapes and dtypes of its arguments, trees of `jax.ShapeDtypeStruct`; fixed, the batch
        size too.

    Returns:
      The file's bytes. Its signature "serving_default" has inputs named by the arguments' paths, or
      "input", and outputs "output", or by their paths.

    Raises:
      ExportError: a symbolic shape; an operation that LiteRT does not have; or litert-converter or
        ai-edge-litert is not installed, or the converter is another version than 0.5.0.
    """
    need("ai_edge_litert", "litert")
    need("litert_converter", "litert")
    if (found := importlib.metadata.version("litert-converter")) != CONVERTER:
        raise ExportError(
            f"litert-converter is version {found}; its interface is not documented, and "
            f"{CONVERTER} is what this was written for: pip install --no-deps "
            f"litert-converter=={CONVERTER}"
        )
    tree: PyTree = avals[0] if len(avals) == 1 else avals
    inputs = {path or "input": x for path, x in leaves(tree).items()}
    for name, x in inputs.items():
        if not all(isinstance(n, int) for n in x.shape):
            raise ExportError(
                f"LiteRT: the input {name!r} has the shape {x.shape}; a .tflite file has fixed "
                "shapes. Give a batch size, and write a file for each that is needed."
            )
    closed = jax.make_jaxpr(fn)(*avals)
    if _looks_up_integers(closed.jaxpr, set()):
        raise ExportError(
            "LiteRT: an embedding is quantized, which its converter does not survive. Leave "
            "embeddings in floating point, or export to ONNX or StableHLO."
        )
    try:
        return _loads(_converted(fn, list(inputs), *avals))
    except _refusals() as error:
        raise ExportError(_why(closed.jaxpr, str(error))) from error


def _converted(fn: Callable[..., PyTree], names: list[str], *avals: PyTree) -> bytes:
    ir = need("litert_converter.mlir.ir", "litert")
    passes = need("litert_converter.mlir.passmanager", "litert")
    converter = need("litert_converter.mlir._mlir_libs.converter_api_ext", "litert")
    exported = jax.export.export(jax.jit(fn), platforms=("cpu",))(*avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    options = converter.ConvertToTFLConfig()
    options.model_origin_framework = "JAX"
    options.strict_qdq_mode = True  # without it the quantizers vanish
    options.qdq_conversion_mode = "STATIC"
    options.canonicalizing_inf_as_min_max_float = False
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        text = _SMALL_KERNEL.sub(r'\1"i8"\2', exported.mlir_module())
        module = ir.Module.parse(text)
        results = [path or "output" for path in leaves(outputs)]
        converter.set_signature(module.operation, "serving_default", names, results)
        converter.run_convert_to_tfl_passes(module, passes.PassManager(), options)
        data = converter.export_flatbuffer_to_bytes(module.operation)
    schema = need("litert_converter.schema_py_generated", "litert")
    return small(through_floats(schema.ModelT.InitFromPackedBuf(data, 0)))


def _refusals() -> tuple[type[Exception], ...]:
    """What the converter raises for a program that it does not take."""
    return ValueError, need("litert_converter.mlir.ir", "litert").MLIRError


def _loads(data: bytes) -> bytes:
    _interpreter(data, 1)
    return data


def _why(jaxpr: Jaxpr, message: str) -> str:
    """Names the first operation that cannot be converted alone."""
    tried = set[str]()
    for inner, eqn, scope in _operations(jaxpr, ""):
        if (key := repr((eqn.primitive, [v.aval for v in eqn.invars]))) in tried:
            continue
        tried.add(key)
        variables = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))

        def alone(*operands, inner=inner, eqn=eqn, variables=variables):
            env = dict(zip(variables, operands, strict=True))
            rerun(inner, [eqn], eqn.outvars, env)
            return [env[v] for v in eqn.outvars]

        found: list[Any] = [v.aval for v in variables]
        avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in found]
        try:
            _loads(_converted(alone, [f"input_{i}" for i in range(len(avals))], *avals))
        except _refusals() as error:
            shapes = ", ".join(v.aval.str_short() for v in eqn.invars)
            first = str(error).strip().partition("\n")[0]
            return (
                f"LiteRT: the operation {eqn.primitive.name!r} on ({shapes}) at "
                f"{scope or 'the top'} has no translation. Replace it in the model. ({first})"
            )
    return f"LiteRT: the model cannot be converted: {message.strip()}"


def _looks_up_integers(jaxpr: Jaxpr, marked: set[Any]) -> bool:
    """Whether rows of what a quantizer gives are gathered; `marked` are such inputs."""
    for eqn in jaxpr.eqns:
        inner, known = parts(eqn), [not is_literal(v) and v in marked for v in eqn.invars]
        if is_marker(eqn):
            marked.update(eqn.outvars)
        elif isinstance(inner, Call | Remat | Ruled):
            body = inner.body.jaxpr
            own = {v for v, yes in zip(body.invars, known, strict=True) if yes}
            if _looks_up_integers(body, own):
                return True
        elif eqn.primitive.name == "gather" and known[0]:
            return True
    return False


def _operations(jaxpr: Jaxpr, scope: str) -> Iterator[tuple[Jaxpr, Eqn, str]]:
    """The equations, those of called functions in place of the calls."""
    for eqn in jaxpr.eqns:
        own = scope_of(scope, eqn)
        inner = parts(eqn)
        if isinstance(inner, Call | Remat | Ruled) and not is_marker(eqn):
            yield from _operations(inner.body.jaxpr, own)
        elif eqn.invars:
            yield jaxpr, eqn, own


def _interpreter(data: bytes, threads: int) -> Any:
    interpreter = need("ai_edge_litert.interpreter", "litert").Interpreter(
        model_content=data, num_threads=threads
    )
    interpreter.allocate_tensors()
    return interpreter


def run(data: bytes, threads: int = 1) -> Callable[..., list[np.ndarray]]:
    """The file in LiteRT, as a function of NumPy arrays in the order of its inputs."""
    interpreter = _interpreter(data, threads)

    inputs = interpreter.get_input_details()
    outputs = interpreter.get_output_details()

    def call(*arrays: Any) -> list[np.ndarray]:
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], np.asarray(array, detail["dtype"]))
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    return call


def kernels(data: bytes) -> dict[str, int]:
    """How many operations of each kind a file has, by name and type: {"CONV_2D int8": 5}."""
    schema = need("litert_converter.schema_py_generated", "litert")
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    types = {code: name for name, code in vars(schema.TensorType).items() if name.isupper()}
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    found = Counter[str]()
    for graph in model.subgraphs:
        for op in graph.operators:
            code = model.operatorCodes[op.opcodeIndex]
            name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
            operands = {types[graph.tensors[i].type] for i in (op.inputs[0], op.outputs[0])}
            found[f"{name} {'int8' if operands == {'INT8'} else 'float32'}"] += 1
    return dict(found)


def integer_kernels(data: bytes) -> dict[str, int]:
    """Those of `kernels` that compute on int8."""
    split = {key: key.split(" ") for key in kernels(data)}
    return {
        name: kernels(data)[key]
        for key, (name, kind) in split.items()
        if kind == "int8" and name not in _PLAIN
    }
