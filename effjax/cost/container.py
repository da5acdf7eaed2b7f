"""The file that holds packed leaves: a safetensors header, then the tensors' bytes.

    8 bytes   N, the length of the header, little-endian
    N bytes   JSON {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}, spaces
    the rest  the tensors, one after the other, the widest dtypes first

"__metadata__" has "effjax_packed", the leaves as JSON, and "sha256", the hash of the whole file
with 64 zeros in place of it.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.cost.coding import Coded
from effjax.cost.formats import Stored
from effjax.cost.layouts import Spec

VERSION = 1
MARK = "effjax_packed"
NO_HASH = "0" * 64
NAMES = {
    f"{kind}{bits}": f"{letter}{bits}"
    for kind, letter in (("uint", "U"), ("int", "I"), ("float", "F"))
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("float", 8)
}


def entry(coded: Coded, stored: Stored) -> dict[str, Any]:
    """What a file notes of a leaf."""
    layout, encoding = stored.layout, stored.encoding
    found: dict[str, Any] = {"shape": list(coded.kept.shape), "dtype": coded.dtype.name}
    found |= {"layout": layout.kind, **layout.arguments, "kind": encoding.kind}
    if encoding.kind != "float":
        found["bits"] = encoding.bits
    if encoding.kind == "int":
        found["axes"] = list(coded.axes)
    return found


def header(
    leaves: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Spec]],
    metadata: Mapping[str, Any],
) -> tuple[bytes, list[tuple[str, str]]]:
    """The length and the header, without hash, and the (leaf, tensor) names in their order."""
    order = [(path, name) for path, own in tensors.items() for name in own]
    order.sort(key=lambda names: -np.dtype(tensors[names[0]][names[1]][0]).itemsize)
    record = {"version": VERSION, "leaves": leaves, "metadata": dict(metadata)}
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    table: dict[str, Any] = {"__metadata__": {MARK: text, "sha256": NO_HASH}}
    start = 0
    for path, name in order:
        dtype, count = tensors[path][name]
        end = start + np.dtype(dtype).itemsize * count
        spec = {"dtype": NAMES[dtype], "shape": [count], "data_offsets": [start, end]}
        table[f"{path}:{name}"] = spec
        start = end
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, order


def contents(
    tensors: Mapping[str, Mapping[str, np.ndarray]], order: list[tuple[str, str]]
) -> list[bytes]:
    """What follows the header: the tensors' bytes, little-endian."""
    arrays = [tensors[path][name] for path, name in order]
    return [x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays]
