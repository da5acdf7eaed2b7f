"""Scores and masks of whole channels: structured pruning over channel groups."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import PyTree
from effjax.errors import SelectorError, SetupError
from effjax.prune.grouping import Group, Groups
from effjax.select import leaves


def group_scores(groups: Mapping[str, Group], params: PyTree) -> dict[str, Array]:
    """The summed squared magnitude of every channel over all params that belong to it.

      score[c] = sum over the group's members of the sum of w^2 over the entries of channel c

    Args:
      groups: those to score, for example `groups(...).prunable`.
      params: the weights.

    Returns:
      {group name: float32 [channels]}, for `group_masks`.

    Reference: Fang et al., "DepGraph", 2023, https://arxiv.org/abs/2301.12900.
    """
    named = leaves(params)
    scores = {}
    for name, group in groups.items():
        total = jnp.zeros(group.size, jnp.float32)
        for m in group.members:
            if m.state:
                continue
            w = jnp.asarray(named[m.path], jnp.float32)
            others = tuple(i for i in range(w.ndim) if i != m.axis)
            own = np.flatnonzero(m.channels >= 0)
            total = total.at[m.channels[own]].add(jnp.sum(w * w, axis=others)[own])
        scores[name] = total
    return scores


def group_masks(
    groups: Mapping[str, Group],
    scores: Mapping[str, Any],
    sparsity: float | Mapping[str, float],
    *,
    scope: Literal["group", "global"] = "group",
) -> dict[str, Array]:
    """Masks of whole channels that `compact` can remove, everything that belongs to them included.

    Of a group's n channels the n - round(sparsity * n) with the largest scores stay, of equal ones
    the first, and at least one. The masks cover kernels that make a channel, its bias, its
    BatchNorm scale and bias, and the rows of the kernels that consume it, so that the masked model
    computes exactly what the smaller one does.

    Args:
      groups: where the channels lie, see `groups`.
      scores: {group name: float [channels]}; groups without scores are left alone.
      sparsity: the fraction of channels to prune, in [0, 1); one, or one by group name.
      scope: "group" prunes each group to the sparsity, "global" ranks all channels together.

    Returns:
      {params path: bool [like the leaf]}.

    Raises:
      SelectorError: scores for a group that there is not, or whose channels must stay.
      SetupError: a sparsity outside [0, 1), or scores of another length.
    """
    if scope not in ("group", "global"):
        raise SetupError(f"scope is {scope!r}; it is 'group' or 'global'.")
    ranked = {name: np.asarray(s, np.float64) for name, s in scores.items()}
    _check_names(groups, ranked)
    for name, own in ranked.items():
        if own.shape != (groups[name].size,):
            raise SetupError(
                f"the scores of {name} have shape {own.shape}; it has {groups[name].size} channels."
            )
    fractions = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(ranked, sparsity)
    if wrong := {n: s for n, s in fractions.items() if not 0 <= s < 1}:
        raise SetupError(f"the sparsities {wrong} are outside [0, 1).")
    kept = {name: np.ones(groups[name].size, bool) for name in ranked}
    if scope == "global":
        if isinstance(sparsity, Mapping):
            raise SetupError("scope='global' takes one sparsity for all groups together.")
        pooled = [
            (s, i, name, c)
            for i, (name, own) in enumerate(ranked.items())
            for c, s in enumerate(own)
        ]
        pooled.sort(key=lambda entry: (entry[0], -entry[1], -entry[3]))
        best = {name: int(np.argmax(own)) for name, own in ranked.items()}
        for _, _, name, c in pooled[: round(sparsity * len(pooled))]:
            kept[name][c] = c == best[name]
    else:
        for name, fraction in fractions.items():
            size = groups[name].size
            count = min(round(fraction * size), size - 1)
            order = np.argsort(-ranked[name], kind="stable")
            kept[name][order[size - count :]] = False
    return masks_of(groups, kept)


def masks_of(groups: Mapping[str, Group], kept: Mapping[str, Any]) -> dict[str, Array]:
    """The masks of all params that belong to channels.

    Args:
      groups: where the channels lie.
      kept: {group name: bool [channels]}, True for those that stay.

    Returns:
      {params path: bool [like the leaf]}.
    """
    _check_names(groups, kept)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, stays in kept.items():
        for m in groups[name].members:
            if m.state:
                continue
            entries = np.where(m.channels >= 0, np.asarray(stays, bool)[m.channels], True)
            found.setdefault(m.path, []).append((m.axis, entries))
    masks = {}
    for path, along in found.items():
        shape = _shape(groups, path)
        mask: Any = np.ones(shape, bool)
        for axis, entries in along:
            mask = mask & entries.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        masks[path] = jnp.asarray(mask)
    return masks


def channel_masks(groups: Groups, masks: Mapping[str, Any]) -> dict[str, Array]:
    """Extends masks of kernels to everything that belongs to the channels they prune.

    A channel goes if every kernel that makes it prunes it: a residual branch's alone does not, as
    the sum still carries the others. Where it goes, its bias, its BatchNorm scale and bias (which
    would leave a constant behind) and the rows of the kernels that consume it are masked too.

    Args:
      groups: all groups of the model.
      masks: {path of a kernel: bool [output channels], or bool [like the kernel], in which a
        channel is pruned where nothing of it is kept}.

    Returns:
      {params path: bool [like the leaf]}: the given masks, and those that follow. Use them in
      place of the given ones while training, and `compact` removes the channels.

    Raises:
      SelectorError: a path that makes no channels.
      SetupError: a mask of another shape, or channels of which it is not clear along which axis
        they lie.
    """
    pruned: dict[tuple[str, int], np.ndarray] = {}
    full: dict[str, np.ndarray] = {}
    makers = {
        (m.path, m.axis)
        for g in groups.values()
        for m in g.members
        if "out" in m.roles and not m.state
    }
    for path, given in masks.items():
        mask = np.asarray(given, bool)
        axes = sorted(axis for p, axis in makers if p == path)
        if not axes:
            raise SelectorError(
                f"{path} makes no channels; these do: {sorted(p for p, _ in makers)}."
            )
        shape = _shape(groups, path)
        if mask.shape != shape:
            fitting = [i for i in axes if mask.shape == (shape[i],)]
            if len(fitting) != 1:
                raise SetupError(
                    f"the mask of {path} has shape {mask.shape}; wanted {shape}, or one value for "
                    f"each channel along one of the axes {axes}."
                )
            along = [-1 if i == fitting[0] else 1 for i in range(len(shape))]
            mask = np.broadcast_to(mask.reshape(along), shape)
        full[path] = mask
        for axis in axes:
            others = tuple(i for i in range(len(shape)) if i != axis)
            pruned[path, axis] = np.asarray(~mask.any(axis=others))
    kept = {}
    for name, group in groups.items():
        own = [m for m in group.members if "out" in m.roles and not m.state]
        if group.pinned or not own:
            continue
        gone = np.ones(group.size, bool)
        for m in own:
            entries = pruned.get((m.path, m.axis), np.zeros(m.size, bool))
            gone[m.channels[(m.channels >= 0) & ~entries]] = False
            # A channel that this kernel does not make is not for it to keep.
        if gone.any():
            kept[name] = ~gone
    found = {path: np.asarray(mask) for path, mask in masks_of(groups, kept).items()}
    for path, mask in full.items():
        found[path] = found.get(path, np.ones(mask.shape, bool)) & mask
    return {path: jnp.asarray(mask) for path, mask in found.items()}


def _shape(groups: Mapping[str, Group], path: str) -> tuple[int, ...]:
    if not isinstance(groups, Groups):
        raise SetupError("pass the Groups that `prune.groups` returned, not a part of them.")
    return tuple(len(axis) for axis in groups.dependencies.leaves[path])


def _check_names(groups: Mapping[str, Group], names: Mapping[str, Any] | Sequence[str]) -> None:
    if unknown := sorted(set(names) - set(groups)):
        raise SelectorError(f"no groups {unknown}; the groups are {list(groups)}.")
    if stuck := {n: groups[n].pinned for n in names if groups[n].pinned}:
        raise SelectorError(
            f"these channels must stay: {stuck}. Score only groups that can be pruned: "
            "`groups(...).prunable`."
        )
