"""Classifies images with ONNX Runtime alone: `python classify_onnx.py MODEL.onnx TEST.npz`.

TEST.npz holds what the model reads, by its inputs' names, and the right answers as "label".
"""

import sys

import numpy as np
import onnxruntime as ort


def classify(path, test, batch_size=100):
    """The classes of all examples."""
    options = ort.SessionOptions()
    # Exact sums on CPUs without VNNI, where the faster instruction saturates at 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = []
    for start in range(0, len(test["label"]), batch_size):
        part = {name: test[name][start : start + batch_size] for name in names}
        found.append(session.run(None, part)[0].argmax(axis=-1))
    return np.concatenate(found)


if __name__ == "__main__":
    test = dict(np.load(sys.argv[2]))
    accuracy = np.mean(classify(sys.argv[1], test) == test["label"])
    print(f"accuracy {accuracy:.4f} on {len(test['label'])} examples")
