"""Bilevel gradients in one backward pass: one half of a batch trains weights, the other choices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import PyTree
from effjax.errors import SetupError


def halves(batch: PyTree) -> tuple[PyTree, PyTree]:
    """The examples at even places, and those at odd ones.

    Raises:
      SetupError: the arrays begin with different numbers of examples, or an odd one.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    [size] = next(iter(sizes)) or (0,) if len(sizes) == 1 else (0,)
    if not size or size % 2:
        raise SetupError(
            "a differentiable search trains weights with one half of the batch and the "
            "architecture with the other: every array begins with the same even number of "
            f"examples. The batch's arrays begin with {sorted(sizes)}."
        )
    pairs = jax.tree.map(lambda x: jnp.reshape(x, (size // 2, 2, *jnp.shape(x)[1:])), batch)
    return jax.tree.map(lambda x: x[:, 0], pairs), jax.tree.map(lambda x: x[:, 1], pairs)


def joined(even: PyTree, odd: PyTree, whole: PyTree) -> PyTree:
    """What two halves gave as what the whole batch would give.

    Args:
      even, odd: of the halves.
      whole: the same from the whole batch, shapes alone: leaves that have another shape there are
        of examples and are put together; of the others those of the even half count.
    """

    def join(a: Array, b: Array, shape: Any) -> Array:
        if jnp.shape(a) == shape.shape:
            return a
        return jnp.stack([a, b], axis=1).reshape(shape.shape)

    return jax.tree.map(join, even, odd, whole)


def scaled(tree: PyTree, factor: float) -> PyTree:
    """The same values, with gradients times a factor."""

    def one(x: Array) -> Array:
        still = jax.lax.stop_gradient(x)
        return still + factor * (x - still)

    return jax.tree.map(one, tree)
