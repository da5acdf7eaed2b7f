"""Bias correction: the mean error that rounding leaves at a layer's outputs is taken off again."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform, chain
from effjax.errors import SetupError
from effjax.interpret import Operation, intercept
from effjax.prune.calibration import peek
from effjax.quantize.follow import STATE, follow
from effjax.select import leaves, replace
from effjax.step import TrainState, forward


def correct_bias(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    *,
    reference: tuple[PyTree, PyTree] | None = None,
) -> TrainState:
    """Adds to each layer's bias what quantization has moved its outputs by on average.

    For each output channel, b += E[y] - E[ŷ], over the calibration batches and all positions, where
    y is the site's output in floating point and ŷ the quantized one. Layers are corrected in the
    order of execution, each with the inputs that the corrected ones before it give. A layer without
    a bias before a BatchNorm has it put into the running mean, m -= E[y] - E[ŷ].

    Args:
      apply: the model's.
      transform: with the quantizer.
      state: calibrated, if its ranges are static.
      batches: of a calibration split, in a list.
      reference: (params, model_state) of the model in floating point, where those of `state` are no
        longer these (after learned rounding).

    Returns:
      The state with other biases.

    Raises:
      SetupError: no batches, an iterator that is used up after once, nothing quantized, or a
        quantized layer to whose outputs nothing is added.

    Reference: Nagel et al., "Data-free quantization through weight equalization and bias
    correction", 2019, https://arxiv.org/abs/1906.04721, section 4.2 and appendix D.
    """
    if iter(batches) is batches:
        raise SetupError(
            "correct_bias() goes over the batches once for each layer, and this is an iterator "
            "that is used up after once. Pass a list."
        )
    first, _ = peek(batches)
    params, model_state = reference or (state.vars.model, state.model_state)
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    layers = follow(apply, state.vars.model, state.model_state, first)
    chosen = [path for path, own in facts.items() if {"weight_bits", "act_bits"} & set(own)]
    homes = {own.kernel: (own.first, own.added.get(own.first, 1)) for own in layers.values()}
    chosen = [path for path in chosen if not path.startswith("@")]
    if not chosen:
        raise SetupError("correct_bias() finds no quantized layer in the transform.")
    if lost := [path for path in chosen if not homes.get(path, ("", 1))[0]]:
        raise SetupError(
            f"there is nowhere to put a correction of {lost}: no bias, and no BatchNorm's mean, is "
            "added to their outputs directly (or they lie in a loop or are used twice). Build the "
            "layers with use_bias=True (0 will do), or quantize with bias_correction=False."
        )
    order = [kernel for kernel in homes if kernel in chosen]
    plain = state._replace(
        vars=state.vars._replace(model=params, extra={}), model_state=model_state, transform={}
    )
    want = _average(jax.jit(_means(apply, chain(), order)), plain, batches)
    measure = jax.jit(_means(apply, transform, order))
    for kernel in order:
        error = want[kernel] - _average(measure, state, batches)[kernel]
        home, sign = homes[kernel]
        where = state.model_state if home.startswith(STATE) else state.vars.model
        path = home.removeprefix(STATE)
        old = leaves(where)[path]
        new = replace(where, {path: old + (sign * error).reshape(old.shape).astype(old.dtype)})
        if home.startswith(STATE):
            state = state._replace(model_state=new)
        else:
            state = state._replace(vars=state.vars._replace(model=new))
    return state


def _means(
    apply: Apply, transform: Transform, paths: list[str]
) -> Callable[[TrainState, PyTree], dict[str, Array]]:
    """`(state, batch) -> {site: [channels]}`, the mean outputs."""

    def handler(op: Operation) -> tuple[Array, PyTree]:
        out = op.run(*op.operands)
        return out, jnp.mean(out.astype(jnp.float32), axis=tuple(range(out.ndim - 1)))

    def seeing(params: PyTree, model_state: PyTree, batch: PyTree, key: Array, train: bool) -> Any:
        closed = partial(_closed, apply, train)
        look = intercept(closed, lambda site: handler if site.path in paths else None)
        (outputs, model_state), seen = look(params, model_state, batch, key)
        return (outputs, seen), model_state

    def run(state: TrainState, batch: PyTree) -> dict[str, Array]:
        ctx = Ctx(state.step, state.key, None, train=False)
        out = forward(seeing, transform, state.vars, state.model_state, state.transform, batch, ctx)
        return out.outputs[1]

    return run


def _closed(apply: Apply, train: bool, params, model_state, batch, key):
    return apply(params, model_state, batch, key, train)


def _average(measure: Callable[..., Any], state: TrainState, batches: Iterable) -> Any:
    found = [measure(state, batch) for batch in batches]
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)
