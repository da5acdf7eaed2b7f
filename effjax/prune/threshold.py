"""Exactly the k largest scores, of one leaf or of many together, without sorting or gathering them.

Non-negative floats order like their bit patterns read as unsigned integers, so the k-th largest is
found by searching over patterns: count the scores at or above a candidate, and narrow the interval.
Each pass reads the scores once and needs only their count, which is an all-reduce of one number
where they are sharded: no leaf is sorted, gathered, reshaped or concatenated. Floats of any sign
order like their bit patterns once those of negative ones are inverted, see `ordered`.
"""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.errors import SetupError
from effjax.prune.counts import Count, count

UINT32 = 2**32

Number = int | Array | Count


def largest(
    scores: Mapping[str, Array],
    keep: Number | Mapping[str, Number],
    signed: bool = False,
    spare: bool = False,
) -> dict[str, Array]:
    """Masks of exactly the largest scores.

    Of equal scores those that come first are kept: by the order of the dict, then in row-major
    order. NaN counts as larger than everything, so that it is not pruned away unseen.

    Args:
      scores: {path: float [...]}, of 32 bits or fewer, mixed as you like.
      keep: how many to keep, from 0 up to all of them: one number for all leaves taken together, or
        {path: number} for each leaf by itself. Python integers, int32 scalars or Counts.
      signed: scores may be negative; -0.0 equals 0.0. Otherwise they must not be.
      spare: with one number for all leaves, each leaf keeps at least its largest score, at the
        expense of the smallest ones of the other leaves.

    Returns:
      {path: bool [...]}, shaped and sharded like the scores.

    Raises:
      SetupError: scores that are not floating point, or wider than 32 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
      >>> {path: mask.tolist() for path, mask in largest(scores, 3).items()}
      {'a': [True, False, True], 'b': [False, True]}
      >>> {path: mask.tolist() for path, mask in largest(scores, {"a": 1, "b": 1}).items()}
      {'a': [True, False, False], 'b': [False, True]}
      >>> largest({"a": jnp.array([-3.0, 1.0, -2.0])}, 2, signed=True)["a"].tolist()
      [False, True, True]
    """
    patterns, top = ordered(scores, signed)
    together = not isinstance(keep, Mapping)
    spare = spare and together
    one = Count.of(1)
    if isinstance(keep, Mapping):
        wanted = Count.stack([Count.of(keep[path]) for path in scores])
    else:
        wanted = Count.stack([Count.of(keep)])
        wanted = wanted.maximum(Count.of(len(scores))) if spare else wanted

    def pool(counts: list[Count]) -> Count:
        stacked = Count.stack(counts)
        stacked = stacked.maximum(one) if spare else stacked
        return Count.stack([stacked.sum()]) if together else stacked

    def each(values: Array) -> list[Array]:
        return [values[0 if together else i].astype(x.dtype) for i, x in enumerate(patterns)]

    def at_or_above(pattern: Array) -> Count:
        pairs = zip(patterns, each(pattern), strict=True)
        return pool([count(x >= p) for x, p in pairs])

    size = pool([Count.of(x.size) for x in patterns])
    threshold, found = _search(at_or_above, wanted, size, jnp.full(size.high.shape, top))
    surplus = found.minus(wanted)
    bounds, exact = each(threshold), jnp.all(found.equals(wanted))
    if spare:
        # Leaves that are all below the threshold keep one of their largest scores.
        peaks = [jnp.max(x) for x in patterns]
        below = jnp.stack([peak < p for peak, p in zip(peaks, bounds, strict=True)])
        bounds = [jnp.minimum(peak, p) for peak, p in zip(peaks, bounds, strict=True)]
        at_peak = jnp.stack([peak == p for peak, p in zip(peaks, bounds, strict=True)])
        exact = exact & ~jnp.any(below)

    def with_ties() -> list[Array]:
        ties = [x == p for x, p in zip(patterns, bounds, strict=True)]
        tied = Count.stack([count(tie) for tie in ties])
        drop = surplus
        if together:
            free = tied.minus(one).where(at_peak, tied) if spare else tied
            open_to = Count.of(0).where(below, free) if spare else free
            drop = surplus.minus(open_to.after()).minimum(open_to)
            drop = free.where(below, drop) if spare else drop
        dropped = _last(ties, tied, drop)
        return [(x >= p) & ~d for x, p, d in zip(patterns, bounds, dropped, strict=True)]

    def without() -> list[Array]:
        return [x >= p for x, p in zip(patterns, bounds, strict=True)]

    masks = lax.cond(exact, without, with_ties)
    return dict(zip(scores, masks, strict=True))


