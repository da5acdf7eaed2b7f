"""LeNet-300-100, the fully connected network of the pruning papers, in Linen and NNX.

784 → 300 → 100 → 10 with ReLU: 266,610 parameters. Images of any shape are flattened.

References: LeCun et al., "Gradient-based learning applied to document recognition", 1998; Frankle
and Carbin, "The Lottery Ticket Hypothesis", 2019, https://arxiv.org/abs/1803.03635.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from flax import nnx
from jax import Array

import effjax as ej


@dataclass(frozen=True)
class Spec:
    """Layer sizes: `inputs` features, `hidden` units of each hidden layer, `classes` outputs.

    `dropout` is the fraction of hidden units that training drops, `inputs_dropout` of features.
    """

    inputs: int = 784
    hidden: tuple[int, ...] = (300, 100)
    classes: int = 10
    dropout: float = 0.0
    inputs_dropout: float = 0.0


class LinenMLP(nn.Module):
    """The network in Linen. `[batch, ...] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        x = image.reshape(image.shape[0], -1)
        x = nn.Dropout(self.spec.inputs_dropout, deterministic=not train)(x)
        for i, units in enumerate(self.spec.hidden):
            x = nn.relu(nn.Dense(units, name=f"dense_{i}")(x))
            x = nn.Dropout(self.spec.dropout, deterministic=not train)(x)
        return nn.Dense(self.spec.classes, name="head")(x)


class NNXMLP(nnx.Module):
    """The network in NNX. `[batch, ...] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.depth = len(spec.hidden)
        sizes = (spec.inputs, *spec.hidden)
        for i in range(self.depth):
            setattr(self, f"dense_{i}", nnx.Linear(sizes[i], sizes[i + 1], rngs=rngs))
        self.head = nnx.Linear(sizes[-1], spec.classes, rngs=rngs)
        self.drop_inputs = nnx.Dropout(spec.inputs_dropout, rngs=rngs)
        self.drop = nnx.Dropout(spec.dropout, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        x = self.drop_inputs(image.reshape(image.shape[0], -1))
        for i in range(self.depth):
            x = self.drop(nnx.relu(getattr(self, f"dense_{i}")(x)))
        return self.head(x)


def model(spec: Spec = Spec(), library: Literal["linen", "nnx"] = "linen") -> ej.Model:
    """The network as an `effjax.Model` that reads `batch["image"]`."""
    if library == "linen":
        return ej.from_linen(LinenMLP(spec))
    return ej.from_nnx(lambda rngs: NNXMLP(spec, rngs=rngs))
