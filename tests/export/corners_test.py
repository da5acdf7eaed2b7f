"""Models that came through compression, in every engine: fewer bits, fewer channels, embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import effjax as ej
from effjax.errors import ExportError
from effjax.export.verify import deploy

pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
RNG = np.random.default_rng(0)
BATCH = {"image": jnp.asarray(RNG.normal(size=(16, 8, 8, 3)), jnp.float32)}
TOKENS = {"tokens": jnp.asarray(RNG.integers(0, 50, (8, 6)), jnp.int32)}
SUFFIXES = (".onnx", ".tflite", ".stablehlo")


class Linen(nn.Module):
    """Two convolutions with BatchNorm."""

    widths: tuple[int, ...] = (16, 16)

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.conv0 = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm0 = nnx.BatchNorm(16, rngs=rngs)
        self.conv1 = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(nnx.relu(self.norm0(self.conv0(x))))))
        return self.head(x.mean(axis=(1, 2)))


class Encoder(nn.Module):
    """An embedding, attention and an MLP."""

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(50, 16, name="embed")(tokens)
        y = nn.LayerNorm(name="norm0")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention", deterministic=True)(y, y)
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(y)))
        return nn.Dense(10, name="head")(x.mean(1))


def written(model, transform, folder, batch, suffix, values=None):
    """The file of the model quantized after training."""
    params, state = values or model.init(jax.random.key(0), batch)
    small = ej.quantize.ptq(model, params, state, [batch], transform=transform)
    frozen = ej.quantize.freeze(model.apply, small.transform, small.state, [batch])
    return frozen, deploy(frozen, folder / f"model{suffix}", repeats=1)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("weights", "activations"), [(4, 8), (2, 8), (4, 4)])
def test_fewer_bits(weights, activations, suffix, tmp_path):
    quant = ej.quantize.qat(weights, activations, ranges="static")
    _, found = written(ej.from_linen(Linen()), ej.chain(quant=quant), tmp_path, BATCH, suffix)
    assert found.units == 1.0
    assert found.integers == (3 * 9 + 16 * 9 + 10) * 16 * weights / 8 + 4 * (16 + 16 + 10)
    assert sum(found.integer_kernels.values()) >= (0 if suffix == ".stablehlo" else 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", [ej.quantize.ternary, ej.quantize.binary])
def test_signs(make, suffix, tmp_path):
    model, quant = ej.from_linen(Linen()), ej.chain(quant=make())
    state = ej.init_state(jax.random.key(0), model, quant, optax.sgd(0.1), BATCH)
    frozen = ej.quantize.freeze(model.apply, quant, state, [BATCH])
    assert deploy(frozen, tmp_path / f"model{suffix}", repeats=1).units == 1.0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nnx(suffix, tmp_path):
    model = ej.from_nnx(NNX)
    _, found = written(model, None, tmp_path, BATCH, suffix)
    assert found.units == 1.0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fewer_channels(suffix, tmp_path):
    """Channels that are pruned and cut out; the module is made anew with the widths left."""
    model = ej.from_linen(Linen())
    params, state = model.init(jax.random.key(0), BATCH)
    alive = jnp.arange(16) % 2 == 0
    masks = {f"norm0/{name}": alive for name in ("scale", "bias")}
    masks["conv0/kernel"] = jnp.broadcast_to(alive, params["conv0"]["kernel"].shape)
    small = ej.prune.compact(model, params, state, BATCH, masks)
    cut = ej.from_linen(Linen(widths=(8, 16)))
    values = (small.params, small.model_state)
    _, found = written(cut, None, tmp_path, BATCH, suffix, values)
    assert found.units == 1.0
    assert found.integers == 3 * 9 * 8 + 8 * 9 * 16 + 16 * 10 + 4 * (8 + 16 + 10)


@pytest.mark.parametrize("suffix", [".onnx", ".stablehlo"])
def test_embeddings_and_products(suffix, tmp_path):
    quant = ej.quantize.qat(ranges="static", embeddings=True, products=True)
    model = ej.from_linen(Encoder(), "tokens")
    frozen, found = written(model, ej.chain(quant=quant), tmp_path, TOKENS, suffix)
    assert found.units >= 0.995
    assert {name.rpartition(":")[2] for name in frozen.quantizers} >= {"weight", "lhs", "rhs"}


def test_embeddings_that_litert_does_not_take(tmp_path):
    quant = ej.quantize.qat(ranges="static", embeddings=True)
    model = ej.from_linen(Encoder(), "tokens")
    with pytest.raises(ExportError, match="an embedding is quantized"):
        written(model, ej.chain(quant=quant), tmp_path, TOKENS, ".tflite")
    assert not list(tmp_path.iterdir())
