"""Transforms in a training loop of your own, in Linen, NNX or raw JAX.

`attach` replaces `tx.init`: what it returns stands where the optimizer's state stood, and carries
the transform's state with it. `NNXOptimizer` does so for loops around `nnx.Optimizer`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform, Vars
from effjax.errors import SetupError
from effjax.model import Inputs, Model, from_nnx
from effjax.sharding import Layout
from effjax.step import Pass, abstract, forward, init_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """The optimizer's state and the transform's, for a loop of your own. A pytree.

    Args and results named `vars` are a `Vars`: what `attach` returned in place of the params.
    """

    step: Array
    key: Array
    opt: PyTree
    model_state: PyTree
    state: PyTree
    apply: Apply = dataclasses.field(metadata={"static": True})
    transform: Transform = dataclasses.field(metadata={"static": True})
    tx: optax.GradientTransformation | None = dataclasses.field(metadata={"static": True})

    def forward(self, vars: Vars, batch: PyTree, frozen: PyTree = None, train: bool = True) -> Pass:
        """The model as the transform makes it. Differentiate your loss plus its `.loss`."""
        ctx = self._ctx(frozen, train)
        args = (self.apply, self.transform, vars, self.model_state, self.state)
        return forward(*args, batch, ctx)

    def update(
        self, grads: Vars, vars: Vars, out: Pass, frozen: PyTree = None
    ) -> tuple[Vars, "Attached"]:
        """The optimizer's step and then the transform's: in place of `tx.update, apply_updates`."""
        if self.tx is None:
            raise SetupError(
                "update() needs the optimizer: give it to attach(tx=...), or step the weights "
                "yourself and call after()."
            )
        updates, opt = self.tx.update(grads, self.opt, vars)
        stepped = dataclasses.replace(self, opt=opt)
        return stepped.after(grads, optax.apply_updates(vars, updates), out, frozen)

    def after(
        self, grads: Vars, vars: Vars, out: Pass, frozen: PyTree = None
    ) -> tuple[Vars, "Attached"]:
        """The transform's step alone, for weights that your own rule has already updated."""
        ctx = self._ctx(frozen, True)
        vars, opt, state = self.transform.update(vars, self.opt, self.state, grads, out.aux, ctx)
        carried = {"opt": opt, "state": state, "model_state": out.model_state}
        return vars, dataclasses.replace(self, step=self.step + 1, **carried)

    def _ctx(self, frozen: PyTree, train: bool) -> Ctx:
        return Ctx(self.step, jax.random.fold_in(self.key, self.step), frozen, train)


def attach(
    key: Array,
    model: Model | Apply,
    transform: Transform,
    params: PyTree,
    batch: PyTree,
    *,
    tx: optax.GradientTransformation | None = None,
    model_state: PyTree = None,
    frozen: PyTree = None,
    layout: Layout | None = None,
) -> tuple[Vars, Attached]:
    """Adds a transform to a training loop of your own.

    Args:
      key: randomness of the transform and of the model (dropout).
      model: `from_linen(module)`, `from_function(f)`, or your own
        `apply(params, model_state, batch, key, train) -> (outputs, model_state)`.
      transform: usually a `chain`.
      params: the model's weights as they are; they are copied.
      batch: an example batch, or its shapes.
      tx: the optimizer; without it, step the weights yourself and call `Attached.after`.
      model_state: what the model mutates, {} if nothing.
      frozen: a teacher and the like, as given to every `forward`.
      layout: a mesh and which params lie where on it.

    Returns:
      (vars, attached): the weights with what the transform trains beside them, and the rest.

    Raises:
      EffjaxError: what the transform can know to be wrong before the first step.
    """
    apply = model.apply if isinstance(model, Model) else model
    state = init_state(
        key,
        Model(lambda key, batch: (params, model_state), apply),
        transform,
        tx or optax.identity(),
        batch,
        frozen,
        params=params,
        model_state={} if model_state is None else model_state,
        layout=layout,
    )
    carried = (state.step, state.key, state.opt, state.model_state, state.transform)
    return state.vars, Attached(*carried, apply, transform, tx)


class TransformState(nnx.Variable):
    """What a transform carries from step to step, as NNX Variables."""


class NNXOptimizer(nnx.Optimizer):
    """An `nnx.Optimizer` that carries a transform, for loops written around one.

    The transform may not train leaves of its own (`extra`), which no gradient of the model reaches;
    for such a transform use `make_step` or `attach`.

    Args:
      key: randomness of the transform and of the model (dropout).
      model: the module that is trained.
      tx: any optax optimizer.
      transform: usually a `chain`.
      batch: an example batch, or its shapes.
      inputs: where the module's inputs are in a batch; see `from_nnx`.
      frozen: a teacher and the like, as given to every `forward`.
    """

    def __init__(
        self,
        key: Array,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        transform: Transform,
        batch: PyTree,
        inputs: Inputs = "image",
        frozen: PyTree = None,
    ):
        super().__init__(model, tx, wrt=nnx.Param)
        functional = from_nnx(model, inputs)
        params, model_state = functional.init(key, batch)
        setup = init_state(
            key,
            functional,
            transform,
            optax.identity(),
            abstract(batch),
            frozen,
            params=params,
            model_state=model_state,
        )
        if found := jax.tree.leaves(setup.vars.extra):
            raise SetupError(
                f"the transform trains {len(found)} leaves of its own, which nnx.grad of the model "
                "does not reach; use effjax.make_step or effjax.attach for it."
            )
        self.apply = functional.apply
        self.transform = transform
        self.key = TransformState(setup.key)
        self.carried = nnx.data(jax.tree.map(TransformState, setup.transform))
        self.extra = setup.vars.extra

    def forward(
        self, model: nnx.Module, batch: PyTree, frozen: PyTree = None, train: bool = True
    ) -> Pass:
        """The model as the transform makes it. Differentiate your loss plus its `.loss`."""
        params, model_state = _states(model)
        vars = Vars(params, self.extra)
        ctx = self._ctx(frozen, train)
        state = nnx.as_pure(self.carried)
        return forward(self.apply, self.transform, vars, model_state, state, batch, ctx)

    def update(self, model: nnx.Module, grads: Any, out: Pass, frozen: PyTree = None) -> None:  # type: ignore[override]
        """The optimizer's step and then the transform's, on the model and this optimizer."""
        ctx = self._ctx(frozen, True)
        super().update(model, grads)
        vars = Vars(_states(model)[0], self.extra)
        slopes = Vars(nnx.to_pure_dict(nnx.state(grads, nnx.Param)), self.extra)
        opt, state = nnx.as_pure(self.opt_state), nnx.as_pure(self.carried)
        vars, opt, state = self.transform.update(vars, opt, state, slopes, out.aux, ctx)
        _write(nnx.state(model, nnx.Param), vars.model, model)
        _write(
            nnx.state(model, nnx.filterlib.Not(nnx.Any(nnx.Param, nnx.RngState))),
            out.model_state,
            model,
        )
        nnx.update(self.opt_state, nnx.state(opt))
        nnx.update(self.carried, nnx.state(state))

    def _ctx(self, frozen: PyTree, train: bool) -> Ctx:
        step = self.step[...].astype(jnp.int32)
        return Ctx(step, jax.random.fold_in(self.key[...], step), frozen, train)


def _states(model: nnx.Module) -> tuple[PyTree, PyTree]:
    _, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
    params, _, rest = states
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _write(template: PyTree, pure: PyTree, model: nnx.Module) -> None:
    leaves = jax.tree.leaves(pure)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(template), leaves))
