"""Proxies from gradients: saliencies of weights or channels, summed over the network.

Arguments that all have are those of `effjax.nas.proxies`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.interpret import Operation, intercept
from effjax.nas.proxy_parts import at, total, training, wide
from effjax.prune import oneshot, scores
from effjax.prune.calibration import Leaves, chosen_leaves, no_key
from effjax.select import KERNELS, replace
from effjax.select import select as select_leaves

Loss = Callable[[PyTree, PyTree], Array]


def grad_norm(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    loss: Loss,
    *,
    select: str = KERNELS,
    key: Array | None = None,
) -> Array:
    """The sum over weight tensors of the Euclidean norms of the loss's gradients: Σ_l ‖∂L/∂w_l‖."""
    chosen = chosen_leaves(params, select)
    grads = jax.grad(_objective(apply, params, model_state, batch, loss, key))(chosen)
    return total(jnp.sqrt(jnp.sum(jnp.square(wide(g)))) for g in grads.values())


def snip(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    loss: Loss,
    *,
    select: str = KERNELS,
    key: Array | None = None,
) -> Array:
    """The sum of SNIP's saliencies: Σ |g w|; see `effjax.prune.scores.saliency`."""
    chosen = chosen_leaves(params, select)
    grads = jax.grad(_objective(apply, params, model_state, batch, loss, key))(chosen)
    return total(jnp.sum(scores.saliency(w, grads[path])) for path, w in chosen.items())


def grasp(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    loss: Loss,
    *,
    select: str = KERNELS,
    key: Array | None = None,
) -> Array:
    """GraSP's sum, with the sign that the proxies' paper gives it: -Σ w (H g), of either sign.

    See `effjax.prune.scores.grasp`; the Hessian-gradient product is forward over reverse.
    """
    chosen = chosen_leaves(params, select)
    slope = jax.grad(_objective(apply, params, model_state, batch, loss, key))
    products = jax.jvp(slope, (chosen,), (slope(chosen),))[1]
    return -total(jnp.sum(scores.grasp(w, products[path])) for path, w in chosen.items())


def synflow(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    select: str = KERNELS,
    keep: str | None = None,
) -> Array:
    """The logarithm of the sum of synaptic flows: log Σ |w ∂R/∂|w||, without data.

    R is the sum of the outputs for one input of ones, with every parameter replaced by its absolute
    value and the model in evaluation: the untrained statistics of BatchNorm make it the identity,
    and the paper leaves it out. The logarithm changes no ranking; a network through which nothing
    flows has -inf. Deep networks overflow float32 (then +inf or NaN): enable x64 and give params in
    float64.

    Args:
      keep: a regular expression for the batch's entries that stay as they are: the architecture,
        "^edges$". Of the others one example is kept, floating-point ones replaced by ones.

    Reference: Tanaka et al., 2020, https://arxiv.org/abs/2006.05467.
    """
    ones = jax.tree.map(oneshot.one_of_ones, batch)
    if keep is not None:
        ones = replace(ones, select_leaves(batch, keep))
    state, linear = oneshot.absolute(model_state), oneshot.absolute(params)
    chosen = chosen_leaves(linear, select)
    grads = jax.grad(lambda w: oneshot.flow(apply, replace(linear, w), state, ones))(chosen)
    return jnp.log(total(jnp.sum(scores.synflow(w, grads[path])) for path, w in chosen.items()))


def fisher(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    loss: Loss,
    *,
    select: str = KERNELS,
    key: Array | None = None,
) -> Array:
    """The sum of the channels' Fisher saliencies: Σ_c k_c ½ mean_n (∂L/∂z_nc)².

    z_nc = 1 multiplies channel c of example n of what a selected weight computes, so that its
    derivative is the sum over positions of activation times gradient. k_c is the number of weights
    that the channel has: the proxies' authors give each of them the channel's saliency, and sum
    over weights. Examples lie along the first axis of every such result, channels along the last.

    References: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
    https://arxiv.org/abs/1801.05787; Turner et al., "BlockSwap", 2020,
    https://arxiv.org/abs/1906.04113.
    """
    counts: dict[str, float] = {}

    def blank(op: Operation) -> tuple[Array, PyTree]:
        assert op.site.weight is not None
        out = op.run(*op.operands)
        counts[op.site.path] = op.operands[op.site.weight].size / out.shape[-1] / len(out)
        return out, jnp.zeros((len(out), *[1] * (out.ndim - 2), out.shape[-1]))

    def gated(op: Operation) -> tuple[Array, PyTree]:
        out = op.run(*op.operands)
        return out * op.given.astype(out.dtype), jnp.zeros(())

    chosen = chosen_leaves(params, select)
    args, forward = (params, model_state, batch, no_key(key)), training(apply)
    shapes = jax.eval_shape(intercept(forward, at(blank, chosen)), *args)[1]
    gates = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)

    def objective(gates: PyTree) -> Array:
        outputs, _ = intercept(forward, at(gated, chosen), given=gates)(*args)
        return loss(outputs, batch)

    slopes = jax.grad(objective)(gates)
    return total(counts[path] * jnp.sum(jnp.square(s)) for path, s in slopes.items()) / 2


def _objective(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree, loss: Loss, key: Array | None
) -> Callable[[Leaves], Array]:
    """The loss by the chosen leaves."""

    def objective(chosen: Leaves) -> Array:
        outputs = apply(replace(params, chosen), model_state, batch, no_key(key), True)[0]
        return loss(outputs, batch)

    return objective
