"""How the axes of a value follow from those of others, operation by operation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax import jaxprs
from effjax.prune.channels import FREE, Axis, Units, blocks

# Entry by entry, whatever they compute.
_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz convert_element_type
copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow
reduce_precision rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
_REDUCTIONS = """
argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCTIONS = frozenset(_REDUCTIONS.split())
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
ALONG = {  # primitives that mix entries along one axis, and the parameter that says which
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}


WINDOW = "a window slides over it"
LOOKUP = "its entries are looked up by position"


class Value(NamedTuple):
    """What is known of a value: its axes, whether it depends on the batch, and on which leaf."""

    axes: tuple[Axis, ...]
    data: bool = False
    leaf: str = ""


class Layout:
    """Rules for the operations that move, copy or mix entries without weights.

    A rule is a method named after its primitive; it gives the axes of each output.
    """

    def __init__(self) -> None:
        self.units = Units()
        self.roles: dict[tuple[str, int], set[str]] = {}
        self.origin: dict[int, tuple[str, int]] = {}  # unit as made for a leaf's axis

    def whole(self, atom: Any, reason: str, data: bool) -> Value:
        return Value(tuple(self.units.kept(n, reason) for n in atom.aval.shape), data)

    def constant(self, value: Any) -> Value:
        """Constants of one value follow what they meet; others stay as they are."""
        shape = np.shape(value)
        if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
            alike = not shape
        else:
            array = np.asarray(value)
            alike = bool((array == array.ravel()[:1]).all()) if array.size else False
        if alike:
            return Value(tuple(self.units.free(n) for n in shape))
        reason = "it meets a constant array that is written into the model"
        return Value(tuple(self.units.kept(n, reason) for n in shape))

    def role(self, axis: Axis, role: str) -> None:
        for unit in np.unique(axis):
            if int(unit) in self.origin:
                self.roles.setdefault(self.origin[int(unit)], set()).add(role)

    def unknown(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        """What cannot be followed stays whole, on both sides."""
        reason = f"it enters {eqn.primitive.name}, which is not followed"
        for value in values:
            for axis in value.axes:
                self.units.pin(axis, reason)
        return [self.whole(v, reason, False).axes for v in eqn.outvars]

    def elementwise(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> Sequence[Axis]:
        shape = shape_of(eqn)
        axes = [self.units.free(n) for n in shape]
        for value in values:
            if len(value.axes) == len(shape):
                pairs = zip(axes, value.axes, shape, strict=True)
                axes = [a if len(b) != n else self.units.join(a, b) for a, b, n in pairs]
        return axes

    def reduction(self, eqn: jaxprs.Eqn, value: Value) -> Sequence[Axis]:
        for i in eqn.params["axes"]:
            # Normalization in groups: whole groups could go, but then their number is another one.
            self.units.pin_whole(value.axes[i], self.reduced(eqn))
        return [a for i, a in enumerate(value.axes) if i not in eqn.params["axes"]]

    def reduced(self, eqn: jaxprs.Eqn) -> str:
        scope = str(eqn.source_info.name_stack)
        place = f" in {scope}" if scope else ""
        name = eqn.primitive.name
        return f"{name} runs over it{place} (LayerNorm, softmax, mean) and depends on its size"

    def window(self, eqn: jaxprs.Eqn, value: Value) -> Sequence[Axis]:
        p = eqn.params
        out = []
        for i, axis in enumerate(value.axes):
            untouched = p["window_dimensions"][i] == 1 and p["window_strides"][i] == 1
            if untouched and tuple(p["padding"][i]) == (0, 0):
                out.append(axis)
            else:
                self.units.pin(axis, WINDOW)
                out.append(self.units.kept(shape_of(eqn)[i], WINDOW))
        return out

    def along(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index = eqn.params[ALONG[eqn.primitive.name]]
        for value in values:
            self.units.pin(value.axes[index], self.reduced(eqn))
        axes = self.elementwise(eqn, values)
        return [axes] * len(eqn.outvars)

    def _broadcast_in_dim(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        axes = [self.units.free(n) for n in shape]
        for axis, i in zip(values[0].axes, dims, strict=True):
            if len(axis) == shape[i]:
                axes[i] = axis
        return [axes]

    def _reshape(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        before, after = tuple(map(len, values[0].axes)), eqn.params["new_sizes"]
        if eqn.params.get("dimensions") is not None or 0 in before:
            return self.unknown(eqn, values)
        axes = [self.units.free(n) for n in after]
        for a, b in blocks(before, after):
            if len(a) == len(b) == 1:
                axes[b[0]] = values[0].axes[a[0]]
                continue
            flat = self.units.merged([values[0].axes[i] for i in a])
            found = self.units.split(flat, [after[i] for i in b]) if len(b) > 1 else [flat]
            for i, axis in zip(b, found, strict=True):
                axes[i] = axis
        return [axes]

    def _squeeze(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        gone = eqn.params["dimensions"]
        return [[a for i, a in enumerate(values[0].axes) if i not in gone]]

    def _transpose(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        return [[values[0].axes[i] for i in eqn.params["permutation"]]]

    def _rev(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        turned = eqn.params["dimensions"]
        return [[a[::-1] if i in turned else a for i, a in enumerate(values[0].axes)]]

    def _slice(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        p, axes = eqn.params, values[0].axes
        strides = p["strides"] or (1,) * len(axes)
        bounds = zip(axes, p["start_indices"], p["limit_indices"], strides, strict=True)
        return [[axis[start:stop:step] for axis, start, stop, step in bounds]]

    def _split(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index, axes = eqn.params["axis"], values[0].axes
        ends = np.cumsum([int(n) for n in eqn.params["sizes"]])[:-1]
        parts = np.split(axes[index], ends)
        return [[*axes[:index], part, *axes[index + 1 :]] for part in parts]

    def _concatenate(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        index = eqn.params["dimension"]
        parts = [v.axes[index] for v in values]
        width = max(part.shape[1] for part in parts)
        wide = [np.pad(a, ((0, 0), (0, width - a.shape[1])), mode="edge") for a in parts]
        axes = list(values[0].axes)
        for value in values[1:]:
            pairs = zip(axes, value.axes, strict=True)
            axes = [a if i == index else self.units.join(a, b) for i, (a, b) in enumerate(pairs)]
        axes[index] = np.concatenate(wide)
        return [axes]

    def _pad(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = []
        for axis, config in zip(values[0].axes, eqn.params["padding_config"], strict=True):
            low, high, between = (int(n) for n in config)
            if min(low, high) < 0 or between:
                self.units.pin(axis, "it is padded inside or cropped")
                size = len(axis) + low + high + max(len(axis) - 1, 0) * between
                axes.append(self.units.kept(size, "it is padded inside or cropped"))
                continue
            around = [np.full((n, axis.shape[1]), FREE) for n in (low, high)]
            axes.append(np.concatenate([around[0], axis, around[1]]))
        return [axes]

    def _iota(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = [self.units.free(n) for n in eqn.params["shape"]]
        i = eqn.params["dimension"]
        axes[i] = self.units.kept(len(axes[i]), "its positions are counted (iota)")
        return [axes]

    def _gather(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        table, indices = values[0].axes, values[1].axes
        if numbers.operand_batching_dims:
            return self.unknown(eqn, values)
        shape = shape_of(eqn)
        dropped = numbers.collapsed_slice_dims
        passed = [i for i in range(len(table)) if i not in dropped]
        axes = [self.units.free(n) for n in shape]
        around = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        for i, axis in zip(around, indices[:-1], strict=True):
            axes[i] = axis
        for i, axis in enumerate(table):
            if i in dropped or sizes[i] != len(axis):
                self.units.pin(axis, LOOKUP)
        for i, j in zip(numbers.offset_dims, passed, strict=True):
            whole = sizes[j] == len(table[j]) and j not in numbers.start_index_map
            if not whole:
                self.units.pin(table[j], LOOKUP)
            axes[i] = table[j] if whole else self.units.kept(shape[i], LOOKUP)
            if whole and not values[0].data:
                self.role(table[j], "out")
        return [axes]

    def _dynamic_slice(self, eqn: jaxprs.Eqn, values: Sequence[Value]) -> list[Sequence[Axis]]:
        axes = []
        for axis, size in zip(values[0].axes, eqn.params["slice_sizes"], strict=True):
            if len(axis) != size:
                self.units.pin(axis, LOOKUP)
            axes.append(axis if len(axis) == size else self.units.kept(size, LOOKUP))
        return [axes]


def shape_of(eqn: jaxprs.Eqn) -> tuple[int, ...]:
    """Of the first output."""
    out: Any = eqn.outvars[0]
    return tuple(out.aval.shape)
