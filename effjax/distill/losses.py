"""Distillation losses: functions of logits over any leading axes, in float32 or better."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.distill.numerics import unit, wide
from effjax.errors import SetupError


def kl(student_logits: Array, teacher_logits: Array, temperature: float | Array = 1.0) -> Array:
    """Hinton's distillation loss: the divergence of the student's soft outputs from the teacher's.

    T^2 * sum_c p_c (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T).

    The factor T^2 keeps the gradients' size: d/d student = T (q - p), which at large T tends to the
    difference of the centred logits over the number of classes. It is computed in float32 (float64
    for float64 logits), and is finite where the logits' differences are. A class that the teacher
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
    student, teacher = wide(student_logits, teacher_logits)
    t = jnp.asarray(temperature, student.dtype)
    log_q = jax.nn.log_softmax(student / t, axis=-1)
    log_p = jax.nn.log_softmax(teacher / t, axis=-1)
    p = jnp.exp(log_p)
    # Where p underflows to 0 the limit is 0, also if its logarithm is -inf.
    return t**2 * jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def mse(student_logits: Array, teacher_logits: Array) -> Array:
    """Logit matching: mean over the classes of (student - teacher)^2.

    The gradient is 2 (student - teacher) / classes; it is what `kl` tends to at a large
    temperature, but for the logits' mean, which a softmax does not see, and a factor of 2.

    Args:
      student_logits, teacher_logits: floating [..., classes], of one shape.

    Returns:
      [...], float32 or float64.

    Raises:
      SetupError: the shapes differ.

    Reference: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014,
      https://arxiv.org/abs/1312.6184.
    """
    check_logits(student_logits, teacher_logits)
    student, teacher = wide(student_logits, teacher_logits)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def cosine(student: Array, teacher: Array) -> Array:
    """1 - cos of the angle between student and teacher along the last axis: DistilBERT's loss of
    hidden states.

    A vector of zeros has no direction: the loss is then 1 and its gradient 0.

    Args:
      student, teacher: logits or features, floating [..., n], of one shape.

    Returns:
      [...], float32 or float64, in [0, 2].

    Raises:
      SetupError: the shapes differ.

    Reference: Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
      https://arxiv.org/abs/1910.01108.
    """
    check_logits(student, teacher)
    student, teacher = wide(student, teacher)
    return 1.0 - jnp.sum(unit(student) * unit(teacher), axis=-1)


def dist(
    student_logits: Array,
    teacher_logits: Array,
    temperature: float | Array = 1.0,
    *,
    inter: float | Array = 1.0,
    intra: float | Array = 1.0,
) -> Array:
    """DIST: the correlations of the predictions in place of their values. Batch-relational.

    T^2 (inter * mean_b (1 - r(q_b, p_b)) + intra * mean_c (1 - r(q_.c, p_.c))),

    p = softmax(teacher / T), q = softmax(student / T), r Pearson's correlation: of the classes of
    one example, and of the examples in one class. Where either side is constant r is 0, and has
    no gradient.

    Args:
      student_logits, teacher_logits: floating [batch, classes], of one shape.
      temperature: T > 0, a scalar.
      inter: weight of the relation between classes (beta in the paper).
      intra: weight of the relation within a class (gamma).

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the shapes differ, or are not [batch, classes].

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
      https://arxiv.org/abs/2205.10536.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise SetupError(
            f"dist compares the examples of a batch, and got logits of shape "
            f"{list(student_logits.shape)}; it takes [batch, classes]. Flatten other axes (tokens) "
            "into the batch."
        )
    student, teacher = wide(student_logits, teacher_logits)
    t = jnp.asarray(temperature, student.dtype)
    q, p = jax.nn.softmax(student / t, axis=-1), jax.nn.softmax(teacher / t, axis=-1)

    def distance(axis: int) -> Array:
        centred = [x - jnp.mean(x, axis, keepdims=True) for x in (q, p)]
        return jnp.mean(1.0 - jnp.sum(unit(centred[0], axis) * unit(centred[1], axis), axis))

    return t**2 * (inter * distance(1) + intra * distance(0))


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
