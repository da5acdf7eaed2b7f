"""Wide residual networks, WRN-d-k, in Linen and NNX.

    conv 3x3 | three stages of (d - 4) / 6 blocks | norm, ReLU, mean over the image, dense classes
    block: shortcut(x) + conv 3x3(dropout(ReLU(norm(conv 3x3(ReLU(norm(x)))))))

Stages have 16k, 32k and 64k channels; the first blocks of the last two halve the image. Where a
block widens the features, its shortcut is a 1x1 convolution of the block's first ReLU. Convolutions
have no bias. WRN-28-10 has 36.5M parameters.

Reference: Zagoruyko and Komodakis, "Wide residual networks", 2016,
https://arxiv.org/abs/1605.07146.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from flax import nnx
from jax import Array

import effjax as ej


@dataclass(frozen=True)
class Spec:
    """One member of the family.

    Attributes:
      depth: d, of which (d - 4) must be a multiple of 6.
      width: k.
      dropout: inside the blocks.
      channels: of the images.
      classes: number of outputs.
      momentum: of the BatchNorm statistics.
    """

    depth: int = 22
    width: int = 2
    dropout: float = 0.0
    channels: int = 3
    classes: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"WRN-{self.depth}: the depth is 4 more than a multiple of 6.")

    def plan(self) -> list[tuple[int, int, int]]:
        """(features in, features out, stride) of each block."""
        found, before = [], 16
        for stage in range(3):
            for i in range((self.depth - 4) // 6):
                features = 16 * self.width * 2**stage
                found.append((before, features, 2 if stage and not i else 1))
                before = features
        return found


class LinenBlock(nn.Module):
    """One block in Linen."""

    before: int
    features: int
    stride: int
    spec: Spec

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not train, momentum=self.spec.momentum, name=name)

        def conv(size: int, stride: int, name: str) -> nn.Conv:
            window, strides = (size, size), (stride, stride)
            return nn.Conv(self.features, window, strides, use_bias=False, name=name)

        y = nn.relu(norm("norm_0")(x))
        if self.before != self.features:
            x = conv(1, self.stride, "shortcut")(y)
        y = nn.relu(norm("norm_1")(conv(3, self.stride, "conv_0")(y)))
        y = nn.Dropout(self.spec.dropout, deterministic=not train)(y)
        return x + conv(3, 1, "conv_1")(y)


class LinenWRN(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        x = nn.Conv(16, (3, 3), use_bias=False, name="conv")(image)
        for i, block in enumerate(self.spec.plan()):
            x = LinenBlock(*block, self.spec, name=f"block_{i}")(x, train)
        x = nn.relu(nn.BatchNorm(not train, momentum=self.spec.momentum, name="norm")(x))
        return nn.Dense(self.spec.classes, name="head")(x.mean(axis=(1, 2)))


class NNXBlock(nnx.Module):
    """One block in NNX."""

    def __init__(self, before: int, features: int, stride: int, spec: Spec, *, rngs: nnx.Rngs):
        def conv(inputs: int, size: int, stride: int) -> nnx.Conv:
            window, strides = (size, size), (stride, stride)
            return nnx.Conv(inputs, features, window, strides, use_bias=False, rngs=rngs)

        self.widens = before != features
        self.norm_0 = nnx.BatchNorm(before, momentum=spec.momentum, rngs=rngs)
        if self.widens:
            self.shortcut = conv(before, 1, stride)
        self.conv_0 = conv(before, 3, stride)
        self.norm_1 = nnx.BatchNorm(features, momentum=spec.momentum, rngs=rngs)
        self.drop = nnx.Dropout(spec.dropout, rngs=rngs)
        self.conv_1 = conv(features, 3, 1)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm_0(x))
        if self.widens:
            x = self.shortcut(y)
        y = nnx.relu(self.norm_1(self.conv_0(y)))
        return x + self.conv_1(self.drop(y))


class NNXWRN(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        plan = spec.plan()
        self.depth = len(plan)
        self.conv = nnx.Conv(spec.channels, 16, (3, 3), use_bias=False, rngs=rngs)
        for i, block in enumerate(plan):
            setattr(self, f"block_{i}", NNXBlock(*block, spec, rngs=rngs))
        features = plan[-1][1]
        self.norm = nnx.BatchNorm(features, momentum=spec.momentum, rngs=rngs)
        self.head = nnx.Linear(features, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = self.conv(image)
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def model(spec: Spec = Spec(), library: Literal["linen", "nnx"] = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenWRN(spec))
    return ej.from_nnx(lambda rngs: NNXWRN(spec, rngs=rngs))