def ordered(scores: Mapping[str, Array], signed: bool = False) -> tuple[list[Array], Array]:
    """Unsigned integers of one width that order like the scores, and a bound above all of them.

    Non-negative floats are read as integers. With `signed`, x of bits b becomes b with its sign bit
    set if x >= 0, and b with all bits inverted if x < 0; -0.0 becomes what 0.0 becomes, and every
    NaN the next integer above that of inf.

    Returns:
      (uint [...] for each leaf, uint32 [])
    """
    for path, score in scores.items():
        if not jnp.issubdtype(score.dtype, jnp.floating) or jnp.finfo(score.dtype).bits > 32:
            raise SetupError(
                f"the scores of {path!r} are {score.dtype}; thresholds are found among floating-"
                "point scores of 32 bits or fewer. Convert them first: score.astype(jnp.float32)."
            )
    dtype = jnp.result_type(*scores.values())
    bits = jnp.finfo(dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    patterns = [lax.bitcast_convert_type(s.astype(dtype), unsigned) for s in scores.values()]
    sign = 2 ** (bits - 1)
    if not signed:
        return patterns, jnp.uint32(sign)
    infinity = int(np.array(np.inf, dtype).view(unsigned))
    return [_with_sign(x, unsigned.type(sign), infinity) for x in patterns], jnp.uint32(
        2 * sign - 1
    )


def _with_sign(x: Array, sign: np.unsignedinteger, infinity: int) -> Array:
    """Bit patterns of floats of any sign, mapped so that they order as the floats do."""
    size = x & ~sign
    found = jnp.where(x > sign, ~x, x | sign)  # -0.0 has the pattern `sign`, and so has 0.0 then
    return jnp.where(size > infinity, sign + type(sign)(infinity + 1), found)


def unordered(pattern: Array) -> Array:
    """The float32 that `ordered` with `signed` maps to an integer, uint32 [...]."""
    sign = jnp.uint32(2**31)
    return lax.bitcast_convert_type(
        jnp.where(pattern >= sign, pattern ^ sign, ~pattern), jnp.float32
    )


def _search(
    counts: Callable[[Array], Count], wanted: Count, size: Count, top: Array
) -> tuple[Array, Count]:
    """The largest x below `top` with counts(x) >= wanted, or any x with counts(x) == wanted.

    Several searches at once: all arguments have an axis [n].

    Args:
      counts: uint32 [n] -> Count [n], never increasing in x; counts(0) is `size`, counts(top) is 0.
      wanted: at most `size`.

    Returns:
      (x, counts(x)), x uint32 [n].
    """
    # Invariant: counts(low) >= wanted > counts(high), and low == high only at `top`.
    all_of_them, none = wanted.equals(size), wanted.equals(Count.of(0))
    low = jnp.where(none, top, 0).astype(jnp.uint32)
    high = jnp.where(all_of_them & ~none, 1, top).astype(jnp.uint32)
    at_low = Count.of(jnp.zeros(top.shape, jnp.int32)).where(none, size)

    def unfinished(carry) -> Array:
        low, high, _ = carry
        return jnp.any(high - low > 1)

    def narrow(carry):
        low, high, at_low = carry
        middle = low + (high - low) // 2
        found = counts(middle)
        enough = found.at_least(wanted)
        high = jnp.where(enough, high, middle)
        high = jnp.where(found.equals(wanted), middle + 1, high)
        return jnp.where(enough, middle, low), high, found.where(enough, at_low)

    low, _, at_low = lax.while_loop(unfinished, narrow, (low, high, at_low))
    return low, at_low


def _last(ties: list[Array], tied: Count, drop: Count) -> list[Array]:
    """In each of n bool arrays, the last `drop` [n] of the `tied` [n] entries that are True."""
    levels = [_levels(tie.shape) for tie in ties]
    dropped = [jnp.zeros_like(tie) for tie in ties]
    for level in range(-max(len(axes) for axes in levels), 0):
        # An array with fewer levels has a single place, 0, at the outer ones.
        axes = [found[level] if -level <= len(found) else () for found in levels]
        sizes = [math.prod(t.shape[a] for a in over) for t, over in zip(ties, axes, strict=True)]

        def at_or_after(x: Array, ties: list[Array] = ties, axes=axes) -> Count:
            flags = [tie & _compare(tie.shape, axes[i], x[i])[1] for i, tie in enumerate(ties)]
            return Count.stack([count(flag) for flag in flags])

        x, _ = _search(at_or_after, drop, tied, jnp.asarray(sizes, jnp.uint32))
        found = [_compare(tie.shape, axes[i], x[i]) for i, tie in enumerate(ties)]
        after = [tie & (reached & ~at) for tie, (at, reached) in zip(ties, found, strict=True)]
        ties = [tie & at for tie, (at, _) in zip(ties, found, strict=True)]
        dropped = [d | a for d, a in zip(dropped, after, strict=True)]
        drop = drop.minus(Count.stack([count(a) for a in after]))
        tied = Count.stack([count(tie) for tie in ties])
    # At the innermost level each place is one entry: what is left is what is still to be dropped.
    return [d | tie for d, tie in zip(dropped, ties, strict=True)]


def _levels(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes of a shape in groups, outer ones first, that a uint32 can index each."""
    levels: list[tuple[int, ...]] = [()]
    for axis in reversed(range(len(shape))):
        if math.prod(shape[a] for a in (axis, *levels[0])) < UINT32:
            levels[0] = (axis, *levels[0])
        else:
            levels.insert(0, (axis,))
    return levels


def _compare(shape: tuple[int, ...], axes: tuple[int, ...], x: Array) -> tuple[Array, Array]:
    """Which entries are at row-major position x along some axes, and which at x or later.

    Each axis is compared with its own digit of x: positions written out would be an array that XLA
    keeps whole on every device.
    """
    at = reached = jnp.broadcast_to(jnp.bool_(True) if axes else x == 0, shape)
    for axis in reversed(axes):
        place = lax.broadcasted_iota(jnp.uint32, shape, axis)
        digit = x if axis == axes[0] else x % shape[axis]
        x = x // shape[axis]
        at, reached = at & (place == digit), (place > digit) | ((place == digit) & reached)
    return at, reached
