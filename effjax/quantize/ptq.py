"""Post-training quantization: from float params to a quantized model, without training."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import optax

from effjax.core import Apply, PyTree, Transform, chain
from effjax.errors import SetupError
from effjax.model import Model
from effjax.quantize import numerics
from effjax.quantize.adaround import adaround
from effjax.quantize.calibrate import calibrate
from effjax.quantize.correct import correct_bias
from effjax.quantize.equalize import equalize as rescaled
from effjax.quantize.estimators import Estimator
from effjax.quantize.gptq import gptq
from effjax.quantize.qat import qat
from effjax.step import TrainState, init_state

Rounder = Callable[[Apply, Transform, TrainState, list[PyTree]], TrainState]
METHODS: dict[str, Rounder] = {"gptq": gptq, "adaround": adaround}


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
    per_channel: bool = True,
    symmetric: bool = True,
    estimator: str | Estimator = "mse",
    equalize: bool = False,
    method: Literal["nearest", "gptq", "adaround"] | Rounder = "nearest",
    bias_correction: bool = False,
    transform: Transform | None = None,
) -> Quantized:
    """Quantizes a trained model: weights by their largest values, activations by calibration.

    In this order: channels are equalised (`quantize.equalize`, which folds BatchNorms), weights
    rounded by the method, activation ranges calibrated (`calibrate`), biases corrected
    (`correct_bias`). Each is a function of its own, for other settings than its defaults.

    Args:
      model: whose params these are.
      params, model_state: trained in floating point.
      batches: of a calibration split, never test data; a few hundred examples do.
      weights, activations: bits, for `qat` with static ranges of activations.
      per_channel: one scale for each output channel of a weight, or one for all of it.
      symmetric: whether activations' ranges are. Below 8 bits False is better: what is never
        negative then has twice the levels; `quantize.integer` takes True.
      estimator: of the activations' ranges; see `calibrate`.
      equalize: whether channels of layers that follow each other get equal ranges: what one scale
        for a weight needs, above all in depthwise networks. Not through ReLU6, GELU or SiLU.
      method: which way weights are rounded: "nearest"; "gptq" and "adaround", so that the outputs
        of layers change little (`quantize.gptq`, `quantize.adaround`): what 4 bits and fewer need;
        or one of these functions with settings of its own, `partial(adaround, steps=3000)`.
      bias_correction: whether each layer's mean error is taken off its bias.
      transform: in place of that `qat`: another with static ranges, or a chain with masks and one.

    Returns:
      The transform, and the state that has its ranges.

    Raises:
      SetupError, SelectorError, SiteError: no batches; and as `qat`, `equalize`, `calibrate` and
        `correct_bias`.

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
    rounder = METHODS.get(method) if isinstance(method, str) else method
    if rounder is None and method != "nearest":
        raise SetupError(f"method is {method!r}; there are {['nearest', *METHODS]}.")
    batches = list(batches)
    if not batches:
        raise SetupError("ptq() got no batches: activation ranges come from data. Give some.")
    if equalize:
        params, model_state = rescaled(model.apply, params, model_state, batches[0])
    if transform is None:
        transform = chain(
            quant=qat(
                weights,
                activations,
                ranges="static",
                per_channel=per_channel,
                symmetric=symmetric,
            )
        )
    state = init_state(
        jax.random.key(0),
        model,
        transform,
        optax.identity(),
        batches[0],
        params=params,
        model_state=model_state,
    )
    if rounder is not None:
        state = rounder(model.apply, transform, state, batches)
    state = calibrate(model.apply, transform, state, batches, estimator)
    if bias_correction:
        state = correct_bias(
            model.apply, transform, state, batches, reference=(params, model_state)
        )
    return Quantized(transform, state)
