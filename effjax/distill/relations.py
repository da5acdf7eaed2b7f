"""Losses of the relations between examples of a batch, or between tokens of an example. Student and
teacher may have features of different sizes."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.distill.numerics import check_batch, check_features, huber, norm, unit, wide
from effjax.errors import SetupError


def similarity(student: Array, teacher: Array) -> Array:
    """Similarity-preserving distillation: what is alike to the teacher is so to the student.

    sum_ij (G_s - G_t)_ij^2 / batch^2, G = F F^T with rows of norm 1, F [batch, all features].

    Args:
      student, teacher: floating [batch, ...]; what follows the batch may differ.

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the batches differ, or hold fewer than 2 examples.

    Reference: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019,
      https://arxiv.org/abs/1907.09682.
    """
    s, t = _rows("similarity", student, teacher, 2)

    def gram(x: Array) -> Array:
        # A constant factor changes no normalised row, and keeps the squares in range.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        x = x / jnp.where(largest > 1e-20, largest, 1.0)
        return unit(x @ x.T)

    return jnp.mean((gram(s) - gram(t)) ** 2)


def rkd_distance(student: Array, teacher: Array) -> Array:
    """Relational distillation by distances.

    mean over pairs i != j of huber(d_s - d_t), d = ||f_i - f_j|| / (its mean over the pairs).
    A pair of equal examples gets no gradient.

    Args:
      student, teacher: floating [batch, ...]; what follows the batch may differ.

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the batches differ, or hold fewer than 2 examples.

    Reference: Park et al., "Relational Knowledge Distillation", 2019,
      https://arxiv.org/abs/1904.05068.
    """
    s, t = _rows("rkd_distance", student, teacher, 2)
    pairs = ~jnp.eye(len(s), dtype=bool)

    def distances(x: Array) -> Array:
        d = norm(x[:, None] - x[None])
        mean = jnp.sum(d) / jnp.sum(pairs)
        return d / jnp.where(mean > 1e-20, mean, 1.0)

    return jnp.mean(huber(distances(s) - distances(t)), where=pairs)


def rkd_angle(student: Array, teacher: Array) -> Array:
    """Relational distillation by the angles that three examples make.

    mean over distinct i, j, k of huber(c_s - c_t), c = cos of the angle at f_i between f_j and f_k.
    It takes batch^3 numbers. Where two of the three are equal, c is 0.

    Args:
      student, teacher: floating [batch, ...]; what follows the batch may differ.

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the batches differ, or hold fewer than 3 examples.

    Reference: Park et al., "Relational Knowledge Distillation", 2019,
      https://arxiv.org/abs/1904.05068.
    """
    s, t = _rows("rkd_angle", student, teacher, 3)
    differ = ~jnp.eye(len(s), dtype=bool)
    triplets = differ[:, :, None] & differ[:, None, :] & differ[None]

    def cosines(x: Array) -> Array:
        edges = unit(x[None] - x[:, None])  # edges[i, j] from i to j
        return jnp.einsum("ijf,ikf->ijk", edges, edges)

    return jnp.mean(huber(cosines(s) - cosines(t)), where=triplets)


def crd(student: Array, teacher: Array, temperature: float | Array = 0.07) -> Array:
    """Contrastive representation distillation, with the batch's other examples as negatives.

    mean_i -log softmax_j(s_i . t_j / T)_i, with s and t of norm 1: of all the teacher's embeddings
    in the batch, the student's is to be nearest to that of its own example.

    Differences from the original: there the negatives (16384) come from a memory bank of the whole
    data set, drawn from other classes where labels are known, the critic is trained by binary
    noise-contrastive estimation with its constant, and teacher embeddings are contrasted with
    student's as well. Here it is InfoNCE over the batch, one way, and an example of the same
    class counts as a negative: use large batches. `embedded(crd)` trains the two embeddings.

    Args:
      student, teacher: floating [batch, features], of one shape.
      temperature: T > 0, a scalar.

    Returns:
      scalar, float32 or float64.

    Raises:
      SetupError: the shapes differ, or the batch holds fewer than 2 examples.

    Reference: Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020,
      https://arxiv.org/abs/1910.10699.
    """
    check_features("crd", student, teacher, "batch features", "batch", "features")
    check_batch("crd", student.shape, 2)
    s, t = wide(student, teacher)
    likeness = unit(s) @ unit(t).T / jnp.asarray(temperature, s.dtype)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(likeness, axis=-1)))


def minilm(student: Array, teacher: Array, *, heads: int = 1, valid: Array | None = None) -> Array:
    """MiniLM's self-attention relations: how the tokens of an example relate, in queries, keys or
    values.

    mean over heads and tokens of KL(R_t || R_s), R = softmax(X X^T / sqrt(size of a head)), X the
    features split into `heads` relation heads, which need not be those of the attention. With
    values, that is MiniLM's value relation; with each of queries, keys and values, MiniLMv2.

    Args:
      student, teacher: floating [batch, tokens, ...]; what follows is flattened (the attention's
        own heads), and may differ between the two.
      heads: relation heads; divides the features of both.
      valid: bool [batch, tokens], False for padding, which neither asks nor answers.

    Returns:
      [batch], float32 or float64.

    Raises:
      SetupError: batches or tokens differ, or `heads` does not divide the features.

    Reference: Wang et al., "MiniLM", 2020, https://arxiv.org/abs/2002.10957; "MiniLMv2", 2021,
      https://arxiv.org/abs/2012.15828.
    """
    check_features("minilm", student, teacher, "batch tokens ...", "batch", "tokens")
    if valid is not None and (valid.shape != student.shape[:2] or valid.dtype != jnp.bool_):
        raise SetupError(
            f"minilm has valid {valid.dtype}{list(valid.shape)}; it is "
            f"bool{list(student.shape[:2])}, [batch, tokens]."
        )

    def relation(who: str, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1)
        if heads < 1 or x.shape[-1] % heads:
            raise SetupError(
                f"minilm: {heads} relation heads do not divide the {who}'s {x.shape[-1]} features."
            )
        x = x.reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bihd,bjhd->bhij", x, x) / jnp.sqrt(x.shape[-1]).astype(x.dtype)
        if valid is not None:
            # Finite, so that an example without valid tokens has finite gradients.
            scores = jnp.where(valid[:, None, None], scores, jnp.finfo(x.dtype).min)
        return jax.nn.log_softmax(scores, axis=-1)

    s, t = wide(student, teacher)
    log_q, log_p = relation("student", s), relation("teacher", t)
    p = jnp.exp(log_p)
    tokens = jnp.mean(jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1), axis=1)
    if valid is None:
        return jnp.mean(tokens, axis=-1)
    count = jnp.maximum(jnp.sum(valid, axis=-1), 1)
    return jnp.sum(jnp.where(valid, tokens, 0), axis=-1) / count


def _rows(loss: str, student: Array, teacher: Array, least: int) -> tuple[Array, Array]:
    """Both as float [batch, features]."""
    check_features(loss, student, teacher, "batch ...", "batch")
    check_batch(loss, student.shape, least)
    s, t = wide(student, teacher)
    return s.reshape(len(s), -1), t.reshape(len(t), -1)
