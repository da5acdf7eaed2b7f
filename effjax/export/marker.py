"""Frozen quantizers in a traced program: what each does, and what comes out of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core import PyTree
from effjax.errors import ExportError
from effjax.jaxprs import Call, Eqn, Jaxpr, Remat, Ruled, is_literal, parts, rerun
from effjax.quantize.marker import NAME


class Marker(NamedTuple):
    """A quantizer: x becomes (clip(round(x / scale) + zero_point) - zero_point) * scale.

    scale: float32 [1], or [channels] along `axis`.
    zero_point: an integer of the signed grid of so many bits; its least for an unsigned range.
    narrow: whether the least integer is left out, which makes a signed grid symmetric.
    axis: of the operand; None where one scale serves all.
    """

    scale: np.ndarray
    zero_point: int
    bits: int
    narrow: bool
    axis: int | None


def scope_of(outer: str, eqn: Eqn) -> str:
    """Where in the model an equation stands, inside what stands at `outer`."""
    return "/".join(part for part in (outer, str(eqn.source_info.name_stack)) if part)


def is_marker(eqn: Eqn) -> bool:
    """Whether an equation is a frozen quantizer; its operand is the last one."""
    return eqn.primitive.name == "composite" and eqn.params["name"] == NAME


def read(eqn: Eqn) -> Marker:
    """What a frozen quantizer does.

    Raises:
      ExportError: attributes that no engine takes: an asymmetric grid for each channel, or a type
        that is not "i2" to "i8".
    """
    found = {name: _plain(leaves) for name, leaves, _ in eqn.params["attributes"]}
    where = str(eqn.source_info.name_stack) or "the top"
    scale = np.asarray(found["scale"], np.float32).reshape(-1)
    zero_points = np.unique(found.get("zero_point", 0))
    if len(zero_points) != 1:
        raise ExportError(
            f"the quantizer at {where} has the zero points {zero_points}; engines want one for all "
            "channels, 0 for weights. Quantize with symmetric ranges."
        )
    kind = str(found["dtype"])
    if kind not in ("i2", "i3", "i4", "i5", "i6", "i7", "i8"):
        raise ExportError(f"the quantizer at {where} has the type {kind!r}, not 'i2' to 'i8'.")
    axis = found.get("quantization_dimension")
    if (axis is None) != (scale.size == 1):
        raise ExportError(
            f"the quantizer at {where} has {scale.size} scales and the axis {axis}; one scale "
            "needs no axis, several need the one they belong to."
        )
    narrow = bool(found.get("narrow_range", False))
    return Marker(
        scale, int(zero_points[0]), int(kind[1:]), narrow, None if axis is None else int(axis)
    )


def _plain(leaves: tuple[Any, ...]) -> Any:
    """An attribute's value: jax wraps arrays to make them hashable."""
    (leaf,) = leaves
    return (
        leaf
        if isinstance(leaf, str | bool | int | float)
        else np.asarray(getattr(leaf, "val", leaf))
    )


def codes(x: Any, marker: Marker) -> np.ndarray:
    """The integers of a concrete array, int8, in float32 arithmetic as the program's."""
    x = np.asarray(x, np.float32)
    low, high = -(2 ** (marker.bits - 1)) + marker.narrow, 2 ** (marker.bits - 1) - 1
    shape = [1] * x.ndim
    if marker.axis is not None:
        shape[marker.axis] = -1
    rounded = np.round(x / marker.scale.reshape(shape)) + np.float32(marker.zero_point)
    return np.clip(rounded, low, high).astype(np.int8)


def tapped(fn: Callable[..., PyTree]) -> Callable[..., tuple[PyTree, dict[str, jax.Array]]]:
    """The function with the values of its quantizers as further outputs, to compare layers by.

    Returns:
      A function of the same arguments, to `(outputs, {name: value})` with the name that stands last
      in the quantizer's scope; those of constants are left out.
    """

    def run(*args: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        found: dict[str, jax.Array] = {}
        outputs = _follow(closed.jaxpr, closed.consts, jax.tree.leaves(args), set(), "", found)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs), found

    return run


def _follow(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    fixed: set[Any],
    scope: str,
    found: dict[str, Any],
) -> list[Any]:
    env = {
        **dict(zip(jaxpr.constvars, consts, strict=True)),
        **dict(zip(jaxpr.invars, args, strict=True)),
    }
    fixed = fixed | set(jaxpr.constvars)

    def of(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        own = scope_of(scope, eqn)
        still = [is_literal(v) or v in fixed for v in eqn.invars]
        inner = parts(eqn)
        if isinstance(inner, Call | Remat | Ruled) and not is_marker(eqn):
            body = inner.body.jaxpr
            held = {v for v, known in zip(body.invars, still, strict=True) if known}
            outs = _follow(body, inner.body.consts, [of(v) for v in eqn.invars], held, own, found)
            env.update(zip(eqn.outvars, outs, strict=True))
        else:
            rerun(jaxpr, [eqn], eqn.outvars, env)
        if is_marker(eqn) and not still[-1]:
            found[own.rpartition("/")[2]] = env[eqn.outvars[0]]
        if all(still):
            fixed.update(eqn.outvars)
    return [of(v) for v in jaxpr.outvars]
