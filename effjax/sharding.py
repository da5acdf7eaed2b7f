"""Layouts: which mesh a run is on, and which leaf of its state lies where."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import Apply, PyTree
from effjax.errors import ShardingError
from effjax.select import leaves, map_named, owners


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and rules for params paths.

    mesh: `jax.make_mesh((4, 2), ("data", "model"))`. Its axes are taken as automatic: the compiler
      places what lies between the state and the batch.
    rules: (pattern, PartitionSpec) pairs; the first pattern that matches a params path
      (`re.search`) says how that leaf is split. Leaves that match none are replicated.
    batch: the mesh axes that the batch's first axis is split over; by default all of them.
    """

    mesh: Mesh
    rules: Sequence[tuple[str, PartitionSpec]] = ()
    batch: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names))

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes of the batch's first axis."""
        return tuple(self.mesh.axis_names) if self.batch is None else self.batch

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The PartitionSpec of the params leaf at `path`, checked against its shape."""
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                self._check(path, shape, spec)
                return spec
        return PartitionSpec()

    def _check(self, path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
        if len(spec) > len(shape):
            raise ShardingError(
                f"{path} has shape {shape}, but its rule says {spec}: too many axes."
            )
        for axis, names in enumerate(spec):
            ways = self.ways(names)
            if shape[axis] % ways:
                raise ShardingError(
                    f"axis {axis} of {path} has {shape[axis]} entries, which {names!r} of the mesh "
                    f"splits {ways} ways; choose an axis that divides, or leave this one whole."
                )

    def ways(self, names: str | tuple[str, ...] | None) -> int:
        """Into how many parts the named mesh axes split an array axis."""
        if names is None:
            return 1
        return int(np.prod([self.mesh.shape[n] for n in np.atleast_1d(names)]))

    def put_batch(self, batch: PyTree) -> PyTree:
        """The batch on the mesh, its first axis split.

        Raises:
          ShardingError: the batch does not divide.
        """
        ways = self.ways(self.batch_axes)
        for name, leaf in leaves(batch).items():
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] % ways:
                raise ShardingError(
                    f"batch[{name!r}] has shape {np.shape(leaf)}, and the mesh axes "
                    f"{self.batch_axes} split its first axis {ways} ways. Use a batch size that is "
                    f"a multiple of {ways}, or name fewer axes in Layout(batch=...)."
                )
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(self.batch_axes)))


def state_shardings(state: PyTree, layout: Layout) -> PyTree:
    """The sharding of every leaf of a TrainState: what belongs to a params leaf (a moment, a mask,
    a moving average) lies where that leaf lies, and the rest is replicated.

    Args:
      state: a TrainState; its leaves may be abstract.

    Returns:
      The same tree with NamedShardings, for `jax.jit(step, out_shardings=(shardings, None))`.
    """
    params = leaves(state.vars.model)
    specs = {path: layout.spec(path, np.shape(leaf)) for path, leaf in params.items()}
    unused = [p for p, _ in layout.rules if not any(re.search(p, path) for path in params)]
    if unused:
        raise ShardingError(f"the layout's rules {unused} match none of the params {list(params)}.")
    belongs = owners(state, state.vars.model)

    def place(name: str, leaf: Any) -> NamedSharding:
        spec = specs[belongs[name]] if name in belongs else PartitionSpec()
        return NamedSharding(layout.mesh, spec)

    return map_named(place, state)


def check_grouped_convolutions(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree, layout: Layout
) -> None:
    """Refuses the one layout in which XLA computes a wrong gradient.

    On a mesh of two axes with the batch split over one of them, the gradient of a grouped
    (depthwise) convolution's kernel comes out multiplied by the size of the other axis.
    """
    whole = [a for a, n in layout.mesh.shape.items() if n > 1 and a not in layout.batch_axes]
    if not whole:
        return
    from effjax.sites import find_sites

    grouped = [s.path for s in find_sites(apply, params, model_state, batch) if s.groups > 1]
    if grouped:
        raise ShardingError(
            f"the grouped convolutions {grouped} on a mesh {dict(layout.mesh.shape)} with the "
            f"batch split over {layout.batch_axes} only: XLA would multiply their gradients by the "
            f"size of {whole}. Split the batch over every axis: Layout(mesh, rules, batch=None)."
        )
