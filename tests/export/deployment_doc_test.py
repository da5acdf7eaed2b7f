"""The code of docs/deployment.md runs and prints what the page says, and the examples classify."""

import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from effjax.export.onnx import to_onnx
from tests.export.frozen_programs import cnn, images

ROOT = pathlib.Path(__file__).parents[2]


def section(name):
    page = (ROOT / "docs" / "deployment.md").read_text()
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found is not None
    return found[1], "".join(re.findall(r"^```python\n(.*?)^```", found[1], re.M | re.S))


def test_the_code_of_the_page_runs(capsys):
    pytest.importorskip("onnxruntime")
    space = {"__name__": "docs"}
    for name in ("Freezing", "Verified files", "StableHLO", "ONNX", "LiteRT"):
        text, code = section(name)
        exec(compile(code, f"docs/deployment.md: {name}", "exec"), space)
        printed = capsys.readouterr().out.strip()
        if name != "LiteRT":
            assert f"prints `{printed}`" in text
        if "logits" in code:
            wanted = space["frozen"].apply(space["frozen"].weights, space["batch"])
            np.testing.assert_allclose(space["logits"], wanted, atol=0.02)


def test_the_examples_classify(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    apply, shape = cnn((4,))
    x = images(shape, 7)
    label = np.asarray(jax.jit(apply)(x)).argmax(-1)
    np.savez(tmp_path / "test.npz", input=x, label=np.where(np.arange(7) < 5, label, label + 1))
    (n,) = jax.export.symbolic_shape("n")
    files = {"onnx": to_onnx(apply, jax.ShapeDtypeStruct((n, *shape), x.dtype))}
    try:
        import litert_converter  # noqa: F401

        from effjax.export.litert import to_litert

        files["litert"] = to_litert(apply, jax.ShapeDtypeStruct((3, *shape), x.dtype))
    except ImportError:
        pass
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        arguments = [name, str(tmp_path / name), str(tmp_path / "test.npz")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", arguments)
            runpy.run_path(str(ROOT / "examples" / f"classify_{name}.py"), run_name="__main__")
        assert capsys.readouterr().out == "accuracy 0.7143 on 7 examples\n"
