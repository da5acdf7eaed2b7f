"""Patterns: the shapes in which weights are kept or pruned together.

A pattern divides a weight array into units: single weights, rectangles, whole channels. Scores are
pooled to one per unit, the units with the largest scores are kept, and the choice is expanded to a
mask of the weights. In an N:M pattern it is each group of M weights that keeps its N largest.

Nothing here sorts, gathers or indexes a weight array: axes are split (which a sharding follows
where each device holds whole units), pooled and compared.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from effjax.errors import SetupError
from effjax.prune.budgets import Budget
from effjax.prune.threshold import largest, ordered

Shape = tuple[int, ...]
# From the scores of all units to how many of them are kept.
BudgetOf = Callable[[Mapping[str, Array]], Budget]


class Pattern(NamedTuple):
    """What is kept or pruned together, as pure functions of one weight array.

    check     `(path, shape) -> None`: raises SetupError where the pattern does not fit.
    units     `(shape) -> int`: how many units an array of this shape has.
    pool      `(scores [shape]) -> [grid]`: the score of each unit, the mean of its weights' scores,
              float32. The grid has as many axes as the array. A mean, as it can be compared between
              units of different sizes: layers under one threshold, and the cut units at an edge.
    expand    `(kept [grid], shape) -> bool [shape]`: the mask of the weights.
    choose    `(scores, budget_of, signed=False) -> masks`, {path: float [shape]} to {path: bool
              [shape]}: the units with the largest scores, exactly as many as
              `budget_of({path: unit scores})` says; of equal ones the first. Under a budget for all
              arrays together each of them keeps at least one unit. Unless `signed`, scores are
              never negative.
    sparsity  the fraction of zeros, where the pattern fixes it (N:M, which asks for no budget).
    name      how footprints and files call it, "" for weights by themselves: "2:4", "4x4",
              "channel", "channel 64"; then " over " and its axes where they are not the usual ones
              ("2:4 over -1", "16 over -2").
    """

    check: Callable[[str, Shape], None]
    units: Callable[[Shape], int]
    pool: Callable[[Array], Array]
    expand: Callable[[Array, Shape], Array]
    choose: Callable[..., dict[str, Array]]
    sparsity: float | None = None
    name: str = ""


def unstructured() -> Pattern:
    """Every weight by itself.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 5.0]])}
      >>> unstructured().choose(scores, lambda units: 2)["kernel"].tolist()
      [[True, False], [False, True]]
    """

    def choose(scores: Mapping[str, Array], budget_of: BudgetOf, signed: bool = False):
        return largest(scores, budget_of(scores), signed=signed, spare=True)

    return Pattern(
        check=lambda path, shape: None,
        units=math.prod,
        pool=lambda scores: scores,
        expand=lambda kept, shape: kept,
        choose=choose,
    )


def block(
    sizes: tuple[int, ...], axes: tuple[int, ...] | None = None, pad: bool = False
) -> Pattern:
    """Rectangles of weights, for example of 4 inputs by 4 outputs.

    Args:
      sizes: the rectangle's length along each of `axes`, in weights.
      axes: different axes of the weight; by default the last ones. Along all other axes a unit is
        one weight long: a 4x4 block of a convolution kernel [h, w, in, out] lies at one (h, w).
      pad: let the last unit along an axis be cut off where its length does not divide the axis.
        A cut unit counts as a unit; its score is the mean of the weights it has.

    Raises:
      SetupError: sizes or axes that cannot be meant; from `check`, too few axes, or an axis that
        the length does not divide without `pad`.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 9.0, 0.0]])}
      >>> block((2, 2)).choose(scores, lambda units: 1)["kernel"].tolist()
      [[False, False, True, True], [False, False, True, True]]

    Reference: Gray, Radford and Kingma, "GPU kernels for block-sparse weights", 2017.
    """
    axes = tuple(range(-len(sizes), 0)) if axes is None else axes
    if not sizes or len(sizes) != len(axes) or any(size < 1 for size in sizes):
        raise SetupError(
            f"a block of sizes {sizes} over axes {axes}; give one positive length for each axis, "
            "for example block((4, 4)) or block((16,), axes=(-1,))."
        )

    def lengths(path: str, shape: Shape) -> Shape:
        found = [1] * len(shape)
        places = _axes(path, shape, axes, f"a block over axes {axes}")
        for place, size in zip(places, sizes, strict=True):
            found[place] = size
        return tuple(found)

    name = "x".join(map(str, sizes)) + _over(axes, tuple(range(-len(sizes), 0)))
    return _tiles(lengths, f"blocks of {' x '.join(map(str, sizes))}", pad, name)


def channel(axis: int | tuple[int, ...] = -1, size: int = 1, pad: bool = False) -> Pattern:
    """Whole slices of a weight: output channels (filters), input channels, heads, groups.

    - `channel()`: columns of a dense kernel [in, out], filters of a convolution [h, w, in, out].
    - `channel(-2)`: input channels; heads of an attention kernel [in, heads, head_dim].
    - `channel(-1, size=64)`: heads of 64 features that lie side by side, [in, heads * 64].
    - `channel((0, -1))`: output channels of each layer of a stacked kernel [layers, in, out].

    Args:
      axis: the axis, or axes, whose entries are the slices.
      size: how many neighbouring slices along the last of these axes are kept or pruned together.
      pad: let the last group be smaller where `size` does not divide the axis.

    Raises:
      SetupError: as `block`.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0, 2.0, 3.0], [1.0, 3.0, 0.0]])}
      >>> channel().choose(scores, lambda units: 2)["kernel"].tolist()
      [[False, True, True], [False, True, True]]

    Reference: Li et al., "Pruning filters for efficient ConvNets", 2017,
    https://arxiv.org/abs/1608.08710.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or size < 1:
        raise SetupError(
            f"channels along {axis} in groups of {size}; name an axis and a size >= 1."
        )

    def lengths(path: str, shape: Shape) -> Shape:
        found = list(shape)
        for place in _axes(path, shape, axes, f"channels along {axis}"):
            found[place] = 1
        found[axes[-1]] = size
        return tuple(found)

    name = "channel" + (f" {size}" if size > 1 else "") + _over(axes, (-1,))
    return _tiles(lengths, f"groups of {size} channels" if size > 1 else "channels", pad, name)


