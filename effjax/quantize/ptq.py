"""Post-training quantization: from float params to a quantized model, without training."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import optax

from effjax.core import PyTree, Transform, chain
from effjax.errors import SetupError
from effjax.model import Model
from effjax.quantize import numerics
from effjax.quantize.calibrate import calibrate
from effjax.quantize.estimators import Estimator
from effjax.quantize.qat import qat
from effjax.step import TrainState, init_state


class Quantized(NamedTuple):
    """A quantized model, as training would leave it.

    `make_eval(model.apply, transform, metrics)(state, batch)` evaluates it, `quantize.integer`
    makes an integer program of it where it is symmetric, and a train step with the same transform
    goes on from it.
    """

    transform: Transform
    state: TrainState


def ptq(
    model: Model,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[PyTree],
    weights: numerics.Bits = 8,
    activations: numerics.Bits = 8,
    *,
    symmetric: bool = True,
    estimator: str | Estimator = "mse",
    transform: Transform | None = None,
) -> Quantized:
    """Quantizes a trained model: weights by their largest values, activations by calibration.

    Args:
      model: whose params these are.
      params, model_state: trained in floating point.
      batches: of a calibration split, never test data; a few hundred examples do.
      weights, activations: bits, for `qat` with static ranges of activations and a scale for each
        output channel of a weight.
      symmetric: whether activations' ranges are. Below 8 bits False is better: what is never
        negative then has twice the levels; `quantize.integer` takes True.
      estimator: of the activations' ranges; see `calibrate`.
      transform: in place of that `qat`: another with static ranges, or a chain with masks and one.

    Returns:
      The transform, and the state that has its ranges.

    Raises:
      SetupError, SelectorError, SiteError: as `qat` and `calibrate`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Dense(2), "x")
      >>> data = [{"x": jnp.arange(6.0).reshape(2, 3)}]
      >>> params, model_state = model.init(jax.random.key(0), data[0])
      >>> small = ej.quantize.ptq(model, params, model_state, data, 8, 8)
      >>> float(small.state.transform["quant"]["ranges"]["kernel"])
      5.0

    Reference: Krishnamoorthi, 2018, https://arxiv.org/abs/1806.08342.
    """
    batches = list(batches)
    if not batches:
        raise SetupError("ptq() got no batches: activation ranges come from data. Give some.")
    if transform is None:
        transform = chain(quant=qat(weights, activations, ranges="static", symmetric=symmetric))
    state = init_state(
        jax.random.key(0),
        model,
        transform,
        optax.identity(),
        batches[0],
        params=params,
        model_state=model_state,
    )
    return Quantized(transform, calibrate(model.apply, transform, state, batches, estimator))
