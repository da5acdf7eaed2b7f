"""Scores: how much each weight matters. Higher is kept. They know no step, no mask and no
budget."""

import jax.numpy as jnp
from jax import Array


def magnitude(weight: Array) -> Array:
    """The magnitude score: s = |w|.

    Args:
      weight: float [...].

    Returns:
      The score of each weight, of the same shape and dtype, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude(jnp.array([0.5, -2.0, 0.0])).tolist()
      [0.5, 2.0, 0.0]

    Reference: Han et al., "Learning both weights and connections", 2015,
    https://arxiv.org/abs/1506.02626.
    """
    return jnp.abs(weight)
