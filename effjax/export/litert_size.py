"""Less around the integers of a .tflite file, which is a flatbuffer: tables that share vectors."""

from typing import Any

import numpy as np

from effjax.export.extras import need


def small(model: Any) -> bytes:
    """A model's file without what the interpreter does not read: names of the tensors between
    layers (lists of scopes, up to a hundred bytes each), remarks of the converter, empty tables and
    buffers, and all but one of equal vectors.

    Args:
      model: `ModelT`, of one subgraph; it is changed in place.
    """
    flatbuffers = need("flatbuffers", "litert")
    (graph,) = model.subgraphs
    ends = {*graph.inputs, *graph.outputs}
    remarks = {entry.buffer for entry in model.metadata or ()}
    model.metadata = model.description = None
    held = [
        i
        for i, buffer in enumerate(model.buffers)
        if i == 0 or (buffer.data is not None and i not in remarks)
    ]
    places = {old: new for new, old in enumerate(held)}
    for i, tensor in enumerate(graph.tensors):
        tensor.buffer = places.get(tensor.buffer, 0)
        tensor.name = tensor.name if i in ends else None
        if tensor.quantization is not None and tensor.quantization.scale is None:
            tensor.quantization = None
    model.buffers = [model.buffers[i] for i in held]
    builder = _sharing(flatbuffers.Builder)(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _sharing(base: Any) -> Any:
    """flatbuffers' Builder, which writes equal vectors once."""

    class Builder(base):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.known: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:
            key = x.dtype.str, x.tobytes()
            if key not in self.known:
                if x.dtype == np.uint8:
                    self.Prep(16, x.size)  # buffers are read in place, as vectors of any type
                self.known[key] = super().CreateNumpyVector(x)
            return self.known[key]

    return Builder
