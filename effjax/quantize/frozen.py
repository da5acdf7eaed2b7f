"""A frozen model: what training left, as a pure function of integers that engines can run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import PyTree
from effjax.quantize.marker import Quantizer

Weights = dict[str, Any]
Inputs = Mapping[str, Array]


class FrozenSite(NamedTuple):
    """A site of a frozen model.

    path: of the weight; layers of a scan are "path[0]", "path[1]", ....
    op: "dot_general", "conv_general_dilated" or "gather".
    inputs: names of the quantizers of its activations; none where these stay in floating point.
    weight: name of its weight, and of the weight's quantizer; "" in a product of activations.
    bias: whether it has one, BatchNorm's shift included.
    groups: feature groups of a convolution, 1 elsewhere.
    """

    path: str
    op: str
    inputs: tuple[str, ...]
    weight: str
    bias: bool
    groups: int

    @property
    def integer(self) -> bool:
        """Whether both its operands are rounded, so that an engine can multiply integers."""
        return bool(self.inputs) and (bool(self.weight) or len(self.inputs) == 2)


class Distance(NamedTuple):
    """How far a function's outputs are from another's, over a set of examples.

    mean, largest: of the absolute differences.
    scale: the mean magnitude of the reference's outputs.
    agreement: how often the largest of the last axis is the same one.
    examples: how many were compared.
    """

    mean: float
    largest: float
    scale: float
    agreement: float
    examples: int


class Frozen(NamedTuple):
    """A trained model as a pure function of arrays; see `freeze`.

    apply: `(weights, inputs) -> outputs`, for any size of batch.
    marked: the same with a composite for each quantizer, see `marker.fake_quant`.
    observe: `(weights, inputs) -> {quantizer: the float32 values that it gave}`, of activations.
    weights: {"<site>:weight": int8 codes; "<site>:scale": float32 [channels]; "<site>:bias": int32
      on the grid of input scale times weight scale, or float32 where the input is not rounded;
      "<quantizer>:scale": float32 [], of activations; and
      by path, or as "constant#0", ..., what stays in floating point}.
    example: {name: array}: what the model reads of the first calibration batch.
    quantizers: {name: Quantizer}, those of weights included.
    sites: in the order of execution.
    distance: to evaluation under the transform, over the calibration batches.
    """

    apply: Callable[[Weights, Inputs], PyTree]
    marked: Callable[[Weights, Inputs], PyTree]
    observe: Callable[[Weights, Inputs], dict[str, Array]]
    weights: Weights
    example: dict[str, np.ndarray]
    quantizers: dict[str, Quantizer]
    sites: tuple[FrozenSite, ...]
    distance: Distance

    @property
    def nbytes(self) -> int:
        """Bytes of the integers, weights packed as their bits allow and biases included."""
        total = 0
        for name, x in self.weights.items():
            if name.endswith(":weight"):
                total += -(-x.size * storage_bits(self.quantizers[name]) // 8)
            elif name.endswith(":bias") and x.dtype == jnp.int32:
                total += x.nbytes
        return total

    def floats(self) -> Weights:
        """The weights as floating point on their grids, in place of integers and scales: what
        `apply` and `marked` take as well, for converters that fold constants."""
        found: Weights = {n: x for n, x in self.weights.items() if not n.endswith(":scale")}
        for site in self.sites:
            if site.weight:
                found[site.weight] = decode(self.weights, self.quantizers[site.weight])
            if site.bias and site.inputs:
                step = self.quantizers[site.inputs[0]].scale
                found[f"{site.path}:bias"] = decode_bias(self.weights, site.path, step)
        return {n: np.asarray(x) for n, x in found.items()}

    def codes(self, weights: Weights, inputs: Inputs) -> dict[str, Array]:
        """The integers of each quantizer of an activation: x / s, int32."""
        values = self.observe(weights, inputs)
        return {n: jnp.round(x / self.quantizers[n].scale).astype(int) for n, x in values.items()}


def storage_bits(own: Quantizer) -> int:
    """Bits that a weight's code takes when packed: 8, 4 or 2."""
    return next(b for b in (2, 4, 8) if own.low >= -(2 ** (b - 1)) and own.high < 2 ** (b - 1))


def decode(weights: Mapping[str, Any], own: Quantizer) -> Array:
    """A weight in floating point, s · codes; as it is where it is that already."""
    x = jnp.asarray(weights[own.name])
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x
    scale = jnp.asarray(weights[own.name.removesuffix(":weight") + ":scale"])
    return x.astype(jnp.float32) * scale.reshape(
        [-1 if axis == own.axis else 1 for axis in range(x.ndim)]
    )


def decode_bias(weights: Mapping[str, Any], site: str, step: Any) -> Array:
    """A bias in floating point: its integers times the scales of input and weight."""
    x = jnp.asarray(weights[f"{site}:bias"])
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x
    return x.astype(jnp.float32) * (jnp.float32(step) * jnp.asarray(weights[f"{site}:scale"]))


def compare(reference: PyTree, other: PyTree) -> Distance:
    """The distance of outputs to a reference's, of one set of examples."""
    pairs = list(zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True))
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    away = np.concatenate([np.abs(a - b).ravel() for a, b in wide])
    size = np.concatenate([np.abs(a).ravel() for a, _ in wide])
    same = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in wide if a.ndim]
    agreement = float(np.concatenate(same).mean()) if same else 1.0
    count = wide[0][0].shape[0] if wide[0][0].ndim else 1
    return Distance(float(away.mean()), float(away.max()), float(size.mean()), agreement, count)
