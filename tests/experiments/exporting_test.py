"""The command `export`: files of a finished run, classified with by scripts that know no effjax."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.harness.cli import main
from experiments.harness.exporting import predictions

EXAMPLES = Path(__file__).parents[2] / "examples"
SUFFIXES = {"onnx": ".onnx", "litert": ".tflite", "stablehlo": ".stablehlo"}


def test_the_last_batch_is_filled_up():
    images = np.eye(5, dtype=np.float32)
    sizes = []

    def call(inputs):
        sizes.append(len(inputs["image"]))
        return inputs["image"]

    assert predictions(call, images, 2).tolist() == [0, 1, 2, 3, 4]
    assert sizes == [2, 2, 2]


def test_what_cannot_be_exported_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    assert main(["export", "train/none"]) == 2
    assert "there is no run 'train/none'" in capsys.readouterr().err
    run = tmp_path / "sparsity_curve" / "a"
    run.mkdir(parents=True)
    assert main(["export", str(run)]) == 1
    assert "is no run's folder" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps({"experiment": "sparsity_curve", "config": {}}))
    assert main(["export", str(run)]) == 1
    error = capsys.readouterr().err
    assert "leave no one model to export" in error
    assert "'quickstart', 'train'" in error
    (run / "config.json").write_text(json.dumps({"experiment": "train", "config": {"bits": 32}}))
    assert main(["export", str(run)]) == 1
    assert "--bits 8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("words", [["train", "--epochs", "6"], ["quickstart", "--seeds", "1"]])
def test_every_engine_classifies_as_evaluation_does(words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("litert_converter")
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    assert main([*words, "--id", "a"]) == 0
    assert main(["export", f"{words[0]}/a"]) == 0
    folder = tmp_path / words[0] / "a" / "export"
    record = json.loads((folder / "export.json").read_text())
    accuracy = record["accuracy"]
    capsys.readouterr()
    for name, suffix in SUFFIXES.items():
        # One of 360 images is 0.28 points.
        assert abs(accuracy[name] - accuracy["frozen"]) < 0.003
        assert abs(accuracy[name] - accuracy["evaluation"]) < 0.006
        script = EXAMPLES / f"classify_{name}.py"
        command = [sys.executable, str(script), str(folder / f"model{suffix}")]
        done = subprocess.run(
            [*command, str(folder / "test.npz")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"accuracy {accuracy[name]:.4f} on 360 examples" in done.stdout
