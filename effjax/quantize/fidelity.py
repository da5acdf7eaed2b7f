"""How much of each layer's signal quantization leaves."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform, chain
from effjax.errors import SetupError
from effjax.interpret import Operation, intercept
from effjax.step import TrainState, forward

SITE_OUTPUTS = "outputs of the model"


def signal_to_noise(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batch: PyTree,
    *,
    reference: tuple[PyTree, PyTree] | None = None,
) -> dict[str, float]:
    """The signal-to-noise ratio of each quantized layer's outputs, in decibels.

    With y a layer's outputs in floating point and ŷ those of the quantized model, whose layers
    before it are quantized too, 10 log10(Σ y² / Σ (y - ŷ)²) over the batch, positions and channels.

    Args:
      apply: the model's.
      transform: with the quantizer.
      state: calibrated, if its ranges are static.
      batch: of examples.
      reference: (params, model_state) of the model in floating point, where those of `state` are no
        longer these (after learned rounding or bias correction).

    Returns:
      {site: decibels}, and that of the model's outputs under
      `SITE_OUTPUTS`.

    Raises:
      SetupError: nothing is quantized.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Dense(2), "x")
      >>> data = [{"x": jnp.arange(6.0).reshape(2, 3)}]
      >>> params, model_state = model.init(jax.random.key(0), data[0])
      >>> small = ej.quantize.ptq(model, params, model_state, data, 8, 8)
      >>> found = ej.quantize.signal_to_noise(model.apply, *small, data[0])
      >>> list(found), 30 < found["kernel"] < 60
      (['kernel', 'outputs of the model'], True)
    """
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    quantized = [p for p, own in facts.items() if {"weight_bits", "act_bits"} & {*own}]
    chosen = [name for p in quantized for name in (p, p.removeprefix("@"))]  # "@kernel#1"
    if not chosen:
        raise SetupError("signal_to_noise() finds no quantized layer in the transform.")
    params, model_state = reference or (state.vars.model, state.model_state)
    plain = state._replace(
        vars=state.vars._replace(model=params, extra={}), model_state=model_state, transform={}
    )

    def handler(op: Operation) -> tuple[Array, PyTree]:
        out = op.run(*op.operands)
        return out, out.astype(jnp.float32)

    def seeing(params: PyTree, model_state: PyTree, batch: PyTree, key: Array, train: bool):
        def closed(params, model_state, batch, key):
            return apply(params, model_state, batch, key, train)

        look = intercept(closed, lambda site: handler if site.path in chosen else None)
        (outputs, model_state), seen = look(params, model_state, batch, key)
        return (outputs, seen), model_state

    def outputs(transform: Transform, state: TrainState, batch: PyTree) -> dict[str, PyTree]:
        ctx = Ctx(state.step, state.key, None, train=False)
        out = forward(seeing, transform, state.vars, state.model_state, state.transform, batch, ctx)
        return {**out.outputs[1], SITE_OUTPUTS: out.outputs[0]}

    @jax.jit
    def compare(plain: TrainState, state: TrainState, batch: PyTree) -> dict[str, Array]:
        pairs = outputs(chain(), plain, batch), outputs(transform, state, batch)

        def power(tree: PyTree) -> Array:
            return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), jnp.zeros(()))

        return {
            name: 10 * jnp.log10(power(want) / power(jax.tree.map(jnp.subtract, want, got)))
            for name, want, got in ((n, pairs[0][n], pairs[1][n]) for n in pairs[0])
        }

    found = compare(plain, state, batch)
    order = [name for name in dict.fromkeys(chosen) if name in found]
    return {name: float(found[name]) for name in (*order, SITE_OUTPUTS)}
