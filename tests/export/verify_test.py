"""A file is written if its engine computes what the frozen model does, and else nothing is."""

import jax
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ExportError
from effjax.export.verify import FORMATS, Bound, deploy
from tests import nets

pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")


@pytest.fixture(scope="module")
def frozen():
    model = nets.raw()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    small = ej.quantize.ptq(model, params, state, [nets.BATCH])
    return ej.quantize.freeze(model.apply, small.transform, small.state, [nets.BATCH])


@pytest.mark.parametrize("suffix", [".onnx", ".tflite", ".stablehlo"])
def test_what_is_written_was_run_and_agrees(frozen, tmp_path, suffix):
    found = deploy(frozen, tmp_path / f"model{suffix}", repeats=1)
    assert found.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert found.integers == 64 * 32 + 32 * 8 + 4 * (32 + 8)
    assert found.units == 1.0
    assert found.distance.agreement == 1.0
    # A sum at a tie is rounded to either side: a unit of one input of the last layer.
    assert found.distance.mean < 1e-3 * found.distance.scale
    # LiteRT computes the last layer, whose result has no grid, in floating point.
    assert sum(found.integer_kernels.values()) == {".onnx": 2, ".tflite": 1}.get(suffix, 0)
    assert found.batch == (1 if suffix == ".tflite" else 24)
    assert found.seconds > 0


def refused(frozen, path, match, **options):
    before = list(path.parent.iterdir()) if path.parent.is_dir() else []
    with pytest.raises(ExportError, match=match):
        deploy(frozen, path, repeats=1, **options)
    assert (list(path.parent.iterdir()) if path.parent.is_dir() else []) == before


def test_a_file_that_disagrees_is_not_written(frozen, tmp_path):
    other = frozen._replace(apply=lambda w, x: -frozen.apply(w, x))
    refused(other, tmp_path / "m.onnx", r"would not compute what the frozen model does")
    away = frozen._replace(observe=lambda w, x: {n: x + 1 for n, x in frozen.observe(w, x).items()})
    refused(away, tmp_path / "m.onnx", r"integers are not those of the frozen model")


def test_a_file_whose_quantizers_vanished_is_not_written(frozen, tmp_path):
    def unmarked(w, inputs):
        x = inputs["image"].reshape(-1, 64)
        x = jax.nn.relu(x @ w["hidden/kernel:weight"] + w["hidden/kernel:bias"])
        return x @ w["head/kernel:weight"] + w["head/kernel:bias"]

    other = frozen._replace(marked=unmarked)
    refused(other, tmp_path / "m.onnx", r"of 2 sites with integers the engine runs \{\}")


def test_places_and_formats_that_cannot_be(frozen, tmp_path):
    refused(frozen, tmp_path / "m.pt", r"suffix '\.pt'.*onnx.*tflite.*stablehlo")
    (tmp_path / "file").write_text("kept")
    for suffix in FORMATS:
        refused(frozen, tmp_path / "file" / f"m{suffix}", r"cannot be written.*Nothing was left")
    assert (tmp_path / "file").read_text() == "kept"
    refused(frozen, tmp_path / "m.onnx", r"24 rows, which are no batch of 32", batch=32)


def test_bounds_are_the_callers(frozen, tmp_path):
    # One unit less than asked: no share is larger than 1.
    refused(frozen, tmp_path / "m.onnx", r"agree to one unit", bound=Bound(units=1.1))
    assert np.isclose(Bound().units, 0.995)