def n_m(n: int, m: int, axis: int = -2, pad: bool = False) -> Pattern:
    """N:M sparsity: of every M consecutive weights along an axis the N with the largest scores.

    Args:
      n: how many are kept in each group.
      m: the length of a group.
      axis: the axis that groups lie along. The default is the input axis of kernels [..., in, out],
        which is summed over: where hardware skips zeros.
      pad: let the last group be shorter where `m` does not divide the axis. It keeps its `n`
        largest weights, or all if it has no more; the array is then less sparse than 1 - n/m.

    Raises:
      SetupError: not 0 < n <= m; from `check`, too few axes, or an axis that `m` does not divide
        without `pad`.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0], [4.0], [4.0], [4.0]])}
      >>> n_m(2, 4).choose(scores)["kernel"][:, 0].tolist()
      [False, True, True, False]

    Reference: Mishra et al., "Accelerating sparse deep neural networks", 2021,
    https://arxiv.org/abs/2104.08378.
    """
    if not 0 < n <= m:
        raise SetupError(f"{n}:{m} sparsity keeps {n} of {m} weights; it needs 0 < n <= m.")
    what = f"{n}:{m} sparsity"

    def check(path: str, shape: Shape) -> None:
        [place] = _axes(path, shape, (axis,), what)
        _check_divides(path, shape, place, m, what, pad)

    def choose(
        scores: Mapping[str, Array], budget_of: BudgetOf | None = None, signed: bool = False
    ) -> dict[str, Array]:
        for path, score in scores.items():
            check(path, score.shape)
        found, _ = ordered(scores, signed)
        chosen = [_largest_of_each(x, n, m, axis % x.ndim) for x in found]
        return dict(zip(scores, chosen, strict=True))

    return Pattern(
        check=check,
        units=math.prod,
        pool=lambda scores: scores,
        expand=lambda kept, shape: kept,
        choose=choose,
        sparsity=1 - n / m,
        name=f"{n}:{m}" + _over((axis,), (-2,)),
    )


def _over(axes: tuple[int, ...], usual: tuple[int, ...]) -> str:
    """The axes in a pattern's name."""
    return "" if axes == usual else f" over {','.join(map(str, axes))}"


