"""A small residual network whose every width, kernel size and depth can be set, in Linen and NNX.

    conv 3x3 s2 | at every stage: conv 3x3 s2, then blocks | mean over the image, dense classes
    block: ReLU(x + norm(conv 3x3(ReLU(norm(conv k x k(x))))))

with BatchNorm and ReLU after every other convolution; no convolution has a bias. A block adds to
what is never negative, so that without its branch it is the identity. Images of 28 x 28 become 14 x
14, then 7 x 7 and 4 x 4 in two stages.

Both modules name their layers alike (`stem/conv`, `down_0/conv`, `block_0_1/conv_0`, ..., `head`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
from flax import nnx
from jax import Array

import effjax as ej

Library = Literal["linen", "nnx"]


@dataclass(frozen=True)
class Spec:
    """One member of the family.

    Attributes:
      stem: channels of the first convolution.
      stages: channels of each stage.
      inner: channels inside each block of each stage.
      kernels: size of each block's first convolution.
      channels: of the images.
      classes: number of outputs.
      momentum: of the BatchNorm statistics.
    """

    stem: int = 16
    stages: tuple[int, ...] = (16, 32)
    inner: tuple[tuple[int, ...], ...] = ((16, 16), (32, 32))
    kernels: tuple[tuple[int, ...], ...] = ((5, 5), (5, 5))
    channels: int = 1
    classes: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        depths = [len(x) for x in self.inner], [len(x) for x in self.kernels]
        if depths[0] != depths[1] or len(self.inner) != len(self.stages):
            raise ValueError(
                f"{len(self.stages)} stages need as many lists of blocks; inner and kernels have "
                f"{depths[0]} and {depths[1]} blocks."
            )


class LinenUnit(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    features: int
    stride: int
    momentum: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, (3, 3), strides, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x))


class LinenBlock(nn.Module):
    """A residual block."""

    features: int
    inner: int
    size: int
    momentum: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        window = (self.size, self.size)
        y = nn.Conv(self.inner, window, use_bias=False, name="conv_0")(x)
        y = nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm_0")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv_1")(y)
        return nn.relu(x + nn.BatchNorm(not train, momentum=self.momentum, name="norm_1")(y))


class LinenElastic(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        spec = self.spec
        x = LinenUnit(spec.stem, 2, spec.momentum, name="stem")(image, train)
        for s, features in enumerate(spec.stages):
            x = LinenUnit(features, 2, spec.momentum, name=f"down_{s}")(x, train)
            for b, (inner, size) in enumerate(zip(spec.inner[s], spec.kernels[s], strict=True)):
                block = LinenBlock(features, inner, size, spec.momentum, name=f"block_{s}_{b}")
                x = block(x, train)
        return nn.Dense(spec.classes, name="head")(x.mean(axis=(1, 2)))


class NNXUnit(nnx.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, before: int, features: int, momentum: float, *, rngs: nnx.Rngs):
        how: dict[str, Any] = {"strides": (2, 2), "use_bias": False, "rngs": rngs}
        self.conv = nnx.Conv(before, features, (3, 3), **how)
        self.norm = nnx.BatchNorm(features, momentum=momentum, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.norm(self.conv(x)))


class NNXBlock(nnx.Module):
    """A residual block."""

    def __init__(self, features: int, inner: int, size: int, momentum: float, *, rngs: nnx.Rngs):
        how: dict[str, Any] = {"use_bias": False, "rngs": rngs}
        self.conv_0 = nnx.Conv(features, inner, (size, size), **how)
        self.norm_0 = nnx.BatchNorm(inner, momentum=momentum, rngs=rngs)
        self.conv_1 = nnx.Conv(inner, features, (3, 3), **how)
        self.norm_1 = nnx.BatchNorm(features, momentum=momentum, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        return nnx.relu(x + self.norm_1(self.conv_1(y)))


class NNXElastic(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        momentum, before = spec.momentum, spec.stem
        self.stem = NNXUnit(spec.channels, before, momentum, rngs=rngs)
        self.layers: list[str] = ["stem"]
        for s, features in enumerate(spec.stages):
            units: list[tuple[str, Any]] = [
                (f"down_{s}", NNXUnit(before, features, momentum, rngs=rngs))
            ]
            for b, (inner, size) in enumerate(zip(spec.inner[s], spec.kernels[s], strict=True)):
                block = NNXBlock(features, inner, size, momentum, rngs=rngs)
                units.append((f"block_{s}_{b}", block))
            for name, unit in units:
                setattr(self, name, unit)
                self.layers.append(name)
            before = features
        self.head = nnx.Linear(before, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = image
        for name in self.layers:
            x = getattr(self, name)(x)
        return self.head(x.mean(axis=(1, 2)))


def model(spec: Spec = Spec(), library: Library = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenElastic(spec))
    return ej.from_nnx(lambda rngs: NNXElastic(spec, rngs=rngs))


def dimensions(
    spec: Spec,
    widths: tuple[float, ...] = (0.5, 0.75, 1.0),
    inner: tuple[float, ...] | None = None,
    least: int = 0,
    matrices: bool = False,
) -> dict[str, Any]:
    """What `ej.nas.Supernet` may choose: every width and depth, and where kernels are larger than
    3 their size. What exists only in deeper networks is chosen only there.

    Args:
      spec: the largest member.
      widths: fractions of the stem's and of the stages' channels; only (1.0,) leaves them alone.
      inner: fractions of the channels inside blocks; left out, `widths`.
      least: blocks that each stage keeps.
      matrices: of kernels, see `ej.nas.Kernel`.
    """
    nas, found = ej.nas, dict[str, Any]()
    inside = widths if inner is None else inner
    if len(widths) > 1:
        found["stem"] = nas.Width("^stem/conv/kernel$", widths)
    for s, kernels in enumerate(spec.kernels):
        if len(widths) > 1:
            found[f"stage_{s}"] = nas.Width(f"^down_{s}/conv/kernel$", widths)
        count = len(kernels)
        blocks = [f"^block_{s}_{b}/" for b in range(count)]
        found[f"depth_{s}"] = nas.Depth(blocks, range(least, count + 1))
        for b, size in enumerate(kernels):
            there = tuple(range(b + 1, count + 1))
            conv = f"^block_{s}_{b}/conv_0/kernel$"
            own: dict[str, Any] = {f"inner_{s}_{b}": nas.Width(conv, inside)}
            if size > 3:
                own[f"kernel_{s}_{b}"] = nas.Kernel(conv, tuple(range(3, size + 1, 2)), matrices)
            always = b < least
            for name, one in own.items():
                found[name] = one if always else nas.When(f"depth_{s}", there, one)
    return found


def chosen(spec: Spec, config: Mapping[str, Any], channels: Mapping[str, int]) -> Spec:
    """The member that a configuration of `dimensions` is; `channels` as `Supernet.channels`."""
    depths = [config[f"depth_{s}"] for s in range(len(spec.stages))]
    places = [[(s, b) for b in range(depth)] for s, depth in enumerate(depths)]
    return Spec(
        stem=channels["stem/conv/kernel"],
        stages=tuple(channels[f"down_{s}/conv/kernel"] for s in range(len(spec.stages))),
        inner=tuple(
            tuple(channels[f"block_{s}_{b}/conv_0/kernel"] for s, b in stage) for stage in places
        ),
        kernels=tuple(
            tuple(config.get(f"kernel_{s}_{b}", spec.kernels[s][b]) for s, b in stage)
            for stage in places
        ),
        channels=spec.channels,
        classes=spec.classes,
        momentum=spec.momentum,
    )
