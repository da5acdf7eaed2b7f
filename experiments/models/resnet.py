"""The residual networks for CIFAR, in Linen and NNX.

    conv 3x3, norm, ReLU | n blocks at every stage | mean over the image, dense classes
    block: ReLU(shortcut(x) + norm(conv 3x3(ReLU(norm(conv 3x3(x))))))

The first block of every stage but the first halves the image. Where a block widens the features,
its shortcut takes every second pixel and pads with channels of zeros (option A of the paper), or is
a 1x1 convolution and a norm (option B). With n = 3 and widths (16, 32, 64) this is ResNet-20: 0.27M
parameters (269,722 with option A, 272,474 with option B). Convolutions have no bias. Every width
can be set by itself, so that what `ej.prune.compact` leaves of a network is one of the family; see
`compacted`.

Both modules name their layers alike (`conv`, `norm`, `block_0/conv_0`, ..., `head`).

Reference: He et al., "Deep Residual Learning for Image Recognition", 2016,
https://arxiv.org/abs/1512.03385, section 4.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.select import leaves

Library = Literal["linen", "nnx"]


@dataclass(frozen=True)
class Spec:
    """One member of the family.

    Attributes:
      stages: channels of each stage.
      blocks: residual blocks of a stage, n; the network has 2 n stages + 2 layers.
      inner: channels inside each block; left out, those of its stage.
      shortcut: "A" (padding with zeros) or "B" (projection).
      pads: with option A, channels of zeros (before, after) at the beginning of each stage but the
        first; left out, half on each side.
      channels: channels of the images.
      classes: number of outputs.
      momentum: of the BatchNorm statistics.
    """

    stages: tuple[int, ...] = (16, 32, 64)
    blocks: int = 3
    inner: tuple[int, ...] | None = None
    shortcut: Literal["A", "B"] = "A"
    pads: tuple[tuple[int, int], ...] | None = None
    channels: int = 3
    classes: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.stages) * self.blocks:
            raise ValueError(
                f"inner has {len(self.widths)} widths; {len(self.stages)} stages of {self.blocks} "
                f"blocks need {len(self.stages) * self.blocks}."
            )
        if min(*self.stages, *self.widths) < 1:
            raise ValueError(
                f"widths are at least 1; stages are {self.stages}, inner {self.inner}."
            )
        if len(self.padding) != len(self.stages) - 1:
            raise ValueError(f"pads are one pair for each stage but the first, not {self.pads}.")
        pairs = zip(self.stages, self.padding, strict=False)
        padded = tuple(c + low + high for c, (low, high) in pairs)
        if self.shortcut == "A" and padded != self.stages[1:]:
            raise ValueError(
                f"with option A the stages have {self.stages} channels, but padded by "
                f"{self.padding} they have {padded}."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels inside each block."""
        if self.inner is not None:
            return self.inner
        return tuple(c for c in self.stages for _ in range(self.blocks))

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Channels of zeros at the beginning of each stage but the first."""
        if self.pads is not None:
            return self.pads
        more = [b - a for a, b in zip(self.stages, self.stages[1:], strict=False)]
        return tuple((n // 2, n - n // 2) for n in more)

    def plan(self) -> list["Plan"]:
        """What each block is built from."""
        plans = []
        features = self.stages[0]
        for i, inner in enumerate(self.widths):
            stage, first = divmod(i, self.blocks)
            starts = stage > 0 and first == 0
            out = self.stages[stage]
            pads = self.padding[stage - 1] if starts and self.shortcut == "A" else None
            projected = starts and self.shortcut == "B"
            plans.append(Plan(features, inner, out, 2 if starts else 1, pads, projected))
            features = out
        return plans


@dataclass(frozen=True)
class Plan:
    """One block: features in, inside and out, stride, and what its shortcut does."""

    features: int
    inner: int
    out: int
    stride: int
    pads: tuple[int, int] | None
    projected: bool

    def padded(self, x: Array) -> Array:
        """The shortcut without weights."""
        if self.pads is None:
            return x
        return jnp.pad(x[:, :: self.stride, :: self.stride], [(0, 0)] * 3 + [self.pads])


class LinenBlock(nn.Module):
    """One residual block in Linen."""

    plan: Plan
    momentum: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        plan = self.plan

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not train, momentum=self.momentum, name=name)

        def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
            window, strides = (size, size), (stride, stride)
            return nn.Conv(features, window, strides, use_bias=False, name=name)

        y = nn.relu(norm("norm_0")(conv(plan.inner, 3, plan.stride, "conv_0")(x)))
        y = norm("norm_1")(conv(plan.out, 3, 1, "conv_1")(y))
        if plan.projected:
            x = norm("shortcut_norm")(conv(plan.out, 1, plan.stride, "shortcut")(x))
        return nn.relu(plan.padded(x) + y)


class LinenResNet(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        spec = self.spec
        x = nn.Conv(spec.stages[0], (3, 3), use_bias=False, name="conv")(image)
        x = nn.relu(nn.BatchNorm(not train, momentum=spec.momentum, name="norm")(x))
        for i, plan in enumerate(spec.plan()):
            x = LinenBlock(plan, spec.momentum, name=f"block_{i}")(x, train)
        return nn.Dense(spec.classes, name="head")(x.mean(axis=(1, 2)))


class NNXBlock(nnx.Module):
    """One residual block in NNX."""

    def __init__(self, plan: Plan, momentum: float, *, rngs: nnx.Rngs):
        def conv(features: int, out: int, size: int, stride: int) -> nnx.Conv:
            window, strides = (size, size), (stride, stride)
            return nnx.Conv(features, out, window, strides, use_bias=False, rngs=rngs)

        self.plan = plan
        self.conv_0 = conv(plan.features, plan.inner, 3, plan.stride)
        self.norm_0 = nnx.BatchNorm(plan.inner, momentum=momentum, rngs=rngs)
        self.conv_1 = conv(plan.inner, plan.out, 3, 1)
        self.norm_1 = nnx.BatchNorm(plan.out, momentum=momentum, rngs=rngs)
        if plan.projected:
            self.shortcut = conv(plan.features, plan.out, 1, plan.stride)
            self.shortcut_norm = nnx.BatchNorm(plan.out, momentum=momentum, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        if self.plan.projected:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(self.plan.padded(x) + y)


class NNXResNet(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        first = spec.stages[0]
        self.conv = nnx.Conv(spec.channels, first, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(first, momentum=spec.momentum, rngs=rngs)
        self.depth = len(spec.widths)
        for i, plan in enumerate(spec.plan()):
            setattr(self, f"block_{i}", NNXBlock(plan, spec.momentum, rngs=rngs))
        self.head = nnx.Linear(spec.stages[-1], spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(image)))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(x.mean(axis=(1, 2)))


def model(spec: Spec = Spec(), library: Library = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenResNet(spec))
    return ej.from_nnx(lambda rngs: NNXResNet(spec, rngs=rngs))


def compacted(spec: Spec, params: PyTree, entries: Mapping[str, Any]) -> Spec:
    """The spec of what `ej.prune.compact` left of `model(spec)`.

    Args:
      spec: of the network before.
      params: its weights afterwards, `Compact.params`.
      entries: what is left of each axis, `Compact.entries`.
    """
    named = leaves(params)
    inner = tuple(named[f"block_{i}/conv_0/kernel"].shape[-1] for i in range(len(spec.widths)))
    last = [f"block_{(s + 1) * spec.blocks - 1}/conv_1/kernel" for s in range(len(spec.stages))]
    stages = tuple(named[path].shape[-1] for path in last)
    pads = []
    for stage, (low, high) in enumerate(spec.padding, 1):
        kept = np.asarray(entries[last[stage]][-1])
        end = spec.stages[stage] - high
        pads.append((int((kept < low).sum()), int((kept >= end).sum())))
    padding = tuple(pads) if spec.shortcut == "A" else None
    return replace(spec, stages=stages, inner=inner, pads=padding)
