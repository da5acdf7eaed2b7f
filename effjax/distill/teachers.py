"""Teachers: their weights as a step's frozen input; several, or one on several views, as one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.distill.numerics import wide
from effjax.errors import SetupError

Combine = Literal["probabilities", "logits"]


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
    combine: Combine = "probabilities",
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
    _check_combine("ensemble", combine)
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
        _check_averaged("ensemble", [logits for logits, _ in runs])
        logits = jnp.stack(wide(*(logits for logits, _ in runs)))
        w = jnp.stack([jnp.asarray(x, logits.dtype) for x in given])
        return _average(logits, w, combine), tuple(state for _, state in runs)

    return apply


def views(
    teacher: Apply,
    view: Callable[[PyTree, Array], PyTree],
    count: int,
    *,
    combine: Combine = "probabilities",
) -> Apply:
    """A teacher whose logits are its average over several views of each example.

    A teacher that was trained on augmented examples knows of each what the student, who sees it as
    it is, cannot find in one forward pass of it: "probabilities" says log of the mean over i of
    softmax(logits of view i), "logits" the mean of the logits. It costs `count` forward passes, one
    after another; over examples that are not augmented for the student, run it once and keep what
    it says with `write_cache`.

    Args:
      teacher: its `apply`, whose outputs are logits, floating [..., classes].
      view: `(batch, i) -> batch`, the i-th view, i a traced int32 in 0 .. count-1.
      count: how many views there are, 1 or more.
      combine: what is averaged.

    Returns:
      An `apply` with the teacher's own params and model_state, for evaluation: the model_state is
      returned as it was given.

    Raises:
      SetupError: no functions, or a count below 1; when run, a teacher whose outputs are no logits.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params, model_state
      >>> scaled = lambda batch, i: {"x": batch["x"] * (i + 1)}
      >>> teacher = ej.distill.views(apply, scaled, 3, combine="logits")
      >>> teacher(jnp.eye(2), {}, {"x": jnp.ones((1, 2))}, None, False)[0].tolist()
      [[2.0, 2.0]]

    Reference: Radosavovic et al., "Data Distillation: Towards Omni-Supervised Learning", 2018,
      https://arxiv.org/abs/1712.04440.
    """
    check_apply("distill.views", teacher)
    if not callable(view) or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SetupError(
            f"distill.views takes a function (batch, i) -> batch and how many views there are, 1 "
            f"or more; got a {type(view).__name__} and {count!r}."
        )
    _check_combine("distill.views", combine)

    def apply(params, model_state, batch, key, train):
        def one(i: Array) -> Array:
            logits, _ = teacher(params, model_state, view(batch, i), key, train)
            _check_averaged("distill.views", [logits])
            return logits

        (logits,) = wide(jax.lax.map(one, jnp.arange(count, dtype=jnp.int32)))
        return _average(logits, jnp.ones(count, logits.dtype), combine), model_state

    return apply


def _check_combine(who: str, combine: str) -> None:
    if combine not in ("probabilities", "logits"):
        raise SetupError(f"{who} averages 'probabilities' or 'logits', not {combine!r}.")


def _check_averaged(who: str, found: Sequence[Any]) -> None:
    """Raises SetupError unless outputs are floating [..., classes] arrays of one shape."""
    for x in found:
        dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", ())
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or not shape:
            what = type(x).__name__ if dtype is None else f"{dtype}{list(shape)}"
            raise SetupError(
                f"{who} averages logits, floating with the classes on the last axis, and a teacher "
                f"gave {what}. Give a function that returns its logits alone, before softmax and "
                "argmax, with the model_state: lambda *args: (apply(*args)[0]['logits'], args[1])."
            )
    if len({x.shape for x in found}) > 1:
        raise SetupError(
            f"{who} averages logits class by class and example by example, and its teachers' have "
            f"shapes {[list(x.shape) for x in found]}. Give teachers of the same classes, or a "
            "function for each that selects those that all have."
        )


def _average(logits: Array, weights: Array, combine: Combine) -> Array:
    """The logits of the average over the first axis, by weights that are divided by their sum."""
    w = (weights / jnp.sum(weights)).reshape(-1, *[1] * (logits.ndim - 1))
    if combine == "logits":
        return jnp.sum(w * logits, axis=0)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1), axis=0, b=w)


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
