"""Batches whose examples are mixed in pairs, with their labels: mixup and cutmix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

# (key, image, other image, share of the first) -> (mixed image, share it really has)
Mixer = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def mixup(
    alpha: Scalar = 0.2, classes: int | None = None, field: str = "image", label: str = "label"
) -> Transform:
    """Each example becomes share · itself + (1 - share) · another of the batch; labels likewise.

    The share is drawn from Beta(alpha, alpha) for each example; the other is given by a permutation
    of the batch. Labels leave as probabilities, float32 [batch, classes], which
    `optax.softmax_cross_entropy` takes and `..._with_integer_labels` does not.

    Args:
      alpha: above 0, perhaps traced; small ones hardly mix, 1 is uniform.
      classes: makes integer labels one-hot; left out, labels are already [batch, classes].
      field: the batch's entry with the images, floating point.
      label: the batch's entry with the labels.

    Raises:
      SetupError: alpha not above 0; at `init`, integer labels without `classes`, or soft labels of
        another width, or no such entries.

    Example:
      >>> import effjax as ej
      >>> transform = ej.chain(mix=ej.augment.mixup(0.2, classes=10))

    Reference: Zhang et al., "mixup: beyond empirical risk minimization", 2017,
    https://arxiv.org/abs/1710.09412.
    """

    def mixer(key: Array, image: Array, other: Array, share: Array) -> tuple[Array, Array]:
        return (share * image + (1 - share) * other).astype(image.dtype), share

    return _mixing("mixup", mixer, alpha, classes, field, label)


def cutmix(
    alpha: Scalar = 1.0, classes: int | None = None, field: str = "image", label: str = "label"
) -> Transform:
    """A rectangle of each image is another image's; labels are mixed by the areas left.

    The rectangle has the image's aspect and the area (1 - share), share from Beta(alpha, alpha);
    its middle is uniform, and what of it lies outside the image is cut off. Arguments, labels and
    errors as for `mixup`.

    Reference: Yun et al., "CutMix: regularization strategy to train strong classifiers with
    localizable features", 2019, https://arxiv.org/abs/1905.04899.
    """

    def mixer(key: Array, image: Array, other: Array, share: Array) -> tuple[Array, Array]:
        sides = jnp.array(image.shape[:2])
        middle = jax.random.randint(key, (2,), 0, sides)
        half = (sides * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        start, end = jnp.maximum(middle - half, 0), jnp.minimum(middle + half, sides)
        rows, columns = (
            (jnp.arange(n) >= start[i]) & (jnp.arange(n) < end[i])
            for i, n in enumerate(image.shape[:2])
        )
        inside = rows[:, None] & columns[None, :]
        return jnp.where(inside[..., None], other, image), 1.0 - inside.mean()

    return _mixing("cutmix", mixer, alpha, classes, field, label)


def _mixing(
    name: str, mixer: Mixer, alpha: Scalar, classes: int | None, field: str, label: str
) -> Transform:
    if not is_traced(alpha) and not alpha > 0:
        raise SetupError(
            f"{name}(alpha={alpha}): the shares are from Beta(alpha, alpha), alpha > 0."
        )
    if classes is not None and classes < 2:
        raise SetupError(f"{name}(classes={classes}): there are 2 classes or more.")

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        batch = setup.batch if isinstance(setup.batch, dict) else {}
        if field not in batch or label not in batch:
            raise SetupError(
                f"{name}() looks for batch[{field!r}] and batch[{label!r}], but the batch is "
                f"{jax.tree.map(jnp.shape, setup.batch)}. Name them: field=..., label=...."
            )
        image, labels = batch[field], batch[label]
        if not jnp.issubdtype(image.dtype, jnp.floating) or image.ndim != 4:
            raise SetupError(
                f"batch[{field!r}] is {image.dtype}{list(image.shape)}; {name}() takes floating "
                "point [batch, height, width, channels]. Convert integers first: image / 255."
            )
        integer = not jnp.issubdtype(labels.dtype, jnp.floating)
        if integer and (classes is None or labels.ndim != 1):
            raise SetupError(
                f"batch[{label!r}] is {labels.dtype}{list(labels.shape)}; {name}() mixes labels "
                f"into probabilities. Say how many classes there are, {name}(classes=10), and take "
                "a loss of soft labels: optax.softmax_cross_entropy, not "
                "..._with_integer_labels."
            )
        if not integer and (labels.ndim != 2 or classes not in (None, labels.shape[-1])):
            raise SetupError(
                f"batch[{label!r}] is {labels.dtype}{list(labels.shape)}; soft labels are "
                f"[batch, {classes or 'classes'}]."
            )
        return {}, {}

    def batch(batch: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        images, labels = jnp.asarray(batch[field]), jnp.asarray(batch[label])
        if classes is not None and not jnp.issubdtype(labels.dtype, jnp.floating):
            labels = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
        order, draw, place = jax.random.split(ctx.key, 3)
        count = images.shape[0]
        other = jax.random.permutation(order, count)
        share = jax.random.beta(draw, alpha, alpha, (count,), jnp.float32)
        keys = jax.random.split(place, count)
        mixed, share = jax.vmap(mixer)(keys, images, images[other], share)
        share = share[:, None].astype(labels.dtype)
        return {**batch, field: mixed, label: share * labels + (1 - share) * labels[other]}

    return Transform(init=init, batch=batch)
