"""What can be elastic in a supernet, as plain data; and which entries of an axis each choice keeps.

Widths, kernel sizes and depths are one mechanism: every axis of a weight has a table of the entries
that are kept, by gene. A mask is the table's rows multiplied out, a count is their sum, and what is
extracted is what they name.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.errors import SetupError
from effjax.nas.dimensions import When
from effjax.quantize import numerics


class Width(NamedTuple):
    """Fractions of the channels that the kernels matching a pattern make: the first
    ceil(channels * fraction) are kept.

    What goes with a channel (BatchNorm's entries, the inputs of the next layers, the channels that
    it is added to) is found in the traced model, see `ej.prune.groups`: name the kernel only.
    """

    kernels: str
    choices: Sequence[float] = (0.5, 0.75, 1.0)


class Kernel(NamedTuple):
    """Sizes of square convolution kernels [size, ..., in, out]: the centre of the largest is kept.

    matrices: whether the taps of a smaller size are those of the next larger one times a trained
      matrix, which starts as the identity and is shared by a layer's channels. (Cai et al., 2020)
    """

    kernels: str
    choices: Sequence[int] = (3, 5)
    matrices: bool = False


class Depth(NamedTuple):
    """How many of some residual blocks are kept, the first ones.

    blocks: for each block, in order, a regular expression for the params of its branch. All of them
      are zero in a block that is skipped, so that the branch gives 0.
    """

    blocks: Sequence[str]
    choices: Sequence[int]


class Sparsity(NamedTuple):
    """Fractions of zeros among the kept weights of each leaf: those of smallest magnitude."""

    leaves: str
    choices: Sequence[float] = (0.0, 0.5, 0.75)


class Bits(NamedTuple):
    """Bits of weights where they meet data, and of that data; 16 and more are floating point.

    activations: their bits; "same" for those of the weights.
    """

    leaves: str
    choices: Sequence[int] = (2, 4, 8)
    activations: int | Literal["same"] = 32


class Resolution(NamedTuple):
    """Sizes that square images are resized to, which is exact: the model runs at that size.

    entry: of the batch, [batch, size, size, channels].
    """

    choices: Sequence[int]
    entry: str = "image"


Elastic = Width | Kernel | Depth | Sparsity | Bits | Resolution


class Axis(NamedTuple):
    """Which entries of one axis are kept.

    genes: that this depends on; none for an axis that is always whole.
    table: bool [values of each gene ..., size].
    """

    genes: tuple[int, ...]
    table: np.ndarray

    def kept(self, arch: Any) -> Any:
        """The entries that are kept, bool [size]; `arch` int [genes], perhaps traced."""
        return _looked_up(self.table, self.genes, arch)

    def count(self, arch: Any) -> Any:
        """How many they are."""
        return _looked_up(self.table.sum(axis=-1), self.genes, arch)


def _looked_up(table: np.ndarray, genes: tuple[int, ...], arch: Any) -> Any:
    if isinstance(arch, np.ndarray):
        return table[tuple(arch[g] for g in genes)]
    return jnp.asarray(table)[tuple(arch[g] for g in genes)]


def meet(axes: Sequence[Axis], size: int) -> Axis:
    """The axis whose entries are kept by all of several: tables that depend on genes of each.

    Example:
      >>> import numpy as np
      >>> one = Axis((0,), np.array([[True, False], [True, True]]))
      >>> meet([one, Axis((3,), np.array([[True, True]]))], 2).genes
      (0, 3)
    """
    genes = tuple(sorted({g for axis in axes for g in axis.genes}))
    lengths = {g: axis.table.shape[i] for axis in axes for i, g in enumerate(axis.genes)}
    table = np.ones((*(lengths[g] for g in genes), size), bool)
    for axis in axes:
        shape = [lengths[g] if g in axis.genes else 1 for g in genes]
        table &= axis.table.reshape(*shape, size)
    return Axis(genes, table)


def channels_kept(size: int, choices: Sequence[float]) -> np.ndarray:
    """ceil(channels * width) by choice: int [choices]."""
    # The rounding removes what floats add to exact products: 0.1 * 30 = 3.0000000000000004.
    return np.array([math.ceil(round(size * width, 6)) for width in choices])


def centre(size: int, choices: Sequence[int]) -> np.ndarray:
    """The middle entries of an axis by choice: bool [choices, size].

    Example:
      >>> centre(5, (1, 3)).astype(int).tolist()
      [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0]]
    """
    place = np.arange(size)
    rows = [(place >= (size - k) // 2) & (place < (size + k) // 2) for k in choices]
    return np.array(rows)


def values_of(name: str, elastic: Any) -> tuple[Any, ...]:
    """The choices of an elastic dimension, from the smallest network to the largest.

    Raises:
      SetupError: what is no elastic dimension, or choices that cannot be meant.
    """
    if isinstance(elastic, When):
        return values_of(name, elastic.then)
    if not isinstance(elastic, Elastic):
        raise SetupError(
            f"{name} is {elastic!r:.80}; an elastic dimension is a Width, Kernel, Depth, Sparsity, "
            "Bits or Resolution, or a When with one of them."
        )
    choices = tuple(elastic.choices)
    if not choices or len(set(choices)) < len(choices):
        raise SetupError(f"the choices of {name} are {choices}; give each once, and at least one.")
    match elastic:
        case Width():
            wrong = [c for c in choices if not 0 < c <= 1]
            what = "fractions in (0, 1]; build the widest network and choose among its fractions"
        case Kernel():
            wrong = [c for c in choices if c < 1 or (c - max(choices)) % 2]
            what = "sizes with one middle: all odd, or all even"
        case Depth():
            wrong = [c for c in choices if not 0 <= c <= len(elastic.blocks)]
            what = f"numbers of blocks that are kept, of {len(elastic.blocks)}"
        case Sparsity():
            wrong = [c for c in choices if not 0 <= c < 1]
            what = "fractions of zeros in [0, 1)"
        case Resolution():
            wrong = [c for c in choices if c < 1]
            what = "sizes of images"
        case Bits():
            wrong, what = [], ""
            for bits in elastic.choices:
                least = 2 if elastic.activations == "same" else 1
                numerics.check_bits(bits, f"a choice of {name}", least)
            if elastic.activations != "same":
                numerics.check_bits(elastic.activations, f"activations of {name}")
    if wrong:
        raise SetupError(f"the choices {wrong} of {name} are no {what}.")
    return tuple(sorted(choices, reverse=isinstance(elastic, Sparsity)))
