"""From a Flax module, Linen or NNX, to a pair of pure functions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.select import leaves, path_name

Inputs = str | Callable[[PyTree], Any]


class Model(NamedTuple):
    """A model as pure functions.

    init: `(key, batch) -> (params, model_state)`; works under `jax.eval_shape`.
    apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`, where `model_state`
      is what Flax mutates (BatchNorm statistics, ...) and comes back changed only where `train` is.
    """

    init: Callable[[Array, PyTree], tuple[PyTree, PyTree]]
    apply: Apply


def from_linen(
    module: Any,
    inputs: Inputs = "image",
    *,
    rngs: Sequence[str] = ("dropout",),
    mode: Callable[[bool], dict[str, Any]] | None = None,
) -> Model:
    """A Linen module as a Model, with BatchNorm, Dropout and other mutable collections.

    Args:
      module: a `flax.linen.Module`.
      inputs: the batch's entry that the module is called with, or a function from the batch to it
        (a tuple is passed as several arguments).
      rngs: names of the random streams that the module may ask for; each gets a key of its own.
      mode: from `train` to the keyword arguments that tell the module so. By default the first of
        `train`, `training`, `is_training`, `deterministic` and `use_running_average` (the last two
        negated) that `module.__call__` takes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Dense(3), inputs="x")
      >>> params, state = model.init(jax.random.key(0), {"x": jnp.ones((2, 5))})
      >>> params["kernel"].shape
      (5, 3)
    """
    arguments = _inputs(inputs)
    keywords = mode or _mode_keywords(module)

    def init(key: Array, batch: PyTree) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, len(rngs) + 1)
        streams = dict(zip(("params", *rngs), keys, strict=True))
        variables = dict(module.init(streams, *arguments(batch), **keywords(True)))
        return variables.pop("params", {}), variables

    def apply(params, model_state, batch, key, train):
        keys = jax.random.split(key, max(len(rngs), 1))
        streams = dict(zip(rngs, keys, strict=False)) if train else {}
        variables = {"params": params, **model_state}
        call = (variables, *arguments(batch))
        if train and model_state:
            mutable = list(model_state)
            outputs, changed = module.apply(*call, rngs=streams, mutable=mutable, **keywords(True))
            return outputs, {**model_state, **changed}
        return module.apply(*call, rngs=streams, **keywords(train)), model_state

    return Model(init, apply)


def from_nnx(module: Any, inputs: Inputs = "image") -> Model:
    """An NNX module as a Model, with BatchNorm, Dropout and other Variables.

    Params are the module's `nnx.Param` leaves as a nested dict of arrays; `model_state` is the rest
    as another, less the random streams, which are seeded from `key` in every call. `train` switches
    the module by its `train()` and `eval()` methods.

    Args:
      module: a function `(nnx.Rngs) -> nnx.Module`, for example the class itself; or a built
        module, whose weights are then the initial ones whatever the key.
      inputs: the batch's entry that the module is called with, or a function from the batch to it
        (a tuple is passed as several arguments).

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_nnx(lambda rngs: nnx.Linear(5, 3, rngs=rngs), inputs="x")
      >>> params, state = model.init(jax.random.key(0), {"x": jnp.ones((2, 5))})
      >>> params["kernel"].shape
      (5, 3)
    """
    from flax import nnx

    built = isinstance(module, nnx.Module)
    if not built and not callable(module):
        raise SetupError(
            f"from_nnx got a {type(module).__name__}; it takes an nnx.Module, or a function from "
            "nnx.Rngs to one, such as the class."
        )
    arguments = _inputs(inputs)

    def build(key: Array) -> Any:
        return module(nnx.Rngs(key))

    def split(m: Any) -> tuple[Any, Any, Any, Any]:
        graphdef, *states = nnx.split(m, nnx.Param, nnx.RngState, ...)
        params, streams, rest = states
        return graphdef, params, streams, rest

    if built:
        graphdef, params0, streams0, rest0 = split(module)
    else:
        graphdef, params0, streams0, rest0 = nnx.eval_shape(lambda: split(build(jax.random.key(0))))

    def init(key: Array, batch: PyTree) -> tuple[PyTree, PyTree]:
        _, params, _, rest = (None, params0, None, rest0) if built else split(build(key))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, model_state, batch, key, train):
        streams = _seed(streams0, key)
        states = (
            _fill(params0, params, "params"),
            streams,
            _fill(rest0, model_state, "model_state"),
        )
        m = nnx.merge(graphdef, *states, copy=True)
        m.train() if train else m.eval()
        outputs = m(*arguments(batch))
        if not train:
            return outputs, model_state
        return outputs, nnx.to_pure_dict(split(m)[3])

    return Model(init, apply)


def from_function(f: Callable[..., PyTree], inputs: Inputs = "image") -> Apply:
    """An `apply` from a plain function `f(params, inputs)` without state, dropout or modes.

    Args:
      f: the model in plain JAX.
      inputs: the batch's entry that it is called with, or a function from the batch to it (a
        tuple is passed as several arguments).
    """
    arguments = _inputs(inputs)

    def apply(params, model_state, batch, key, train):
        return f(params, *arguments(batch)), model_state

    return apply


def _fill(template: PyTree, pure: PyTree, what: str) -> PyTree:
    """A State with the template's Variables and the arrays of a nested dict, matched by path."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = [path_name(path).removesuffix("/value") for path, _ in paths]
    found = leaves(pure)
    if len(found) != len(wanted) or not all(name in found for name in wanted):
        raise SetupError(
            f"{what} has {len(found)} leaves, {list(found)}, but the NNX module has {len(wanted)}, "
            f"{wanted}. They come from another module, or a transform changed the tree's structure."
        )
    return jax.tree.unflatten(structure, [found[name] for name in wanted])


def _seed(streams: PyTree, key: Array) -> PyTree:
    """Random streams that start anew from this key, each with a key of its own."""
    found, structure = jax.tree.flatten(streams)
    fresh = [
        jax.random.fold_in(key, i)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(found)
    ]
    return jax.tree.unflatten(structure, fresh)


def _inputs(inputs: Inputs) -> Callable[[PyTree], tuple[Any, ...]]:
    def arguments(batch: PyTree) -> tuple[Any, ...]:
        if callable(inputs):
            found = inputs(batch)
            return found if isinstance(found, tuple) else (found,)
        try:
            return (batch[inputs],)
        except (KeyError, TypeError, IndexError) as error:
            entries = list(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SetupError(
                f"the model reads batch[{inputs!r}], but the batch has {entries}. Say where its "
                "inputs are: from_linen(module, inputs='x') or inputs=lambda batch: ..."
            ) from error

    return arguments


def _mode_keywords(module: Any) -> Callable[[bool], dict[str, Any]]:
    accepted = inspect.signature(type(module).__call__).parameters
    for name in ("train", "training", "is_training"):
        if name in accepted:
            return lambda train: {name: train}
    for name in ("deterministic", "use_running_average"):
        if name in accepted:
            return lambda train: {name: not train}
    return lambda train: {}
