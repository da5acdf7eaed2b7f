"""LiteRT: layers on int8 with the scales of training, or an error that names what is not there."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effjax.errors import ExportError
from effjax.export import litert
from effjax.export.litert import integer_kernels, kernels, run, to_litert
from effjax.export.marker import tapped
from effjax.quantize.marker import Quantizer, fake_quant
from tests.export.frozen_programs import PROGRAMS, SIGNED, UNSIGNED, images

WHY = "needs litert-converter and ai-edge-litert: pip install 'effjax[litert]'"
pytest.importorskip("litert_converter", reason=WHY)
pytest.importorskip("ai_edge_litert", reason=WHY)

# The last layer's result has no quantizer, so it is float32 from int8 weights.
KERNELS = {
    "mlp": {"FULLY_CONNECTED": 2},
    "cnn": {"CONV_2D": 4, "ADD": 2, "MAX_POOL_2D": 1, "MEAN": 1},
    "depthwise": {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 2, "MEAN": 1},
    "encoder": {"FULLY_CONNECTED": 6, "BATCH_MATMUL": 1, "GELU": 1},
}


def aval(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def exported(kind):
    apply, shape = PROGRAMS[kind]()
    x, every = images(shape, 4), tapped(apply)
    outputs, values = jax.tree.map(np.asarray, jax.jit(every)(x))
    return x, to_litert(every, aval(*x.shape)), outputs, values


@pytest.mark.parametrize("kind", PROGRAMS)
def test_layers_run_on_integers_and_give_what_jax_gives(kind):
    x, data, outputs, values = exported(kind)
    assert integer_kernels(data) == KERNELS[kind]
    found, *layers = run(data)(x)
    # LiteRT's mean rounds twice, and what follows softmax and GELU differs by their tables.
    near, all_near = {"encoder": (2.01, 0.8)}.get(kind, (1.01, 0.995))
    for (name, wanted), layer in zip(sorted(values.items()), layers, strict=True):
        units = np.abs(layer - wanted) / (UNSIGNED if wanted.min() >= 0 else SIGNED)
        assert units.max() < near, name
        assert (units < 0.01).mean() >= (0.9 if name == "mean:output" else all_near), name
    assert (found.argmax(-1) == outputs.argmax(-1)).all()


def test_weights_are_stored_as_integers():
    apply, shape = PROGRAMS["cnn"]((64, 128))
    data = to_litert(apply, aval(1, *shape))
    weights = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 128 * 10
    assert len(data) < 1.1 * (weights + 4 * (2 * 64 + 2 * 128 + 10))
    assert kernels(data)["QUANTIZE float32"] == 1


@pytest.mark.parametrize("kind", PROGRAMS)
def test_buffers_are_where_they_are_read_in_place(kind):
    schema = importlib.import_module("litert_converter.schema_py_generated")
    file = schema.Model.GetRootAs(exported(kind)[1], 0)
    buffers = [file.Buffers(i) for i in range(file.BuffersLength())]
    data = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
    assert data
    assert all(start % 16 == 0 for start in data)
    assert [b.DataLength() > 0 for b in buffers] == [False, *[True] * len(data)]


def test_weights_of_few_bits_are_packed():
    def size(bits):
        bound = 2 ** (bits - 1) - 1
        codes = np.random.default_rng(0).integers(-bound, bound + 1, (128, 128))
        scale = np.full(128, 0.05, np.float32)
        weight, half = (codes * scale).astype(np.float32), np.float32(0.5)

        def apply(x):
            x = fake_quant(x, Quantizer("x:input", half, -127, 127))
            w = fake_quant(jnp.asarray(weight), Quantizer("k:weight", scale, -bound, bound, 1))
            return fake_quant(x @ w, Quantizer("k:output", half, -127, 127))

        x = images((128,), 2)
        data = to_litert(apply, aval(*x.shape))
        np.testing.assert_allclose(run(data)(x)[0], jax.jit(apply)(x), atol=0.501)
        return len(data)

    eight, four, two = size(8), size(4), size(2)
    assert (eight - four, eight - two) == pytest.approx((128 * 64, 128 * 96), abs=200)


def test_a_change_of_grid_is_exact():
    """Of a ratio that XNNPACK's kernel from int8 to int8 has not: 1.2135 is 311 / 256 there."""
    grids = [Quantizer(f"x:{s}", np.float32(s), -128, 127) for s in (0.0465634, 0.0383694)]

    def apply(x):
        return fake_quant(fake_quant(x, grids[0]), grids[1])

    x = (np.arange(-128, 128) * grids[0].scale).astype(np.float32)[None]
    data = to_litert(apply, aval(*x.shape))
    units = run(data)(x)[0] / grids[1].scale
    np.testing.assert_allclose(units, np.asarray(jax.jit(apply)(x)) / grids[1].scale, atol=1e-3)
    assert kernels(data)["QUANTIZE float32"] == 2


def test_an_operation_without_a_translation_is_named_with_its_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4, name="first")(x))
            with jax.named_scope("order"):
                return jnp.sort(x)

    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ExportError, match=r"'sort' on \(float32\[2,4\]\) at Net/order"):
        to_litert(lambda x: net.apply(variables, x), aval(2, 3))


def test_symbolic_shapes_are_refused():
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(ExportError, match=r"'input' has the shape \(n, 3\).*Give a batch size"):
        to_litert(jnp.tanh, aval(n, 3))


def test_another_converter_is_refused(monkeypatch):
    monkeypatch.setattr(litert.importlib.metadata, "version", lambda _: "0.6.1")
    with pytest.raises(ExportError, match=r"is version 0.6.1.*litert-converter==0.5.0"):
        to_litert(jnp.tanh, aval(3))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(ExportError, match=r"pip install 'effjax\[litert\]'"):
        to_litert(jnp.tanh, aval(3))