def _largest_of_each(x: Array, n: int, m: int, axis: int) -> Array:
    """Which of every m unsigned integers along an axis are the n largest; of equal ones the first.

    A weight is kept if fewer than n of its group are above it: larger, or equal and before it.
    """
    length = x.shape[axis]
    groups = -(-length // m)
    widths = [(0, groups * m - length if a == axis else 0) for a in range(x.ndim)]
    # What is filled in comes last and is as small as can be, so that nothing is below it.
    x = jnp.pad(x, widths) if groups * m > length else x
    split = x.reshape(*x.shape[:axis], groups, m, *x.shape[axis + 1 :])
    place = lax.broadcasted_iota(jnp.int32, split.shape, axis + 1)
    above = jnp.zeros(split.shape, jnp.int32)
    for j in range(m):
        # Larger, or equal and not after it; this way XLA needs one comparison of vectors for both.
        other = lax.slice_in_dim(split, j, j + 1, axis=axis + 1)
        above += (other >= split + (place < j).astype(split.dtype)).astype(jnp.int32)
    kept = (above <= n).reshape(x.shape)  # each is also above itself
    return lax.slice_in_dim(kept, 0, length, axis=axis)


def _tiles(lengths: Callable[[str, Shape], Shape], what: str, pad: bool, name: str) -> Pattern:
    """Units that are the tiles of these lengths."""

    def check(path: str, shape: Shape) -> None:
        for axis, length in enumerate(lengths(path, shape)):
            _check_divides(path, shape, axis, length, what, pad)

    def tile(path: str, shape: Shape) -> Shape:
        check(path, shape)
        return lengths(path, shape)

    def pool(scores: Array) -> Array:
        return _pool(scores, tile("the array", scores.shape))

    def expand(kept: Array, shape: Shape) -> Array:
        return _expand(kept, tile("the array", shape), shape)

    def choose(
        scores: Mapping[str, Array], budget_of: BudgetOf, signed: bool = False
    ) -> dict[str, Array]:
        pooled = {path: _pool(s, tile(path, s.shape)) for path, s in scores.items()}
        kept = largest(pooled, budget_of(pooled), signed=signed, spare=True)
        return {path: expand(kept[path], s.shape) for path, s in scores.items()}

    def units(shape: Shape) -> int:
        return math.prod(_grid(shape, tile("the array", shape)))

    return Pattern(check, units, pool, expand, choose, name=name)


def _grid(shape: Shape, lengths: Shape) -> Shape:
    """How many tiles there are along each axis."""
    return tuple(-(-n // length) for n, length in zip(shape, lengths, strict=True))


def _pool(scores: Array, lengths: Shape) -> Array:
    """The mean of each tile, float32 [grid]."""
    shape, grid = scores.shape, _grid(scores.shape, lengths)
    full = [g * length - n for n, g, length in zip(shape, grid, lengths, strict=True)]
    found = jnp.pad(scores.astype(jnp.float32), [(0, n) for n in full])
    whole = tuple(axis for axis, g in enumerate(grid) if g == 1)
    found = jnp.sum(found, axis=whole, keepdims=True)
    for axis, length in enumerate(lengths):
        if axis not in whole:
            found = _sum_each(found, length, axis)
    for axis, (n, g, length) in enumerate(zip(shape, grid, lengths, strict=True)):
        # The tiles' own lengths along this axis; the last one may be cut off.
        own = jnp.full(g, length, jnp.float32).at[-1].set(n - (g - 1) * length)
        found = found / own.reshape([g if a == axis else 1 for a in range(len(shape))])
    return found


def _sum_each(x: Array, length: int, axis: int) -> Array:
    """The sum of every `length` entries along an axis.

    Written as XLA compiles it well for a CPU, where a sum over a short axis takes ten times longer:
    products with ones along the last axis, and along the others sums of vectors, two at a time.
    """
    if axis == x.ndim - 1:
        split = x.reshape(*x.shape[:-1], -1, length)
        return jnp.dot(split, jnp.ones(length, x.dtype), precision=lax.Precision.HIGHEST)
    while length % 2 == 0:
        split = _split(x, 2, axis)
        # Fused with what comes next, the additions would be done again and again.
        x = lax.optimization_barrier(split[_at(axis + 1, 0)] + split[_at(axis + 1, 1)])
        length //= 2
    return jnp.sum(_split(x, length, axis), axis=axis + 1) if length > 1 else x


def _split(x: Array, length: int, axis: int) -> Array:
    return x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])


def _at(axis: int, place: int) -> tuple[slice | int, ...]:
    """The index of a place along an axis."""
    return (*(slice(None),) * axis, place)


def _expand(kept: Array, lengths: Shape, shape: Shape) -> Array:
    """Each tile's entry at all its places, [grid] -> [shape]."""
    # Axis by axis, as shardings follow a reshape that merges two axes and no more.
    for axis, (g, length) in enumerate(zip(kept.shape, lengths, strict=True)):
        if g > 1 and length > 1:
            before, after = kept.shape[:axis], kept.shape[axis + 1 :]
            split = jnp.broadcast_to(jnp.expand_dims(kept, axis + 1), (*before, g, length, *after))
            kept = split.reshape(*before, g * length, *after)
            kept = lax.slice_in_dim(kept, 0, shape[axis], axis=axis)
    return jnp.broadcast_to(kept, shape)


def _axes(path: str, shape: Shape, axes: tuple[int, ...], what: str) -> tuple[int, ...]:
    """The axes as numbers from 0."""
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise SetupError(
                f"{path} has shape {shape}, which has no axis {axis} for {what}. Leave it out of "
                "the selector, or name another axis."
            )
    found = tuple(axis % len(shape) for axis in axes)
    if len(set(found)) < len(found):
        raise SetupError(f"{path} has shape {shape}, in which {what} name an axis twice.")
    return found


def _check_divides(path: str, shape: Shape, axis: int, length: int, what: str, pad: bool) -> None:
    if not pad and shape[axis] % length:
        raise SetupError(
            f"{path} has shape {shape}: its axis {axis} is {shape[axis]} long, which {length} does "
            f"not divide, so {what} do not fit. Pass pad=True to let the last one be smaller, "
            "choose another size, or leave the path out of the selector."
        )
