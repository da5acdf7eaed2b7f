"""Layouts: which entries of an array are stored, in which order, and how that is noted.

Everything that is narrower than a byte is packed without gaps: value i takes the bits from i·width
on, the lowest bit first, and only the end of an array is filled up to a whole byte.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from effjax.errors import SetupError

Shape = tuple[int, ...]
Spec = tuple[str, int]  # of a tensor in a file: its NumPy dtype, and how many entries it has
Index = dict[str, np.ndarray]

WIDEST_GROUP = 16  # N:M groups are ranked by a table of all their patterns
_CHUNK = 1 << 20


class Size(NamedTuple):
    """What a layout takes: the tensors of its index, and how many values it stores."""

    tensors: dict[str, Spec]
    values: int

    @property
    def index_bytes(self) -> int:
        """Bytes of the index."""
        return tensor_bytes(self.tensors)


class Layout(NamedTuple):
    """Which entries of an array are stored, in which order, and how that is noted.

    name       of the format, as it is shown and asked for: "bitmask", "2:4".
    kind       of the index: "dense", "bitmask", "csr", "n:m" or "block".
    arguments  of that kind, as a file notes them; JSON.
    size       `(kept bool [shape]) -> Size`, or None where the array does not fit the layout.
    lay        `(kept) -> (index, positions)`: what is written, and the flat positions of the values
               in their order; -1 is a value beyond the array's edge, stored as 0.
    find       `(index, shape) -> positions`: the way back.
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    size: Callable[[np.ndarray], Size | None]
    lay: Callable[[np.ndarray], tuple[Index, np.ndarray]]
    find: Callable[[Index, Shape], np.ndarray]


def tensor_bytes(tensors: Mapping[str, Spec]) -> int:
    """Bytes of tensors."""
    return sum(np.dtype(dtype).itemsize * count for dtype, count in tensors.values())


