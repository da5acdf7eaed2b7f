"""Products of small integers: int8 operands, int32 sums, and how a backend is asked for them.

XLA's CPU backend has a fast int8 matrix product; its int8 convolution is slow on few channels, and
slower than that of floats where it is depthwise. There a convolution of few channels is written as
the matrix product of its patches, and a depthwise one as a sum of shifted products; both give the
same integers as the operation itself. Other backends get the operation.

That product arranges its second operand anew in every call, a few bytes from each row at a time. So
a matrix of weights is stored transposed, and is the first operand where the others are few rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.errors import SetupError
from effjax.jaxprs import CONV, DOT
from effjax.sites import Site

LARGEST_SUM = 2**31 - 1
FEW = 16  # input channels up to which a convolution is faster as a product of its patches
ROWS = 2  # one row alone takes a slow path in XLA on CPU
FEW_ROWS = 32  # up to which a matrix of weights is the first operand


def multiply(
    run: Callable[..., Array], site: Site, lhs: Array, rhs: Array, *, cpu: bool, turned: bool
) -> tuple[Array, Mapping[str, Any]]:
    """The operation at a site on integer codes.

    Args:
      run: see `effjax.interpret.Operation`.
      lhs: int8.
      rhs: int8; as `turn` makes it where it is `turned`.
      cpu: choose what is fast in XLA on CPU.

    Returns:
      (int32 sums, exact where they fit; the primitive's parameters).
    """
    op = site.op
    second = jax.ShapeDtypeStruct(site.rhs, jnp.float32) if turned else rhs.astype(jnp.float32)
    traced = jax.make_jaxpr(run)(lhs.astype(jnp.float32), second)
    params = next(e.params for e in traced.jaxpr.eqns if e.primitive.name == op)
    if turned:
        return _product(lhs, rhs).reshape(site.out), params
    if cpu and op == CONV and _plain(params):
        # Without it the rounding is fused into each of the slices, and done again in each.
        lhs = lax.optimization_barrier(lhs)
        channels = lhs.shape[params["dimension_numbers"].lhs_spec[1]]
        taps = math.prod(rhs.shape[a] for a in params["dimension_numbers"].rhs_spec[2:])
        if params["feature_group_count"] == 1 and (channels <= FEW or taps == 1):
            return _patches(lhs, rhs, params), params
        if params["feature_group_count"] == channels > 1 and rhs.size == channels * taps:
            return _shifts(lhs, rhs, params), params
    return run(lhs, rhs, preferred_element_type=jnp.int32), params


def scaled(
    run: Callable[..., Array],
    site: Site,
    codes: Sequence[Array],
    scales: Sequence[Array],
    *,
    cpu: bool,
    turned: bool = False,
) -> Array:
    """The operation at a site on operands that are codes times scales: (s_x s_w) sum x' w'.

    Args:
      codes, scales: of the two operands; scales of length 1 along axes that are summed over.
      run, cpu, turned: see `multiply`.
    """
    sums, params = multiply(run, site, *codes, cpu=cpu, turned=turned)
    lhs, rhs = (in_output(s, site.op, params, i, sums.ndim) for i, s in enumerate(scales))
    return (sums.astype(lhs.dtype) * (lhs * rhs)).astype(site.dtypes[2])


def turns(site: Site) -> bool:
    """Whether a site multiplies rows with a matrix of weights: its last axes with their first."""
    if site.op != DOT or site.weight != 1:
        return False
    count, ndim = len(site.contracting[1]), len(site.lhs)
    return (
        site.contracting[1] == tuple(range(count))
        and site.contracting[0] == tuple(range(ndim - count, ndim))
        and site.out == (*site.lhs[: ndim - count], *site.rhs[count:])
    )


def turn(codes: Array, site: Site) -> Array:
    """The codes of a site that `turns`, as they are stored: [what is kept, what is summed over]."""
    return codes.reshape(terms(site), -1).T


def turn_back(codes: Array, site: Site) -> Array:
    """What `turn` was given."""
    return codes.T.reshape(site.rhs)


def _product(x: Array, codes: Array) -> Array:
    """[..., terms] by [kept, terms]: int32 [rows, kept]."""
    flat = x.reshape(-1, codes.shape[1])
    rows = len(flat)
    if rows < ROWS:
        flat = jnp.pad(flat, ((0, ROWS - rows), (0, 0)))
    if rows > FEW_ROWS:
        return _last_axes(flat, codes)
    # Without the barrier XLA turns the product round again.
    return lax.optimization_barrier(_last_axes(codes, flat)).T[:rows]


def _last_axes(lhs: Array, rhs: Array) -> Array:
    """The product of two matrices whose last axes are summed over."""
    axes = (((1,), (1,)), ((), ()))
    return lax.dot_general(lhs, rhs, axes, preferred_element_type=jnp.int32)


def _plain(params: Mapping[str, Any]) -> bool:
    return params["batch_group_count"] == 1 and all(d == 1 for d in params["lhs_dilation"])


def _slices(x: Array, kernel: tuple[int, ...], params: Mapping[str, Any]) -> list[Array]:
    """What each tap of a kernel multiplies: one array [batch, *positions, channels] a tap."""
    x = lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in params["padding"]), (0, 0, 0)]
    )
    strides, spread = params["window_strides"], params["rhs_dilation"]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    sizes = zip(x.shape[1:-1], reach, strides, strict=True)
    counts = [(n - r) // s + 1 for n, r, s in sizes]
    slices = []
    for tap in range(math.prod(kernel)):
        at = []
        for size in reversed(kernel):
            tap, index = divmod(tap, size)
            at.append(index)
        first = [i * d for i, d in zip(reversed(at), spread, strict=True)]
        last = [f + (c - 1) * s + 1 for f, c, s in zip(first, counts, strides, strict=True)]
        slices.append(
            lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1))
        )
    return slices


def _ordered(x: Array, k: Array, params: Mapping[str, Any]) -> tuple[Array, Array]:
    """The operands as [batch, *space, channels] and [*space, in, out]."""
    numbers = params["dimension_numbers"]
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    return x, k.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])


def _placed(out: Array, params: Mapping[str, Any]) -> Array:
    """[batch, *space, channels] in the order of the operation's output."""
    spec = params["dimension_numbers"].out_spec
    source = [spec[0], *spec[2:], spec[1]]
    return out.transpose(*(source.index(axis) for axis in range(out.ndim)))


def _patches(x: Array, k: Array, params: Mapping[str, Any]) -> Array:
    x, k = _ordered(x, k, params)
    patches = jnp.concatenate(_slices(x, k.shape[:-2], params), axis=-1)
    out = lax.dot(
        patches.reshape(-1, patches.shape[-1]),
        k.reshape(-1, k.shape[-1]),
        preferred_element_type=jnp.int32,
    )
    return _placed(out.reshape(*patches.shape[:-1], -1), params)


def _shifts(x: Array, k: Array, params: Mapping[str, Any]) -> Array:
    x, k = _ordered(x, k, params)
    slices = _slices(x, k.shape[:-2], params)
    taps = k.reshape(-1, k.shape[-1]).astype(jnp.int32)
    out = sum(s.astype(jnp.int32) * tap for s, tap in zip(slices, taps, strict=True))
    return _placed(jnp.asarray(out), params)


def terms(site: Site) -> int:
    """How many products a sum of the site has."""
    side = 1 if site.weight is None else site.weight
    return math.prod(site.shapes[side][axis] for axis in site.contracting[side])


def check_sums(site: Site, largest: int, other: int) -> None:
    """Raises SetupError if sums of products of integers up to these two may exceed int32."""
    count = terms(site)
    if count * largest * other > LARGEST_SUM:
        raise SetupError(
            f"{site.path} sums {count} products of up to {largest} x {other}, which may exceed "
            "int32. Use fewer bits there, or split the sum."
        )


def in_output(scale: Array, op: str, params: Mapping[str, Any], side: int, rank: int) -> Array:
    """An operand's scales, of the operand's rank, in the layout of the output.

    Args:
      scale: of length 1 along axes that are summed over.
      side: 0 or 1, which operand.
      rank: of the output.
    """
    if scale.size == 1:
        return scale.reshape((1,) * rank)
    numbers = params["dimension_numbers"]
    if op == CONV:
        axis = numbers.out_spec[side]  # batch, or features
        return scale.reshape([-1 if a == axis else 1 for a in range(rank)])
    contracting, batch = numbers[0][side], numbers[1][side]
    free = [a for a in range(scale.ndim) if a not in contracting and a not in batch]
    shape = [scale.shape[a] for a in (*batch, *free)]
    scale = scale.transpose(*batch, *free, *contracting).reshape(shape)
    others = (1,) * (rank - len(shape))
    leading = len(shape) if side == 0 else len(batch)
    return scale.reshape(*shape[:leading], *others, *shape[leading:])


def width(bits: int) -> int:
    """Bits that a code of so many bits is stored in: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack(codes: Array, bits: int) -> Array:
    """Codes as they are stored: int8 as they are, smaller ones several to a byte.

    Args:
      codes: int8, of at most `bits` bits.

    Returns:
      The codes where they take a byte each; else uint8 [ceil(size / codes in a byte)]. jax has an
      int4 type, but stores it in bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> stored = pack(jnp.array([[1, -1], [7, -7]], jnp.int8), 4)
      >>> stored.nbytes, unpack(stored, (2, 2), 4).tolist()
      (2, [[1, -1], [7, -7]])
    """
    size = width(bits)
    if size == 8:
        return codes
    parts = 8 // size
    flat = jnp.ravel(codes)
    flat = jnp.pad(flat, (0, -flat.size % parts)).astype(jnp.uint8) & (2**size - 1)
    byte = jnp.zeros(flat.size // parts, jnp.uint8)
    # Neighbours lie in different bytes, so that unpacking moves whole rows.
    for i, part in enumerate(flat.reshape(parts, -1)):
        byte |= part << (size * i)
    return byte


def unpack(stored: Array, shape: tuple[int, ...], bits: int) -> Array:
    """The int8 codes that `pack` stored."""
    size = width(bits)
    if size == 8:
        return stored
    parts = [
        lax.bitcast_convert_type(stored << (8 - size * (i + 1)), jnp.int8) >> (8 - size)
        for i in range(8 // size)
    ]
    return jnp.concatenate(parts)[: math.prod(shape)].reshape(shape)
