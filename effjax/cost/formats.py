"""How a leaf is stored: the one source of truth of all bytes.

A stored leaf is an index, which says where values stand, and the stream of these values. A `Layout`
makes the index, an `Encoding` the values. Footprints count what they say; packed files hold it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.cost.layouts import Layout, Size, Spec, layouts, tensor_bytes, whole_bytes, width_of


class Encoding(NamedTuple):
    """How values are stored.

    kind: "float" (as they are), "int" ((code - zero) · scale) or "cluster" (codebook[code]).
    bits: of a value.
    dtype: of the tensor of values; "uint8" where they are packed.
    side: the tensors stored beside them: scales, zeros, codebook.
    zero: whether a 0 can be stored as a value; if not, the index must leave all zeros out.
    """

    kind: str
    bits: int
    dtype: str
    side: dict[str, Spec]
    zero: bool = True

    def tensors(self, values: int) -> dict[str, Spec]:
        """The tensors that store so many values."""
        many = whole_bytes(values * self.bits) // np.dtype(self.dtype).itemsize
        return {"values": (self.dtype, many), **self.side}


_NATIVE = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)}


def floats(dtype: Any) -> Encoding:
    """Values as they are. Those of dtypes that NumPy lacks (bfloat16) are stored as their bits."""
    dtype = np.dtype(dtype)
    bits = dtype.itemsize * 8
    return Encoding("float", bits, dtype.name if dtype.name in _NATIVE else f"uint{bits}", {})


def integers(bits: int, scales: int, zeros: int = 0, zero: bool = True) -> Encoding:
    """Codes of `bits` bits, times float32 scales, with float32 zero points where `zeros` is not 0.

    Without zero points the code of 0 is 2^(bits-1): codes are the signed integers of
    `effjax.quantize`, moved up so that none is negative.
    """
    side = {"scales": ("float32", max(scales, 1))}
    if zeros:
        side["zeros"] = ("float32", zeros)
    return Encoding("int", bits, "uint8", side, zero)


def clustered(symbols: int, dtype: Any, zero: bool) -> Encoding:
    """Indices of ceil(log2 symbols) bits into a codebook of values as they are; 0 may be one."""
    book = (floats(dtype).dtype, symbols)
    return Encoding("cluster", width_of(symbols), "uint8", {"codebook": book}, zero)


class Stored(NamedTuple):
    """A leaf as it is stored."""

    layout: Layout
    encoding: Encoding
    size: Size

    @property
    def tensors(self) -> dict[str, Spec]:
        """All its tensors, by name."""
        return {**self.size.tensors, **self.encoding.tensors(self.size.values)}

    @property
    def bytes(self) -> int:
        """Index, values, and what is stored beside them."""
        return tensor_bytes(self.tensors)


def choices(
    kept: np.ndarray, encodings: Sequence[Encoding], pattern: str = ""
) -> dict[str, Stored]:
    """Every way in which a leaf can be stored, by the layout's name.

    Args:
      kept: bool [shape]: which entries must be stored (the others are 0).
      encodings: of the values; a layout takes the first that can store what it must.
      pattern: see `layouts`.
    """
    found: dict[str, Stored] = {}
    count = int(kept.sum())
    for option in layouts(kept.shape, pattern):
        size = option.size(kept)
        if size is None:
            continue
        able = [e for e in encodings if e.zero or size.values == count]
        if able:
            found[option.name] = Stored(option, able[0], size)
    return found


def cheapest(options: Mapping[str, Stored]) -> Stored:
    """The one of fewest bytes; of equal ones the first, which is the simplest."""
    return min(options.values(), key=lambda stored: stored.bytes)
