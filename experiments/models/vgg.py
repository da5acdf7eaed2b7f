"""VGG-small, the network of the papers on low-bit quantization, in Linen and NNX.

    at each stage: twice conv 3x3, norm, ReLU; then 2x2 max-pooling | dense classes

With stages of 128, 256 and 512 channels on CIFAR's images it has 4.66M parameters, of which 3,584
are BatchNorm's. Convolutions have no bias.

Reference: Zhang et al., "LQ-Nets: Learned quantization for highly accurate and compact deep neural
networks", 2018, https://arxiv.org/abs/1807.10029, after Cai et al., "Deep learning with low
precision by half-wave Gaussian quantization", 2017, https://arxiv.org/abs/1702.00953.
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
    """`size` and `channels` of the images, the `stages`' channels, `classes`, and the `momentum` of
    the BatchNorm statistics."""

    size: int = 32
    channels: int = 3
    stages: tuple[int, ...] = (128, 256, 512)
    classes: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.size % 2 ** len(self.stages):
            raise ValueError(f"images of {self.size} pixels do not halve {len(self.stages)} times.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each convolution."""
        return tuple(c for c in self.stages for _ in range(2))

    @property
    def flat(self) -> int:
        """Inputs of the last layer."""
        return (self.size >> len(self.stages)) ** 2 * self.stages[-1]


class LinenVGG(nn.Module):
    """The network in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        x = image
        for i, features in enumerate(self.spec.widths):
            x = nn.Conv(features, (3, 3), use_bias=False, name=f"conv_{i}")(x)
            norm = nn.BatchNorm(not train, momentum=self.spec.momentum, name=f"norm_{i}")
            x = nn.relu(norm(x))
            x = max_pool(x) if i % 2 else x
        return nn.Dense(self.spec.classes, name="head")(x.reshape(x.shape[0], -1))


class NNXVGG(nnx.Module):
    """The network in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        before, self.depth = spec.channels, len(spec.widths)
        for i, features in enumerate(spec.widths):
            conv = nnx.Conv(before, features, (3, 3), use_bias=False, rngs=rngs)
            norm = nnx.BatchNorm(features, momentum=spec.momentum, rngs=rngs)
            setattr(self, f"conv_{i}", conv)
            setattr(self, f"norm_{i}", norm)
            before = features
        self.head = nnx.Linear(spec.flat, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = image
        for i in range(self.depth):
            x = nnx.relu(getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x)))
            x = max_pool(x) if i % 2 else x
        return self.head(x.reshape(x.shape[0], -1))


def model(spec: Spec = Spec(), library: Literal["linen", "nnx"] = "linen") -> ej.Model:
    """The network as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenVGG(spec))
    return ej.from_nnx(lambda rngs: NNXVGG(spec, rngs=rngs))
