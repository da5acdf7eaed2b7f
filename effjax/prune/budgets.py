"""Budgets: from a sparsity to how many weights are kept, in each layer or in all together.

A network's sparsity may be spread over its layers in many ways; what selects weights (`masks`) is
told only the numbers.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from effjax.errors import SetupError
from effjax.prune.counts import Count
from effjax.schedules import Scalar

# Of each layer by itself, or of all layers together.
Budget = Count | dict[str, Count]


def per_layer(sizes: Mapping[str, int], sparsity: Scalar) -> dict[str, Count]:
    """The same sparsity in every layer: each keeps n - round(sparsity * n) of its n weights."""
    return {path: keep(size, sparsity) for path, size in sizes.items()}


def overall(sizes: Mapping[str, int], sparsity: Scalar) -> Count:
    """One sparsity for all layers together, which are then pruned to different degrees."""
    return keep(sum(sizes.values()), sparsity)


def keep(size: int, sparsity: Scalar) -> Count:
    """How many of `size` weights are kept: size - round(sparsity * size), and at least one.

    The product is computed and rounded in float32, halves to the even number, so that a sparsity
    that is traced (a schedule, a population) gives the same count as the same number written down.
    Above 2^24 weights it is the nearest count that float32 resolves.

    Args:
      size: a number of weights.
      sparsity: float32 scalar in [0, 1); outside of it the nearest count that there can be is
        meant.

    Example:
      >>> int(keep(10, 0.75).value())  # round(7.5) = 8 are pruned
      2
    """
    zeros = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0) * jnp.float32(size)
    return Count.of(size).minus(Count.rounded(zeros).minimum(Count.of(max(size - 1, 0))))


def check_not_emptied(sizes: Mapping[str, int], sparsity: float) -> None:
    """Raises if a layer of one of these sizes would lose all its weights at this sparsity."""
    for path, size in sizes.items():
        if np.round(np.float32(sparsity) * np.float32(size)) >= size:
            raise SetupError(
                f"{path} has {size} weights, and a sparsity of {sparsity} would prune every one of "
                "them. Leave it out of the selector, or prune less."
            )
