"""Quantization whose steps are trained with the weights: LSQ and LSQ+."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Transform
from effjax.quantize import engine, levels, numerics
from effjax.quantize.operands import Operand, Place, Values, transform_of
from effjax.quantize.rules import Bits
from effjax.select import KERNELS

Signs = Literal["auto"] | bool
ONE = Bits(1, 1)


def lsq(
    weights: numerics.Bits = 4,
    activations: numerics.Bits = 4,
    *,
    select: str = KERNELS,
    per_channel: bool = False,
    signed: Signs = "auto",
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
    products: bool | str = False,
) -> Transform:
    """Learned step size quantization (LSQ): the steps of the grids are trained by the task's loss.

    Weights and activations at sites are rounded to q(x) = s · clip(round(x / s), -Qn, Qp). Weights
    and signed activations have Qn = 2^(b-1), Qp = 2^(b-1) - 1, activations that are never negative
    Qn = 0, Qp = 2^b - 1; of one bit, signed values are ±s. With v = x / s the gradients are

        dq/dx = 1 where -Qn <= v <= Qp, else 0
        dq/ds = g · (round(v) - v inside, -Qn below, Qp above),  g = 1 / sqrt(N · Qp)

    where N is how many weights share the step, or how many values an activation has in one example
    (its size without its leading axis). A step begins at 2 mean|x| / sqrt(Qp) of the first training
    step's weights and batch (of one bit, at mean|x|), and gets no gradient in that step. Until
    then, evaluation has no ranges for activations and leaves them in floating point; the metric
    "uncalibrated" counts them. Zeros stay exact zeros.

    Steps are trained leaves at "extra/<name>/step/...". Give them a label, and thereby a learning
    rate, of their own, without weight decay:

        rules = [(r"^extra/.*(step|offset)/", "steps"), ("", "weights")]
        tx = optax.partition({"steps": ..., "weights": ...}, ej.select.label_tree(vars, rules))

    Steps of 8 bits are near 0.01, and Adam moves a leaf by about its learning rate in each step: at
    the weights' rate of 0.005 it walks them through zero, and nothing is learnt.

    Args:
      weights, activations: bits, 1..8, or 16 and more for floating point; may be traced.
      select, rules, embeddings, products: as `qat`. The paper keeps the first and the last layer at
        8 bits: rules=[(r"^(stem|head)/", Bits(8, 8))].
      per_channel: a step for each output channel of a weight; the paper has one for the layer.
      signed: of activations: "auto" takes those for signed that are negative anywhere in the first
        batch; or True or False for all.

    Extra: {"step": {"weights": {site: float32}, "activations": {site: float32}}}, layers of a scan
    on leading axes. State: see `operands.transform_of`; "fixed" holds {"signed"} of activations.

    Raises:
      SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ends = [(r"^(stem|head)/", ej.quantize.Bits(8, 8))]
      >>> ej.quantize.lsq(2, 2, rules=ends).kind
      'quantize'

    Reference: Esser et al., "Learned step size quantization", 2020,
    https://arxiv.org/abs/1902.08153.
    """
    default = Bits(weights, activations)
    asked = engine.rules_of("lsq", default, rules, select, embeddings, products, ONE)
    fitted = Operand(_lsq_rounded(signed), _mean_seen, _lsq_fit(signed), ("step",))
    return transform_of(asked, LSQ_WEIGHTS, fitted, per_channel=per_channel)


def lsq_plus(
    weights: numerics.Bits = 4,
    activations: numerics.Bits = 4,
    *,
    select: str = KERNELS,
    per_channel: bool = False,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
    products: bool | str = False,
) -> Transform:
    """LSQ+: learned steps, and for activations learned offsets, for ranges that are not symmetric.

    Weights are as in `lsq`, but begin at s = max(|m - 3 d|, |m + 3 d|) / 2^(b-1) with their mean m
    and standard deviation d. Activations become q(x) = s · (clip(round(x / s) - z, 0, 2^b - 1) +
    z), z = round(offset / s), which begin at the first batch's range: s = (max - min) / (2^b - 1),
    offset = min (with 0 inside). The gradients are in `levels.learned_offset`, with LSQ's gradient
    scale for both. The paper fits the first activation ranges by their squared error, and lets
    offsets lie between whole steps; here zero is exact.

    Args, Raises: as `lsq`.

    Steps and offsets need a learning rate of their own, more than those of `lsq` do, as they begin
    smaller; see there.

    Extra: {"step": {"weights", "activations"}, "offset": {"activations"}} by site.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.lsq_plus(4, 4).kind
      'quantize'

    Reference: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization", 2020, https://arxiv.org/abs/2004.09576.
    """
    default = Bits(weights, activations)
    asked = engine.rules_of("lsq_plus", default, rules, select, embeddings, products, ONE)
    own = LSQ_WEIGHTS._replace(seen=_spread_seen, fit=_spread_fit)
    ranged = Operand(_offset_rounded, ends_seen, _offset_fit, ("step", "offset"))
    return transform_of(asked, own, ranged, per_channel=per_channel)


def _lsq_rounded(signed: Signs):
    def rounded(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        own = levels.choose(values["signed"], bits)
        factor = lax.rsqrt(levels.per_layer(x) * own.high)
        return levels.learned_step(x, values["step"], own, factor)

    return rounded


def _lsq_fit(signed: Signs):
    def fit(seen: Values, bits: numerics.Bits) -> Values:
        negative = is_signed(seen, signed)
        return {
            "step": _first_step(seen["mean"], levels.choose(negative, bits)),
            "signed": negative,
        }

    return fit


def is_signed(seen: Values, signed: Signs) -> Array:
    """Whether a grid has negative integers: as was said, or where "auto" as values were seen."""
    return seen["low"] > 0 if signed == "auto" else jnp.full(seen["low"].shape, bool(signed))


def _first_step(mean: Array, own: levels.Levels) -> Array:
    return _same_everywhere(jnp.where(own.signs, mean, 2 * mean * lax.rsqrt(own.high)))


def _same_everywhere(step: Array) -> Array:
    # Devices sum in another order: 12 bits of the mantissa are what their means have in common.
    return lax.reduce_precision(step, 8, 12)


def _weight_rounded(w: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
    own, step = levels.signed(bits), values["step"]
    factor = lax.rsqrt(max(w.size // max(step.size, 1), 1) * own.high)
    return levels.learned_step(w, step, own, factor)


def _over(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis not in axes)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(x.astype(jnp.float32), axis=_over(x, axes), keepdims=True)


def _weight_seen(w: Array, axes: tuple[int, ...]) -> Values:
    mean = _mean(jnp.abs(w), axes)
    # A channel of zeros begins like the others, for when its weights come back.
    return {"mean": jnp.where(mean > 0, mean, jnp.mean(mean))}


def _weight_fit(seen: Values, bits: numerics.Bits) -> Values:
    return {"step": _first_step(seen["mean"], levels.signed(bits))}


def _mean_seen(x: Array, axes: tuple[int, ...]) -> Values:
    return {"mean": _mean(jnp.abs(x), axes), "low": ends_seen(x, axes)["low"]}


def ends_seen(x: Array, axes: tuple[int, ...]) -> Values:
    """max(x, 0) and max(-x, 0)."""
    wide, over = x.astype(jnp.float32), _over(x, axes)
    high = jnp.max(wide, axis=over, keepdims=True, initial=0)
    return {"high": high, "low": jnp.max(-wide, axis=over, keepdims=True, initial=0)}


def _spread_seen(w: Array, axes: tuple[int, ...]) -> Values:
    mean = _mean(w, axes)
    spread = 3 * jnp.sqrt(_mean((w.astype(jnp.float32) - mean) ** 2, axes))
    reach = jnp.abs(mean) + spread  # max(|m - 3 d|, |m + 3 d|)
    return {"reach": jnp.where(reach > 0, reach, jnp.mean(reach)), **_weight_seen(w, axes)}


def _spread_fit(seen: Values, bits: numerics.Bits) -> Values:
    own = levels.signed(bits)
    first = jnp.where(own.signs, seen["mean"], seen["reach"] / -own.low)
    return {"step": _same_everywhere(first)}


def _offset_rounded(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
    own = levels.unsigned(bits)
    factor = lax.rsqrt(levels.per_layer(x) * own.high)
    return levels.learned_offset(x, values["step"], values["offset"], own, factor)


def _offset_fit(seen: Values, bits: numerics.Bits) -> Values:
    own = levels.unsigned(bits)
    return {"step": (seen["high"] + seen["low"]) * (1.0 / own.high), "offset": -seen["low"]}


LSQ_WEIGHTS = Operand(_weight_rounded, _weight_seen, _weight_fit, ("step",))
