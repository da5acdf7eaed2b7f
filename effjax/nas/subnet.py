"""A chosen sub-network: set it, and measure its BatchNorm statistics anew."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform
from effjax.errors import SetupError
from effjax.select import replace, select
from effjax.step import TrainState

# BatchNorm's moving averages, as Linen and NNX name them.
STATISTICS = r"(^|/)(mean|var)$"
# A moving average started here moves by a known amount, from which its momentum is read.
_PROBE = 2.0**20


def subnet(state: Any, arch: Array, name: str | None = None) -> Any:
    """The state with another architecture: a value, so evaluating it compiles nothing again.

    Args:
      state: a TrainState, or the transform's part of one.
      arch: int32 [genes], see `Supernet`, or [groups], see `WidthSpace`; may be traced.
      name: the name of the width search or supernet in the chain, needed if there are several.

    Returns:
      The same kind of state; evaluation and `export` use the architecture, training is unchanged.

    Raises:
      SetupError: nothing of that name has architectures, several have, or the architecture is not
        int32 [genes].
    """
    if isinstance(state, TrainState):
        return state._replace(transform=subnet(state.transform, arch, name))
    if name is None and (entry := _entry(state)):
        return {**state, entry: _check(arch, state[entry])}
    slots = [n for n, own in state.items() if _entry(own)] if isinstance(state, Mapping) else []
    if name is None and len(slots) == 1:
        name = slots[0]
    if name not in slots:
        wanted = "one width search" if name is None else f"a width search named {name!r}"
        raise SetupError(
            f"the state should hold {wanted} or supernet; those it holds are named {slots}."
        )
    return {**state, name: subnet(state[name], arch)}


def _entry(state: Any) -> str:
    """Where a transform's state has its architecture; "" if it has none."""
    found = set(state) if isinstance(state, Mapping) else set()
    if found == {"width"}:
        return "width"
    return "arch" if found in ({"arch"}, {"arch", "quant"}) else ""


def _check(arch: Array, old: Array) -> Array:
    if np.shape(arch) != np.shape(old) or not jnp.issubdtype(jnp.result_type(arch), jnp.integer):
        raise SetupError(
            f"the architecture is {jnp.result_type(arch)}{list(np.shape(arch))}; it is "
            f"int32{list(np.shape(old))}, one index into the choices for each gene."
        )
    return jnp.asarray(arch, jnp.int32)


def make_recalibrate(
    apply: Apply, transform: Transform, statistics: str = STATISTICS
) -> Callable[..., TrainState]:
    """Measures BatchNorm's statistics for the network that evaluation runs.

    A sub-network's activations are distributed otherwise than the largest network's, whose moving
    averages the state holds. The statistics become the mean over the given batches of each batch's
    own, whatever the layers' momentum: a layer updates them as s <- m s + (1 - m) b, and b follows
    from two updates that start from known values.

    Args:
      apply: `model.apply`.
      transform: the transform of the step, which decides what evaluation runs.
      statistics: regular expression over paths of `model_state`; what else the model keeps there is
        left alone.

    Returns:
      `recalibrate(state, batches, frozen=None) -> state`, pure and jittable, also mapped over
      architectures; each leaf of `batches` is [batches, ...]. The model runs in training mode
      with the weights and ranges of evaluation, so dropout is active.

    Raises:
      SelectorError: nothing in `model_state` matches.

    Reference: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques",
      2019, section 3.3, https://arxiv.org/abs/1903.05134.
    """

    def plain(params, model_state, batch, key, train):
        outputs, model_state = apply(params, model_state, batch, key, train)
        return outputs, model_state, {}

    def recalibrate(state: TrainState, batches: PyTree, frozen: PyTree = None) -> TrainState:
        old = select(state.model_state, statistics)
        ctx = Ctx(state.step, state.key, frozen, train=False)
        params = transform.view(state.vars.model, state.vars.extra, state.transform, ctx)
        forward = transform.wrap(plain, state.vars.extra, state.transform, ctx)

        def updated(value: float, batch: PyTree, key: Array) -> dict[str, Array]:
            start = {name: jnp.full_like(leaf, value) for name, leaf in old.items()}
            model_state = replace(state.model_state, start)
            return select(forward(params, model_state, batch, key, True)[1], statistics)

        def measure(total: dict[str, Array], numbered: tuple[Array, PyTree]):
            number, batch = numbered
            key = jax.random.fold_in(state.key, number)
            # The two passes differ in the averages only: XLA computes what they share once.
            low, high = updated(0.0, batch, key), updated(_PROBE, batch, key)
            own = {n: low[n] / (1 - (high[n] - low[n]) / _PROBE) for n in total}
            return {n: total[n] + own[n] for n in total}, None

        count = jax.tree.leaves(batches)[0].shape[0]
        zero = {n: jnp.zeros_like(leaf) for n, leaf in old.items()}
        total, _ = jax.lax.scan(measure, zero, (jnp.arange(count), batches))
        mean = {n: total[n] / count for n in total}
        return state._replace(model_state=replace(state.model_state, mean))

    return recalibrate
