"""From the values of a leaf to what stands in a file: codes, tables, and the entries to keep."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.cost import grids
from effjax.cost.formats import (
    Encoding,
    Stored,
    cheapest,
    choices,
    clustered,
    floats,
    integers,
)
from effjax.cost.layouts import pack_bits
from effjax.errors import SetupError

FLOAT = 16  # from this width on, a leaf is stored as it is
CODEBOOK = 256  # the most entries that a codebook has


class Coded(NamedTuple):
    """A leaf in symbols, before a layout is chosen.

    dtype: the leaf's own.
    symbols: [shape]: the values' bits as unsigned integers, codes, or places in the codebook.
    kept: bool [shape]: what is not 0.
    encodings: how the symbols may be stored, the best first.
    side: the tables, flat: "scales", "zeros", "codebook"; zero is left out of the latter where the
      encoding says so.
    axes: of the channels that scales belong to.
    """

    dtype: np.dtype
    symbols: np.ndarray
    kept: np.ndarray
    encodings: tuple[Encoding, ...]
    side: dict[str, np.ndarray]
    axes: tuple[int, ...] = ()

    def stored(self, pattern: str = "") -> dict[str, Stored]:
        """Every layout's way to store it."""
        return choices(self.kept, self.encodings, pattern)

    def smallest(self, pattern: str = "") -> Stored:
        """The way that takes the fewest bytes: what a packed file holds."""
        return cheapest(self.stored(pattern))

    def entropy_bytes(self) -> int:
        """n · H / 8 of the symbols, each coded by itself, and the tables that they need.

        H = -sum p log2 p over how often each occurs. Floats need a table of those that occur; where
        it would take more than the values, these stand as they are.
        """
        found, counts = np.unique(self.symbols, return_counts=True)
        p = counts / max(self.symbols.size, 1)
        table = sum(x.nbytes for x in self.side.values())
        if self.encodings[0].kind == "float":
            table = found.nbytes
        coded = math.ceil(-self.symbols.size * float(np.sum(p * np.log2(p))) / 8) + table
        return min(coded, self.symbols.nbytes) if self.encodings[0].kind == "float" else coded

    def tensors(self, stored: Stored) -> dict[str, np.ndarray]:
        """The arrays of a file."""
        index, positions = stored.layout.lay(self.kept)
        encoding, symbols, side = stored.encoding, self.symbols, self.side
        if encoding.kind == "cluster" and not encoding.zero:
            # The codebook begins with 0, which the index leaves out.
            symbols, side = symbols - self.kept, {"codebook": side["codebook"][1:]}
        inside = positions >= 0
        flat = np.where(inside, symbols.reshape(-1)[np.maximum(positions, 0)], 0)
        if encoding.kind == "float":
            values = flat.astype(symbols.dtype).view(encoding.dtype)
        else:
            values = pack_bits(flat.astype(np.uint8), encoding.bits)
        return {**index, "values": values, **side}


def code(path: str, leaf: Any, fact: Mapping[str, Any]) -> Coded:
    """The symbols of a leaf.

    Args:
      path: of the leaf, for errors.
      leaf: a concrete array.
      fact: of it, as in `Transform.describe`. "weight_bits" up to 8 rounds the leaf to that many
        bits with so many "scales"; a leaf that lies on such a grid already is not changed.
        "clusters" says that it has no more than so many different values.

    Raises:
      SetupError: an abstract leaf, a width that no file holds, or values that the facts deny.
    """
    x = concrete(path, leaf)
    bits = int(fact.get("weight_bits", FLOAT))
    if bits < 1 or grids.WIDEST < bits < FLOAT:
        raise SetupError(
            f"{path} has {bits} bits; stored values have 1 to {grids.WIDEST}, and {FLOAT} or more "
            "mean floating point."
        )
    if "clusters" in fact:
        return _clustered(path, x, int(fact["clusters"]))
    if bits < FLOAT:
        return _integers(path, x, bits, max(int(fact.get("scales", 1)), 1))
    symbols = _as_bits(x)
    return Coded(x.dtype, symbols, symbols != 0, (floats(x.dtype),), {})


def concrete(path: str, leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array.

    Raises:
      SetupError: it is abstract, or no array of numbers.
    """
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise SetupError(
            f"{path} is abstract ({type(leaf).__name__}); footprints and packed files need the "
            "arrays themselves, outside jit."
        )
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        raise SetupError(f"{path} is a PRNG key, which is no weight. Leave it out of the params.")
    x = np.asarray(leaf)
    if x.dtype.itemsize not in (1, 2, 4, 8):
        raise SetupError(f"{path} is {x.dtype}; values of 1, 2, 4 or 8 bytes can be stored.")
    return x


def channels(path: str, shape: tuple[int, ...], scales: int) -> tuple[int, ...]:
    """The axes that so many scales belong to."""
    axes = grids.channel_axes(shape, scales)
    if axes is None:
        raise SetupError(
            f"{path} has shape {shape}, of which no axes have {scales} entries together for the "
            f"{scales} scales that its facts speak of. Take the facts of the same model."
        )
    return axes


def _as_bits(x: np.ndarray) -> np.ndarray:
    # By their bits rather than by comparison with 0: a negative zero is a value that must return.
    return np.ascontiguousarray(x).view(f"uint{x.dtype.itemsize * 8}").reshape(x.shape)


def _integers(path: str, x: np.ndarray, bits: int, scales: int) -> Coded:
    if not np.all(np.isfinite(x.astype(np.float32))):
        raise SetupError(f"{path} has values that are not finite, which {bits} bits cannot hold.")
    axes = channels(path, x.shape, scales)
    grid = grids.nearest(x, bits, axes) if bits > 1 else None
    if grid is None or not np.array_equal(grid.values(x.dtype), x):
        # Rounded before, perhaps with a scale that its largest value no longer shows.
        grid = grids.fit(x, bits, axes) or grid
    if grid is None:
        raise SetupError(
            f"{path} has more than two magnitudes a channel, so that one bit cannot hold it. "
            "Binarize it before, or give it 2 bits or more."
        )
    side = {"scales": np.asarray(grid.scales, np.float32).reshape(-1)}
    if grid.zeros is not None:
        side["zeros"] = np.asarray(grid.zeros, np.float32).reshape(-1)
    zeros = side["zeros"].size if "zeros" in side else 0
    encoding = integers(bits, side["scales"].size, zeros, grid.has_zero)
    kept = grid.codes != grid.zero if grid.has_zero else x != 0
    return Coded(x.dtype, grid.codes, kept, (encoding,), side, axes)


def _clustered(path: str, x: np.ndarray, clusters: int) -> Coded:
    book, places = np.unique(_as_bits(x), return_inverse=True)
    if len(book) > min(clusters, CODEBOOK):
        raise SetupError(
            f"{path} has {len(book)} different values, but its facts say {clusters} clusters, and "
            f"a codebook has {CODEBOOK} at most. Give the exported params: "
            "ej.export(transform, state)."
        )
    symbols = places.reshape(x.shape).astype(np.int16)
    kept = book[places].reshape(x.shape) != 0
    encodings = [clustered(len(book), x.dtype, True)]
    if len(book) and book[0] == 0:
        encodings.insert(0, clustered(len(book) - 1, x.dtype, False))
    table = book.view(floats(x.dtype).dtype)
    return Coded(x.dtype, symbols, kept, tuple(encodings), {"codebook": table})
