"""Exact changes of grid in a .tflite file."""

from typing import Any

from effjax.export.extras import need


def through_floats(model: Any) -> Any:
    """Changes a model so that int8 codes go from one grid to another through float32.

    Where a result enters a layer and a sum on grids of their own, the converter writes one QUANTIZE
    from int8 to int8. XNNPACK's kernel for it has the ratio r of the two scales in steps of 1/256,

        round((q - z) round(256 r) / 256) + z',

    which is a unit off for some hundredths of the codes, and after a few layers for many more.
    DEQUANTIZE and QUANTIZE, which it becomes here, compute round((q - z) s / s') + z'.

    Args:
      model: `ModelT`, of one subgraph; it is changed in place.
    """
    schema = need("litert_converter.schema_py_generated", "litert")
    kinds, types = schema.BuiltinOperator, schema.TensorType
    (graph,) = model.subgraphs
    operators = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        ends = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs)]
        if code == kinds.QUANTIZE and all(tensor.type == types.INT8 for tensor in ends):
            between = schema.TensorT()
            between.type, between.buffer = types.FLOAT32, 0
            between.shape, between.shapeSignature = ends[0].shape, ends[0].shapeSignature
            graph.tensors.append(between)
            first = schema.OperatorT()
            first.opcodeIndex = _code(model, schema, kinds.DEQUANTIZE)
            first.inputs, first.outputs = operator.inputs, [len(graph.tensors) - 1]
            operator.inputs = first.outputs
            operators.append(first)
        operators.append(operator)
    graph.operators = operators
    return model


def _code(model: Any, schema: Any, kind: int) -> int:
    """The index of an operator's code, which is added if the model has none."""
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == kind:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = kind
    code.version = 2  # that takes int8
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
