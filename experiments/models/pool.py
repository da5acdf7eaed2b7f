"""Pooling that both libraries' models share."""

import jax.numpy as jnp
from jax import Array


def max_pool(x: Array) -> Array:
    """The largest of each 2x2 pixels: `[batch, h, w, channels] -> [batch, h/2, w/2, channels]`.

    As Flax's `max_pool(x, (2, 2), (2, 2))`, but for the gradient of equal pixels, which share it.
    On a CPU a train step of the survey's CNN is 1.5 times faster with it: there, XLA gives
    gradients back through windows one by one.
    """
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])
