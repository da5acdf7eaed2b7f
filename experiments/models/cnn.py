"""The CNN family of the survey's practitioner's guide, in Linen and NNX.

    conv s1, conv s1, pool | conv s2·w, conv s2·w, pool | conv s3·w, conv s3·w, pool |
    flatten, dropout, dense h·w, dropout, dense classes

with 3x3 "same" convolutions, each followed by ReLU and then BatchNorm; (s1, s2, s3) = (32, 64, 128)
and h = 512 in the paper. The width w multiplies all but the first stage. Images are [batch, size,
size, channels] with values in [-1, 1].

Both modules name their layers alike (`conv_0`, `norm_0`, ..., `dense`, `head`), so the weights of
one are the weights of the other.

Reference: Menghani, "Efficient Deep Learning: A Survey on Making Deep Learning Models Smaller,
Faster, and Better", 2021, https://arxiv.org/abs/2106.08962, section 4.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from flax import nnx
from jax import Array

import effjax as ej

LAYERS_PER_STAGE = 2


@dataclass(frozen=True)
class Spec:
    """One member of the family.

    Attributes:
      width: the multiplier w of every layer but the first stage's and the classifier's.
      size: height and width of the images.
      channels: channels of the images.
      classes: number of outputs.
      stages: convolution channels of each stage at width 1; a stage halves the image.
      hidden: units of the dense layer at width 1.
      dropout: rate of both dropouts.
      momentum: of the BatchNorm statistics; a run of few steps needs less than 0.99.
    """

    width: float = 1.0
    size: int = 32
    channels: int = 3
    classes: int = 10
    stages: tuple[int, ...] = (32, 64, 128)
    hidden: int = 512
    dropout: float = 0.15
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if self.width <= 0 or min(*self.convolutions, self.units) < 1:
            raise ValueError(
                f"width {self.width} leaves a layer without channels: convolutions "
                f"{self.convolutions}, dense {self.units}. Use a larger width."
            )
        if self.size % 2 ** len(self.stages):
            raise ValueError(
                f"{len(self.stages)} stages halve the image {len(self.stages)} times, but its size "
                f"{self.size} is no multiple of {2 ** len(self.stages)}. Use fewer stages."
            )

    @property
    def convolutions(self) -> tuple[int, ...]:
        """Output channels of every convolution."""
        first, *rest = self.stages
        scaled = (first, *(round(self.width * c) for c in rest))
        return tuple(c for c in scaled for _ in range(LAYERS_PER_STAGE))

    @property
    def units(self) -> int:
        """Units of the dense layer."""
        return round(self.width * self.hidden)

    @property
    def flat(self) -> int:
        """Features after the last pool."""
        side = self.size // 2 ** len(self.stages)
        return side * side * self.convolutions[-1]


class LinenCNN(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        spec, x = self.spec, image
        for i, features in enumerate(spec.convolutions):
            x = nn.relu(nn.Conv(features, (3, 3), name=f"conv_{i}")(x))
            norm = nn.BatchNorm(momentum=spec.momentum, name=f"norm_{i}")
            x = norm(x, use_running_average=not train)
            if i % LAYERS_PER_STAGE == LAYERS_PER_STAGE - 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(spec.dropout)(x.reshape(x.shape[0], -1), deterministic=not train)
        x = nn.relu(nn.Dense(spec.units, name="dense")(x))
        x = nn.Dropout(spec.dropout)(x, deterministic=not train)
        return nn.Dense(spec.classes, name="head")(x)


class NNXCNN(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.depth = len(spec.convolutions)
        features = spec.channels
        for i, wider in enumerate(spec.convolutions):
            setattr(self, f"conv_{i}", nnx.Conv(features, wider, (3, 3), rngs=rngs))
            norm = nnx.BatchNorm(wider, momentum=spec.momentum, rngs=rngs)
            setattr(self, f"norm_{i}", norm)
            features = wider
        self.dropout = nnx.Dropout(spec.dropout, rngs=rngs)
        self.dense = nnx.Linear(spec.flat, spec.units, rngs=rngs)
        self.head = nnx.Linear(spec.units, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = image
        for i in range(self.depth):
            x = getattr(self, f"norm_{i}")(nnx.relu(getattr(self, f"conv_{i}")(x)))
            if i % LAYERS_PER_STAGE == LAYERS_PER_STAGE - 1:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.head(self.dropout(nnx.relu(self.dense(x))))


def model(spec: Spec, library: Literal["linen", "nnx"] = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenCNN(spec))
    return ej.from_nnx(lambda rngs: NNXCNN(spec, rngs=rngs))
