"""Relaxations: from architecture logits to the weights of an edge's operations.

Each is `(logits, key, temperature) -> weights`, both float [edges, operations], one row an edge; a
deterministic one ignores the key.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Relaxation = Callable[[Array, Array, Array], Array]


def softmax(logits: Array, key: Array, temperature: Array) -> Array:
    """DARTS: w = softmax(logits / T), operations that compete.

    Reference: Liu et al., "DARTS: Differentiable architecture search", 2019,
    https://arxiv.org/abs/1806.09055.
    """
    return jax.nn.softmax(logits / temperature)


def sigmoid(logits: Array, key: Array, temperature: Array) -> Array:
    """FairDARTS: w = 1 / (1 + exp(-logits / T)), each operation for itself.

    Reference: Chu et al., "Fair DARTS: Eliminating unfair advantages in differentiable architecture
    search", 2020, https://arxiv.org/abs/1911.12126.
    """
    return jax.nn.sigmoid(logits / temperature)


def gumbel(logits: Array, key: Array, temperature: Array) -> Array:
    """SNAS, FBNet: w = softmax((logits + noise) / T), the noise Gumbel's.

    At T near 0, one-hot with the probabilities softmax(logits).

    References: Jang et al., "Categorical reparameterization with Gumbel-Softmax", 2017,
    https://arxiv.org/abs/1611.01144; Wu et al., "FBNet", 2019, https://arxiv.org/abs/1812.03443.
    """
    return jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / temperature)


def one_path(logits: Array, key: Array, temperature: Array) -> Array:
    """GDAS: one-hot where `gumbel` is largest, with the derivative of `gumbel` (straight-through).

    Reference: Dong and Yang, "Searching for a robust neural architecture in four GPU hours", 2019,
    https://arxiv.org/abs/1910.04465.
    """
    soft = gumbel(logits, key, temperature)
    return through(jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1]), soft)


def two_paths(logits: Array, key: Array, temperature: Array) -> Array:
    """ProxylessNAS: two operations are drawn, one of them runs, and both learn.

    Of each edge two operations are drawn without replacement with the probabilities
    softmax(logits / T), and of these two one, with their probabilities against each other. The
    weights are one-hot there; their derivative is that of the two probabilities, so that all other
    logits have none.

    Reference: Cai et al., "ProxylessNAS: Direct neural architecture search on target task and
    hardware", 2019, https://arxiv.org/abs/1812.00332.
    """
    first, second = jax.random.split(key)
    scaled = logits / temperature
    # The two largest of logits with Gumbel noise are drawn without replacement.
    _, pair = jax.lax.top_k(scaled + jax.random.gumbel(first, logits.shape), 2)
    odds = jnp.take_along_axis(scaled, pair, axis=-1)
    which = jax.random.categorical(second, odds)
    places = jax.nn.one_hot(pair, logits.shape[-1])
    soft = jnp.einsum("...k,...ko->...o", jax.nn.softmax(odds), places)
    hard = jnp.take_along_axis(places, which[..., None, None], axis=-2)[..., 0, :]
    return through(hard, soft)


def through(value: Array, soft: Array) -> Array:
    """A value with another one's derivative."""
    return jax.lax.stop_gradient(value) + (soft - jax.lax.stop_gradient(soft))


RELAXATIONS: dict[str, Relaxation] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "gumbel": gumbel,
    "one_path": one_path,
    "two_paths": two_paths,
}
