"""Losses of logits whose targets are labels, or less than the teacher's whole distribution."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.distill.losses import check_logits
from effjax.distill.numerics import wide
from effjax.errors import SetupError


class TopK(NamedTuple):
    """The k largest of a teacher's logits, largest first: what a cache keeps of them."""

    values: Array  # floating [..., k]
    indices: Array  # int32 [..., k]: the classes


def top_k(teacher_logits: Array, k: int) -> TopK:
    """The k largest logits of each example, and their classes.

    Args:
      teacher_logits: floating [..., classes].
      k: 1 .. classes.

    Raises:
      SetupError: k is not in 1 .. classes.
    """
    check_logits(teacher_logits, teacher_logits)
    if not 1 <= k <= teacher_logits.shape[-1]:
        raise SetupError(
            f"top_k keeps k={k} of {teacher_logits.shape[-1]} classes; 1 <= k <= classes."
        )
    values, indices = jax.lax.top_k(teacher_logits, k)
    return TopK(values, indices.astype(jnp.int32))


def top_k_kl(student_logits: Array, teacher: TopK, temperature: float | Array = 1.0) -> Array:
    """Hinton's loss against the k largest of the teacher's logits alone.

    T^2 * sum_{c in K} p_c (log p_c - log q_c), p = softmax over K of teacher / T and q = softmax
    over all classes of student / T: the classes that were left out get probability 0, and what
    they had goes to the others in proportion. At k = classes it is `kl`.

    Args:
      student_logits: floating [..., classes].
      teacher: `TopK(values, indices)`, both [..., k]. Indices outside of the classes are undefined.
      temperature: T > 0, a scalar.

    Returns:
      [...], float32 or float64.

    Raises:
      SetupError: the shapes do not fit, or the indices are no integers.
    """
    values, indices = teacher
    check_logits(student_logits, student_logits)
    check_logits(values, values)
    fits = values.shape == indices.shape and values.shape[:-1] == student_logits.shape[:-1]
    if not fits or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise SetupError(
            f"the teacher's top-k values are {values.dtype}{list(values.shape)} and its classes "
            f"{indices.dtype}{list(indices.shape)}, for student logits of shape "
            f"{list(student_logits.shape)}; give floating [..., k] and integer [..., k] for [..., "
            "classes], as top_k(teacher_logits, k) does."
        )
    student, values = wide(student_logits, values)
    t = jnp.asarray(temperature, student.dtype)
    log_q = jax.nn.log_softmax(student / t, axis=-1)
    log_q = jnp.take_along_axis(log_q, indices, axis=-1)
    log_p = jax.nn.log_softmax(values / t, axis=-1)
    p = jnp.exp(log_p)
    return t**2 * jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def hard(student_logits: Array, teacher_logits: Array) -> Array:
    """Hard pseudo-labels: cross-entropy with the class that the teacher chooses.

    -log softmax(student)_c, c = argmax teacher (the first, where several are largest). The teacher
    gets no gradient.

    Args:
      student_logits, teacher_logits: floating [..., classes], of one shape.

    Returns:
      [...], float32 or float64.

    Raises:
      SetupError: the shapes differ.

    Reference: Lee, "Pseudo-Label", 2013; as distillation, Touvron et al., "Training data-efficient
      image transformers & distillation through attention", 2021, https://arxiv.org/abs/2012.12877.
    """
    check_logits(student_logits, teacher_logits)
    (student,) = wide(student_logits)
    return -_at(jax.nn.log_softmax(student, axis=-1), jnp.argmax(teacher_logits, axis=-1))


