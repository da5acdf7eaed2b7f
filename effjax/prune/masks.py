"""Masks, {params path: bool [like the weight]}: True where a weight is kept."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.errors import SelectorError
from effjax.prune.counts import Count, count
from effjax.select import KERNELS, leaves, replace
from effjax.select import select as select_leaves

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


@jax.custom_jvp
def straight_through(x: Array, mask: Array, everywhere: Array | bool = True) -> Array:
    """x where the mask keeps it and exactly 0 elsewhere, with the identity's gradient.

    Its gradient with respect to x is the cotangent where the mask keeps x or `everywhere` holds,
    and exactly 0 elsewhere.

    Args:
      x: float [...].
      mask: bool, of the same shape.
      everywhere: bool scalar, perhaps traced; False makes it `masked`.

    Reference: Bengio, Leonard and Courville, "Estimating or propagating gradients through
    stochastic neurons", 2013, https://arxiv.org/abs/1308.3432.
    """
    return masked(x, mask)


@straight_through.defjvp
def _straight_through(primals, tangents):
    (x, mask, everywhere), dx = primals, tangents[0]
    return masked(x, mask), masked(dx, mask | everywhere)


def apply(params: PyTree, masks: Masks, through: Array | bool = False) -> PyTree:
    """The params with the weights that the masks prune set to 0.

    Args:
      params: any tree of arrays.
      masks: by params path.
      through: whether pruned weights get the gradient that they would get if they were kept; a
        bool, perhaps traced.

    Raises:
      SelectorError: a mask for a path that the params don't have.
    """
    named = leaves(params)
    if missing := sorted(set(masks) - set(named)):
        raise SelectorError(
            f"there are masks for {missing}, but the params have {list(named)}. The masks were "
            "made for other params, or a transform before this one renamed them."
        )
    if through is False:
        return replace(params, {path: masked(named[path], mask) for path, mask in masks.items()})
    seen = {path: straight_through(named[path], mask, through) for path, mask in masks.items()}
    return replace(params, seen)


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


def nonzero(params: PyTree, select: str = KERNELS) -> dict[str, Array]:
    """The masks of what is not 0, for example of what learned sparsity or a lasso has exported.

    Args:
      params: any tree of arrays.
      select: a regular expression for the params paths.

    Raises:
      SelectorError: nothing is selected.

    Example:
      >>> import jax.numpy as jnp
      >>> nonzero({"kernel": jnp.array([0.5, 0.0, -2.0])})["kernel"].tolist()
      [True, False, True]
    """
    return {path: x != 0 for path, x in select_leaves(params, select).items()}
