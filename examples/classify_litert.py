"""Classifies images with LiteRT alone: `python classify_litert.py MODEL.tflite TEST.npz`.

TEST.npz holds what the model reads, by its inputs' names, and the right answers as "label".
"""

import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def classify(path, test):
    """The classes of all examples, as many at a time as the file is made for."""
    runner = Interpreter(model_path=path).get_signature_runner("serving_default")
    details = runner.get_input_details()
    size = int(next(iter(details.values()))["shape"][0])
    count, found = len(test["label"]), []
    for start in range(0, count, size):
        # The last batch is filled up: the file has a fixed size of batch.
        rows = np.arange(start, start + size) % count
        outputs = runner(**{name: test[name][rows] for name in details})
        found.append(next(iter(outputs.values())).argmax(axis=-1))
    return np.concatenate(found)[:count]


if __name__ == "__main__":
    test = dict(np.load(sys.argv[2]))
    accuracy = np.mean(classify(sys.argv[1], test) == test["label"])
    print(f"accuracy {accuracy:.4f} on {len(test['label'])} examples")
