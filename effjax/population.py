"""Many runs as one: seeds and hyper-parameters as a leading axis of the state."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from effjax.core import Metrics, PyTree
from effjax.errors import SetupError, ShardingError
from effjax.mapped import in_turn, members, side_by_side, stack
from effjax.step import Mean, TrainState

# The step counter is one for all runs, so that what happens at some steps only stays a `cond`.
STATE_AXES = cast(Any, TrainState)(step=None, key=0, vars=0, opt=0, model_state=0, transform=0)


class Run(NamedTuple):
    """One run as functions: what `build` makes of one set of hyper-parameters.

    init: `(key, batch, frozen) -> TrainState`.
    step: `(state, batch, frozen) -> (state, metrics)`, see `make_step`.
    evaluate: `(state, batch, frozen) -> {name: Mean}`, see `make_eval`.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Mean]] | None = None


class Population(NamedTuple):
    """K runs that step together.

    Their states are one TrainState with a leading axis [K] on all leaves but `step` where they run
    side by side, and a tuple of K TrainStates where they are mapped: taking a stack apart and
    putting it together again would cost as much as a small network's step. Either is a pytree to
    checkpoint and pass on; `member` and `stack` look into both.

    size: K.
    mode: "vmap" or "map".
    hypers: a tree of [K] arrays, one value a run.
    init: `(keys, batch, frozen=None) -> states`; keys [K] are one for each run.
    step: `(states, batch, frozen=None, hypers=None) -> (states, metrics)`, metrics [K]; other
      hypers than the population's may be given at any step (population-based training) and
      compile nothing again.
    evaluate: `(states, batch, frozen=None, hypers=None) -> {name: Mean}`, each Mean of [K] arrays.
    """

    size: int
    mode: str
    hypers: PyTree
    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Mean]]

    def member(self, states: Any, index: int) -> TrainState:
        """The state of one run, for `export`, a checkpoint, or to go on alone."""
        if self.mode == "map":
            return states[index]
        own = jax.tree.map(lambda x: x[index], states._replace(step=()))
        return own._replace(step=states.step)

    def stack(self, states: Any) -> TrainState:
        """All runs' states as one TrainState, [K] on all leaves but `step`."""
        if self.mode == "vmap":
            return states
        return stack([own._replace(step=()) for own in states])._replace(step=states[0].step)


