"""Classifies images with jax and NumPy alone: `classify_stablehlo.py MODEL.stablehlo TEST.npz`.

The weights lie beside the program, as MODEL.safetensors. TEST.npz holds what the model reads, by
its inputs' names, and the right answers as "label".
"""

import json
import lzma
import sys
from pathlib import Path

import jax
import numpy as np

KINDS = {"F32": "<f4", "I32": "<i4", "I8": "i1", "U8": "u1"}


def read(path):
    """The arrays of a safetensors file: a length, a table, the values."""
    raw = path.read_bytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, x in json.loads(raw[8:head]).items():
        begin, end = x["data_offsets"]
        values = np.frombuffer(raw[head + begin : head + end], KINDS[x["dtype"]])
        found[name] = values.reshape(x["shape"])
    return found


def classify(path, test):
    """The classes of all examples."""
    program = jax.export.deserialize(bytearray(lzma.decompress(path.read_bytes())))
    _, inputs = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    given = {name: test[name] for name in inputs}
    outputs = jax.jit(program.call)(read(path.with_suffix(".safetensors")), given)
    return np.asarray(outputs).argmax(axis=-1)


if __name__ == "__main__":
    test = dict(np.load(sys.argv[2]))
    accuracy = np.mean(classify(Path(sys.argv[1]), test) == test["label"])
    print(f"accuracy {accuracy:.4f} on {len(test['label'])} examples")
