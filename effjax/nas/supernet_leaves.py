"""What the elastic dimensions of a supernet say of every leaf of its params and statistics."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import PyTree
from effjax.errors import SelectorError, SetupError
from effjax.nas.slices import (
    Axis,
    Bits,
    Depth,
    Kernel,
    Sparsity,
    Width,
    centre,
    channels_kept,
    meet,
)
from effjax.prune.dependencies import STATE
from effjax.prune.grouping import Group, Groups
from effjax.select import leaves, select


class Leaf(NamedTuple):
    """What architectures do to one leaf of the params or the model_state.

    shape: of the largest network's.
    axes: which entries of each axis are kept.
    blocks: (gene, bool [choices]) of each depth that it may be skipped by.
    kernel: the gene of its kernel size, or None.
    sparsity: the gene of its sparsity, or None.
    bits: the gene of its bits, or None.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    blocks: tuple[tuple[int, np.ndarray], ...] = ()
    kernel: int | None = None
    sparsity: int | None = None
    bits: int | None = None

    def exists(self, arch: Any) -> Any:
        """Whether no depth skips it: bool []."""
        if isinstance(arch, np.ndarray):
            return all(table[arch[gene]] for gene, table in self.blocks)
        found = [jnp.asarray(table)[arch[gene]] for gene, table in self.blocks]
        return jnp.all(jnp.stack(found)) if found else jnp.bool_(True)

    def entries(self, arch: Any) -> Any:
        """How many of its entries the sub-network has."""
        number = np if isinstance(arch, np.ndarray) else jnp
        count = number.asarray(self.exists(arch), int if number is np else jnp.int32)
        for axis in self.axes:
            count = count * axis.count(arch)
        return count

    @property
    def changes(self) -> bool:
        """Whether any architecture has less of it than another."""
        return bool(self.blocks) or self.sparsity is not None or any(a.genes for a in self.axes)

    def mask(self, arch: Array) -> Array | None:
        """Which of its entries the sub-network has; broadcasts to the leaf. None: always all."""
        found = self.exists(arch).reshape((1,) * len(self.shape)) if self.blocks else None
        for i, axis in enumerate(self.axes):
            if axis.genes:
                shape = [1] * len(self.shape)
                shape[i] = self.shape[i]
                own = axis.kept(arch).reshape(shape)
                found = own if found is None else found & own
        return found


class Elastics(Protocol):
    """What is read of a supernet: names and values of its genes, and the largest model's shapes."""

    names: list[str]
    values: list[tuple[Any, ...]]
    params: PyTree
    model_state: PyTree
    groups: Groups

    def of(self, kind: type) -> dict[int, Any]: ...


