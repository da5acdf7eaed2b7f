"""Teachers: their weights as a step's frozen input, one or several, run outside of the gradient."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.distill.losses import check_logits
from effjax.distill.numerics import wide
from effjax.errors import SetupError


class Teacher(NamedTuple):
    """A trained model as the step's frozen input: `frozen={"kd": Teacher(params, model_state)}`."""

    params: PyTree
    model_state: PyTree

    @staticmethod
    def join(*teachers: "Teacher") -> "Teacher":
        """Several as the one that `ensemble` runs."""
        return Teacher(tuple(t.params for t in teachers), tuple(t.model_state for t in teachers))


def ensemble(
    *teachers: Apply,
    weights: Sequence[float | Array] | None = None,
    combine: Literal["probabilities", "logits"] = "probabilities",
) -> Apply:
    """Several teachers as one, whose logits are their average.

    "probabilities": log sum_i w_i softmax(logits_i), the logits of the averaged distribution (at
    temperature 1). "logits": sum_i w_i logits_i. Weights are divided by their sum.

    Args:
      *teachers: the `apply` of each; their outputs are logits, floating [..., classes].
      weights: one for each, >= 0 and not all 0; equal by default. They may be traced.
      combine: what is averaged.

    Returns:
      An `apply` whose params and model_state are tuples, one entry for each: give
      `frozen={"kd": Teacher.join(first, second)}`. Params paths begin with the teacher's number.

    Raises:
      SetupError: no teachers, another number of weights, or (when run) logits of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params, model_state
      >>> both = ej.distill.ensemble(apply, apply, combine="logits")
      >>> of = ej.distill.Teacher
      >>> frozen = of.join(of(jnp.eye(2), {}), of(3 * jnp.eye(2), {}))
      >>> both(*frozen, {"x": jnp.ones((1, 2))}, None, False)[0].tolist()
      [[2.0, 2.0]]

    Reference: You et al., "Learning from Multiple Teacher Networks", 2017 (KDD).
    """
    if not teachers or not all(callable(t) for t in teachers):
        raise SetupError(
            "ensemble takes the functions that run its teachers, such as model.apply; got "
            f"{[type(t).__name__ for t in teachers]}."
        )
    if weights is not None and len(weights) != len(teachers):
        raise SetupError(f"ensemble has {len(weights)} weights for {len(teachers)} teachers.")
    if combine not in ("probabilities", "logits"):
        raise SetupError(f"ensemble averages 'probabilities' or 'logits', not {combine!r}.")
    given = [1.0] * len(teachers) if weights is None else list(weights)

    def apply(params, model_state, batch, key, train):
        if not len(params) == len(model_state) == len(teachers):
            raise SetupError(
                f"an ensemble of {len(teachers)} teachers got the params of {len(params)} and the "
                f"states of {len(model_state)}. Join as many: Teacher.join(first, second)."
            )
        runs = [
            teacher(p, s, batch, key, train)
            for teacher, p, s in zip(teachers, params, model_state, strict=True)
        ]
        for logits, _ in runs:
            check_logits(logits, runs[0][0])
        logits = jnp.stack(wide(*(logits for logits, _ in runs)))
        w = jnp.stack([jnp.asarray(x, logits.dtype) for x in given])
        w = (w / jnp.sum(w)).reshape(-1, *[1] * (logits.ndim - 1))
        if combine == "logits":
            outputs = jnp.sum(w * logits, axis=0)
        else:
            outputs = jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1), axis=0, b=w)
        return outputs, tuple(state for _, state in runs)

    return apply


def check_apply(who: str, teacher: Any) -> None:
    """Raises SetupError unless a teacher is a function."""
    if not callable(teacher):
        raise SetupError(
            f"{who} got a {type(teacher).__name__} as teacher; it takes the function that "
            "runs it, `model.apply`. The teacher's weights go into the step's frozen argument."
        )


def check_teacher(who: str, frozen: PyTree) -> Teacher:
    """The frozen input as a Teacher; SetupError if it is none."""
    if frozen is None:
        raise SetupError(
            f"{who} got no teacher. Give its weights to init_state and to each step: "
            "frozen={'kd': Teacher(params, model_state)}, under the transform's name in the chain."
        )
    if not isinstance(frozen, tuple | list) or len(frozen) != 2:
        raise SetupError(
            f"the teacher given as frozen input is a {type(frozen).__name__}; it is a pair "
            "Teacher(params, model_state), with {} for a model without state."
        )
    return Teacher(*frozen)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating leaves in another dtype; as it is for None."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
