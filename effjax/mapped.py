"""K calls of one function: side by side in one program, or one compiled program K times."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import PyTree


def side_by_side(
    run: Callable[..., Any],
    in_axes: tuple[Any, ...],
    out_axes: Any,
    mesh: Mesh | None,
    donate: bool = False,
) -> Callable[..., Any]:
    """All members as one program, of (hypers, states or keys, batch, frozen)."""
    mapped = jax.vmap(run, in_axes=in_axes, out_axes=out_axes)
    donated = (1,) if donate else ()
    if mesh is None:
        return jax.jit(mapped, donate_argnums=donated)
    given, placed = _specs(in_axes, mesh), _specs(out_axes, mesh)
    # Nothing is exchanged between the devices, so there is no replication for jax to check.
    dealt = jax.shard_map(mapped, mesh=mesh, in_specs=given, out_specs=placed, check_vma=False)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), given)
    jitted = jax.jit(dealt, donate_argnums=donated)
    return lambda *args: jitted(*jax.device_put(args, places))


def in_turn(
    run: Callable[..., Any],
    batch_axis: int | None,
    join: Callable[[list[Any]], Any],
    donate: bool = False,
) -> Callable[..., Any]:
    """One program, that of a run alone, called for each member of (hypers, states or keys)."""
    single = jax.jit(run, donate_argnums=(1,) if donate else ())

    def mapped(hypers: list[PyTree], states: list[PyTree], batch: PyTree, frozen: PyTree) -> Any:
        size = len(hypers)
        batches = [batch] * size if batch_axis is None else members(batch, size)
        calls = zip(hypers, states, batches, strict=True)
        return join([single(*own, frozen) for own in calls])

    return mapped


@jax.jit
def stack(trees: Sequence[PyTree]) -> PyTree:
    """Trees of one form as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def members(tree: PyTree, size: int) -> list[PyTree]:
    """The inverse of `stack`."""
    return [jax.tree.map(lambda x, k=k: x[k], tree) for k in range(size)]


def _is_none(axis: Any) -> bool:
    return axis is None


def _specs(axes: PyTree, mesh: Mesh) -> PyTree:
    (name,) = mesh.axis_names
    return jax.tree.map(
        lambda axis: PartitionSpec() if axis is None else PartitionSpec(name),
        axes,
        is_leaf=_is_none,
    )
