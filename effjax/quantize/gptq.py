"""GPTQ: weights are rounded one input after the other, and those not yet rounded make up for it."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Apply, PyTree, Transform
from effjax.prune.surgeon import factor
from effjax.quantize.layerwise import Problem, check_size, round_layers
from effjax.select import KERNELS
from effjax.step import TrainState


def gptq(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    *,
    select: str = KERNELS,
    sequential: bool = True,
    damping: float = 0.01,
) -> TrainState:
    """Moves weights to points of their grids so that layers' outputs on the data change little.

    Layer by layer, in the order of execution, each with the inputs that the layers rounded before
    it give. `gptq_matrix` has the maths. `transform` says which weights, to how many bits, with
    which scales (for a channel, a tile or all of it); afterwards it rounds the weights to where
    they are. The largest weight of each scale stays as it is, and so do zeros.

    qwix's GPTQ (`qwix.contrib.gptq_core.quantize_weight`) takes a description of the quantization
    whose type is not public, and has another grid; the tests compare with it.

    Args:
      apply: the model's.
      transform: with a `qat` in it.
      state: with its weights in floating point.
      batches: of a calibration split, in a list. They are gone through once for each layer.
      select: regular expression over params paths, of the quantized weights to move.
      sequential: each layer with the inputs that the rounded ones before it give, compiled anew for
        each. Otherwise all with the float model's, in one pass.
      damping: what is added to the diagonal of the moments, as a fraction of its mean.

    Returns:
      The state with other weights.

    Raises:
      SetupError: no batches, an iterator; no quantized weight that is selected; grids that are not
        `qat`'s; inputs that are not finite, or all 0.
      SiteError: a weight that is not used as a plain matrix or kernel.

    Reference: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained
    transformers", 2023, https://arxiv.org/abs/2210.17323.
    """
    check_size("gptq", damping=damping)
    solve = partial(_solve, damping=damping)
    return round_layers("gptq", apply, transform, state, batches, select, sequential, solve)


def gptq_matrix(
    weight: Array,
    moments: Array,
    scale: Array,
    bound: Array | float,
    fixed: Array | None = None,
    damping: Array | float = 0.01,
) -> Array:
    """The integers of one matrix by GPTQ.

    With H = XᵀX + λI and the upper triangular U of H⁻¹ = UᵀU, the inputs j are rounded one after
    the other, q_j = clip(round(w_j / s_j), -B, B), and those after it make up for what that lost:

      w[:, j:] -= (w_j - s_j q_j) / U_jj · U[j, j:].

    Args:
      weight: float [out, in].
      moments: XᵀX, or the mean over examples: float [in, in]. Its scale has no effect.
      scale: step of the grid at each weight, [out, in].
      bound: B.
      fixed: bool [out, in], weights that are rounded from where they were at first.
      damping: λ as a fraction of the mean diagonal of XᵀX.

    Returns:
      Integers as float32 [out, in].

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.quantize.gptq import gptq_matrix
      >>> same = jnp.ones((2, 2))  # the second input repeats the first
      >>> gptq_matrix(jnp.array([[1.4, 1.4]]), same, jnp.ones((1, 2)), 7, damping=1e-4).tolist()
      [[1.0, 2.0]]
    """
    upper = factor(moments.astype(jnp.float32), damping, 0)
    weight = weight.astype(jnp.float32)
    nearest = jnp.clip(jnp.round(weight / scale), -bound, bound)
    stays = jnp.zeros(weight.shape, bool) if fixed is None else fixed

    def column(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, codes = carry
        w, s = weight[:, j], scale[:, j]
        q = jnp.clip(jnp.round(w / s), -bound, bound)
        q = jnp.where(stays[:, j], nearest[:, j], q)
        lost = (w - s * q) / upper[j, j]
        return weight - lost[:, None] * upper[j], codes.at[:, j].set(q)

    return lax.fori_loop(0, weight.shape[1], column, (weight, jnp.zeros_like(weight)))[1]


@jax.jit
def _solve(problem: Problem, damping: Array | float) -> Array:
    one = jax.vmap(gptq_matrix, (0, 0, 0, None, 0, None))
    return one(*problem, damping)
