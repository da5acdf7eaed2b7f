"""Distillation losses: functions of logits over any leading axes, in float32 or better."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.errors import SetupError


def kl(student_logits: Array, teacher_logits: Array, temperature: float | Array = 1.0) -> Array:
    """Hinton's distillation loss: the divergence of the student's soft outputs from the teacher's.

    T^2 * sum_c p_c (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T).

    The factor T^2 keeps the gradients' size: d/d student = T (q - p), which at large T tends to the
    difference of the centred logits over the number of classes. It is computed in float32 (float64
    for float64 logits), and is finite for finite logits of any size. A class that the teacher
    excludes (a logit of -inf) adds nothing.

    Args:
      student_logits: floating [..., classes].
      teacher_logits: floating [..., classes], the same shape; other dtypes are fine. The loss is
        differentiable in it too: stop the gradient if the teacher is not trained.
      temperature: T > 0, a scalar.

    Returns:
      [...], float32 or float64, >= 0 up to rounding.

    Raises:
      SetupError: the shapes differ, or there is nothing to take a softmax over.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> float(ej.distill.kl(jnp.array([0.0, 0.0]), jnp.array([0.0, 0.0]), 4.0))
      0.0

    Reference: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531.
    """
    check_logits(student_logits, teacher_logits)
    dtype = jnp.promote_types(
        jnp.promote_types(student_logits.dtype, teacher_logits.dtype), jnp.float32
    )
    t = jnp.asarray(temperature, dtype)
    log_q = jax.nn.log_softmax(student_logits.astype(dtype) / t, axis=-1)
    log_p = jax.nn.log_softmax(teacher_logits.astype(dtype) / t, axis=-1)
    p = jnp.exp(log_p)
    # Where p underflows to 0 the limit is 0, also if its logarithm is -inf.
    return t**2 * jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def check_logits(student: Any, teacher: Any) -> None:
    """Raises SetupError unless both are floating [..., classes] arrays of one shape."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if not hasattr(logits, "dtype") or not hasattr(logits, "shape"):
            raise SetupError(
                f"the {name}'s logits are a {type(logits).__name__}, not one array. Say where in "
                f"the outputs they are: logits(..., {name}_logits=lambda out: out[0])."
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
            raise SetupError(
                f"the {name}'s logits are {logits.dtype}{list(logits.shape)}; they are floating "
                "with the classes on the last axis. Give what the model computes before softmax "
                "and argmax."
            )
    if student.shape != teacher.shape:
        raise SetupError(
            f"the student's logits have shape {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}. They are compared class by class and example by example: "
            "train the teacher on the same classes, or select those both have by teacher_logits=..."
        )
