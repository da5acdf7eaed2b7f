"""Bytes promised and bytes on disk: a CNN in 4 patterns and 3 widths, read by two readers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_answers_the_same_from_its_file(tmp_path, model, bits):
    model, _, _, _ = model
    images = jax.random.normal(jax.random.key(5), (4, 16, 16, 3))
    batch = {"image": images, "label": jnp.zeros(4, jnp.int32)}
    transform = ej.chain(
        prune=ej.prune.magnitude(0.8, 0, 1, 1), quant=ej.quantize.qat(bits, activations=8)
    )
    tx = optax.sgd(0.01)
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch)

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    step = jax.jit(ej.make_step(model.apply, transform, loss, tx))
    for _ in range(3):
        state, _ = step(state, batch)
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    ej.save_packed(tmp_path / "m", ej.export(transform, state), facts)
    loaded = ej.load_packed(tmp_path / "m", like=state.vars.model).params
    shipped = state._replace(vars=state.vars._replace(model=loaded))
    rows = [ej.make_eval(model.apply, transform, outputs_of)(s, batch) for s in (state, shipped)]
    found = [[float(mean.total) for mean in row.values()] for row in rows]
    # The largest of the rounded weights gives their scale again but for its last bit.
    assert np.allclose(*found, rtol=1e-5, atol=1e-6)
    assert np.ptp(found[0]) > 0.01


def outputs_of(outputs, batch):
    return {str(k): outputs[:, k] for k in range(outputs.shape[1])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["csr", "codebook", "dense"])
def test_numpy_alone_reads_other_layouts_and_dtypes(tmp_path, kind, dtype):
    values = np.random.default_rng(0).normal(size=(64, 512))
    facts = {}
    if kind == "csr":
        values[np.random.default_rng(1).random(values.shape) > 0.01] = 0
    if kind == "codebook":
        values = np.sign(values) * (1 + (abs(values) > 1))
        facts = {"k": {"clusters": 4}}
    params = {"k": jnp.asarray(values, dtype)}
    [leaf] = ej.footprint(params, facts=facts).leaves
    assert leaf.format == ("csr" if kind == "csr" else "dense")
    assert (leaf.bits == 2) == (kind == "codebook")
    ej.save_packed(tmp_path / "m", params, facts)
    found = reader().read(tmp_path / "m")["params/k"]
    assert np.array_equal(found, np.asarray(params["k"]).astype(found.dtype))
