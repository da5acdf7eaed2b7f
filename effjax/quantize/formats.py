"""Number formats on arrays: one bit to eight, ternary, small floats and tables, in scales per
tensor, channel, token or tile. Zero is exact in every one of them.

`encode` gives codes and scales (a `qwix.QArray`, as qwix's dots and convolutions take them),
`decode` the values. Training rounds with `numerics`; this is for what is stored and compared.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax import Array

from effjax.errors import SetupError
from effjax.quantize import numerics

FLOATS = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
TABLES = ("nf4", "mxfp8", "mxfp4")
INTEGERS = tuple(f"int{bits}" for bits in range(2, numerics.WIDEST + 1))
FORMATS = ("int1", "ternary", *INTEGERS, *FLOATS, *TABLES)
MX_TILE = 32  # values that share a power of two in the OCP microscaling formats

Per = Literal["tensor", "channel", "token"] | Sequence[int]


def encode(
    x: Array,
    kind: str,
    *,
    per: Per = "tensor",
    tiles: Mapping[int, int] | None = None,
    symmetric: bool = True,
    key: Array | None = None,
) -> qwix.QArray:
    """Codes and scales of an array in a number format.

    Each group of values that share a scale s (and zero point z) is stored as

        int2..8     clip(round(x / s), -B, B), s = max|x| / B, B = 2^(b-1) - 1; where not
                    `symmetric`, clip(round(x / s) + z, -2^(b-1), 2^(b-1) - 1) with
                    s = (max(x, 0) - min(x, 0)) / (2^b - 1), z = round(-2^(b-1) - min(x, 0) / s)
        int1        sign(x), s = mean|x| over the values that are not 0; zeros stay 0 (a pruned
                    weight's place is known from its mask, and costs no code)
        ternary     sign(x) where |x| > 0.7 mean|x|, else 0; s = mean|x| over those
        fp8_e4m3, fp8_e5m2, nf4, mxfp8, mxfp4    as qwix stores them

    Rounding is to nearest, ties to even; with a `key`, stochastic: floor(x / s + u), u ~ U[0, 1),
    which is x / s on average and leaves what lies on the grid where it is.

    Args:
      x: floating point, any shape.
      kind: one of `FORMATS`.
      per: "tensor"; "channel", scales along the last axis; "token", along all axes but the last;
        or the axes along which scales differ.
      tiles: {axis: size}: scales also differ from one run of `size` values to the next along these
        axes. The mx formats need a tile of 32.
      symmetric: of the integers.
      key: for stochastic rounding, of the integers alone.

    Returns:
      A QArray: codes of x's shape (int8 for what has integers), float32 scales with x's rank, of
      length 1 on shared axes and (size of the axis / tile) on tiled ones.

    Raises:
      SetupError: an unknown format, an x that is not floating point, axes that x does not have, a
        tile that does not divide its axis, asymmetric or stochastic outside int2..8.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.quantize import formats
      >>> x = jnp.array([-1.0, 0.0, 0.5, 2.0])
      >>> formats.encode(x, "int2", symmetric=False).qvalue.tolist()  # steps of 1, zero at -1
      [-2, -1, -1, 1]
      >>> formats.decode(formats.encode(x, "ternary")).tolist()
      [-1.5, 0.0, 0.0, 1.5]

    Reference: Rastegari et al., 2016, https://arxiv.org/abs/1603.05279 (int1); Li et al., 2016,
    https://arxiv.org/abs/1605.04711 (ternary); Dettmers et al., 2023,
    https://arxiv.org/abs/2305.14314 (nf4); Gupta et al., 2015, https://arxiv.org/abs/1502.02551
    (stochastic rounding).
    """
    tiles = dict(tiles or {})
    kept = _check(x, kind, per, tiles, symmetric, key)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if kind in FLOATS or kind in TABLES:
        return qwix.quantize(
            wide, FLOATS.get(kind, kind), channelwise_axes=kept, tiled_axes=tiles or None
        )
    blocks, axes, shape = _split(wide, kept, tiles)
    zero = None
    if kind in ("int1", "ternary"):
        size = jnp.abs(blocks)
        least = 0.7 * jnp.mean(size, axes, keepdims=True) if kind == "ternary" else 0.0
        on = size > least
        count = jnp.maximum(jnp.sum(on, axes, keepdims=True), 1)
        scale = _safe(jnp.sum(jnp.where(on, size, 0), axes, keepdims=True) / count)
        codes = jnp.where(on, jnp.sign(blocks), 0)
    elif symmetric:
        grid = numerics.grid(int(kind[3:]))
        largest = jnp.max(jnp.abs(blocks), axes, keepdims=True, initial=0)
        scale = numerics.scale_of(largest, grid)
        codes = jnp.clip(_round(blocks / scale, key), -grid.bound, grid.bound)
    else:
        half = 2 ** (int(kind[3:]) - 1)
        low = jnp.min(blocks, axes, keepdims=True, initial=0)
        high = jnp.max(blocks, axes, keepdims=True, initial=0)
        scale = _safe((high - low) / (2 * half - 1))
        zero = jnp.clip(jnp.round(-half - low / scale), -half, half - 1)
        codes = jnp.clip(_round(blocks / scale, key) + zero, -half, half - 1)
        zero = zero.reshape(shape).astype(jnp.int8)
    codes = codes.reshape(x.shape).astype(jnp.int8)
    qtype = kind if kind in INTEGERS and kind not in ("int4", "int8") else "int8"
    return qwix.QArray(codes, scale.reshape(shape), zero, jnp.int8 if qtype == "int8" else qtype)


def decode(encoded: qwix.QArray, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """The values of codes and scales, (q - z) · s; from a table, table[q] · s."""
    return qwix.dequantize(encoded).astype(dtype)


def _check(
    x: Array,
    kind: str,
    per: Per,
    tiles: Mapping[int, int],
    symmetric: bool,
    key: Array | None,
) -> tuple[int, ...]:
    """The axes along which scales differ."""
    if kind not in FORMATS:
        found = re.fullmatch(r"int(-?\d+)", str(kind))
        reason = f"{found[1]} bits are out of range; " if found else ""
        raise SetupError(f"the format is {kind!r}; {reason}formats are {list(FORMATS)}.")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise SetupError(
            f"an array of {jnp.result_type(x)} is to be stored as {kind}; only floating-point "
            "values are quantized. Leave it out, or cast it if its integers are measurements."
        )
    if kind not in INTEGERS and not (symmetric and key is None):
        raise SetupError(
            f"{kind} is symmetric and rounds to nearest; asymmetric grids and stochastic rounding "
            f"are for {INTEGERS[0]}..{INTEGERS[-1]}."
        )
    last = x.ndim - 1
    named = {"tensor": (), "channel": (last,), "token": tuple(range(last))}
    if isinstance(per, str) and per not in named:
        raise SetupError(f"per is {per!r}; it is one of {list(named)} or a sequence of axes.")
    kept = named[per] if isinstance(per, str) else tuple(per)
    if bad := [a for a in (*kept, *tiles) if not 0 <= a < x.ndim]:
        raise SetupError(f"the axes {bad} are none of the {x.ndim} axes of shape {x.shape}.")
    for axis, size in tiles.items():
        if size < 1 or x.shape[axis] % size:
            raise SetupError(
                f"a tile of {size} does not divide axis {axis} of shape {x.shape}. Choose a "
                f"divisor of {x.shape[axis]}, or pad the axis."
            )
    if kind.startswith("mx") and list(tiles.values()) != [MX_TILE]:
        raise SetupError(f"{kind} has tiles of {MX_TILE} along one axis; got tiles={dict(tiles)}.")
    # An axis that is both is tiled.
    return tuple(axis for axis in kept if axis not in tiles)


def _split(
    x: Array, kept: Sequence[int], tiles: Mapping[int, int]
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """x with tiled axes split in (tiles, size), the axes that share a scale, the scales' shape."""
    split: list[int] = []
    shared, shape = [], []
    for axis, length in enumerate(x.shape):
        if axis in tiles:
            split += [length // tiles[axis], tiles[axis]]
            shared.append(len(split) - 1)
            shape.append(length // tiles[axis])
        else:
            split.append(length)
            shape.append(length if axis in kept else 1)
            if axis not in kept:
                shared.append(len(split) - 1)
    return x.reshape(split), tuple(shared), tuple(shape)


def _safe(scale: Array) -> Array:
    return jnp.where(scale < np.finfo(scale.dtype).tiny, jnp.ones((), scale.dtype), scale)


def _round(x: Array, key: Array | None) -> Array:
    return jnp.round(x) if key is None else jnp.floor(x + jax.random.uniform(key, x.shape, x.dtype))
