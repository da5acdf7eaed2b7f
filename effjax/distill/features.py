"""Feature and relational distillation: the student's inner layers learn from the teacher's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, Forward, Metrics, PyTree, Setup, Transform, abstract_key
from effjax.distill.hints import hint
from effjax.distill.learned import Learned
from effjax.distill.settings import weight_schedule
from effjax.distill.taps import tap
from effjax.distill.teachers import cast, check_apply, check_teacher
from effjax.errors import SetupError
from effjax.schedules import Scalar, Schedule

Taps = str | tuple[str, ...]


class Match(NamedTuple):
    """Which of the student's features learn from which of the teacher's, and how.

    student, teacher: a tap each ("conv2", "conv2:in", "@outputs"; see `distill.taps`), or a tuple
      of taps for a loss of several layers (`fsp`), which then gets tuples.
    loss: `(student, teacher) -> Array`, averaged; or a `Learned`, with trained leaves of its own.
    alpha: weight of the term >= 0; a number, a traced value, or a schedule (step -> value).
    """

    student: Taps
    teacher: Taps
    loss: Callable[[Any, Any], Array] | Learned = hint
    alpha: Scalar | Schedule = 1.0


def features(teacher: Apply, matches: Mapping[str, Match], *, dtype: Any = None) -> Transform:
    """Distils a teacher's features into the model's, layer to layer.

    Adds a loss term alpha * mean(loss(student's features, teacher's features)) for each match,
    under its name. Any of the losses of features or relations fits, and with the tap "@outputs"
    those of logits: one run of the teacher then serves both.

    The teacher runs in evaluation mode on the batch as the student sees it, augmented, once a
    step, in training only; its weights are the step's frozen input, an argument of the program, and
    get no gradient. Features are what the model computes under the transforms that come later in
    the chain: first in the chain, the taps of a quantized student give what its quantized
    operations compute; last, what they would compute without.

    Args:
      teacher: `model.apply` of the teacher.
      matches: {name: Match}.
      dtype: run the teacher in this dtype (`jnp.bfloat16`): floating params and batch entries are
        cast.

    Returns:
      A Transform of kind "distill", whose frozen input is a `Teacher(params, model_state)`, and
      whose `extra` is {name: the leaves of its Learned loss}.

    Raises:
      SetupError: here, for a teacher that is no function, no matches, or an alpha below 0; at
        `init`, for a missing teacher, a tap that names no module, or features that a loss cannot
        compare.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> from effjax.distill import Match, Teacher, features, hint, projected
      >>> def apply(params, model_state, batch, key, train):
      ...     return jax.nn.relu(batch["x"] @ params["one"]) @ params["two"], model_state
      >>> def weights(width):
      ...     return {"one": jnp.ones((4, width)), "two": jnp.ones((width, 2))}
      >>> student = ej.Model(lambda key, batch: (weights(3), {}), apply)
      >>> kd = features(apply, {"hint": Match("one", "one", projected(hint), alpha=0.1)})
      >>> chain, batch, tx = ej.chain(kd=kd), {"x": jnp.eye(4)}, optax.sgd(0.1)
      >>> frozen = {"kd": Teacher(weights(8), {})}
      >>> state = ej.init_state(jax.random.key(0), student, chain, tx, batch, frozen)
      >>> state.vars.extra["kd"]["hint"]["kernel"].shape
      (3, 8)

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015,
      https://arxiv.org/abs/1412.6550, and those of the losses.
    """
    check_apply("distill.features", teacher)
    if not isinstance(matches, Mapping) or not matches:
        raise SetupError(
            "distill.features needs at least one match by name, for example "
            "{'hint': Match('conv2', 'conv4', projected(hint))}."
        )
    for name, match in matches.items():
        if not isinstance(match, Match):
            raise SetupError(f"the match {name!r} is a {type(match).__name__}, not a Match.")
    alphas = {n: weight_schedule(m.alpha, f"alpha of {n!r}") for n, m in matches.items()}
    student_taps = [t for match in matches.values() for t in _names(match.student)]
    teacher_taps = [t for match in matches.values() for t in _names(match.teacher)]

    def run_teacher(frozen: PyTree, batch: PyTree, key: Array) -> dict[str, Any]:
        given = check_teacher("distill.features", frozen)
        params, batch = cast((given.params, batch), dtype)
        run = tap(teacher, teacher_taps, "teacher")
        return run(params, given.model_state, batch, key, False)[1]

    def distance(match: Match, leaves: Any, found: dict[str, Any], taught: dict[str, Any]) -> Array:
        student, teacher = _pick(found, match.student), _pick(taught, match.teacher)
        if isinstance(match.loss, Learned):
            return match.loss.apply(leaves, student, teacher)
        return match.loss(student, teacher)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        check_teacher("distill.features", setup.frozen)
        run = tap(setup.apply, student_taps, "student")
        args = (params, setup.model_state, setup.batch)
        found = jax.eval_shape(lambda p, s, b, k: run(p, s, b, k, True)[1], *args, abstract_key())
        taught = jax.eval_shape(run_teacher, setup.frozen, setup.batch, abstract_key())
        extra = {}
        keys = jax.random.split(key, len(matches))
        for own, (name, match) in zip(keys, matches.items(), strict=True):
            if isinstance(match.loss, Learned):
                pair = _pick(found, match.student), _pick(taught, match.teacher)
                extra[name] = match.loss.init(own, *pair)
            jax.eval_shape(
                lambda leaves, f, t, match=match: distance(match, leaves, f, t),
                extra.get(name),
                found,
                taught,
            )
        return extra, {}

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        if not ctx.train:
            return forward
        tapped = tap(forward, student_taps, "student")

        def taught_forward(params, model_state, batch, key, train):
            (outputs, new_state, aux), found = tapped(params, model_state, batch, key, train)
            taught = jax.lax.stop_gradient(run_teacher(ctx.frozen, batch, key))
            return outputs, new_state, {**aux, "student": found, "teacher": taught}

        return taught_forward

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        return {
            name: alphas[name](ctx.step)
            * jnp.mean(distance(match, extra.get(name), aux["student"], aux["teacher"]))
            for name, match in matches.items()
        }

    return Transform(init=init, wrap=wrap, loss=loss, kind="distill")


def _names(taps: Taps) -> tuple[str, ...]:
    return (taps,) if isinstance(taps, str) else tuple(taps)


def _pick(found: Mapping[str, Any], taps: Taps) -> Any:
    return found[taps] if isinstance(taps, str) else tuple(found[name] for name in taps)