def label_smoothing(logits: Array, labels: Array, smoothing: float | Array = 0.1) -> Array:
    """Cross-entropy with labels that give each class some probability, as if from a teacher that
    knows nothing.

    -sum_c y_c log softmax(logits)_c, y = (1 - smoothing) onehot(label) + smoothing / classes.

    Args:
      logits: floating [..., classes].
      labels: integer [...].
      smoothing: a number in [0, 1), perhaps traced.

    Returns:
      [...], float32 or float64.

    Raises:
      SetupError: the labels are no class indices of the logits' leading shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> round(float(ej.distill.label_smoothing(jnp.zeros(4), jnp.array(1), 0.2)), 4)  # log 4
      1.3863

    Reference: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016,
      https://arxiv.org/abs/1512.00567; Mueller et al., 2019, https://arxiv.org/abs/1906.02629.
    """
    check_logits(logits, logits)
    check_labels("label_smoothing", logits, labels)
    (wider,) = wide(logits)
    log_q = jax.nn.log_softmax(wider, axis=-1)
    return -(1.0 - smoothing) * _at(log_q, labels) - smoothing * jnp.mean(log_q, axis=-1)


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: float | Array = 4.0,
    *,
    target: float | Array = 1.0,
    others: float | Array = 8.0,
) -> Array:
    """Decoupled distillation: the two parts of `kl`, weighted apart.

    T^2 (target * KL(b_p || b_q) + others * KL(p' || q')),

    with b = (probability of the label's class, of the rest) and p', q' the softmax over the other
    classes alone. `kl` is the case target = 1, others = the teacher's probability of the rest.

    Args:
      student_logits, teacher_logits: floating [..., classes], of one shape.
      labels: integer [...], the true classes.
      temperature: T > 0, a scalar.
      target: weight of the label's class against the rest (alpha in the paper).
      others: weight of the other classes (beta in the paper, 1 to 8 and more).

    Returns:
      [...], float32 or float64.

    Raises:
      SetupError: the shapes differ, or the labels are no class indices: mixed labels (mixup) have
        no one class to set apart.

    Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022,
      https://arxiv.org/abs/2203.08679.
    """
    check_logits(student_logits, teacher_logits)
    check_labels("dkd", student_logits, labels)
    student, teacher = wide(student_logits, teacher_logits)
    t = jnp.asarray(temperature, student.dtype)
    is_label = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)

    def parts(logits: Array) -> tuple[Array, Array, Array]:
        rest = jnp.where(is_label, -jnp.inf, logits)
        all_of_it = jax.nn.logsumexp(logits, axis=-1)
        log_rest = jax.nn.logsumexp(rest, axis=-1) - all_of_it
        within = jnp.where(is_label, 0.0, jax.nn.log_softmax(rest, axis=-1))
        return _at(logits, labels) - all_of_it, log_rest, within

    q_label, q_rest, q_within = parts(student / t)
    p_label, p_rest, p_within = parts(teacher / t)
    binary = jnp.exp(p_label) * (p_label - q_label) + jnp.exp(p_rest) * (p_rest - q_rest)
    p = jnp.where(is_label, 0.0, jnp.exp(p_within))
    within = jnp.sum(p * (p_within - q_within), axis=-1)
    return t**2 * (target * binary + others * within)


def check_labels(loss: str, logits: Any, labels: Any) -> None:
    """Raises SetupError unless the labels are integer [...] for logits [..., classes]."""
    dtype, shape = getattr(labels, "dtype", None), getattr(labels, "shape", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or shape != logits.shape[:-1]:
        got = type(labels).__name__ if dtype is None or shape is None else f"{dtype}{list(shape)}"
        raise SetupError(
            f"{loss} got labels {got} for logits of shape {list(logits.shape)}; it takes one "
            f"integer class an example, of shape {list(logits.shape[:-1])}. Labels that were mixed "
            "or smoothed are distributions: use a loss that takes none (distill.kl)."
        )
    if logits.shape[-1] < 2:
        raise SetupError(f"{loss} got logits of one class; it needs two or more.")


def _at(values: Array, classes: Array) -> Array:
    return jnp.take_along_axis(values, classes[..., None], axis=-1)[..., 0]
