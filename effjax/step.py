"""One train step: forward pass through a transform, gradients, optimizer, update."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from effjax.core import Apply, Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import SetupError
from effjax.model import Model
from effjax.sharding import Layout, check_grouped_convolutions, state_shardings

# (outputs, batch) -> scalar: what the user minimises.
Loss = Callable[[PyTree, PyTree], Array]
# (outputs, batch) -> {name: scalar or [batch]}: what the user wants to see.
MetricsFn = Callable[[PyTree, PyTree], Mapping[str, Array]]


class TrainState(NamedTuple):
    """All that is carried from step to step. A pytree of arrays: save it and the run can go on."""

    step: Array  # int32 []
    key: Array  # the run's key; each step's randomness is derived from it and `step`
    vars: Vars
    opt: PyTree
    model_state: PyTree
    transform: PyTree  # the transform's own state


class Pass(NamedTuple):
    """What one forward pass through a transformed model gives."""

    outputs: PyTree
    batch: PyTree  # as the model saw it, augmented
    losses: Metrics  # the transform's loss terms
    aux: dict[str, PyTree]  # what its wraps measured
    model_state: PyTree

    @property
    def loss(self) -> Array:
        """The sum of the transform's loss terms."""
        return sum(self.losses.values(), jnp.zeros(()))


