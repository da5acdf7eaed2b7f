"""The integers behind a quantized leaf: found again from its values, or made by rounding them.

A leaf lies on a grid of b bits if each of its values is (code - zero) · scale, rounded to its
dtype, with codes 0 ... 2^b - 1 and one scale for each channel. Scales are float32, and all is
NumPy: what a reader of a packed file computes.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]

WIDEST = 8
_PROBE = 64  # values of a channel that are tried before all of them are


class Grid(NamedTuple):
    """A leaf in integers.

    codes: uint8 [shape].
    scales: float32, the leaf's shape with 1 for all axes but those of the channels.
    zeros: float32, likewise; None where it is 2^(bits-1) everywhere.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    @property
    def zero(self) -> np.ndarray:
        """The zero points, float32, broadcasting against the codes."""
        return np.full((), 2 ** (self.bits - 1), np.float32) if self.zeros is None else self.zeros

    @property
    def has_zero(self) -> bool:
        """Whether 0 has a code in every channel."""
        return bool(np.all((self.zero >= 0) & (self.zero < 2**self.bits) & (self.zero % 1 == 0)))

    def values(self, dtype: np.dtype) -> np.ndarray:
        """(code - zero) · scale in float32, then in the leaf's dtype."""
        return ((self.codes.astype(np.float32) - self.zero) * self.scales).astype(dtype)


def channel_axes(shape: Shape, scales: int) -> tuple[int, ...] | None:
    """The axes along which a leaf of this shape has so many scales; None if there are none such.

    Of several choices one with the last axis (the output channels), then the one of fewest axes.
    """
    if scales <= 1:
        return ()
    last = len(shape) - 1
    some = [
        axes
        for count in range(1, len(shape) + 1)
        for axes in itertools.combinations(range(len(shape)), count)
        if math.prod(shape[a] for a in axes) == scales and all(shape[a] > 1 for a in axes)
    ]
    return min(some, key=lambda axes: (last not in axes, len(axes)), default=None)


def nearest(x: np.ndarray, bits: int, axes: tuple[int, ...] = ()) -> Grid:
    """The nearest codes on the grid of `effjax.quantize`: s = max|x| / (2^(b-1) - 1) by channel.

    Args:
      x: floating point [shape], finite.
      bits: 2..8.
      axes: of the channels.
    """
    wide, bound = x.astype(np.float32), 2 ** (bits - 1) - 1
    others = tuple(a for a in range(x.ndim) if a not in axes)
    largest = np.max(np.abs(wide), axis=others, keepdims=True, initial=0)
    # As effjax.quantize.numerics.scale_of: times the reciprocal, and 1 for zeros.
    scales = largest * (np.float32(1) / np.float32(bound))
    scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
    codes = np.clip(np.rint(wide / scales), -bound, bound) + 2 ** (bits - 1)
    return Grid(bits, codes.astype(np.uint8), scales)


def given(x: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray | None) -> Grid | None:
    """The codes of a leaf on the grid of these scales and zero points; None if it is not on it."""
    start = Grid(bits, np.zeros(x.shape, np.uint8), scales, zeros)
    with np.errstate(all="ignore"):
        codes = np.rint(x.astype(np.float64) / scales + start.zero)
    if not np.all((codes >= 0) & (codes < 2**bits)):
        return None
    found = start._replace(codes=codes.astype(np.uint8))
    return found if np.array_equal(found.values(x.dtype), x) else None


def fit(x: np.ndarray, bits: int, axes: tuple[int, ...] = ()) -> Grid | None:
    """The grid that a leaf lies on, or None: codes, and scales such that each value comes back.

    The largest value of a channel has some code k, at most 2^(b-1) - 1; for each k in turn, every
    value bounds the scale to an interval, and a float32 in all these intervals is the scale. One
    bit stands for two values of a magnitude, -s and s.

    Args:
      x: floating point [shape].
      bits: 1..8.
      axes: of the channels.
    """
    if not np.all(np.isfinite(x)):
        return None
    order = (*axes, *(a for a in range(x.ndim) if a not in axes))
    channels = math.prod(x.shape[a] for a in axes)
    rows = np.abs(x.transpose(order).reshape(channels, -1))
    kept = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]
    scales = np.ones(channels, np.float32)
    largest = np.max(rows, axis=1, initial=0).astype(np.float64)
    open_ = np.flatnonzero(largest > 0)
    for k in range(max(2 ** (bits - 1) - 1, 1), 0, -1):
        probe = open_[_scale(rows[open_, :_PROBE], largest[open_] / k) > 0]
        found = _scale(rows[probe], largest[probe] / k)
        scales[probe[found > 0]] = found[found > 0]
        open_ = np.setdiff1d(open_, probe[found > 0])
        if not open_.size:
            break
    if open_.size:
        return None
    spread = scales.reshape([x.shape[a] for a in axes]).reshape(kept)
    if bits == 1:  # (code - 1/2) · 2s
        return (
            given(x, 1, 2 * spread, np.full_like(spread, 0.5)) if np.all(x) else _signs(x, spread)
        )
    return given(x, bits, spread, None)


def _signs(x: np.ndarray, scales: np.ndarray) -> Grid | None:
    """One bit, with zeros that the index leaves out and whose code says nothing."""
    full = np.where(x == 0, np.broadcast_to(scales, x.shape).astype(x.dtype), x)
    return given(full, 1, 2 * scales, np.full_like(scales, 0.5))


def _scale(rows: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """The float32 scale of each row of magnitudes, where the guess is nearly it; else 0."""
    wide, guess = rows.astype(np.float64), guess[:, None]
    with np.errstate(all="ignore"):
        codes = np.rint(wide / guess)
        below, above = (_between(rows, -1), _between(rows, 1))
        low = np.max(np.where(codes > 0, below / codes, 0), axis=1, initial=0)
        high = np.min(np.where(codes > 0, above / codes, np.inf), axis=1, initial=np.inf)
        high = np.minimum(high, 2 * guess[:, 0])
        middle = ((low + high) / 2).astype(np.float32)
    result = np.zeros(len(rows), np.float32)
    for direction in (0, -np.inf, np.inf):  # the middle may be a tie
        scale = middle if direction == 0 else np.nextafter(middle, np.float32(direction))
        product = (codes.astype(np.float32) * scale[:, None]).astype(rows.dtype)
        fits = np.all(product == rows, axis=1) & (result == 0)
        result[fits] = scale[fits]
    return result


def _between(magnitudes: np.ndarray, step: int) -> np.ndarray:
    """Half way to the next magnitude of the dtype above (1) or below (-1), float64."""
    bits = magnitudes.view(f"uint{magnitudes.dtype.itemsize * 8}")
    beside = (bits + np.array(step).astype(bits.dtype)).view(magnitudes.dtype)
    beside = np.where(magnitudes == 0, 0, beside.astype(np.float64))
    return (magnitudes.astype(np.float64) + beside) / 2
