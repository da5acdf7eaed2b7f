"""The curvature of the loss in each leaf, without the Hessian: Hutchinson's estimate."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.select import KERNELS, replace, select
from effjax.step import Loss

Objective = Callable[[PyTree, PyTree], Array]  # (params, batch) -> scalar


class Trace(NamedTuple):
    """The trace of one leaf's block of the Hessian.

    mean: over all probes and batches.
    error: its standard error.
    size: how many weights the leaf has; mean / size is the mean curvature.
    """

    mean: float
    error: float
    size: int


def objective_of(apply: Apply, loss: Loss, model_state: PyTree) -> Objective:
    """The loss in evaluation as a function of params and batch."""

    def objective(params: PyTree, batch: PyTree) -> Array:
        return loss(apply(params, model_state, batch, jax.random.key(0), False)[0], batch)

    return objective


def hessian_traces(
    objective: Objective,
    params: PyTree,
    batches: Iterable[PyTree],
    key: Array,
    *,
    pattern: str = KERNELS,
    probes: int = 32,
    together: int = 8,
) -> dict[str, Trace]:
    """The trace of the Hessian's diagonal block of each leaf, by Hutchinson's estimate.

        tr(H_i) = E[v_i · (H v)_i],  v = ±1 with equal probability, in all leaves at once

    H v is the derivative of the gradient in the direction v: a few times the cost of a gradient,
    and no Hessian. One probe serves all leaves, since blocks off the diagonal are 0 on average.

    Args:
      objective: `(params, batch) -> scalar`, twice differentiable; see `objective_of`. It sees the
        weights in floating point: rounding has no curvature.
      params: concrete, usually of a trained model, where HAWQ takes gradients for 0.
      batches: of equal shapes; estimates are means over them.
      key: of the probes.
      pattern: regular expression over params paths.
      probes: how many for each batch.
      together: how many run side by side, in that many times the memory; divides `probes`.

    Returns:
      {path: Trace}. Estimates may be negative: by chance, or where the model is no minimum.

    Raises:
      SelectorError: the pattern matches nothing.
      SetupError: no batches, or `probes` that `together` does not divide.

    Reference: Dong et al., "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks",
    2020, https://arxiv.org/abs/1911.03852; Hutchinson, 1990.
    """
    if together < 1 or probes < 1 or probes % together:
        raise SetupError(
            f"{probes} probes run {together} side by side; both are 1 or more, and together "
            "divides probes."
        )
    names = tuple(select(params, pattern))

    def products(keys: Array, params: PyTree, batch: PyTree) -> dict[str, Array]:
        chosen = select(params, pattern)

        def gradient(leaves: dict[str, Array]) -> dict[str, Array]:
            return jax.grad(lambda own: objective(replace(params, own), batch))(leaves)

        def probe(key: Array) -> dict[str, Array]:
            ways = {
                n: jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
                for i, (n, x) in enumerate(chosen.items())
            }
            turned = jax.jvp(gradient, (chosen,), (ways,))[1]
            return {n: jnp.vdot(ways[n], turned[n]).astype(jnp.float32) for n in ways}

        return jax.vmap(probe)(keys)

    compiled = jax.jit(products)
    found: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for number, batch in enumerate(batches):
        keys = jax.random.split(jax.random.fold_in(key, number), probes)
        for first in range(0, probes, together):
            for n, x in compiled(keys[first : first + together], params, batch).items():
                found[n].append(np.asarray(x, np.float64))
    if not found[names[0]]:
        raise SetupError("there were no batches to estimate the Hessian on; was it an iterator?")

    def trace(name: str) -> Trace:
        x = np.concatenate(found[name])
        error = x.std(ddof=1) / np.sqrt(x.size) if x.size > 1 else np.inf
        return Trace(float(x.mean()), float(error), int(np.size(select(params, pattern)[name])))

    return {n: trace(n) for n in names}
