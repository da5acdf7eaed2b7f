"""LeNet-5, the small convolutional network of the pruning papers, in Linen and NNX.

    conv 5x5, 2x2 max-pooling | conv 5x5, 2x2 max-pooling | dense, ReLU | dense classes

The convolutions have no padding and no ReLU, as in Caffe's version of it, which is what papers on
pruning mean: 20 and 50 channels and 500 units on images of 28x28 make 431,080 parameters.

References: LeCun et al., "Gradient-based learning applied to document recognition", 1998; Jia et
al., "Caffe: Convolutional architecture for fast feature embedding", 2014,
https://arxiv.org/abs/1408.5093.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from flax import nnx
from jax import Array

import effjax as ej
from experiments.models.pool import max_pool


@dataclass(frozen=True)
class Spec:
    """`size` of the images and their `channels`, the features of both convolutions, the hidden
    units, and `classes`."""

    size: int = 28
    channels: int = 1
    features: tuple[int, int] = (20, 50)
    hidden: int = 500
    classes: int = 10

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 4:
            raise ValueError(
                f"images of {self.size} pixels do not halve twice without padding; give a multiple "
                "of 4 from 16 on."
            )

    @property
    def flat(self) -> int:
        """Inputs of the first dense layer."""
        side = ((self.size - 4) // 2 - 4) // 2
        return side * side * self.features[1]


class LinenLeNet(nn.Module):
    """The network in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array) -> Array:
        x = image
        for i, features in enumerate(self.spec.features):
            x = max_pool(nn.Conv(features, (5, 5), padding="VALID", name=f"conv_{i}")(x))
        x = nn.relu(nn.Dense(self.spec.hidden, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.spec.classes, name="head")(x)


class NNXLeNet(nnx.Module):
    """The network in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        first, second = spec.features
        self.conv_0 = nnx.Conv(spec.channels, first, (5, 5), padding="VALID", rngs=rngs)
        self.conv_1 = nnx.Conv(first, second, (5, 5), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(spec.flat, spec.hidden, rngs=rngs)
        self.head = nnx.Linear(spec.hidden, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = max_pool(self.conv_1(max_pool(self.conv_0(image))))
        return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


def model(spec: Spec = Spec(), library: Literal["linen", "nnx"] = "linen") -> ej.Model:
    """The network as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenLeNet(spec))
    return ej.from_nnx(lambda rngs: NNXLeNet(spec, rngs=rngs))
