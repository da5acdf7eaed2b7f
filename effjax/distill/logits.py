"""Logit distillation: the student learns the softened outputs of a teacher."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, Forward, Metrics, PyTree, Setup, Transform, abstract_key
from effjax.distill.cache import INDICES, LOGITS, VALUES, Cached
from effjax.distill.losses import check_logits, kl
from effjax.distill.settings import temperature_schedule, weight_schedule
from effjax.distill.targets import TopK, top_k_kl
from effjax.distill.teachers import cast, check_apply, check_teacher
from effjax.errors import SetupError
from effjax.schedules import Scalar, Schedule


def logits(
    teacher: Apply | Cached,
    loss: Callable[..., Array] = kl,
    *,
    temperature: Scalar | Schedule = 4.0,
    alpha: Scalar | Schedule = 1.0,
    student_logits: Callable[[PyTree], Array] = lambda outputs: outputs,
    teacher_logits: Callable[[PyTree], Array] = lambda outputs: outputs,
    labels: Callable[[PyTree], Array] = lambda batch: batch["label"],
    dtype: Any = None,
) -> Transform:
    """Distils a teacher's logits into the model.

    Adds the loss term "kl" = alpha * mean over examples of T^2 KL(teacher / T || student / T), see
    `losses.kl`, or another loss of logits in its place, to the task's loss. For Hinton's
    (1 - a) CE + a T^2 KL give alpha=a and scale your own loss by 1 - a.

    The teacher runs in evaluation mode on the batch as the student sees it, augmented, once a
    step, in training only. Its weights are the step's frozen input, an argument of the program:
    no gradient is computed for them, and any weights of that shape serve without compiling again.
    Placed first in the chain it is outside of every other transform's `wrap`, which then have
    less to trace.

    Args:
      teacher: `model.apply` of the teacher; of several, see `ensemble`. Or a cache's `targets`
        (`write_cache`): no teacher runs, there is no frozen input, and the logits are entries of
        the batch, `{**batch, **cache.batch(indices)}`. Of a cache of the k largest, the loss
        gets a `TopK`; `kl` stands for `top_k_kl` there.
      loss: `(student_logits, teacher_logits) -> Array`, averaged; it may also take arguments named
        `temperature` and `labels` (`dkd`), which it is then given. The term has its name, "kl"
        for `kl`; settings of its own are bound by `functools.partial`.
      temperature: T > 0; a number, a traced value, or a schedule (step -> value).
      alpha: weight of the term >= 0; a number, a traced value, or a schedule.
      student_logits: from the student's outputs to its logits, floating [..., classes].
      teacher_logits: from the teacher's outputs to its logits, of the same shape.
      labels: from the batch to integer classes [...], for a loss that takes them.
      dtype: run the teacher in this dtype (`jnp.bfloat16`): floating params and batch entries are
        cast.

    Returns:
      A Transform of kind "distill", without trainable leaves or state, whose frozen input is a
      `Teacher(params, model_state)` or such a pair. It reports "agreement", the fraction of
      examples for which student and teacher choose one class, "temperature" and "alpha".

    Raises:
      SetupError: here, for a teacher that is no function or a number out of range; at `init`, for a
        missing teacher, logits of different shapes, or a batch without a cache's entries.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> student = ej.Model(lambda key, batch: ({"kernel": jnp.zeros((4, 2))}, {}), apply)
      >>> batch, tx = {"x": jnp.eye(4)}, optax.sgd(0.1)
      >>> frozen = {"kd": ej.distill.Teacher({"kernel": jnp.ones((4, 2))}, {})}
      >>> kd = ej.chain(kd=ej.distill.logits(apply, temperature=2.0))
      >>> state = ej.init_state(jax.random.key(0), student, kd, tx, batch, frozen)
      >>> step = ej.make_step(apply, kd, lambda outputs, batch: jnp.mean(outputs**2), tx)
      >>> state, metrics = step(state, batch, frozen)
      >>> float(metrics["kd/kl"]), float(metrics["kd/agreement"])
      (0.0, 1.0)

    Reference: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531.
    """
    if not isinstance(teacher, Cached):
        check_apply("distill.logits", teacher)
    elif teacher.k and loss is kl:
        loss = top_k_kl
    accepted = inspect.signature(loss).parameters
    term = getattr(loss.func if isinstance(loss, functools.partial) else loss, "__name__", "loss")
    term = "loss" if term == "<lambda>" else term
    temperature_at, alpha_at = temperature_schedule(temperature), weight_schedule(alpha)

    def run_teacher(frozen: PyTree, batch: PyTree, key: Array) -> Array | TopK:
        if isinstance(teacher, Cached):
            _check_unmixed(labels, batch)
            return _from_batch(teacher, batch)
        params, model_state = check_teacher("distill.logits", frozen)
        params, batch = cast((params, batch), dtype)
        outputs, _ = teacher(params, model_state, batch, key, False)
        return teacher_logits(outputs)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        if not isinstance(teacher, Cached):
            check_teacher("distill.logits", setup.frozen)
        elif setup.frozen is not None:
            raise SetupError(
                "distill.logits learns from a cache, and got a teacher as frozen input as well. "
                "Leave its entry out of `frozen`."
            )
        taught = jax.eval_shape(run_teacher, setup.frozen, setup.batch, abstract_key())
        student = jax.eval_shape(student_logits, setup.trace(params)[0])
        if isinstance(teacher, Cached):
            _check_classes(teacher, student)
        if not isinstance(taught, TopK):
            check_logits(student, taught)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        jax.eval_shape(distance, student, taught, setup.batch, step)
        return {}, {}

    def distance(student: Array, taught: Array | TopK, batch: PyTree, step: Array) -> Array:
        given: dict[str, Any] = {}
        if "temperature" in accepted:
            given["temperature"] = temperature_at(step)
        if "labels" in accepted:
            try:
                given["labels"] = labels(batch)
            except (KeyError, TypeError) as error:
                raise SetupError(
                    f"{term} needs the labels, and the batch has no entry {error}. Say where they "
                    "are: logits(..., labels=lambda batch: ...)."
                ) from error
        return jnp.mean(loss(student, taught, **given))

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        if not ctx.train:
            return forward

        def taught_forward(params, model_state, batch, key, train):
            outputs, model_state, aux = forward(params, model_state, batch, key, train)
            taught = jax.lax.stop_gradient(run_teacher(ctx.frozen, batch, key))
            return (
                outputs,
                model_state,
                {**aux, "teacher": taught, "agreement": agree(outputs, taught)},
            )

        return taught_forward

    def agree(outputs: PyTree, taught: Array | TopK) -> Array:
        best = taught.indices[..., 0] if isinstance(taught, TopK) else jnp.argmax(taught, axis=-1)
        same = jnp.argmax(student_logits(outputs), axis=-1) == best
        return jnp.mean(same, dtype=jnp.float32)

    def losses(outputs, batch, aux, extra, state, ctx) -> Metrics:
        found = distance(student_logits(outputs), aux["teacher"], batch, ctx.step)
        return {term: alpha_at(ctx.step) * found}

    def report(vars, state, aux, ctx) -> Metrics:
        return {
            "agreement": aux["agreement"],
            "temperature": jnp.asarray(temperature_at(ctx.step), jnp.float32),
            "alpha": jnp.asarray(alpha_at(ctx.step), jnp.float32),
        }

    return Transform(init=init, wrap=wrap, loss=losses, report=report, kind="distill")


def _from_batch(cached: Cached, batch: PyTree) -> Array | TopK:
    names = (VALUES, INDICES) if cached.k else (LOGITS,)
    if missing := [n for n in names if not isinstance(batch, Mapping) or n not in batch]:
        has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise SetupError(
            f"distill.logits learns from a cache, and the batch lacks {missing}; it has {has}. Put "
            "the cache's rows of the batch's examples there: {**batch, **cache.batch(indices)}, or "
            "all of cache.arrays beside the images that batches are drawn from."
        )
    found = [jnp.asarray(batch[n]) for n in names]
    size = cached.k or cached.classes
    if any(x.shape[-1] != size for x in found):
        raise SetupError(
            f"the batch's {list(names)} are {[list(x.shape) for x in found]}, and the cache "
            f"keeps {size} logits an example. They are from another cache."
        )
    return TopK(*found) if cached.k else found[0]


def _check_classes(cached: Cached, student: Any) -> None:
    if (shape := getattr(student, "shape", ())) and shape[-1] != cached.classes:
        raise SetupError(
            f"the student has {shape[-1]} classes (its logits are {list(shape)}) and the cached "
            f"teacher {cached.classes}. They must be the same classes in the same order."
        )


def _check_unmixed(labels: Callable[[PyTree], Array], batch: PyTree) -> None:
    """Raises if the labels are shares of classes, as mixup makes them: no file has such targets."""
    try:
        found = labels(batch)
    except (KeyError, TypeError):
        return  # A batch without labels has none that could be mixed.
    if jnp.issubdtype(found.dtype, jnp.floating):
        raise SetupError(
            f"distill.logits learns from a cache, and the labels are {found.dtype}"
            f"{list(found.shape)}, as mixup and cutmix make them: the cached logits are those of "
            "the examples before they were mixed. Run the teacher in the step, or take the mixing "
            "out. If your labels are soft by nature, say which classes they stand for: "
            "logits(..., labels=lambda batch: batch['label'].argmax(-1))."
        )
