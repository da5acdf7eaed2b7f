"""Training at one bit and near it: binary and ternary weights, and DoReFa's."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from effjax.core import Transform
from effjax.quantize import engine, lowbit, numerics
from effjax.quantize.learned import ONE, Signs, ends_seen, is_signed
from effjax.quantize.operands import Operand, Place, Values, transform_of
from effjax.quantize.rules import Bits
from effjax.schedules import is_traced
from effjax.select import KERNELS


def binary(
    weights: numerics.Bits = 1,
    activations: numerics.Bits = 32,
    *,
    select: str = KERNELS,
    per_channel: bool = True,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
) -> Transform:
    """Binary weights (BinaryConnect, BWN), and with binary activations XNOR-Net.

    Of one bit: q(x) = s · sign(x), s = mean|x| over the values that are not 0, for each output
    channel of a weight, and for each example (token, in a dense layer) of an activation. Gradients
    are straight-through where |x| <= 1 and 0 elsewhere; scales get none. Zeros stay zeros. Of 2..8
    bits, as `qat` with dynamic ranges, so that rules can keep the first and last layer at 8 bits.

    XNOR-Net normalises before each binary operation, and scales activations by a mean at each
    position; the paper finds the weights' scales to be what matters.

    Args:
      weights, activations: bits, 1..8, or 16 and more for floating point; may be traced.
      select, per_channel, rules, embeddings: as `qat`.

    Raises:
      SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ends = [(r"^(stem|head)/", ej.quantize.Bits(8, 8))]
      >>> xnor = ej.quantize.binary(1, 1, rules=ends)

    Reference: Courbariaux et al., "BinaryConnect", 2015, https://arxiv.org/abs/1511.00363;
    Rastegari et al., "XNOR-Net", 2016, https://arxiv.org/abs/1603.05279.
    """
    default = Bits(weights, activations)
    asked = engine.rules_of("binary", default, rules, select, embeddings, False, ONE)

    def activation(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        rows = place.site.channels[place.operand]
        one = lambda: lowbit.signs(x, rows)  # noqa: E731
        return _where(bits, 1, one, lambda: on_grid(x, values, bits, place))

    own = Operand(_signs)
    return transform_of(asked, own, Operand(activation), per_channel=per_channel, form="binary")


def ternary(
    activations: numerics.Bits = 32,
    *,
    select: str = KERNELS,
    per_channel: bool = True,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
) -> Transform:
    """Ternary weight networks: q(w) = s · sign(w) where |w| > 0.7 mean|w|, else 0.

    s is the mean of |w| over those, for each output channel. Gradients are straight-through. A
    ternary weight takes 2 bits, and that is how rules name it: Bits(2, ...) is ternary, Bits(1,
    ...) binary, and 3..8 an integer grid as in `qat`.

    Args:
      activations: bits, 2..8 with dynamic ranges, or 16 and more for floating point.
      select, per_channel, rules, embeddings: as `qat`.

    Raises:
      SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.ternary(rules=[("^head/", ej.quantize.Bits(8, 8))]).kind
      'quantize'

    Reference: Li et al., "Ternary weight networks", 2016, https://arxiv.org/abs/1605.04711.
    """
    default, least = Bits(2, activations), Bits(1, 2)
    asked = engine.rules_of("ternary", default, rules, select, embeddings, False, least)

    def weight(w: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        two = lambda: lowbit.ternary_values(w, place.axes)  # noqa: E731
        return _where(bits, 2, two, lambda: _signs(w, values, bits, place))

    own = Operand(weight)
    return transform_of(asked, own, Operand(on_grid), per_channel=per_channel, form="ternary")


def dorefa(
    weights: numerics.Bits = 4,
    activations: numerics.Bits = 4,
    *,
    gradients: numerics.Bits | None = None,
    select: str = KERNELS,
    signed: Signs = "auto",
    rules: Sequence[tuple[str, Bits]] = (),
) -> Transform:
    """DoReFa-Net: tanh-normalised weights, activations in [0, 1], and quantized gradients.

    Weights become 2 round(n (tanh(w) / (2 max|tanh(w)|) + 1/2)) / n - 1 with n = 2^b - 1, or of one
    bit sign(w) · mean|w|; weights that are exactly 0 stay 0. Activations become round(n clip(x, 0,
    1)) / n, and those that are negative in the first batch round(m clip(x, -1, 1)) / m with
    m = 2^(b-1) - 1. Rounding is straight-through, clipping gives gradient 0 outside. With
    `gradients`, what flows back into each operation is rounded stochastically, with a scale for
    each example; see `backward.round_gradient` (whose grid, unlike the paper's, has a zero).

    Weights reach from -1 to 1, so the model needs normalization after its layers.

    Args:
      weights, activations: bits, 1..8, or 16 and more for floating point; may be traced.
      gradients: bits, 2..8; None leaves gradients alone.
      select, rules: as `qat`. The paper leaves the first and the last layer alone:
        rules=[(r"^(stem|head)/", Bits(32, 32))].
      signed: as `lsq`.

    Raises:
      SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.dorefa(1, 2, gradients=6).kind
      'quantize'

    Reference: Zhou et al., "DoReFa-Net: Training low bitwidth convolutional neural networks with
    low bitwidth gradients", 2016, https://arxiv.org/abs/1606.06160.
    """
    if gradients is not None:
        numerics.check_bits(gradients, "gradients of dorefa()")
    default = Bits(weights, activations)
    asked = engine.rules_of("dorefa", default, rules, select, False, False, ONE)

    def rounded(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        return lowbit.unit_interval(x, values["signed"], bits)

    def fit(seen: Values, bits: numerics.Bits) -> Values:
        return {"signed": is_signed(seen, signed)}

    clipped = Operand(rounded, ends_seen, fit)
    own = Operand(lowbit.dorefa_weights)
    return transform_of(asked, own, clipped, per_channel=False, gradients=gradients, form="dorefa")


def on_grid(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
    """As `qat` rounds with dynamic ranges."""
    grid = numerics.grid(jnp.maximum(bits, 2))
    scale = numerics.scale_of(numerics.absmax(x, place.axes), grid)
    return numerics.fake_quant(x, scale, grid)


def _signs(w: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
    one = lambda: lowbit.signs(w, place.axes)  # noqa: E731
    return _where(bits, 1, one, lambda: on_grid(w, values, bits, place))


def _where(
    bits: numerics.Bits, width: int, this: Callable[[], Array], other: Callable[[], Array]
) -> Array:
    """`this` where the bits are that width, of which only one is computed if that is known."""
    if not is_traced(bits):
        return this() if int(bits) == width else other()
    return jnp.where(jnp.asarray(bits, jnp.int32) == width, this(), other())
