"""The small models that the tests share: one CNN, written in Linen and in NNX with equal paths.

No bias before BatchNorm: its gradient is zero but for rounding, which Adam would blow up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import effjax as ej

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(24, 8, 8, 1)).astype(np.float32),
    "label": RNG.integers(0, 8, size=24).astype(np.int32),
}


class LinenCNN(nn.Module):
    """Convolution, BatchNorm, Dropout, dense."""

    features: int = 8
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(x))
        x = nn.Conv(2 * self.features, (3, 3), strides=2, use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm2")(x))
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(8, name="head")(x)


class NNXCNN(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs, features: int = 8, dropout: float = 0.2):
        self.conv1 = nnx.Conv(1, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        kwargs = {"strides": 2, "use_bias": False, "rngs": rngs}
        self.conv2 = nnx.Conv(features, 2 * features, (3, 3), **kwargs)
        self.norm2 = nnx.BatchNorm(2 * features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(2 * features, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


def linen(features: int = 8, dropout: float = 0.2) -> ej.Model:
    """The CNN in Linen as a Model."""
    return ej.from_linen(LinenCNN(features, dropout))


def nnx_(features: int = 8, dropout: float = 0.2) -> ej.Model:
    """The CNN in NNX as a Model."""
    return ej.from_nnx(lambda rngs: NNXCNN(rngs, features, dropout))


def raw() -> ej.Model:
    """Two matrices, in plain JAX."""

    def init(key, batch):
        a, b = jax.random.split(key)
        return {
            "hidden": {"kernel": 0.2 * jax.random.normal(a, (64, 32)), "bias": jnp.zeros(32)},
            "head": {"kernel": 0.2 * jax.random.normal(b, (32, 8)), "bias": jnp.zeros(8)},
        }, {}

    def apply(params, model_state, batch, key, train):
        x = batch["image"].reshape(-1, 64)
        x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"], model_state

    return ej.Model(init, apply)


def loss(outputs, batch):
    """Cross-entropy with integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def from_nnx_state(params, model_state):
    """An NNX CNN's weights and statistics as the Linen CNN's."""
    return params, {"batch_stats": model_state}
