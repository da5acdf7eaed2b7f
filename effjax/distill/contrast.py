"""Contrastive pre-training without labels: two views of each example, and the loss of pairs."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, PyTree, Setup, Transform
from effjax.distill.numerics import check_batch, check_features, unit, wide
from effjax.errors import SetupError


def nt_xent(first: Array, second: Array, temperature: float | Array = 0.5) -> Array:
    """SimCLR's normalised, temperature-scaled cross-entropy between two views of each example.

    mean over the 2 batch views i of -log (exp(z_i . z_p / T) / sum_{j != i} exp(z_i . z_j / T)),
    with z of norm 1, and p the other view of the same example: of all the other views in the batch,
    it is to be the nearest. Equal views everywhere give log(2 batch - 1).

    Args:
      first, second: floating [batch, features], the embeddings of both views, of one shape.
      temperature: T > 0, a scalar, perhaps traced.

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the shapes differ, or the batch holds fewer than 2 examples.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> same = jnp.ones((2, 3))
      >>> round(float(ej.distill.nt_xent(same, same)), 4)  # log 3
      1.0986

    Reference: Chen et al., "A simple framework for contrastive learning of visual representations",
      2020, https://arxiv.org/abs/2002.05709.
    """
    check_features("nt_xent", first, second, "batch features", "batch", "features")
    check_batch("nt_xent", first.shape, 2)
    z = unit(jnp.concatenate(wide(first, second)))
    likeness = z @ z.T / jnp.asarray(temperature, z.dtype)
    views, batch = len(z), len(first)
    likeness = jnp.where(jnp.eye(views, dtype=bool), -jnp.inf, likeness)
    places = jnp.arange(views)
    log_p = jax.nn.log_softmax(likeness, axis=-1)
    return -jnp.mean(log_p[places, (places + batch) % views])


def twice() -> Transform:
    """Every example of a training batch twice, one after the other: places 0 and 1, 2 and 3, ...

    An augmentation that follows in the chain treats each by a key of its own, which makes them two
    views: `nt_xent(outputs[::2], outputs[1::2])`. Copies stay beside their example, so that a batch
    that is sharded stays where it is. Evaluation sees the batch as it is.

    Returns:
      A Transform without state that acts on the batch alone.

    Raises:
      SetupError: at `init`, a batch with an entry that has no axis of examples.

    Example:
      >>> import effjax as ej
      >>> views = ej.chain(twice=ej.distill.twice(), augment=ej.augment.images(ej.augment.flip()))
      >>> def loss(outputs, batch):
      ...     return ej.distill.nt_xent(outputs[::2], outputs[1::2], temperature=0.5)
    """

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        for path, x in jax.tree_util.tree_leaves_with_path(setup.batch):
            if not x.shape:
                raise SetupError(
                    f"twice() repeats examples, but the batch's entry {jax.tree_util.keystr(path)} "
                    "is a single number. Leave it out of the batch, or repeat it for each example."
                )
        return {}, {}

    def batch(batch: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)

    return Transform(init=init, batch=batch)
