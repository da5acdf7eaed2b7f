"""A small vision transformer, in Linen and NNX.

    patches (convolution), position embedding | blocks | norm, mean over patches, dense classes
    block: x + attention(norm(x)); x + dense(GELU(dense(norm(x))))

Heads and hidden units can be set block by block, so that what `ej.prune.compact` leaves of a
network is one of the family; see `compacted`. The features of the residual stream stay whole, as
LayerNorm runs over them. Both modules name their layers alike (`patches`,
`block_0/attention/query`, ..., `head`).

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021,
https://arxiv.org/abs/2010.11929.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
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
      features: of the residual stream.
      heads: attention heads of each block.
      dim: features of a head.
      hidden: units of each block's perceptron.
      size: height and width of the images.
      patch: height and width of a patch.
      channels: channels of the images.
      classes: number of outputs.
    """

    features: int = 64
    heads: tuple[int, ...] = (4, 4, 4, 4)
    dim: int = 16
    hidden: tuple[int, ...] = (128, 128, 128, 128)
    size: int = 32
    patch: int = 4
    channels: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.hidden):
            raise ValueError(f"heads {self.heads} and hidden {self.hidden} give a number a block.")
        if self.size % self.patch:
            raise ValueError(f"patches of {self.patch} don't divide images of {self.size}.")

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return (self.size // self.patch) ** 2


class LinenBlock(nn.Module):
    """One block in Linen."""

    spec: Spec
    index: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads, dim = self.spec.heads[self.index], self.spec.dim
        attention = nn.MultiHeadDotProductAttention(
            heads, qkv_features=heads * dim, out_features=self.spec.features, name="attention"
        )
        x = x + attention(nn.LayerNorm(name="norm_0")(x))
        y = nn.Dense(self.spec.hidden[self.index], name="dense_0")(nn.LayerNorm(name="norm_1")(x))
        return x + nn.Dense(self.spec.features, name="dense_1")(nn.gelu(y))


class LinenViT(nn.Module):
    """The family in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array) -> Array:
        spec = self.spec
        window = (spec.patch, spec.patch)
        x = nn.Conv(spec.features, window, window, name="patches")(image)
        x = x.reshape(x.shape[0], -1, spec.features)
        shape = (spec.patches, spec.features)
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for i in range(len(spec.heads)):
            x = LinenBlock(spec, i, name=f"block_{i}")(x)
        return nn.Dense(spec.classes, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


class NNXBlock(nnx.Module):
    """One block in NNX."""

    def __init__(self, spec: Spec, index: int, *, rngs: nnx.Rngs):
        heads, units = spec.heads[index], spec.hidden[index]
        self.norm_0 = nnx.LayerNorm(spec.features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, spec.features, heads * spec.dim, spec.features, decode=False, rngs=rngs
        )
        self.norm_1 = nnx.LayerNorm(spec.features, rngs=rngs)
        self.dense_0 = nnx.Linear(spec.features, units, rngs=rngs)
        self.dense_1 = nnx.Linear(units, spec.features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm_0(x))
        return x + self.dense_1(nnx.gelu(self.dense_0(self.norm_1(x))))


class NNXViT(nnx.Module):
    """The family in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        window = (spec.patch, spec.patch)
        self.patches = nnx.Conv(spec.channels, spec.features, window, window, rngs=rngs)
        shape = (spec.patches, spec.features)
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
        self.depth = len(spec.heads)
        for i in range(self.depth):
            setattr(self, f"block_{i}", NNXBlock(spec, i, rngs=rngs))
        self.norm = nnx.LayerNorm(spec.features, rngs=rngs)
        self.head = nnx.Linear(spec.features, spec.classes, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.position[...]
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(self.norm(x).mean(axis=1))


def model(spec: Spec = Spec(), library: Library = "linen") -> ej.Model:
    """The member of the family as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenViT(spec))
    return ej.from_nnx(lambda rngs: NNXViT(spec, rngs=rngs))


def compacted(spec: Spec, params: PyTree) -> Spec:
    """The spec of what `ej.prune.compact` left of `model(spec)`: `params` are its weights.

    Raises:
      ValueError: the heads' features were pruned, which the attention layers cannot have.
    """
    named = leaves(params)
    depth = range(len(spec.heads))
    shapes = [named[f"block_{i}/attention/value/kernel"].shape for i in depth]
    if any(shape[-1] != spec.dim for shape in shapes):
        raise ValueError(
            f"the values have {[shape[-1] for shape in shapes]} features a head, but queries and "
            f"keys {spec.dim}; prune heads (`value/kernel[1]`) and leave `value/kernel` whole."
        )
    heads = tuple(shape[1] for shape in shapes)
    hidden = tuple(named[f"block_{i}/dense_0/kernel"].shape[-1] for i in depth)
    return replace(spec, heads=heads, hidden=hidden)
