"""Reads a packed model with NumPy alone: `python read_packed.py FILE`. See docs/packed.md."""

import itertools
import json
import sys

import numpy as np


def bits(packed, width, count):
    """`count` codes of `width` bits, the lowest bit first."""
    flat = np.unpackbits(packed, count=width * count, bitorder="little").reshape(count, width)
    return flat.astype(np.int64) @ (1 << np.arange(width))


def positions(leaf, part):
    """Where the values stand in the flat array; -1 is nowhere."""
    every = np.arange(np.prod(leaf["shape"], dtype=int)).reshape(leaf["shape"])
    if leaf["layout"] == "bitmask":
        return np.flatnonzero(bits(part["mask"], 1, every.size))
    if leaf["layout"] == "csr":
        rows = np.repeat(np.arange(len(part["rows"]) - 1), np.diff(part["rows"].astype(int)))
        return rows * (every.shape[-1] if every.ndim else 1) + part["columns"]
    if leaf["layout"] == "n:m":
        groups = np.moveaxis(every, leaf["axis"], -1).reshape(-1, leaf["m"])
        choices = np.array(list(itertools.combinations(range(leaf["m"]), leaf["n"])))
        codes = bits(part["groups"], (len(choices) - 1).bit_length(), len(groups))
        return np.take_along_axis(groups, choices[codes], 1).ravel()
    if leaf["layout"] == "block":
        long, rank = leaf["lengths"], every.ndim
        padded = np.pad(every, [(0, -n % k) for n, k in zip(every.shape, long)], constant_values=-1)  # noqa: B905
        split = padded.reshape([n for s, k in zip(padded.shape, long) for n in (s // k, k)])  # noqa: B905
        blocks = split.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)])
        blocks = blocks.reshape(-1, np.prod(long, dtype=int))
        return blocks[bits(part["mask"], 1, len(blocks)).astype(bool)].ravel()
    return every.ravel()


def decode(leaf, part):
    """One leaf as an array; bfloat16 as float32."""
    place, kind, values = positions(leaf, part), leaf["kind"], part["values"]
    if kind != "float":
        codes = bits(values, leaf["bits"], len(place))
        values = part["codebook"][codes * (place >= 0)] if kind == "cluster" else codes
    if kind == "int":
        each = [n if a in leaf["axes"] else 1 for a, n in enumerate(leaf["shape"])]
        zero = part.get("zeros", np.float32([2 ** (leaf["bits"] - 1)]))
        scale, zero = (
            np.broadcast_to(np.resize(x, each), leaf["shape"]).ravel()[np.maximum(place, 0)]
            for x in (part["scales"], zero)
        )
        values = (codes.astype(np.float32) - zero) * scale
    elif leaf["dtype"] == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        values = values.view(leaf["dtype"])
    dtype = "float32" if leaf["dtype"] == "bfloat16" else leaf["dtype"]
    full = np.zeros(np.prod(leaf["shape"], dtype=int), dtype)
    full[place[place >= 0]] = values[place >= 0]
    return full.reshape(leaf["shape"])


def read(path):
    """{path: array} of all leaves."""
    raw = np.fromfile(path, np.uint8).tobytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    leaves = json.loads(table.pop("__metadata__")["effjax_packed"])["leaves"]
    parts = {name: {} for name in leaves}
    for name, spec in table.items():
        dtype = {"U": "<u", "I": "<i", "F": "<f"}[spec["dtype"][0]] + str(
            int(spec["dtype"][1:]) // 8
        )
        first, last = (start + x for x in spec["data_offsets"])
        leaf, _, own = name.rpartition(":")
        parts[leaf][own] = np.frombuffer(raw[first:last], dtype)
    return {name: decode(leaf, parts[name]) for name, leaf in leaves.items()}


if __name__ == "__main__":
    for name, x in read(sys.argv[1]).items():
        print(f"{name:40} {x.dtype} {x.shape}")
