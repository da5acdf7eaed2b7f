"""Masks, {params path: bool [like the weight]}: True where a weight is kept."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from effjax.errors import SelectorError
from effjax.prune.budgets import Budget
from effjax.prune.counts import Count, count
from effjax.prune.threshold import largest
from effjax.select import leaves, replace

PyTree = Any
Masks = Mapping[str, Array]


def masked(x: Array, mask: Array) -> Array:
    """x where the mask keeps it, and exactly 0 elsewhere, also where x is NaN.

    Its gradient with respect to x is the cotangent where the mask keeps x, and exactly 0 elsewhere.

    Args:
      x: any dtype [...].
      mask: bool, of the same shape.
    """
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def apply(params: PyTree, masks: Masks) -> PyTree:
    """The params with the weights that the masks prune set to 0.

    Raises:
      SelectorError: a mask for a path that the params don't have.
    """
    named = leaves(params)
    if missing := sorted(set(masks) - set(named)):
        raise SelectorError(
            f"there are masks for {missing}, but the params have {list(named)}. The masks were "
            "made for other params, or a transform before this one renamed them."
        )
    return replace(params, {path: masked(named[path], mask) for path, mask in masks.items()})


def unstructured(scores: Mapping[str, Array], budget: Budget) -> dict[str, Array]:
    """Masks that keep the weights with the largest scores, wherever they lie.

    Args:
      scores: {path: float [...]}, none negative.
      budget: how many to keep; see `budgets`.

    Returns:
      {path: bool [...]}, with exactly as many kept as the budget says. Of equal scores the first
      are kept, in the order of the dict and then row-major.
    """
    return largest(scores, budget)


def kept(masks: Masks) -> Count:
    """How many weights the masks keep in all."""
    return Count.stack([count(mask) for mask in masks.values()]).sum()


def sparsity(masks: Masks) -> Array:
    """The fraction of weights that the masks prune, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sparsity({"kernel": jnp.array([True, False, False, False])}))
      0.75
    """
    size = Count.of(sum(mask.size for mask in masks.values()))
    return size.minus(kept(masks)).value() / size.value()