class Mean(NamedTuple):
    """A sum and a weight, so that means over batches of different sizes merge correctly."""

    total: Array
    weight: Array  # the number of examples

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both sets."""
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Array:
        """total / weight."""
        return self.total / self.weight


def forward(
    apply: Apply,
    transform: Transform,
    vars: Vars,
    model_state: PyTree,
    state: PyTree,
    batch: PyTree,
    ctx: Ctx,
) -> Pass:
    """Runs the model as the transform makes it: batch, view, wrap, apply, loss terms.

    This is what is differentiated with respect to `vars`. In evaluation (`ctx.train` False) the
    batch is left alone and there are no loss terms.
    """

    def plain(params, model_state, batch, key, train):
        outputs, model_state = apply(params, model_state, batch, key, train)
        return outputs, model_state, {}

    if ctx.train:
        batch = transform.batch(batch, state, ctx)
    params = transform.view(vars.model, vars.extra, state, ctx)
    wrapped = transform.wrap(plain, vars.extra, state, ctx)
    outputs, model_state, aux = wrapped(params, model_state, batch, ctx.key, ctx.train)
    losses = transform.loss(outputs, batch, aux, vars.extra, state, ctx) if ctx.train else {}
    return Pass(outputs, batch, losses, aux, model_state)


def init_state(
    key: Array,
    model: Model,
    transform: Transform,
    tx: optax.GradientTransformation,
    batch: PyTree,
    frozen: PyTree = None,
    *,
    params: PyTree = None,
    model_state: PyTree = None,
    layout: Layout | None = None,
) -> TrainState:
    """The state of a run at step 0, made sharded where a layout is given.

    Args:
      key: the run's key, `jax.random.key(seed)`.
      model: see `from_linen`, `from_nnx`.
      transform: usually a `chain`.
      tx: any optax optimizer; its params are a `Vars`.
      batch: an example batch; only its shapes are read, so `jax.ShapeDtypeStruct` leaves will do.
      frozen: the transform's frozen inputs (a teacher), as given to every step.
      params: start from these instead of `model.init`'s, for example a pretrained model's.
      model_state: goes with `params`.
      layout: a mesh and which params lie where on it; see `Layout`.

    Raises:
      EffjaxError: what the transforms can know to be wrong before the first step.

    Every leaf is a buffer of its own: donating the state deletes neither `key` nor `params`.
    """
    shapes = abstract((batch, frozen))

    def init(key: Array, given: PyTree) -> TrainState:
        model_key, transform_key, run_key = jax.random.split(key, 3)
        params, model_state = given
        if params is None:
            example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0])
            params, model_state = model.init(model_key, example)
        elif model_state is None:
            model_state = {}
        else:
            model_state = jax.tree.map(jnp.copy, model_state)
        params = jax.tree.map(jnp.copy, params)
        setup = Setup(model.apply, abstract(model_state), *shapes)
        extra, state = transform.init(transform_key, params, setup)
        check_no_none(state, "state")
        check_no_none(extra, "extra")
        vars = Vars(params, extra)
        step = jnp.zeros((), jnp.int32)
        return strengthen(TrainState(step, run_key, vars, tx.init(vars), model_state, state))

    given = (params, model_state)
    if layout is None:
        return jax.jit(init)(key, given)
    target = jax.eval_shape(init, key, given)
    check_grouped_convolutions(model.apply, target.vars.model, target.model_state, batch, layout)
    return jax.jit(init, out_shardings=state_shardings(target, layout))(key, given)


def make_step(
    apply: Apply,
    transform: Transform,
    loss: Loss,
    tx: optax.GradientTransformation,
    metrics: MetricsFn | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The train step, a plain function for the caller to jit, donate, shard or map.

    The objective is `loss(outputs, batch) + sum of the transform's loss terms`, differentiated with
    respect to all of `Vars`.

    Args:
      apply: `model.apply`, or a function of your own with that signature.
      transform: usually a `chain`; `chain()` gives the plain step.
      loss: `(outputs, batch) -> scalar`.
      tx: the optimizer that `init_state` was given.
      metrics: `(outputs, batch) -> {name: array}`; reported as means.

    Returns:
      `step(state, batch, frozen=None) -> (state, metrics)`, with metrics {"loss": the objective,
      "task": the user's loss, the transform's terms and reports by "name/term", and the user's}.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> model = ej.Model(lambda key, batch: ({"kernel": jnp.ones((4, 2))}, {}), apply)
      >>> batch = {"x": jnp.ones((8, 4))}
      >>> half = ej.chain(prune=ej.prune.magnitude(0.5, select="kernel$"))
      >>> state = ej.init_state(jax.random.key(0), model, half, optax.sgd(0.1), batch)
      >>> loss = lambda outputs, batch: jnp.mean(outputs**2)
      >>> step = jax.jit(ej.make_step(apply, half, loss, optax.sgd(0.1)))
      >>> state, metrics = step(state, batch)
      >>> int(jnp.sum(state.vars.model["kernel"] != 0))
      4
    """

    def step(state: TrainState, batch: PyTree, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        ctx = Ctx(state.step, jax.random.fold_in(state.key, state.step), frozen)

        def objective(vars: Vars) -> tuple[Array, tuple[Array, Pass]]:
            out = forward(apply, transform, vars, state.model_state, state.transform, batch, ctx)
            task = loss(out.outputs, out.batch)
            return sum(out.losses.values(), task), (task, out)

        (total, (task, out)), grads = jax.value_and_grad(objective, has_aux=True)(state.vars)
        updates, opt = tx.update(grads, state.opt, state.vars)
        vars = optax.apply_updates(state.vars, updates)
        vars, opt, own = transform.update(vars, opt, state.transform, grads, out.aux, ctx)
        report = {"loss": total, "task": task, **out.losses}
        report |= transform.report(vars, own, out.aux, ctx)
        if metrics is not None:
            report |= {n: jnp.mean(x) for n, x in metrics(out.outputs, out.batch).items()}
        return TrainState(state.step + 1, state.key, vars, opt, out.model_state, own), report

    return step


def make_eval(
    apply: Apply, transform: Transform, metrics: MetricsFn
) -> Callable[..., dict[str, Mean]]:
    """Evaluation of the transformed model, as it would be shipped.

    Args:
      metrics: `(outputs, batch) -> {name: [batch]}`, one value an example.

    Returns:
      `evaluate(state, batch, frozen=None) -> {name: Mean}`. Where the batch is a dict with an entry
      "valid" (bool [batch]), the examples it marks False (padding) do not count.
    """

    def evaluate(state: TrainState, batch: PyTree, frozen: PyTree = None) -> dict[str, Mean]:
        ctx = Ctx(state.step, state.key, frozen, train=False)
        out = forward(apply, transform, state.vars, state.model_state, state.transform, batch, ctx)
        valid = batch.get("valid") if isinstance(batch, Mapping) else None
        return {n: mean(x, valid) for n, x in metrics(out.outputs, out.batch).items()}

    return evaluate


def mean(values: Array, valid: Array | None = None) -> Mean:
    """The Mean of per-example values, over the valid examples."""
    if valid is None:
        return Mean(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
    if valid.shape != values.shape:
        raise SetupError(
            f"a metric has shape {values.shape} and the batch's 'valid' {valid.shape}; metrics in "
            "evaluation give one value an example."
        )
    return Mean(jnp.sum(jnp.where(valid, values, 0)), jnp.sum(valid, dtype=jnp.float32))


def export(transform: Transform, state: TrainState) -> PyTree:
    """The params that are shipped: what the model computes with in evaluation, as a plain tree."""
    return transform.export(state.vars.model, state.vars.extra, state.transform)


def abstract(tree: PyTree) -> PyTree:
    """The shapes and dtypes of a tree, without its values."""
    return jax.eval_shape(lambda t: t, tree)


def strengthen(tree: PyTree) -> PyTree:
    """The tree without weak types, which would make the second step compile again."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)


def check_no_none(tree: PyTree, what: str) -> None:
    """Raises if a tree has a None leaf: jax would drop it, and a checkpoint with it."""
    with_none = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    for path, leaf in with_none:
        if leaf is None:
            raise SetupError(
                f"the transform's {what} has None at {jax.tree_util.keystr(path)}; leave the entry "
                "out, or keep an array of size 0 there."
            )
