"""Bytes promised and bytes on disk: a CNN in 4 patterns and 3 widths, read by two readers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.prune import patterns
from effjax.select import leaves
from experiments.models import cnn

SPEC = cnn.Spec(size=16, stages=(16, 32, 32), hidden=128)
PATTERNS = {
    "dense": None,
    "unstructured": patterns.unstructured(),
    "2:4": patterns.n_m(2, 4),
    "block": patterns.block((4, 4)),
}


def reader():
    path = Path(__file__).parents[2] / "examples" / "read_packed.py"
    spec = importlib.util.spec_from_file_location("read_packed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    model = cnn.model(SPEC)
    batch = {"image": jnp.zeros((1, 16, 16, 3))}
    return model, batch, *model.init(jax.random.key(0), batch)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_sizes_on_disk_are_those_promised(tmp_path, model, name, bits):
    model, batch, params, state = model
    members = {}
    if PATTERNS[name] is not None:
        kernels = {p: x for p, x in leaves(params).items() if p.endswith("kernel")}
        scores = {
            p: abs(x) for p, x in kernels.items() if p not in ("conv_0/kernel", "head/kernel")
        }
        members["prune"] = ej.prune.static(
            None if name == "2:4" else 0.8, scores=scores, pattern=PATTERNS[name], budget="uniform"
        )
    if bits < 32:
        members["quant"] = ej.quantize.qat(weights=bits, activations=8)
    transform = ej.chain(**members)
    setup = ej.Setup(model.apply, state, batch)
    extra, kept = transform.init(jax.random.key(1), params, setup)
    shipped = transform.export(params, extra, kept)
    facts = transform.describe(params, extra, kept)
    promised = ej.footprint(shipped, facts=facts, model_state=state)
    path = tmp_path / "m.safetensors"
    size = ej.save_packed(path, shipped, facts, model_state=state)
    assert size == path.stat().st_size == promised.file_bytes
    # Without the header, which does not grow with the weights.
    head = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert size - head == promised.totals.bytes
    if name != "dense":
        taken = {leaf.format for leaf in promised.leaves}
        assert {"unstructured": "bitmask", "2:4": "2:4", "block": "4x4"}[name] in taken
    found = ej.load_packed(path, like=shipped).params
    if bits == 32:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, shipped))
    ej.save_packed(tmp_path / "again", found, facts, model_state=state)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    plain = reader().read(path)
    for p, x in leaves(found).items():
        assert np.array_equal(plain[f"params/{p}"], x), p
