"""Static ranges of activations: moving averages over training steps, kept in the state by site."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from effjax.core import PyTree

LOW = " low"  # after an activation's name: the other end of its range


def observe(
    averages: Sequence[Array], count: Array, seen: Sequence[Array], decay: float | Array
) -> tuple[list[Array], Array]:
    """One step of a moving average, of each end of a range, corrected for its bias.

    average_n = sum_i d^(n-i) x_i / sum_i d^(n-i), computed as a step of size (1 - d) / (1 - d^n).
    Nothing is learnt from zeros (a branch that did not run) and from numbers that are not finite.
    """
    n, d = count + 1, jnp.asarray(decay, jnp.float32)
    share = (1 - d) / (1 - d ** n.astype(jnp.float32))
    learnt = functools.reduce(jnp.logical_or, [x > 0 for x in seen])
    learnt &= functools.reduce(jnp.logical_and, [jnp.isfinite(x) for x in seen])
    moved = [a + share * (x - a) for a, x in zip(averages, seen, strict=True)]
    kept = [jnp.where(learnt, a, b) for a, b in zip(moved, averages, strict=True)]
    return kept, jnp.where(learnt, n, count)


def by_site(state: PyTree) -> dict[str, dict[str, Any]]:
    """The ranges and counts, and layers' numbers, under their sites' paths for the handlers."""
    kinds = [state[kind] for kind in ("ranges", "lows") if kind in state]
    found: dict[str, dict[str, Any]] = {}
    for path in (*state["scales"], *state["tables"]):
        own = [n for n in (path, f"{path}/lhs", f"{path}/rhs") if n in state.get("count", {})]
        found[path] = {n: ([kind[n] for kind in kinds], state["count"][n]) for n in own}
        if "layer" in state:
            found[path]["layer"] = state["layer"][path]
    return found