class Reader:
    """Reads the dimensions of a supernet; the methods raise what does not fit the model."""

    def __init__(self, space: "Elastics"):
        self.space, self.names, self.values = space, space.names, space.values

    def widths(self) -> dict[str, tuple[int, np.ndarray]]:
        """{group name: (gene, channels kept by choice)}."""
        found: dict[str, tuple[int, np.ndarray]] = {}
        for gene, own in self.space.of(Width).items():
            for path in select(self.space.params, own.kernels):
                group = self._made_by(path)
                if group is None:
                    raise SelectorError(
                        f"{self.names[gene]} names {path}, which makes no channels; name kernels: "
                        f"{sorted(self.space.groups.prunable)}."
                    )
                if group.pinned:
                    raise SetupError(
                        f"{self.names[gene]} narrows {path}, but its {group.size} channels have to "
                        f"stay: {'; '.join(group.pinned)}."
                    )
                known = found.get(group.name, (gene,))[0]
                if known != gene:
                    raise SelectorError(
                        f"{self.names[known]} and {self.names[gene]} both narrow {group.name}: "
                        f"{path} is tied to its channels. Name the kernels of one group together."
                    )
                found[group.name] = gene, channels_kept(group.size, self.values[gene])
        return found

    def _made_by(self, path: str) -> Group | None:
        for group in self.space.groups.values():
            for m in group.members:
                last = len(np.shape(leaves(self.space.params).get(m.path, 0))) - 1
                if m.path == path and not m.state and "out" in m.roles and m.axis == last:
                    return group
        return None

    def leaves(self, widths: Mapping[str, tuple[int, np.ndarray]]) -> dict[str, Leaf]:
        """What happens to each leaf; those of the model_state have STATE before their path."""
        named = {p: np.shape(x) for p, x in leaves(self.space.params).items()}
        state = {STATE + p: np.shape(x) for p, x in leaves(self.space.model_state).items()}
        tables: dict[tuple[str, int], list[Axis]] = {}
        for name, (gene, kept) in widths.items():
            for m in self.space.groups[name].members:
                table = m.channels < kept[:, None]
                path = STATE + m.path if m.state else m.path
                tables.setdefault((path, m.axis), []).append(Axis((gene,), table))
        kernels = self._kernels(named, tables)
        sparse, bits = (self._marked(kind) for kind in (Sparsity, Bits))
        blocks = self._blocks([*named, *state])
        found = {}
        for path, shape in (named | state).items():
            axes = tuple(meet(tables.get((path, i), []), n) for i, n in enumerate(shape))
            own = kernels.get(path), sparse.get(path), bits.get(path)
            found[path] = Leaf(shape, axes, tuple(blocks.get(path, ())), *own)
        return found

    def _kernels(
        self, named: Mapping[str, tuple[int, ...]], tables: dict[tuple[str, int], list[Axis]]
    ) -> dict[str, int]:
        found: dict[str, int] = {}
        for gene, own in self.space.of(Kernel).items():
            size = self.values[gene][-1]
            for path in select(self.space.params, own.kernels):
                spatial = named[path][:-2]
                if not spatial or set(spatial) != {size}:
                    raise SetupError(
                        f"{self.names[gene]} chooses sizes up to {size}, and {path} is "
                        f"{list(named[path])}: build the model with kernels of that size, "
                        f"[{size}, ..., in, out]."
                    )
                if path in found:
                    raise SelectorError(
                        f"{self.names[found[path]]} and {self.names[gene]} both choose the size of "
                        f"{path}."
                    )
                found[path] = gene
                for axis in range(len(spatial)):
                    table = centre(size, self.values[gene])
                    tables.setdefault((path, axis), []).append(Axis((gene,), table))
        return found

    def _marked(self, kind: type) -> dict[str, int]:
        found: dict[str, int] = {}
        for gene, own in self.space.of(kind).items():
            for path, leaf in select(self.space.params, own.leaves).items():
                if path in found:
                    names = [self.names[found[path]], self.names[gene]]
                    raise SelectorError(f"{names} are both the {kind.__name__} of {path}.")
                if len(leaf.shape) > 1:
                    found[path] = gene
            if gene not in found.values():
                raise SelectorError(f"{self.names[gene]} matches no leaf of two axes or more.")
        return found

    def _blocks(self, paths: Sequence[str]) -> dict[str, list[tuple[int, np.ndarray]]]:
        found: dict[str, list[tuple[int, np.ndarray]]] = {}
        for gene, own in self.space.of(Depth).items():
            depth = np.array(self.values[gene])
            for place, pattern in enumerate(own.blocks):
                chosen = set(select(self.space.params, pattern))
                layers = {"/" + path.rpartition("/")[0] for path in chosen}
                for path in paths:
                    # Statistics lie in a collection of their own, under their layer's path.
                    inside = path.startswith(STATE) and any(
                        ("/" + path[len(STATE) :].rpartition("/")[0]).endswith(layer)
                        for layer in layers
                        if layer != "/"
                    )
                    if path in chosen or inside:
                        found.setdefault(path, []).append((gene, depth > place))
        return found
