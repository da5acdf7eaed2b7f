"""Physical removal: from masks of whole channels to a smaller model with equal outputs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import Apply, PyTree
from effjax.model import Model
from effjax.prune import masks as mask_trees
from effjax.prune.constants import terms
from effjax.prune.dependencies import STATE, Dependencies, trace
from effjax.prune.grouping import Group, Groups, apply_of, find_groups
from effjax.select import leaves, map_named, map_owned
from effjax.sites import find_sites


class Kept(NamedTuple):
    """What became of one group.

    size: channels before.
    channels: int [kept], those that are left.
    stuck: {reason: channels}, those that a weight of zeros marks as pruned and that yet had to
      stay, and why.
    """

    size: int
    channels: np.ndarray
    stuck: dict[str, np.ndarray]


class Compact(NamedTuple):
    """A smaller model, and the account of what was removed.

    params, model_state: sliced, for a model built with fewer channels.
    groups: what became of each group, by name.
    entries: {params path: for each axis int [kept], the entries left}.
    macs_before, macs_after: multiply-accumulates over the batch, as `find_sites` counts.
    """

    params: PyTree
    model_state: PyTree
    groups: dict[str, Kept]
    entries: dict[str, tuple[np.ndarray, ...]]
    macs_before: int
    macs_after: int

    def cut(self, tree: PyTree, params: PyTree) -> PyTree:
        """The same cut of what belongs to the params: an average of them, an optimizer's moments.

        Args:
          tree: leaves are recognised by path and shape, see `select.owners`; others are kept.
          params: those before the cut.
        """
        return map_owned(_take, tree, params, self.entries)

    def __str__(self) -> str:
        lines = [f"MACs {self.macs_before:,} -> {self.macs_after:,}"]
        for name, kept in self.groups.items():
            lines.append(f"{name}: {kept.size} -> {len(kept.channels)} channels")
            lines += [f"  {len(c)} pruned but kept: {why}" for why, c in kept.stuck.items()]
        return "\n".join(lines)


def compact(
    model: Model | Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    masks: Mapping[str, Any] | None = None,
) -> Compact:
    """Removes the channels that cannot matter, so that the outputs in evaluation stay equal.

    A channel is removed if wherever it is summed over (the input axis of a dense layer or of a
    convolution) each term of it is zero for every input: because the channel is known to be zero
    there, or because the weights that meet it are. Both are read off the weights, by evaluating
    the model on inputs of which nothing is known; no names or layers are. What is removed
    makes further terms vanish, so this is repeated until nothing changes.

    A kernel of zeros is not enough if a bias, or BatchNorm's bias and mean, leave a constant in the
    channel: as "same" padding does not pad with that constant, it cannot be folded into the next
    layer exactly. Mask the whole group instead, which `channel_masks` and `group_masks` do; what
    had to stay is listed with its reason under `stuck`. A constant that ReLU clips to zero is zero.

    The program of the smaller model must do the same on smaller axes. What sums over
    channels or counts them (LayerNorm, a mean, attention's sqrt(dim)) is seen and left alone; a
    size that the Python code computes otherwise and multiplies in is not.

    Args:
      model: a Model, or an apply function.
      params: concrete weights.
      model_state: BatchNorm statistics and the like.
      batch: inputs to trace with, arrays or ShapeDtypeStructs; one example is enough. MACs count
        this batch.
      masks: {params path: bool [like the leaf]}, applied first. Left out, zeros speak.

    Returns:
      The smaller params and model_state, and what was removed.

    Raises:
      SelectorError: a mask for a path that the params don't have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def apply(params, model_state, batch, key, train):
      ...     return jax.nn.relu(batch["x"] @ params["a"]) @ params["b"], model_state
      >>> params = {"a": jnp.array([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}
      >>> small = compact(apply, params, {}, {"x": jnp.ones((1, 1))})
      >>> small.params["a"].tolist(), small.macs_before, small.macs_after
      ([[1.0, 2.0]], 6, 4)
    """
    apply = apply_of(model)
    if masks:
        params = mask_trees.apply(params, masks)
    deps = trace(apply, params, model_state, batch)
    found = find_groups(deps)
    values = [*jax.tree.leaves(params), *jax.tree.leaves(model_state)]
    removed, blocked = _removed(deps, found, values)
    keep = {
        path: tuple(np.flatnonzero(_stays(deps, removed, axis)) for axis in axes)
        for path, axes in deps.leaves.items()
    }

    def cut(prefix: str, tree: PyTree) -> PyTree:
        return map_named(lambda path, leaf: _take(leaf, keep[prefix + path]), tree)

    # Traced once more than needed, but then the count is the one everybody uses.
    before = sum(s.macs for s in find_sites(apply, params, model_state, batch))
    after = before - sum(p.macs - _macs(deps, removed, p) for p in deps.products if p is not None)
    named = leaves(params)
    accounts = {}
    for name, group in found.items():
        stays = np.flatnonzero(~removed[group.units])
        accounts[name] = Kept(group.size, stays, _stuck(group, stays, named, keep, blocked))
    return Compact(
        cut("", params),
        cut(STATE, model_state),
        accounts,
        {path: axes for path, axes in keep.items() if path not in deps.state},
        before,
        after,
    )


def _removed(
    deps: Dependencies, found: Groups, values: list[Any]
) -> tuple[np.ndarray, dict[int, set[str]]]:
    """Which units go, bool [units + 1], and for those that don't the products that need them."""
    units = deps.units
    movable = np.zeros(len(units.parent) + 1, bool)
    for group in found.prunable.values():
        movable[group.units] = True
    summed = []
    for product in deps.products:
        if product is None:
            continue
        if product.inner is not None:
            summed.append((product, [[units.resolved(product.inner)]]))
        else:
            pairs = [
                [units.resolved(product.axes[side][pair[side]]) for side in (0, 1)]
                for pair in product.summed
            ]
            summed.append((product, pairs))
    ask = terms(deps)
    removed = np.zeros_like(movable)
    while True:
        blocked: dict[int, set[str]] = {}
        for needed, (product, pairs) in zip(ask(values, jnp.asarray(removed)), summed, strict=True):
            array = np.asarray(needed)
            for d, axes in enumerate(pairs):
                others = tuple(i for i in range(array.ndim) if i != d)
                entries = array.any(axis=others)
                for axis in axes:
                    for unit in np.unique(axis[entries]):
                        blocked.setdefault(int(unit), set()).add(product.where)
        new = movable.copy()
        new[[u for u in blocked if u >= 0]] = False
        if first := _first_of_emptied(deps, new):  # these stay, and all the rest is asked anew
            movable[first] = False
            new[:] = False
        elif (new == removed).all():
            return removed, blocked
        removed = new


def _first_of_emptied(deps: Dependencies, removed: np.ndarray) -> list[int]:
    """Units of the first entry of axes of which nothing would be left: a layer cannot be empty."""
    found: set[int] = set()
    for axes in deps.leaves.values():
        for axis in axes:
            if len(axis) and not _stays(deps, removed, axis).any():
                found.update(deps.units.resolved(axis)[0].tolist())
    return sorted(found)


def _stays(deps: Dependencies, removed: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Which entries of an axis are left, bool [size]; FREE is the last unit."""
    return ~removed[deps.units.resolved(axis)].any(axis=1)


def _take(leaf: Any, entries: tuple[np.ndarray, ...]) -> Any:
    array = np.asarray(leaf)
    for axis, own in enumerate(entries):
        if len(own) < array.shape[axis]:
            array = array.take(own, axis=axis)
    return leaf if array.shape == np.shape(leaf) else jnp.asarray(array)


def _macs(deps: Dependencies, removed: np.ndarray, product: Any) -> int:
    axes = list(product.out)
    if product.inner is not None:
        axes.append(product.inner)
    else:
        axes += [product.axes[0][a] for a, _ in product.summed]
    left = [int(_stays(deps, removed, axis).sum()) for axis in axes]
    return product.macs * math.prod(left) // max(math.prod(len(axis) for axis in axes), 1)


def _stuck(
    group: Group,
    stays: np.ndarray,
    named: Mapping[str, Any],
    keep: Mapping[str, tuple[np.ndarray, ...]],
    blocked: Mapping[int, set[str]],
) -> dict[str, np.ndarray]:
    """Channels that some kernel makes from zeros alone and that are still there, by reason."""
    alive: dict[str, np.ndarray] = {}  # channels, by the kernel that makes them
    parts: dict[str, np.ndarray] = {}  # channels of which some entries are zeros and yet left
    for m in group.members:
        if "out" not in m.roles or m.state:
            continue
        w = np.asarray(named[m.path])
        nonzero = (w != 0).any(axis=tuple(i for i in range(w.ndim) if i != m.axis))
        left = np.zeros(m.size, bool)
        left[keep[m.path][m.axis]] = True
        for found, entries in ((alive, nonzero), (parts, left & ~nonzero)):
            own = found.setdefault(m.path, np.zeros(group.size, bool))
            own[m.channels[(m.channels >= 0) & entries]] = True
    reasons: dict[str, list[int]] = {}
    for channel in stays.tolist():
        zero = [path for path, own in alive.items() if not own[channel]]
        partly = [path for path, own in parts.items() if own[channel]]
        others = [path for path in alive if path not in zero]
        where = ", ".join(sorted(blocked.get(int(group.units[channel]), ())))
        if not zero and not partly:
            continue
        if group.pinned:
            why = "; ".join(group.pinned)
        elif not zero:
            why = f"only some of the entries that go together are zero in {', '.join(partly)}"
        elif others:
            why = f"other kernels of the group keep them: {', '.join(others)}"
        elif where:
            why = (
                "a bias or BatchNorm leaves a constant in them, or their value is made otherwise; "
                f"they are summed over by {where}. Mask the whole group: prune.channel_masks"
            )
        else:
            why = "a layer keeps at least one channel"
        reasons.setdefault(why, []).append(channel)
    return {why: np.array(channels) for why, channels in reasons.items()}
