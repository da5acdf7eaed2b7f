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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.select import leaves, map_named
from experiments.models.pool import max_pool

LAYERS_PER_STAGE = 2
Library = Literal["linen", "nnx"]


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
                x = max_pool(x)
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
                x = max_pool(x)
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.head(self.dropout(nnx.relu(self.dense(x))))


def model(spec: Spec, library: Library = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenCNN(spec))
    return ej.from_nnx(lambda rngs: NNXCNN(spec, rngs=rngs))


def width_groups(spec: Spec) -> dict[str, str]:
    """What `ej.nas.width` may narrow: each stage and the dense layer. Whatever widths these groups
    take, the network is one of the family; see `narrowed`."""
    groups = {}
    for stage in range(len(spec.stages)):
        layers = range(stage * LAYERS_PER_STAGE, (stage + 1) * LAYERS_PER_STAGE)
        groups[f"stage_{stage}"] = rf"^(conv|norm)_({'|'.join(map(str, layers))})/"
    return {**groups, "dense": r"^dense/"}


def narrowed(spec: Spec, channels: Sequence[int]) -> Spec:
    """The spec with these channels of each of `width_groups`, in their order."""
    *stages, units = (int(c) for c in channels)
    return replace(spec, width=1.0, stages=tuple(stages), hidden=units)


def cut(
    params: PyTree,
    model_state: PyTree,
    spec: Spec,
    smaller: Spec,
    library: Library = "linen",
) -> tuple[PyTree, PyTree]:
    """The first channels of every layer: the params and state of `model(smaller, library)`.

    Where the channels beyond them are zero (`ej.nas.width`), the smaller network computes the same.
    """
    batch = {"image": jnp.zeros((1, spec.size, spec.size, spec.channels))}
    target = leaves(jax.eval_shape(model(smaller, library).init, jax.random.key(0), batch))

    def slice_leaf(name: str, leaf: Array) -> Array:
        if name == "0/dense/kernel":  # rows are pixels of the last stage, and channels within them
            pixels = spec.flat // spec.convolutions[-1]
            kernel = leaf.reshape(pixels, -1, leaf.shape[-1])
            kept = kernel[:, : smaller.convolutions[-1], : smaller.units]
            return kept.reshape(-1, smaller.units)
        return leaf[tuple(slice(n) for n in np.shape(target[name]))]

    return map_named(slice_leaf, (params, model_state))
