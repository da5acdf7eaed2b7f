"""Losses of features with trained parts: projections to the teacher's widths, embeddings.

Their leaves live in the step's `extra`, and are trained by the same optimizer as the model.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.distill.hints import hint, vid
from effjax.distill.numerics import check_features, wide
from effjax.distill.relations import crd


class Learned(NamedTuple):
    """A loss of (student's features, teacher's features) with trainable leaves.

    init: `(key, student, teacher) -> leaves`, a dict of arrays; the features may be abstract.
    apply: `(leaves, student, teacher) -> Array`.
    """

    init: Callable[[Array, Any, Any], dict[str, Any]]
    apply: Callable[[dict[str, Any], Any, Any], Array]


def projected(loss: Callable[[Array, Array], Array] = hint) -> Learned:
    """A loss after a trained linear map of the student's channels to the teacher's.

    loss(student W + b, teacher), W [student channels, teacher channels]: on images a 1x1
    convolution, FitNets' regressor. Only the student's side is mapped, and the map is dropped with
    the teacher when training ends.

    Args:
      loss: of two arrays of one shape, such as `hint`.

    Raises (at `init`):
      SetupError: the features differ in more than the channels.
    """

    def init(key: Array, student: Any, teacher: Any) -> dict[str, Array]:
        check_features("projected", student, teacher, "batch ...")
        return _linear(key, student.shape[-1], teacher.shape[-1])

    def apply(leaves: dict[str, Array], student: Array, teacher: Array) -> Array:
        return loss(_project(leaves, student), teacher)

    return Learned(init, apply)


def variational(variance: float = 5.0) -> Learned:
    """Variational information distillation with its trained parts: see `vid`.

    Args:
      variance: the first value of every channel's variance, > 0.
    """
    raw = variance + math.log(-math.expm1(-variance))  # softplus(raw) = variance

    def init(key: Array, student: Any, teacher: Any) -> dict[str, Array]:
        check_features("variational", student, teacher, "batch ...")
        channels = teacher.shape[-1]
        return {
            **_linear(key, student.shape[-1], channels),
            "raw_variance": jnp.full(channels, raw, jnp.float32),
        }

    def apply(leaves: dict[str, Array], student: Array, teacher: Array) -> Array:
        return vid(_project(leaves, student), teacher, leaves["raw_variance"])

    return Learned(init, apply)


def embedded(loss: Callable[[Array, Array], Array] = crd, size: int = 128) -> Learned:
    """A loss of trained linear embeddings of both sides, for features of any shapes: see `crd`.

    Args:
      loss: of two arrays [batch, size].
      size: of the embeddings.
    """

    def flat(x: Any) -> int:
        return math.prod(x.shape[1:])

    def init(key: Array, student: Any, teacher: Any) -> dict[str, Any]:
        check_features("embedded", student, teacher, "batch ...", "batch")
        keys = jax.random.split(key)
        sides = {"student": student, "teacher": teacher}
        return {
            side: _linear(k, flat(x), size)
            for k, (side, x) in zip(keys, sides.items(), strict=True)
        }

    def apply(leaves: dict[str, Any], student: Array, teacher: Array) -> Array:
        s = _project(leaves["student"], student.reshape(len(student), -1))
        t = _project(leaves["teacher"], teacher.reshape(len(teacher), -1))
        return loss(s, t)

    return Learned(init, apply)


def _linear(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def _project(leaves: dict[str, Array], x: Array) -> Array:
    x, kernel = wide(x, leaves["kernel"])
    return x @ kernel + leaves["bias"]
