"""Channel groups: the channels of a model that can only be removed together."""

from typing import Any, NamedTuple

import numpy as np

from effjax.core import Apply, PyTree
from effjax.model import Model
from effjax.prune.dependencies import STATE, Dependencies, trace
from effjax.prune.layout import WINDOW

UNUSED = "no dot or convolution with a weight sums over it"


class Member(NamedTuple):
    """One axis of a params or model_state leaf that a group's channels lie along.

    path: of the leaf.
    axis: which of its axes.
    size: entries of the axis.
    state: whether it is a leaf of the model_state.
    roles: "out" where the leaf makes the channels (a kernel's output axis, an embedding), "in"
      where it consumes them, neither for a bias, a scale or statistics.
    channels: int [size], the channel of the group that each entry belongs to, -1 for none.
    """

    path: str
    axis: int
    size: int
    state: bool
    roles: frozenset[str]
    channels: np.ndarray


class Group(NamedTuple):
    """Channels that can each be removed, but only from all members at once.

    name: the first kernel that makes them (with its axis, where that is not the last).
    size: how many channels.
    members: the axes they lie along.
    pinned: why the channels cannot be removed; empty if they can.
    units: int [size], their units in the analysis.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    pinned: tuple[str, ...]
    units: np.ndarray


class Groups(dict[str, Group]):
    """Groups by name, in the order of execution; prints as a table."""

    dependencies: Dependencies

    @property
    def prunable(self) -> dict[str, Group]:
        """The groups whose channels can be removed."""
        return {name: group for name, group in self.items() if not group.pinned}

    def __str__(self) -> str:
        lines = []
        for group in self.values():
            why = "; ".join(group.pinned)
            lines.append(f"{group.name}: {group.size} channels" + (f", stay: {why}" if why else ""))
            for m in group.members:
                role = "/".join(sorted(m.roles)) or "-"
                where = " (model_state)" if m.state else ""
                entries = int((m.channels >= 0).sum())
                part = "" if entries == m.size else f", {entries} of them"
                lines.append(f"  {m.path}{where} axis {m.axis}, {m.size} entries{part}, {role}")
        return "\n".join(lines)


def apply_of(model: Model | Apply) -> Apply:
    """The apply function of a Model, or the function itself."""
    return model.apply if isinstance(model, Model) else model


def groups(model: Model | Apply, params: PyTree, model_state: PyTree, batch: PyTree) -> Groups:
    """The channel groups of a model: what has to be pruned together, and what cannot be.

    The program that `apply` runs in evaluation is followed axis by axis from every leaf to where
    the channels are summed over: through biases, BatchNorm, activations, residual additions,
    concatenation, slices, flattening, pooling, grouped and depthwise convolution, attention heads
    and embeddings. Nothing is known of layers or of Flax.

    Axes stay whole, and `pinned` says why, if they reach the model's inputs or outputs, if
    something is computed along them (LayerNorm, RMSNorm, GroupNorm, softmax, a mean), if
    activations are multiplied and summed over them (the dimension of attention's queries and
    keys), or if they enter what is not followed (scan, while, cond, shard_map, scatter, ...).

    Args:
      model: a Model, or an apply function.
      params: arrays or ShapeDtypeStructs.
      model_state: likewise.
      batch: likewise; one example is enough.

    Returns:
      {name: group} in the order of execution.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def apply(params, model_state, batch, key, train):
      ...     hidden = jax.nn.relu(batch["x"] @ params["a"] + params["b"])
      ...     return hidden @ params["c"], model_state
      >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 1))}
      >>> found = groups(apply, params, {}, {"x": jnp.ones((1, 2))})
      >>> [(m.path, m.axis) for m in found["a"].members]
      [('a', 1), ('b', 0), ('c', 0)]

    Reference: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
      https://arxiv.org/abs/2301.12900.
    """
    return find_groups(trace(apply_of(model), params, model_state, batch))


def find_groups(deps: Dependencies) -> Groups:
    """The groups of traced dependencies."""
    units = deps.units
    summed = {root for axis in _summed(deps) for row in axis for root in units.atoms(row)}
    families: dict[int, set[int]] = {}
    for unit, family in enumerate(units.family):
        root = units.find(unit)
        if root not in units.made_of and root not in units.is_constant:
            families.setdefault(root, set()).add(family)
    resolved = {
        (path, i): units.resolved(axis)
        for path, axes in deps.leaves.items()
        for i, axis in enumerate(axes)
    }
    lying = {int(root) for axis in resolved.values() for root in np.unique(axis)} & set(families)

    def reasons(root: int) -> frozenset[str]:
        found = units.reasons.get(root, set())
        return frozenset(found or ([] if root in summed else [UNUSED]))

    alike: dict[Any, list[int]] = {}
    for root in sorted(lying):
        alike.setdefault((frozenset(families[root]), reasons(root)), []).append(root)
    order = {p.where: i for i, p in reversed(list(enumerate(deps.products))) if p is not None}
    found = []
    for (_, why), roots in alike.items():
        channel = {root: i for i, root in enumerate(roots)}
        members = []
        for (path, i), axis in resolved.items():
            table = np.array([[channel.get(int(u), -1) for u in row] for row in axis], int)
            index = table.max(axis=1, initial=-1) if len(table) else np.zeros(0, int)
            if (index >= 0).any():
                roles = frozenset(deps.roles.get((path, i), ()))
                name = path.removeprefix(STATE)
                members.append(Member(name, i, len(axis), path in deps.state, roles, index))
        if why == {WINDOW} and not any(m.roles for m in members):
            continue  # the window of a kernel
        makers = [m for m in members if "out" in m.roles] or members
        first = min(makers, key=lambda m: order.get(m.path, len(order)))
        last = len(deps.leaves[STATE + first.path if first.state else first.path]) - 1
        name = first.path if first.axis == last else f"{first.path}[{first.axis}]"
        rank = order.get(first.path, len(order))
        found.append(
            (rank, Group(name, len(roots), tuple(members), tuple(sorted(why)), np.array(roots)))
        )
    named = Groups()
    for _, group in sorted(found, key=lambda pair: pair[0]):
        count = sum(n == group.name or n.startswith(f"{group.name}#") for n in named)
        name = f"{group.name}#{count}" if count else group.name
        named[name] = group._replace(name=name)
    named.dependencies = deps
    return named


def _summed(deps: Dependencies) -> list[np.ndarray]:
    found = []
    for product in deps.products:
        if product is None:
            continue
        if product.inner is not None:
            found.append(product.inner)
        else:
            found += [product.axes[0][a] for a, _ in product.summed]
            found += [product.axes[1][b] for _, b in product.summed]
    return found
