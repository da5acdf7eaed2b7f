"""Frozen models written by hand: quantizers marked, BatchNorm folded, biases on the sums' grid."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from effjax.quantize.marker import Quantizer, fake_quant

SIGNED, UNSIGNED = np.float32(6 / 127), np.float32(6 / 255)


class Layers:
    """Quantized layers with weights from a seed; one `Layers` writes one model, at every trace."""

    def __init__(self):
        self.weights, self.names = {}, []

    def rounded(self, x, name, low=-127, high=127, scale=None):
        self.names.append(name)
        scale = scale or (SIGNED if low else UNSIGNED)
        return fake_quant(x, Quantizer(f"{name}:output", scale, low, high))

    def relu(self, x, name):
        return self.rounded(jax.nn.relu(x), name, 0, 255)

    def layer(self, name, shape, step):
        """Weight and bias; `step` is the scale of the layer's input."""
        if name not in self.weights:
            rng = np.random.default_rng(len(self.weights))
            w = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
            scale = (np.abs(w).max(axis=tuple(range(w.ndim - 1))) / 127).astype(np.float32)
            w = (np.round(w / scale) * scale).astype(np.float32)
            grid = step * scale
            bias = (np.round(rng.normal(size=shape[-1]) * 0.3 / grid) * grid).astype(np.float32)
            self.weights[name] = w, scale, bias
        w, scale, bias = self.weights[name]
        own = Quantizer(f"{name}:weight", scale, -127, 127, axis=len(shape) - 1)
        return fake_quant(jnp.asarray(w), own), jnp.asarray(bias)

    def conv(self, x, name, features, step, size=3, stride=1, groups=1):
        with jax.named_scope(name):
            shape = (size, size, x.shape[-1] // groups, features)
            w, bias = self.layer(name, shape, step)
            y = jax.lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return y + bias

    def dense(self, x, name, features, step=SIGNED):
        with jax.named_scope(name):
            w, bias = self.layer(name, (x.shape[-1], features), step)
            return x @ w + bias


def mlp(widths=(32, 32)):
    own = Layers()

    def apply(x):
        x, step = own.rounded(x, "input"), SIGNED
        for i, width in enumerate(widths):
            x, step = own.relu(own.dense(x, f"dense{i}", width, step), f"dense{i}"), UNSIGNED
        return own.dense(x, "head", 10, step)

    return apply, (20,)


def cnn(features=(8, 16)):
    """Two residual blocks, a maximum over windows, a mean over space."""
    own = Layers()

    def apply(x):
        x, step = own.rounded(x, "input"), SIGNED
        for i, n in enumerate(features):
            x = own.relu(own.conv(x, f"conv{i}", n, step, stride=1 + i), f"conv{i}")
            y = own.rounded(own.conv(x, f"inner{i}", n, UNSIGNED), f"inner{i}")
            x, step = own.relu(x + y, f"sum{i}"), UNSIGNED
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = own.rounded(x.mean(axis=(1, 2)), "mean", 0, 255)
        return own.dense(x, "head", 10, UNSIGNED)

    return apply, (12, 12, 3)


def depthwise(features=(8, 16)):
    own = Layers()

    def apply(x):
        x = own.relu(own.conv(own.rounded(x, "input"), "stem", 8, SIGNED), "stem")
        for i, n in enumerate(features):
            n_in = x.shape[-1]
            x = own.relu(own.conv(x, f"depth{i}", n_in, UNSIGNED, groups=n_in), f"depth{i}")
            x = own.relu(own.conv(x, f"point{i}", n, UNSIGNED, size=1), f"point{i}")
        x = own.rounded(x.mean(axis=(1, 2)), "mean", 0, 255)
        return own.dense(x, "head", 10, UNSIGNED)

    return apply, (8, 8, 3)


def encoder(width=16, heads=2, length=6):
    """One block of a transformer encoder, before its norms, and a mean over tokens."""
    own = Layers()

    def norm(x, name):
        scale, bias = jnp.linspace(0.5, 1.5, width), jnp.linspace(-0.2, 0.2, width)
        y = nn.LayerNorm(parent=None).apply({"params": {"scale": scale, "bias": bias}}, x)
        return own.rounded(y, name)

    def apply(x):
        n, split = x.shape[0], (x.shape[0], length, heads, width // heads)
        z = norm(x, "norm1")
        q, k, v = (own.rounded(own.dense(z, name, width), name).reshape(split) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
        scores = own.rounded(jax.nn.softmax(scores), "scores", 0, 255, np.float32(1 / 255))
        z = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(n, length, width)
        x = x + own.rounded(own.dense(own.rounded(z, "mixed"), "out", width), "out")
        z = own.rounded(own.dense(norm(x, "norm2"), "up", 2 * width), "up")
        x = x + own.rounded(own.dense(own.rounded(nn.gelu(z), "gelu"), "down", width), "down")
        return own.dense(own.rounded(x.mean(axis=1), "mean"), "head", 10)

    return apply, (length, width)


PROGRAMS = {"mlp": mlp, "cnn": cnn, "depthwise": depthwise, "encoder": encoder}


def images(shape, n=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)
