"""What follows a layer without data, taken into its weights: BatchNorm, biases, scalings.

A site's result y is followed by y' = f · y + b with f and b known for each channel. Then

    f · (w · x) + b = (f w) · x + b,

and of w = s · w' with integers w', f w = (|f| s) · (sign(f) w') has the same integers or their
negatives, so that the folding rounds nothing. The shift is rounded, to the grid of the sums.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from effjax import jaxprs
from effjax.quantize.values import Known, Pending, Value

LARGEST = 2**30  # of a bias in steps: half of int32, the sums need the other half


def absorbed(eqn: jaxprs.Eqn, values: list[Value]) -> Pending | None:
    """The pending result after one more operation, if that is one with known values a channel."""
    name = eqn.primitive.name
    if name in ("copy", "stop_gradient", "optimization_barrier") and isinstance(values[0], Pending):
        return values[0]
    if name == "convert_element_type" and isinstance(values[0], Pending):
        return values[0] if eqn.params["new_dtype"] == jnp.float32 else None
    if name == "neg" and isinstance(values[0], Pending):
        return _moved(values[0], factor=-1.0)
    if name not in ("add", "add_any", "sub", "mul", "div") or len(values) != 2:
        return None
    which = 0 if isinstance(values[0], Pending) else 1
    own, other = values[which], values[1 - which]
    if not isinstance(own, Pending) or not isinstance(other, Known):
        return None
    if jaxprs.shape(eqn.outvars[0]) != own.shape or not _by_channel(own, other):
        return None
    if name == "div" and which == 1:
        return None
    c = None if own.factor is None else _channel_values(own, other)
    if name in ("mul", "div"):
        return _moved(own, factor=c if name == "mul" or c is None else 1.0 / c)
    if name == "sub":
        if which == 1:
            return _moved(own, factor=-1.0, shift=c, shifts=True)
        return _moved(own, shift=None if c is None else -c, shifts=True)
    return _moved(own, shift=c, shifts=True)


def _moved(
    own: Pending,
    factor: np.ndarray | float | None = None,
    shift: np.ndarray | None = None,
    shifts: bool = False,
) -> Pending:
    shifted = own.shifted or shifts
    if own.factor is None or own.shift is None:
        return replace(own, shifted=shifted)
    f = 1.0 if factor is None else factor
    b = 0.0 if shift is None else shift
    return replace(own, factor=own.factor * f, shift=own.shift * f + b, shifted=shifted)


def _by_channel(own: Pending, other: Known) -> bool:
    """Whether a known value is the same along all axes but those of channels."""
    rank, have = len(own.shape), len(other.compact)
    padded = (1,) * (rank - have) + other.compact
    return all(n == 1 for axis, n in enumerate(padded) if axis not in own.channels)


def _channel_values(own: Pending, other: Known) -> np.ndarray:
    assert own.factor is not None  # `absorbed` asked
    value = np.asarray(other.value, np.float64)
    value = value.reshape((1,) * (len(own.shape) - value.ndim) + value.shape)
    kept = value.reshape([value.shape[axis] for axis in own.channels])
    return np.broadcast_to(kept, own.factor.shape)


def folded(
    codes: np.ndarray,
    scale: np.ndarray,
    factor: np.ndarray,
    shift: np.ndarray,
    step: np.float32 | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A layer's weights with what follows it.

    Args:
      codes: int8 [..., channels].
      scale: [channels].
      factor, shift: [channels].
      step: the scale of the input; None where it is not rounded.

    Returns:
      (codes int8, scale float32, shift): int32 in steps of step · scale, or float32 without a step.
      Where int32 cannot hold it (a channel that BatchNorm scales to almost nothing), the channel's
      scale is as large as it takes and its weights are rounded to that.

    Example:
      >>> import numpy as np
      >>> one = np.ones(2)
      >>> q, s, b = folded(np.array([[3, 3]]), one, np.array([-2.0, 1.0]), one, np.float32(0.5))
      >>> q.tolist(), s.tolist(), b.tolist()  # steps of 1.0 and 0.5
      ([[-3, 3]], [2.0, 1.0], [1, 2])
    """
    new = scale.astype(np.float64) * np.abs(factor)
    least = np.abs(shift) / (LARGEST * float(step)) if step is not None else np.zeros_like(new)
    least = np.maximum(least, np.finfo(np.float32).tiny)
    small = new < least
    wide = codes * np.sign(np.where(factor == 0, 1.0, factor))
    wide = np.where(small, np.round(wide * (new / np.where(small, least, 1.0))), wide)
    new = np.where(small, least, new).astype(np.float32)
    # Of -128 the negative is one step further than int8 goes.
    signed = np.clip(wide, -128, 127).astype(np.int8)
    if step is None:
        return signed, new, shift.astype(np.float32)
    grid = (np.float32(step) * new).astype(np.float64)
    return signed, new, np.round(shift / grid).astype(np.int32)