def population(
    build: Callable[[Any], Run],
    hypers: PyTree,
    mode: Literal["auto", "vmap", "map"] = "auto",
    *,
    batch_axis: int | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Population:
    """K runs that differ in seeds and in traced hyper-parameters, compiled once.

    Mode "vmap" runs them side by side in one program, which fills an accelerator that one small
    run leaves idle; results equal those of single runs to rounding. "map" runs one compiled step
    K times, and every run equals, bit for bit, `build`'s functions jitted with the
    hyper-parameters as arguments. "auto" takes "map" on CPU, where side-by-side convolutions are
    slower than one after another, and "vmap" elsewhere.

    Args:
      build: from one set of hyper-parameters (scalars, traced) to a `Run`. It is called when the
        functions are traced, and what it makes must not branch in Python on their values.
      hypers: a tree whose leaves are [K] arrays, or lists of K numbers: {"lr": [0.1, 0.2],
        "sparsity": [0.5, 0.9]}; see `grid`.
      mode: see above.
      batch_axis: None if all runs see the same batches, 0 if each leaf of the batch is [K, ...].
      mesh: a mesh of one axis, over whose devices the runs are dealt out, K / devices to each; they
        share nothing but the batch. Only with "vmap".
      donate: let each step reuse the memory of the states it is given.

    Raises:
      SetupError: leaves of different lengths, no leaves, a leaf that is no array of numbers, an
        unknown mode; when called, another number of keys than runs, hyper-parameters of other
        shapes, or `evaluate` where `build` makes none.
      ShardingError: runs that do not divide over the mesh, or a mesh with more than one axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> model = ej.Model(lambda key, batch: ({"kernel": jnp.ones((4, 2))}, {}), apply)
      >>> def build(hyper):
      ...     tx, loss = optax.sgd(hyper["lr"]), lambda outputs, batch: jnp.mean(outputs**2)
      ...     init = lambda key, batch, frozen: ej.init_state(key, model, ej.chain(), tx, batch)
      ...     return ej.Run(init, ej.make_step(apply, ej.chain(), loss, tx))
      >>> runs = ej.population(build, {"lr": [0.0, 0.1, 0.2]})
      >>> states = runs.init(jax.random.split(jax.random.key(0), 3), {"x": jnp.ones((8, 4))})
      >>> states, metrics = runs.step(states, {"x": jnp.ones((8, 4))})
      >>> runs.stack(states).vars.model["kernel"].shape, metrics["loss"].shape
      ((3, 4, 2), (3,))
    """
    hypers, size = _check_hypers(hypers)
    if mode not in ("auto", "vmap", "map"):
        raise SetupError(f"the population's mode is {mode!r}; it is 'auto', 'vmap' or 'map'.")
    if mode == "auto":
        mode = "map" if jax.default_backend() == "cpu" and mesh is None else "vmap"
    if mesh is not None:
        _check_mesh(mesh, size, mode)
        mesh = Mesh(mesh.devices, mesh.axis_names)  # with automatic axes, as in Layout

    def init(hyper: PyTree, key: Array, batch: PyTree, frozen: PyTree) -> TrainState:
        return build(hyper).init(key, batch, frozen)

    def step(hyper: PyTree, state: TrainState, batch: PyTree, frozen: PyTree):
        return build(hyper).step(state, batch, frozen)

    def evaluate(hyper: PyTree, state: TrainState, batch: PyTree, frozen: PyTree):
        run = build(hyper)
        if run.evaluate is None:
            raise SetupError("build gives no evaluate: Run(init, step, make_eval(...)).")
        return run.evaluate(state, batch, frozen)

    if mode == "map":
        all_init = in_turn(init, batch_axis, tuple)
        all_step = in_turn(step, batch_axis, _join_step, donate)
        all_evaluate = in_turn(evaluate, batch_axis, stack)
    else:
        batched = (STATE_AXES, batch_axis, None)
        all_init = side_by_side(init, (0, 0, batch_axis, None), STATE_AXES, mesh)
        all_step = side_by_side(step, (0, *batched), (STATE_AXES, 0), mesh, donate)
        all_evaluate = side_by_side(evaluate, (0, *batched), 0, mesh)

    def spread(tree: PyTree) -> PyTree:
        return members(tree, size) if mode == "map" else tree

    spread_hypers = spread(hypers)

    def chosen(other: PyTree) -> PyTree:
        return spread_hypers if other is None else spread(_check_other_hypers(other, hypers))

    def init_all(keys: Array, batch: PyTree, frozen: PyTree = None) -> PyTree:
        if np.shape(keys)[:1] != (size,):
            raise SetupError(
                f"init got keys of shape {list(np.shape(keys))} for {size} runs; give each its "
                f"own: jax.random.split(jax.random.key(seed), {size})."
            )
        return all_init(spread_hypers, spread(keys), batch, frozen)

    def step_all(states: PyTree, batch: PyTree, frozen: PyTree = None, hypers: PyTree = None):
        _check_states(states, size, mode)
        return all_step(chosen(hypers), states, batch, frozen)

    def evaluate_all(states: PyTree, batch: PyTree, frozen: PyTree = None, hypers: PyTree = None):
        _check_states(states, size, mode)
        return all_evaluate(chosen(hypers), states, batch, frozen)

    return Population(size, mode, hypers, init_all, step_all, evaluate_all)


def _join_step(found: list[tuple[TrainState, Metrics]]) -> tuple[tuple[TrainState, ...], Metrics]:
    states, metrics = zip(*found, strict=True)
    return states, stack(metrics)


def grid(**axes: Any) -> dict[str, Array]:
    """All combinations of hyper-parameters, the first moving slowest: {name: [product of lengths]}.

    Example:
      >>> import effjax as ej
      >>> {n: x.tolist() for n, x in ej.grid(bits=[4, 8], seed=[0, 1]).items()}
      {'bits': [4, 4, 8, 8], 'seed': [0, 1, 0, 1]}
    """
    arrays = jnp.meshgrid(*(jnp.asarray(values) for values in axes.values()), indexing="ij")
    return {name: array.ravel() for name, array in zip(axes, arrays, strict=True)}


def _check_other_hypers(other: PyTree, hypers: PyTree) -> PyTree:
    other, _ = _check_hypers(other)
    wanted, found = (jax.tree.map(lambda x: x.shape, t) for t in (hypers, other))
    if wanted != found:
        raise SetupError(
            f"the step's hyper-parameters are {found}, and the population's are {wanted}; "
            "only their values may change."
        )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), other, hypers)


def _is_list(leaf: Any) -> bool:
    return isinstance(leaf, list)


def _check_hypers(hypers: PyTree) -> tuple[PyTree, int]:
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(hypers, is_leaf=_is_list):
        name = jax.tree_util.keystr(path)
        try:
            arrays[name] = jnp.asarray(leaf)
        except (TypeError, ValueError) as error:
            raise SetupError(
                f"the hyper-parameter {name} is {leaf!r:.60}, not an array of numbers. What "
                "is no number (a model, an optimizer's name) makes another program: a population "
                "of its own."
            ) from error
        if arrays[name].ndim == 0:
            raise SetupError(
                f"the hyper-parameter {name} is the single value {leaf!r:.40}; give one value a "
                "run, or close over it in build if it is the same for all."
            )
    if not arrays:
        raise SetupError("the population has no hyper-parameters; give at least {'seed': [0, 1]}.")
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise SetupError(
            f"the hyper-parameters have {lengths} values; each needs one a run, the same number "
            "for all. For all combinations use effjax.grid(...)."
        )
    structure = jax.tree.structure(hypers, is_leaf=_is_list)
    return jax.tree.unflatten(structure, arrays.values()), next(iter(lengths.values()))


def _check_states(states: PyTree, size: int, mode: str) -> None:
    if isinstance(states, TrainState) != (mode == "vmap") or (
        mode == "map" and len(states) != size
    ):
        wanted = "one TrainState" if mode == "vmap" else f"a tuple of {size} TrainStates"
        raise SetupError(
            f"the states are a {type(states).__name__}; a population in mode {mode!r} has "
            f"{wanted}. They come from another population: take `init`'s."
        )


def _check_mesh(mesh: Mesh, size: int, mode: str) -> None:
    if mode == "map":
        raise ShardingError("runs that are mapped one after another use one device; mode='vmap'.")
    if len(mesh.axis_names) != 1 or size % mesh.size:
        raise ShardingError(
            f"{size} runs on a mesh {dict(mesh.shape)}: it needs one axis, whose length divides "
            "the number of runs."
        )
