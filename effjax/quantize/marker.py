"""The marker of a frozen quantizer, which converters read: one composite for each.

A quantizer rounds to q(x) = s · clip(round(x / s), low, high), so that zero is the integer 0.
Engines store the integers as int8 codes c = round(x / s) + z in -128 ... 127; z is chosen so that
low ... high fits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.errors import SetupError

NAME = "quant.fake_quant"
LOW, HIGH = -128, 127  # of int8


class Quantizer(NamedTuple):
    """One frozen quantizer of an activation, or of a weight.

    name: the site's path and which of its arrays: "conv/kernel:input", ":lhs", ":rhs" (of a product
      of activations), ":weight", ":output"; a value that is none of these, as a sum before pooling,
      is "add", "add#1", ....
    scale: float32 []; of a weight [channels].
    low, high: the integers it rounds to; low <= 0 <= high, high - low <= 255.
    axis: the axis of the array along which scales differ, or None.
    bits: that were trained; engines store 8 for activations, weights may take 4 or 2.
    """

    name: str
    scale: np.ndarray
    low: int
    high: int
    axis: int | None = None
    bits: int = 8

    @property
    def zero_point(self) -> int:
        """The int8 code of zero: 0 where there are negative integers and all fit; else -128 - low,
        so that what is never negative begins at the lowest code (uint8 with 128 taken away)."""
        return 0 if LOW <= self.low < 0 and self.high <= HIGH else LOW - self.low

    @property
    def narrow(self) -> bool:
        """Whether the code -128 is left out: -127 ... 127 and smaller symmetric grids."""
        return self.zero_point == 0 and self.low > LOW

    @property
    def clips(self) -> bool:
        """Whether low ... high is less than what int8 holds with this zero point, narrow or not:
        then a marker alone does not clip as the quantizer does."""
        z = self.zero_point
        return (self.low + z, self.high + z) not in ((LOW, HIGH), (LOW + 1, HIGH))


def fake_quant(
    x: Array, quantizer: Quantizer, *, marked: bool = True, scale: Array | None = None
) -> Array:
    """x rounded: s · clip(round(x / s), low, high), ties to the even integer.

    Where `marked` this is one `jax.lax.composite` of the name "quant.fake_quant" with the operands
    (scale, x) and the attributes

      scale: float32 [1] or [channels]
      zero_point: int64, of the same shape
      dtype: "i8", "i4" or "i2"
      narrow_range: bool, whether the lowest code is left out
      quantization_dimension: the axis, where there are several scales

    A quantizer whose range int8 does not clip (`Quantizer.clips`: of less than 8 bits) is two
    composites on the 8-bit grid of its scale with a clamp between them, s · low ... s · high: what
    fuses with the operation before it is the first.

    Args:
      x: float32.
      quantizer: of an activation, or of a weight that lies on its grid.
      marked: False writes the same arithmetic without the composite, which jax cannot export with
        symbolic shapes.
      scale: the quantizer's, as an argument of the program: XLA divides by a constant as a product
        with its reciprocal, which rounds elsewhere. Read where not `marked`.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from effjax.quantize.marker import Quantizer, fake_quant
      >>> half = Quantizer("x", np.float32(0.5), -127, 127)
      >>> fake_quant(jnp.array([0.2, 0.3, 99.0]), half).tolist()
      [0.0, 0.5, 63.5]
    """
    weight = quantizer.name.endswith(":weight")
    if weight or not quantizer.clips:
        return _rounded(x, quantizer, quantizer.low, quantizer.high, marked, scale)
    z = quantizer.zero_point
    low, high = LOW - z + quantizer.narrow, HIGH - z
    wide = _rounded(x, quantizer, low, high, marked, scale)
    s = np.float32(quantizer.scale)
    inside = lax.clamp(np.float32(s * quantizer.low), wide, np.float32(s * quantizer.high))
    return _rounded(inside, quantizer, low, high, marked, scale)


def _rounded(
    x: Array, own: Quantizer, low: int, high: int, marked: bool, given: Array | None
) -> Array:
    if x.dtype != jnp.float32:
        raise SetupError(f"{own.name} is {x.dtype}; a frozen quantizer rounds float32.")
    scale = np.asarray(own.scale, np.float32).reshape(-1)

    def arithmetic(steps: Array, x: Array, **attributes: Any) -> Array:
        each = [-1 if axis == own.axis else 1 for axis in range(x.ndim)]
        s = jnp.broadcast_to(steps.reshape(each), x.shape)
        codes = lax.round(x / s, lax.RoundingMethod.TO_NEAREST_EVEN)
        return lax.clamp(np.float32(low), codes, np.float32(high)) * s

    if not marked:
        return arithmetic(jnp.asarray(scale if given is None else given).reshape(-1), x)
    attributes: dict[str, Any] = {
        "scale": scale,
        "zero_point": np.full(scale.shape, own.zero_point, np.int64),
        "dtype": f"i{_width(own)}",
        "narrow_range": own.narrow,
    }
    if own.axis is not None and scale.size > 1:
        attributes["quantization_dimension"] = own.axis
    marker = functools.partial(jax.lax.composite, name=NAME)(arithmetic)
    with jax.named_scope(own.name.replace("/", ".")):
        return marker(jnp.asarray(scale), x, **attributes)


def _width(own: Quantizer) -> int:
    """Bits of a stored code: of weights 8, 4 or 2, of activations 8."""
    if not own.name.endswith(":weight"):
        return 8
    return next(b for b in (2, 4, 8) if own.low >= -(2 ** (b - 1)) and own.high < 2 ** (b - 1))
