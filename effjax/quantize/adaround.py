"""AdaRound: which way each weight is rounded is learned, so that layers' outputs change little."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from effjax.core import Apply, PyTree, Transform
from effjax.quantize.layerwise import Problem, check_size, round_layers
from effjax.select import KERNELS
from effjax.step import TrainState

LOW, HIGH = -0.1, 1.1  # the rectified sigmoid's ends
WARM = 0.2  # of the steps, without the regulariser
BETAS = 20.0, 2.0


def adaround(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    *,
    select: str = KERNELS,
    sequential: bool = True,
    steps: int = 1000,
    rate: float = 0.02,
    regulariser: float = 10.0,
) -> TrainState:
    """Moves weights to the point of their grid above or below, whichever serves outputs better.

    Layer by layer, in the order of execution, each with the inputs x that the layers rounded before
    it give, a number V for each weight w is learned (Adam), which minimizes

        E ‖(W̃ - W) x‖² + λ Σ (1 - |2 h(V) - 1|^β),   W̃ = s (floor(W / s) + h(V)),
        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

    from h = W / s - floor(W / s). After a fifth of the steps without the second term, β falls from
    20 to 2 and drives h to 0 or 1. The expectation is over all positions and examples: it needs no
    more than the moments E x xᵀ, which are measured once for each layer. It is taken over the
    error of rounding to nearest, for each output and weight, so that λ needs no tuning to a layer.
    An output that rounding to nearest serves better keeps that. (The paper's loss also has the
    layer's activation function in it, and inputs of the float model on one side.)

    `transform` says which weights, to how many bits, with which scales; afterwards it rounds the
    weights to where they are. The largest weight of each scale stays as it is, and so do zeros.

    Args:
      apply: the model's.
      transform: with a `qat` in it.
      state: with its weights in floating point.
      batches: of a calibration split, in a list. They are gone through once for each layer.
      select: regular expression over params paths, of the quantized weights to move.
      sequential: each layer with the inputs that the rounded ones before it give, compiled anew for
        each. Otherwise all with the float model's, in one pass.
      steps: of Adam, for each layer.
      rate: Adam's learning rate.
      regulariser: λ.

    Returns:
      The state with other weights.

    Raises:
      SetupError, SiteError: as `gptq`; steps, a rate or a regulariser that are not positive.

    Reference: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020,
    https://arxiv.org/abs/2004.10568.
    """
    check_size("adaround", steps=steps, rate=rate, regulariser=regulariser)
    solve = partial(_solve, steps=steps, rate=rate, regulariser=regulariser)
    return round_layers("adaround", apply, transform, state, batches, select, sequential, solve)


def rectified_sigmoid(v: Array) -> Array:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), which reaches 0 and 1."""
    return jnp.clip(jax.nn.sigmoid(v) * (HIGH - LOW) + LOW, 0, 1)


def output_error(change: Array, moments: Array) -> Array:
    """E ((w̃ - w)ᵀ x)² of each output, [..., out], from w̃ - w [..., out, in] and E x xᵀ."""
    return jnp.einsum("...oi,...ij,...oj->...o", change, moments, change)


@partial(jax.jit, static_argnames="steps")
def _solve(problem: Problem, steps: int, rate: float, regulariser: float) -> Array:
    w, moments, s, _, fixed = problem
    below = jnp.floor(w / s)
    fraction = w / s - below
    nearest = jnp.round(w / s)
    before = output_error(s * nearest - w, moments)[..., None]
    free = jnp.sum(~fixed, axis=-1, keepdims=True)
    weigh = jnp.where(before > 0, free / jnp.where(before > 0, before, 1), 0)
    rest = jnp.clip((fraction - LOW) / (HIGH - LOW), 1e-3, 1 - 1e-3)
    start = jnp.log(rest / (1 - rest))
    tx = optax.adam(rate)

    def loss(v: Array, at: Array) -> Array:
        h = jnp.where(fixed, fraction, rectified_sigmoid(v))
        change = s * (below + h) - w
        # The gradient of change · H · change, of which nothing but that is needed.
        slope = lax.stop_gradient(2 * weigh * jnp.einsum("moi,mij->moj", change, moments))
        past = jnp.maximum(at - WARM, 0) / (1 - WARM)
        beta = BETAS[0] + (BETAS[1] - BETAS[0]) * past
        open_ = jnp.where(fixed, 0, 1 - jnp.abs(2 * h - 1) ** beta)
        return jnp.sum(slope * change) + jnp.where(at >= WARM, regulariser, 0) * jnp.sum(open_)

    def step(i: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        v, opt = carry
        updates, opt = tx.update(jax.grad(loss)(v, i / steps), opt)
        return optax.apply_updates(v, updates), opt

    v, _ = lax.fori_loop(0, steps, step, (start, tx.init(start)))
    learned = jnp.where(fixed, nearest, below + (rectified_sigmoid(v) >= 0.5))
    after = output_error(s * learned - w, moments)[..., None]
    return jnp.where(after < before, learned, nearest)
