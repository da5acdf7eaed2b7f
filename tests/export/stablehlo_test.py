"""StableHLO: written, read back by jax and NumPy alone, and refused with a reason."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ExportError
from effjax.export.stablehlo import (
    from_safetensors,
    load_stablehlo,
    packed,
    safetensors,
    save_stablehlo,
    to_stablehlo,
)
from tests import nets

IMAGES = {"image": nets.BATCH["image"]}

ALONE = """
import json, lzma, sys
import jax, jax.numpy as jnp, numpy as np

program = jax.export.deserialize(bytearray(lzma.open(sys.argv[1]).read()))
raw = open(sys.argv[2], "rb").read()
head = 8 + int.from_bytes(raw[:8], "little")
kinds = {"F32": "float32", "I32": "int32", "I8": "int8", "U8": "uint8"}
weights = {}
for name, x in json.loads(raw[8:head]).items():
    begin, end = (head + at for at in x["data_offsets"])
    weights[name] = np.frombuffer(raw[begin:end], kinds[x["dtype"]]).reshape(x["shape"])
np.save(sys.argv[4], program.call(weights, {"image": np.load(sys.argv[3])}))
assert not any(name.split(".")[0] in ("effjax", "flax", "safetensors") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def frozen():
    """Two matrices of 4 bits."""
    model = nets.raw()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    small = ej.quantize.ptq(model, params, state, [nets.BATCH], 4, 8)
    return ej.quantize.freeze(model.apply, small.transform, small.state, [nets.BATCH])


def test_jax_and_numpy_alone_compute_the_same_bits(frozen, tmp_path):
    program = to_stablehlo(frozen)
    size = save_stablehlo(tmp_path / "model.stablehlo", program)
    assert size == program.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "model.stablehlo"]
    np.save(tmp_path / "x.npy", IMAGES["image"][:5])
    files = [tmp_path / n for n in ("model.stablehlo", "model.safetensors", "x.npy", "y.npy")]
    command = [sys.executable, "-c", ALONE, *map(str, files)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    want = jax.jit(frozen.apply)(frozen.weights, {"image": IMAGES["image"][:5]})
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), want)
    # All sizes of batch, on three platforms.
    again = load_stablehlo(tmp_path / "model.stablehlo")
    whole = jax.jit(frozen.apply)(frozen.weights, IMAGES)
    np.testing.assert_array_equal(again.run()(IMAGES), whole)
    assert jax.export.deserialize(bytearray(again.program)).platforms == ("cpu", "cuda", "tpu")


def test_four_bits_take_half_a_byte(frozen):
    stored = packed(frozen)
    assert stored["hidden/kernel:weight"].nbytes == 64 * 32 // 2
    assert stored["head/kernel:weight"].nbytes == 32 * 8 // 2
    assert frozen.nbytes == (64 * 32 + 32 * 8) // 2 + 4 * (32 + 8)


def test_a_program_names_no_file_of_the_machine_that_wrote_it(frozen):
    before = jax.config.jax_traceback_in_locations_limit
    assert b".py" not in to_stablehlo(frozen).program
    assert jax.config.jax_traceback_in_locations_limit == before


def test_weights_inside_need_no_second_file(frozen, tmp_path):
    program = to_stablehlo(frozen, weights="inside", batch=3, platforms=["cpu"])
    save_stablehlo(tmp_path / "model.stablehlo", program)
    assert [p.name for p in tmp_path.iterdir()] == ["model.stablehlo"]
    few = {"image": IMAGES["image"][:3]}
    want = jax.jit(frozen.apply)(frozen.weights, few)
    np.testing.assert_allclose(program.run()(few), want, rtol=1e-6, atol=1e-6)


def test_bad_input_is_an_error_and_leaves_no_file(frozen, tmp_path):
    with pytest.raises(ExportError, match="'beside' the program or 'inside'"):
        to_stablehlo(frozen, weights="near")
    with pytest.raises(ExportError, match="cpu, cuda, rocm and tpu"):
        to_stablehlo(frozen, platforms=["npu"])
    program = to_stablehlo(frozen, platforms=["cpu"])
    save_stablehlo(tmp_path / "model.stablehlo", program)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="which is not there"):
        load_stablehlo(tmp_path / "model.stablehlo")
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": np.zeros(2, np.float32)}))
    with pytest.raises(ExportError, match="weights of another program"):
        load_stablehlo(tmp_path / "model.stablehlo")
    (tmp_path / "cut").write_bytes(program.program[:100])
    with pytest.raises(ExportError, match="cannot be read as a program"):
        load_stablehlo(tmp_path / "cut")
    # A folder where the second file should be: the first is not written either.
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "new.safetensors").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        save_stablehlo(tmp_path / "there" / "new.stablehlo", program)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["new.safetensors"]


def test_safetensors_are_read_by_the_safetensors_library():
    stored = {"a/b:weight": np.arange(6, dtype=np.int8).reshape(2, 3), "s": np.float32([1.5])}
    raw = safetensors(stored)
    own = from_safetensors(raw)
    for name, x in stored.items():
        np.testing.assert_array_equal(own[name], x)
    library = pytest.importorskip("safetensors.numpy").load(raw)
    assert {n: x.tolist() for n, x in library.items()} == {n: x.tolist() for n, x in own.items()}
    with pytest.raises(ExportError, match="cut off or damaged"):
        from_safetensors(raw[:20])
