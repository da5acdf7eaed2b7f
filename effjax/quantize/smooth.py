"""SmoothQuant: large input channels are made smaller, and the weights that meet them larger."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array
from qwix.contrib import smooth_quant

from effjax.core import Apply, PyTree
from effjax.interpret import Operation
from effjax.prune import calibration
from effjax.quantize.rescale import KINDS, Rescaling
from effjax.schedules import check_fraction


def smooth(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[PyTree],
    layers: Sequence[str] | None = None,
    *,
    alpha: float = 0.5,
    epsilon: float = 1e-5,
) -> tuple[PyTree, PyTree]:
    """Moves the ranges of activations into weights; the model's outputs stay as they are.

    The input channel j of a layer is divided by

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

    and its weights multiplied by it, as `qwix.contrib.smooth_quant` has it. What is in front takes
    the division: the scale and shift of a LayerNorm or RMSNorm, or the output channels of a layer
    before a ReLU (as in `equalize`). Where several layers read the same (queries, keys and values),
    |w_j| is the largest of theirs.

    Args:
      apply, params, model_state: a model in evaluation. BatchNorms are folded.
      batches: of a calibration split.
      layers: whose outputs are divided, by path without "/kernel" or "/scale". Left out, all those
        of which the program shows that it is possible.
      alpha: how much of the difficulty moves to the weights, in [0, 1].
      epsilon: the BatchNorms'.

    Returns:
      (params, model_state) of the same structure.

    Raises:
      SetupError: as `equalize`; no batches; inputs that are not finite.
      ScheduleError: alpha outside [0, 1].

    Reference: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for
    large language models", 2023, https://arxiv.org/abs/2211.10438.
    """
    check_fraction(alpha, "alpha of smooth()")
    first, batches = calibration.peek(batches)
    kinds = (*KINDS, "scale")
    model = Rescaling("smooth", apply, params, model_state, first, layers, kinds, epsilon)
    largest = model.read(batches, _largest, jnp.maximum)
    named = model.named()
    for name in model.chosen:
        own = [jnp.max(jnp.abs(w), axis=(0, 2)) for w in model.inputs(named, name)]
        seen = [largest[n] for n in model.chosen[name]]
        x, w = (jnp.max(jnp.stack(each), axis=0) for each in (seen, own))
        alive = (x > 0) & (w > 0)
        s = smooth_quant.compute_scales_ratio(x, jnp.where(alive, w, 1), alpha)
        named = model.moved(named, name, jnp.where(alive, s, 1))
    return model.finished(named)


def _largest(op: Operation, features: int) -> tuple[Array, Array]:
    x = op.operands[0].astype(jnp.float32).reshape(-1, features)
    return op.run(*op.operands), jnp.max(jnp.abs(x), axis=0)
