"""The grids of a trained quantizer, read from its state: what each activation is rounded to, and
the integers that its weights are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.core import Transform
from effjax.errors import SetupError
from effjax.quantize import levels, numerics
from effjax.select import leaves
from effjax.step import TrainState

LARGEST = 128  # of the integers that a weight's values are looked for among


class Grid(NamedTuple):
    """The values s · k, low <= k <= high, of an activation.

    scale: float32, with a leading axis for each scan that slices the site's weight.
    """

    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bits: int

    def at(self, layer: tuple[int, ...]) -> tuple[np.float32, int, int]:
        """(s, low, high) of one layer of a scan; `()` where there is none."""
        return np.float32(self.scale[layer]), int(self.low[layer]), int(self.high[layer])


def quantizer_of(
    transform: Transform, state: TrainState, what: str
) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """The name, state and extra of the one quantizer in a transform; `what` asks for it.

    Raises:
      SetupError: there is none, or several.
    """
    members = transform.members or (("", transform),)
    found = [name for name, member in members if member.kind == "quantize"]
    if len(found) != 1:
        raise SetupError(
            f"{what} found {len(found)} quantizers in the transform ({found}); it takes the "
            "grids of one: chain(..., quant=ej.quantize.qat(...))."
        )
    if not transform.members:
        return found[0], state.transform, state.vars.extra
    return found[0], state.transform[found[0]], state.vars.extra[found[0]]


def activation_grids(transform: Transform, state: TrainState) -> dict[str, Grid]:
    """The grids of all rounded activations by name, `path`, or "path/lhs" and "path/rhs".

    They are those of `qat(ranges="static")`, `lsq`, `lsq_plus` and `pact` (of which one bit without
    signs is a grid, and with signs is none).

    Raises:
      SetupError: dynamic ranges, ranges that were never calibrated, other kinds of quantizers.
    """
    name, own, extra = quantizer_of(transform, state, "freeze()")
    counts = own.get("count", {})
    if never := [n for n, count in counts.items() if not np.all(np.asarray(count))]:
        raise SetupError(
            f"the ranges of {never} were never calibrated: nothing has been seen that they could "
            "be taken from. Train for a step at least, or call ej.quantize.calibrate(apply, "
            "transform, state, batches) before freeze()."
        )
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    found = {}
    for path in {**own["scales"], **own["tables"]}:
        fact = facts.get("@" + path, facts.get(path, {}))
        if path in own["tables"] or "act_bits" not in fact:
            continue
        for one in (path, f"{path}/lhs", f"{path}/rhs"):
            if one in counts:
                found[one] = _grid(one, int(fact["act_bits"]), own, extra)
        if not any(n in found for n in (path, f"{path}/lhs")):
            raise SetupError(
                f"the activations at {path} are rounded to {fact['act_bits']} bits by {name!r}, "
                "which takes their range from each batch. An engine needs one that stays: train "
                "with qat(ranges='static'), lsq, lsq_plus or pact, or quantize the trained params "
                "with ej.quantize.ptq."
            )
    return found


def _grid(name: str, bits: int, own: Mapping[str, Any], extra: Mapping[str, Any]) -> Grid:
    def learnt(tree: Mapping[str, Any], value: str) -> Any:
        return tree.get(value, {}).get("activations", {}).get(name)

    fixed = own.get("fixed", {})
    if "ranges" in own and "lows" not in own:
        bound = 2 ** (bits - 1) - 1
        scale = numerics.scale_of(own["ranges"][name], numerics.grid(bits))
        return _made(scale, np.full(scale.shape, -bound), np.full(scale.shape, bound), bits)
    unsigned = levels.unsigned(bits)
    if "ranges" in own:  # as `levels.between`
        low, high = -own["lows"][name], own["ranges"][name]
        scale = (high - low).astype(jnp.float32) * (1.0 / unsigned.high).astype(jnp.float32)
        scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
        zero = jnp.round(low / scale)
        return _made(scale, zero, zero + unsigned.high, bits)
    if (alpha := learnt(extra, "alpha")) is not None:
        levels_ = levels.choose(learnt(fixed, "signed"), bits, narrow=True)
        scale = jnp.maximum(alpha, levels.SMALLEST) * (1.0 / levels_.high)
    elif (step := learnt(extra, "step")) is not None:
        scale = jnp.maximum(step, levels.SMALLEST)
        if (offset := learnt(extra, "offset")) is not None:
            zero = jnp.round(offset / scale)
            return _made(scale, zero, zero + unsigned.high, bits)
        levels_ = levels.choose(learnt(fixed, "signed"), bits)
    else:
        raise SetupError(
            f"the activations {name!r} are rounded in a way that freeze() does not know: "
            f"{sorted({*own, *extra})}. It reads qat(ranges='static'), lsq, lsq_plus and pact."
        )
    if np.any(np.asarray(levels_.signs)):
        raise SetupError(
            f"the activations {name!r} have one bit with a sign, -s and s, which is no grid with a "
            "zero; engines have none such. Train them with 2 bits or more."
        )
    return _made(scale, levels_.low, levels_.high, bits)


def _made(scale: Any, low: Any, high: Any, bits: int) -> Grid:
    scale = np.asarray(scale, np.float32)
    ends = (np.broadcast_to(np.asarray(x), scale.shape).astype(np.int64) for x in (low, high))
    low, high = ends
    if np.any(low > 0) or np.any(high < 0):
        # Zero must be on the grid: what pads a convolution is zero.
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        if np.any(high - low > 255):
            raise SetupError(
                "an activation's range does not reach zero, and with zero it has more than 256 "
                f"integers: {low} ... {high}. Train with a range that has zero inside."
            )
    return Grid(scale, low, high, bits)


def integers(
    name: str, values: np.ndarray, axes: tuple[int, ...], bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The integers and scales that rounded weights are made of: values = scales · codes.

    Scales are sought as max|w| / k of each channel: first for the k that a grid of so many bits has
    at its end, then for the smallest k up to 128 that fits. So it does not matter which technique
    rounded the weights, as long as their points are equally far from each other.

    Args:
      name: for errors.
      values: as they meet the data.
      axes: those of the channels.
      bits: of the weights.

    Returns:
      (codes int8 of the shape of `values`, scales float32 of length 1 along all but `axes`).

    Raises:
      SetupError: values on no such grid.
    """
    others = tuple(axis for axis in range(values.ndim) if axis not in axes)
    wide = values.astype(np.float64)
    largest = np.abs(wide).max(axis=others, keepdims=True, initial=0)
    scales = np.ones_like(largest)
    missing = largest > 0
    half = 2 ** (bits - 1)
    shared = np.full_like(largest, largest.max(initial=0))
    trials = [(largest, half - 1), (shared, half - 1), (shared, half), (largest, half)]
    trials += [(largest, k) for k in range(1, LARGEST + 1)]
    for reach, k in trials:
        if not missing.any() or k < 1:
            continue
        step = np.where(missing, reach / k, 1.0)
        codes = wide / step
        # The points are rounded to float32: k times 2^-24 of a step from where they should be.
        off = np.abs(codes - np.round(codes)).max(axis=others, keepdims=True, initial=0)
        outside = np.round(codes).max(axis=others, keepdims=True, initial=0) > LARGEST - 1
        fits = missing & (off < 1e-3) & ~outside
        scales = np.where(fits, step, scales)
        missing &= ~fits
    if missing.any():
        raise SetupError(
            f"the weights of {name} lie on no grid of equal steps with up to 8 bits: "
            f"{int(missing.sum())} of {missing.size} channels. Engines know no other; train with "
            "qat, lsq, lsq_plus, pact or ternary weights, and without shared codebooks or tiles."
        )
    codes = np.round(wide / scales)
    return codes.astype(np.int8), scales.astype(np.float32)


def check_on_grids(off: Mapping[str, float]) -> None:
    """Raises if operands in evaluation lie away from their grids: {name: steps}."""
    # A hundredth of a step: rounding of floats makes 1e-5 of it, another grid up to a half.
    if wrong := [name for name, x in leaves(dict(off)).items() if not x < 0.01]:
        raise SetupError(
            f"in evaluation the operands at {wrong} do not lie on the grids that the state tells "
            "of, so that a frozen model would be another one. Freeze with the transform that was "
            "trained, unchanged, and without stochastic rounding in evaluation."
        )
