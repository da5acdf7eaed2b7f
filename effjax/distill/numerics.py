"""What the distillation losses compute with: wide dtypes, and norms whose gradients stay finite."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from effjax.errors import SetupError

# Below this size a float32 vector has no direction that its gradient, 1 / size, could be finite in.
_SMALLEST = 1e-20


def wide(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in one dtype: float32, or float64 where one of them is."""
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
    return tuple(x.astype(dtype) for x in arrays)


def unit(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """x / ||x|| along axes, without overflow; zeros stay zeros and get no gradient.

    Args:
      x: float32 or float64.
    """
    # x / c for a constant c has the same direction and derivative, and a norm of ordinary size.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
    pointed = largest > _SMALLEST
    scaled = jnp.where(pointed, x / jnp.where(pointed, largest, 1.0), 0.0)
    square = jnp.sum(scaled**2, axis, keepdims=True)
    return scaled * lax.rsqrt(jnp.where(pointed, square, 1.0))


def norm(x: Array, axis: int = -1) -> Array:
    """||x|| along an axis; its gradient at zero is zero."""
    return jnp.sum(x * unit(x, axis), axis)


def huber(difference: Array) -> Array:
    """d^2 / 2 where |d| <= 1, |d| - 1/2 elsewhere."""
    size = jnp.abs(difference)
    clipped = jnp.minimum(size, 1.0)
    return clipped * (size - 0.5 * clipped)


def check_features(loss: str, student: Any, teacher: Any, axes: str, *equal: str) -> None:
    """Raises SetupError unless both are floating arrays with these axes.

    Args:
      loss: whose they are, for the message.
      student, teacher: anything.
      axes: what each is, such as "batch height width channels"; a last "..." stands for any others.
      *equal: the names of axes that must agree; "..." for those it stands for.
    """
    names = axes.split()
    open_ended = names[-1] == "..."
    named = names[:-1] if open_ended else names
    for who, x in (("student", student), ("teacher", teacher)):
        shape = getattr(x, "shape", None)
        if shape is None or not jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.floating):
            what = type(x).__name__ if shape is None else f"{x.dtype}{list(shape)}"
            raise SetupError(f"{loss}: the {who}'s features are {what}, not one floating array.")
        if len(shape) < len(named) or (len(shape) > len(named) and not open_ended):
            raise SetupError(
                f"{loss}: the {who}'s features have shape {list(shape)}; they are [{axes}], with "
                "channels last. Tap another layer, or reshape them."
            )
    for name in equal:
        at = slice(len(named), None) if name == "..." else _only(names.index(name))
        if student.shape[at] != teacher.shape[at]:
            what = "the axes after the batch" if name == "..." else name
            raise SetupError(
                f"{loss}: the student's features have shape {list(student.shape)} and the "
                f"teacher's {list(teacher.shape)}, which differ in {what}. Tap layers of equal "
                "sizes, give the student a trained projection where channels differ "
                "(distill.projected(loss)), or choose a loss that compares relations "
                "(distill.similarity, distill.rkd_distance), which need no equal shapes."
            )


def check_batch(loss: str, shape: Sequence[int], least: int) -> None:
    """Raises SetupError if a relation between examples has fewer than it needs."""
    if shape[0] < least:
        raise SetupError(
            f"{loss} relates the examples of a batch and needs {least} of them; it got {shape[0]}. "
            "Use larger batches."
        )


def _only(index: int) -> slice:
    return slice(index, index + 1)
