"""State dicts that PyTorch has saved, read without it: arrays by name, and no code is run.

Before version 1.6 (and `_use_new_zipfile_serialization=False` since) `torch.save` writes four
pickles, a magic number, the protocol's version, the machine's sizes, and the object, in which each
storage is a persistent id (kind, key, place, length); a fifth with the storages' keys; then each
storage, an int64 length and the values.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.errors import DataError

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "u1",
}


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in values
    size: tuple[int, ...]
    stride: tuple[int, ...]  # in values


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Knows dicts and tensors, and nothing that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return name
        raise DataError(f"the file holds {module}.{name}; it should be a dict of tensors.")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(key, DTYPES[kind])


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name, in the order of the file.

    Raises:
      DataError: another format, an object that is no dict of tensors, or a file cut short.
    """
    file = io.BytesIO(content)
    try:
        head = [_Unpickler(file).load() for _ in range(3)]
        if head[:2] != [MAGIC, VERSION]:
            raise DataError(f"the file begins with {head[:2]}, not {[MAGIC, VERSION]}.")
        found, keys = _Unpickler(file).load(), _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"this is no state dict in PyTorch's format 1001 ({error}).") from error
    if not isinstance(found, Mapping) or not all(isinstance(x, _Tensor) for x in found.values()):
        raise DataError(f"the file holds {type(found).__name__}; it should be a dict of tensors.")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in found.values()}
    place, values = file.tell(), {}
    for key in keys:
        dtype = np.dtype(dtypes.get(key, "<f4"))
        length = int.from_bytes(content[place : place + 8], "little")
        end = place + 8 + length * dtype.itemsize
        if end > len(content):
            raise DataError("the file is cut short: a tensor's values are missing. Fetch it again.")
        values[key] = np.frombuffer(content, dtype, length, place + 8)
        place = end
    return {name: _array(tensor, values) for name, tensor in found.items()}


def _array(tensor: _Tensor, values: Mapping[str, np.ndarray]) -> np.ndarray:
    own = values[tensor.storage.key][tensor.offset :]
    last = sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    if math.prod(tensor.size) and last >= len(own):
        raise DataError(f"a tensor of shape {tensor.size} reaches beyond its {len(own)} values.")
    strides = [s * own.itemsize for s in tensor.stride]
    return np.lib.stride_tricks.as_strided(own, tensor.size, strides, writeable=False).copy()