def whole_bytes(bits: int) -> int:
    """Bytes that hold so many bits."""
    return -(-bits // 8)


def width_of(symbols: int) -> int:
    """Bits that tell so many symbols apart: ceil(log2 symbols)."""
    return max(symbols - 1, 0).bit_length()


def unsigned(largest: int) -> str:
    """The narrowest unsigned dtype that holds a number."""
    return np.min_scalar_type(largest).name


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of `width` bits, one after the other, lowest bit first; uint8 [ceil(n · width / 8)].

    Example:
      >>> import numpy as np
      >>> pack_bits(np.array([1, 2, 3]), 4).tolist()
      [33, 3]
    """
    codes = np.asarray(codes).reshape(-1)
    if width == 8:
        return codes.astype(np.uint8)
    chunks = [np.zeros(0, np.uint8)]
    for start in range(0, codes.size, _CHUNK):  # a chunk is a whole number of bytes
        part = codes[start : start + _CHUNK, None]
        bits = (part >> np.arange(width).astype(codes.dtype)) & 1
        chunks.append(np.packbits(bits.astype(np.uint8), bitorder="little"))
    return np.concatenate(chunks)


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The `count` codes that were packed in `width` bits each; int64."""
    if width == 8:
        return packed[:count].astype(np.int64)
    chunks = [np.zeros(0, np.int64)]
    for start in range(0, count, _CHUNK):
        many = min(_CHUNK, count - start)
        part = packed[start * width // 8 :]
        bits = np.unpackbits(part, count=many * width, bitorder="little").reshape(many, width)
        chunks.append(bits.astype(np.int64) @ (1 << np.arange(width)))
    return np.concatenate(chunks)


def dense() -> Layout:
    """Every value, in C order; no index."""
    return Layout(
        "dense",
        "dense",
        {},
        lambda kept: Size({}, kept.size),
        lambda kept: ({}, np.arange(kept.size)),
        lambda index, shape: np.arange(math.prod(shape)),
    )


def bitmask() -> Layout:
    """One bit for every position in C order, then the kept values."""
    return Layout(
        "bitmask",
        "bitmask",
        {},
        lambda kept: Size({"mask": ("uint8", whole_bytes(kept.size))}, int(kept.sum())),
        lambda kept: ({"mask": pack_bits(kept, 1)}, np.flatnonzero(kept)),
        lambda index, shape: np.flatnonzero(unpack_bits(index["mask"], 1, math.prod(shape))),
    )


def csr() -> Layout:
    """Compressed sparse rows of the matrix [all axes but the last, last axis].

    "rows" are rows + 1 offsets into the values, and "columns" the column of each: absolute, in the
    narrowest of uint8, 16, 32 and 64 that holds the largest. Absolute rather than relative columns,
    so that any sparse library can use the arrays as they are read.
    """

    def size(kept: np.ndarray) -> Size:
        count, columns = int(kept.sum()), kept.shape[-1] if kept.ndim else 1
        rows = math.prod(kept.shape[:-1])
        index = {
            "columns": (unsigned(max(columns - 1, 0)), count),
            "rows": (unsigned(count), rows + 1),
        }
        return Size(index, count)

    def lay(kept: np.ndarray) -> tuple[Index, np.ndarray]:
        specs, _ = size(kept)
        matrix = kept.reshape(math.prod(kept.shape[:-1]), -1) if kept.size else kept.reshape(0, 1)
        rows = np.zeros(specs["rows"][1], specs["rows"][0])
        if kept.size:
            rows[1:] = np.cumsum(matrix.sum(1))
        index = {"columns": np.nonzero(matrix)[1].astype(specs["columns"][0]), "rows": rows}
        return index, np.flatnonzero(kept)

    def find(index: Index, shape: Shape) -> np.ndarray:
        columns = shape[-1] if shape else 1
        ends = index["rows"].astype(np.int64)
        row = np.repeat(np.arange(len(ends) - 1), ends[1:] - ends[:-1])
        return row * columns + index["columns"].astype(np.int64)

    return Layout("csr", "csr", {}, size, lay, find)


def n_m(n: int, m: int, axis: int = -2) -> Layout:
    """N of every M neighbours along an axis, and for each group which ones: the rank of its pattern
    among all combinations in lexicographic order, in ceil(log2 C(m, n)) bits.

    For 2:4 that is 3 bits a group, where two indices in a group or a bitmask take 4. Groups are
    counted in C order of the array with `axis` moved to the end. Fits where `m` divides the axis
    and no group keeps more than `n`; groups that keep fewer store zeros.
    """
    width = width_of(math.comb(m, n))
    arguments = {"n": n, "m": m, "axis": axis}

    def size(kept: np.ndarray) -> Size | None:
        if not -kept.ndim <= axis < kept.ndim or not kept.size or kept.shape[axis] % m:
            return None
        if m > WIDEST_GROUP or np.max(_groups(kept, m, axis).sum(1)) > n:
            return None
        groups = kept.size // m
        return Size({"groups": ("uint8", whole_bytes(groups * width))}, groups * n)

    def lay(kept: np.ndarray) -> tuple[Index, np.ndarray]:
        # Kept places first, then others; of each kind the first.
        chosen = np.sort(np.argsort(~_groups(kept, m, axis), axis=1, kind="stable")[:, :n], axis=1)
        places, ranks = _combinations(n, m)
        codes = ranks[(1 << chosen).sum(1)]
        return {"groups": pack_bits(codes, width)}, _placed(kept.shape, places[codes])

    def find(index: Index, shape: Shape) -> np.ndarray:
        codes = unpack_bits(index["groups"], width, math.prod(shape) // m)
        return _placed(shape, _combinations(n, m)[0][codes])

    def _placed(shape: Shape, chosen: np.ndarray) -> np.ndarray:
        positions = _groups(np.arange(math.prod(shape)).reshape(shape), m, axis)
        return np.take_along_axis(positions, chosen, axis=1).reshape(-1)

    return Layout(f"{n}:{m}", "n:m", arguments, size, lay, find)


def _groups(x: np.ndarray, m: int, axis: int) -> np.ndarray:
    return np.moveaxis(x, axis, -1).reshape(-1, m)


@functools.lru_cache(maxsize=32)
def _combinations(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """All choices of n out of m, int64 [C(m, n), n], and the rank of each by its bits."""
    places = np.array(list(itertools.combinations(range(m), n)), np.int64)
    ranks = np.zeros(1 << m, np.int64)
    ranks[(1 << places).sum(1)] = np.arange(len(places))
    return places, ranks


def block(lengths: Shape, name: str = "") -> Layout:
    """A bit for every block of these lengths (one an axis), then the kept blocks, each dense.

    Blocks, and the values in one, are in C order. Blocks that reach over the array's edge store
    zeros there.
    """
    name = name or "x".join(str(length) for length in lengths if length > 1)

    def blocks(x: np.ndarray, fill: Any) -> np.ndarray:
        """[blocks, values in one]."""
        grid = [-(-n // length) for n, length in zip(x.shape, lengths, strict=True)]
        full = zip(grid, lengths, x.shape, strict=True)
        widths = [(0, g * length - n) for g, length, n in full]
        x = np.pad(x, widths, constant_values=fill) if any(w for _, w in widths) else x
        split = x.reshape([n for pair in zip(grid, lengths, strict=True) for n in pair])
        order = [*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)]
        return split.transpose(order).reshape(math.prod(grid), math.prod(lengths))

    def size(kept: np.ndarray) -> Size | None:
        if len(lengths) != kept.ndim or not kept.size:
            return None
        any_kept = blocks(kept, False).any(1)
        index = {"mask": ("uint8", whole_bytes(any_kept.size))}
        return Size(index, int(any_kept.sum()) * math.prod(lengths))

    def lay(kept: np.ndarray) -> tuple[Index, np.ndarray]:
        index = {"mask": pack_bits(np.any(blocks(kept, False), axis=1), 1)}
        return index, find(index, kept.shape)

    def find(index: Index, shape: Shape) -> np.ndarray:
        positions = blocks(np.arange(math.prod(shape)).reshape(shape), -1)
        mask = unpack_bits(index["mask"], 1, len(positions)).astype(bool)
        return positions[mask].reshape(-1)

    return Layout(name, "block", {"lengths": list(lengths)}, size, lay, find)


PLAIN = (dense(), bitmask(), csr())
_PATTERN = re.compile(
    r"(?:(?P<n>\d+):(?P<m>\d+)|(?P<channel>channel)(?: (?P<size>\d+))?|(?P<sizes>\d+(?:x\d+)*))"
    r"(?: over (?P<axes>-?\d+(?:,-?\d+)*))?"
)


def layouts(shape: Shape, pattern: str = "") -> Iterator[Layout]:
    """The layouts that an array of this shape may be stored in, the simplest first.

    Args:
      shape: of the array.
      pattern: the name of a pruning pattern, "2:4", "4x4" or "channel", with its axes where they
        are not the usual ones ("2:4 over -1"); see `effjax.prune.patterns.Pattern`.

    Raises:
      SetupError: no such pattern.
    """
    yield from PLAIN
    if not pattern:
        return
    found = _PATTERN.fullmatch(pattern)
    if not found:
        raise SetupError(
            f"the pattern {pattern!r} names no format; patterns are '2:4', '4x4' and 'channel', "
            "with ' over ' and their axes where these are not the last ones."
        )
    axes = tuple(int(a) for a in found["axes"].split(",")) if found["axes"] else ()
    if found["n"]:
        yield n_m(int(found["n"]), int(found["m"]), *(axes or (-2,)))
        return
    if found["channel"]:
        lengths, axes = list(shape), axes or (-1,)
        sizes = [1] * (len(axes) - 1) + [int(found["size"] or 1)]
    else:
        sizes = [int(size) for size in found["sizes"].split("x")]
        lengths, axes = [1] * len(shape), axes or tuple(range(-len(sizes), 0))
    if len(sizes) == len(axes) and all(-len(shape) <= a < len(shape) for a in axes):
        for axis, size in zip(axes, sizes, strict=True):
            lengths[axis] = size
        yield block(tuple(lengths), pattern.split(" ")[0])


def layout(kind: str, arguments: Mapping[str, Any]) -> Layout:
    """The layout that a file notes as this kind and these arguments.

    Raises:
      SetupError: there is none.
    """
    plain = {x.kind: x for x in PLAIN}
    if kind in plain:
        return plain[kind]
    if kind == "n:m":
        return n_m(arguments["n"], arguments["m"], arguments["axis"])
    if kind == "block":
        return block(tuple(arguments["lengths"]))
    raise SetupError(f"there is no layout of kind {kind!r}.")
