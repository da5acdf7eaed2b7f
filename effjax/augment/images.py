"""Augmentation of a batch's images as a transform."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

# (key, image [height, width, channels]) -> image, of the same shape and dtype.
Operation = Callable[[Array, Array], Array]


def images(*operations: Operation, field: str = "image") -> Transform:
    """Applies operations, one after another, to each training image with a key of its own.

    It happens in the step, before the forward pass: a teacher in the same chain sees the same
    augmented batch. Keys follow from the step's: a run that is resumed draws what it would have
    drawn. Evaluation sees the images as they are.

    Args:
      operations: for example `flip()`, `translate(3)`; any function of a key and one image.
      field: the batch's entry with the images, floating point, [batch, height, width, channels].

    Returns:
      A Transform without state that acts on the batch alone.

    Raises:
      SetupError: no operations; at `init`, a batch without such images, or an operation that
        changes their shape or dtype.

    Example:
      >>> import effjax as ej
      >>> augment = ej.augment.images(ej.augment.flip(), ej.augment.translate(3))
      >>> transform = ej.chain(augment=augment, prune=ej.prune.magnitude(0.8, 0, 9))
    """
    if not operations:
        raise SetupError("augment.images() got no operations; give it some: images(flip()).")

    one = in_turn(operations)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        found = setup.batch.get(field) if isinstance(setup.batch, dict) else None
        if found is None:
            raise SetupError(
                f"augment.images() looks for images in batch[{field!r}], but the batch is "
                f"{jax.tree.map(jnp.shape, setup.batch)}. Name the entry: images(..., field=...)."
            )
        if found.ndim != 4 or not jnp.issubdtype(found.dtype, jnp.floating):
            raise SetupError(
                f"batch[{field!r}] is {found.dtype}{list(found.shape)}; augmentation takes "
                "floating point [batch, height, width, channels]. Convert integers first: "
                "image / 255."
            )
        image = jax.ShapeDtypeStruct(found.shape[1:], found.dtype)
        after = jax.eval_shape(one, jax.random.key(0), image)
        if (after.shape, after.dtype) != (image.shape, image.dtype):
            raise SetupError(
                f"the operations make {after.dtype}{list(after.shape)} of an image that is "
                f"{image.dtype}{list(image.shape)}; they keep shape and dtype."
            )
        return {}, {}

    return Transform(init=init, batch=on_each(one, field))


def in_turn(operations: Sequence[Operation]) -> Operation:
    """Operations on one example, one after another, each with a key of its own."""

    def one(key: Array, example: Array) -> Array:
        for i, operation in enumerate(operations):
            example = operation(jax.random.fold_in(key, i), example)
        return example

    return one


def on_each(operation: Operation, field: str) -> Callable[[PyTree, PyTree, Ctx], PyTree]:
    """The `batch` hook that gives each example of an entry a key of its own."""

    def batch(batch: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        keys = jax.random.split(ctx.key, batch[field].shape[0])
        return {**batch, field: jax.vmap(operation)(keys, batch[field])}

    return batch


def check_probability(value: Scalar, what: str) -> None:
    """Raises unless the value is in [0, 1]; a traced value passes."""
    if not is_traced(value) and not 0.0 <= value <= 1.0:
        raise SetupError(f"the probability of {what} is {value}; it is a number in [0, 1].")
