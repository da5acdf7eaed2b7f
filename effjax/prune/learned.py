"""Sparsity that is learned by gradient descent: a threshold for each layer, or gates."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import ScheduleError, SetupError
from effjax.prune.engine import Named, selected
from effjax.prune.masks import masked
from effjax.prune.patterns import Pattern, unstructured
from effjax.schedules import Scalar, is_traced
from effjax.select import leaves, replace

# The hard concrete distribution: its temperature, and how far it is stretched beyond [0, 1].
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def soft_threshold(
    initial: Scalar = -5.0, decay: Scalar = 0.0, *, select: str | None = None
) -> Transform:
    """Soft threshold reparameterization (STR): each layer learns its threshold.

    The forward pass sees

        w' = sign(w) * max(|w| - sigmoid(s), 0),

    with one trainable s for each layer, at "extra/threshold/<path>". Both get the gradient of this
    expression: dL/dw = dL/dw' where |w| is above the threshold and exactly 0 elsewhere, dL/ds =
    -sigmoid'(s) * sum of sign(w) dL/dw' over those above. Weights below keep their values, and come
    back when the threshold falls.

    What makes a network sparse is that s is pulled towards 0, a threshold of 1/2: by the
    optimizer's weight decay (the paper's way, with the same decay as the weights'), or by `decay`
    here. The optimizer decides: leave decay out of `label_tree`'s group for "threshold" to rely on
    the latter alone.

    Args:
      initial: s at the start, perhaps traced. The default is a threshold of 0.0067; take one below
        the layers' typical weights. The paper starts as low as -12800 and lets decay do the work.
      decay: d in the added loss d/2 * (sum of s²).
      select: a regular expression for the params paths that are pruned. Left out, every kernel but
        those of the model's first and last operation.

    Returns:
      A Transform of kind "mask" with extra {"threshold": {path: float32 []}} and no state. It
      reports "sparsity" and "sparsest", the fractions of zeros, and adds the loss "threshold".

    Raises:
      ScheduleError: a negative decay.
      SelectorError, SetupError (at `init`): as `prune.magnitude`.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> str_ = ej.prune.soft_threshold(select="")
      >>> extra = {"threshold": {"kernel": jnp.float32(0.0)}}  # sigmoid(0) = 0.5
      >>> str_.export({"kernel": jnp.array([2.0, -0.75, 0.25])}, extra, {})["kernel"].tolist()
      [1.5, -0.25, 0.0]

    Reference: Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity",
    2020, https://arxiv.org/abs/2002.03231.
    """
    if not is_traced(decay) and decay < 0:
        raise ScheduleError(f"the thresholds' decay is {decay}; it is a number >= 0.")

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        start = jnp.asarray(initial, jnp.float32)
        return {"threshold": dict.fromkeys(selected(params, setup, select), start)}, {}

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        named = leaves(params)
        return replace(params, {p: _soft(named[p], s) for p, s in extra["threshold"].items()})

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        return export(params, extra, state)

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        return {"threshold": decay / 2 * sum(s**2 for s in extra["threshold"].values())}

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        return _zeros(export(vars.model, vars.extra, state), vars.extra["threshold"])

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        return _facts(export(params, extra, state), extra["threshold"])

    return Transform(
        init=init,
        view=view,
        loss=loss,
        export=export,
        report=report,
        describe=describe,
        kind="mask",
    )


def _soft(weight: Array, s: Array) -> Array:
    threshold = jax.nn.sigmoid(s).astype(weight.dtype)
    return masked(weight - jnp.sign(weight) * threshold, jnp.abs(weight) > threshold)


def hard_concrete(
    strength: Scalar,
    *,
    droprate: float = 0.5,
    pattern: Pattern | None = None,
    select: str | None = None,
) -> Transform:
    """L0 regularization by hard concrete gates: each weight, block or channel learns whether it is.

    Weights are multiplied with gates z that are 0 or 1 often and between them at times. With one
    trainable log a for each gate, at "extra/gate/<path>", and u ~ U(0, 1) drawn in each step,

        s = sigmoid((log u - log(1 - u) + log a) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1)

    with beta = 2/3, gamma = -0.1, zeta = 1.1, through which the gradient flows to both. Evaluation
    and export take z = clip(sigmoid(log a) (zeta - gamma) + gamma, 0, 1) for every step's key, and
    weights whose z is 0 are exactly 0. The loss term is

        strength * (sum of P(z > 0) over weights) / (number of weights),
        P(z > 0) = sigmoid(log a - beta log(-gamma / zeta)),

    the expected fraction of weights that are not 0 (the gates of a layer count alike): the paper's
    lambda is strength divided by the number of weights.

    Args:
      strength: of the loss term, perhaps traced; 0 leaves gates to the task alone.
      droprate: log a starts near log((1 - droprate) / droprate), between 0 and 1.
      pattern: what shares a gate; left out, each weight has its own (and the cost is one more
        number to train for each). `channel()` makes whole channels vanish, for `prune.compact`.
      select: a regular expression for the params paths that are pruned. Left out, every kernel but
        those of the model's first and last operation.

    Returns:
      A Transform of kind "mask" with extra {"gate": {path: float32 [grid of the pattern]}} and
      state {"size": {path: float32 []}}. It reports "sparsity" and "sparsest" of what would be
      shipped, and adds the loss "l0".

    Raises:
      ScheduleError: a negative strength, or a droprate outside (0, 1).
      SetupError: an N:M pattern; at `init`, a leaf that the pattern does not fit.
      SelectorError (at `init`): nothing is selected.

    Example:
      >>> import effjax as ej
      >>> gates = ej.chain(prune=ej.prune.hard_concrete(0.1, pattern=ej.prune.channel()))

    Reference: Louizos, Welling and Kingma, "Learning sparse neural networks through L0
    regularization", 2018, https://arxiv.org/abs/1712.01312.
    """
    if not is_traced(strength) and strength < 0:
        raise ScheduleError(f"the strength of the L0 penalty is {strength}; it is a number >= 0.")
    if not 0.0 < droprate < 1.0:
        raise ScheduleError(
            f"droprate is {droprate}; it is the share of gates that are off at first, in (0, 1)."
        )
    own = unstructured() if pattern is None else pattern
    if own.sparsity is not None:
        raise SetupError(
            "gates decide by themselves how many weights are kept, and an N:M pattern fixes it. "
            "Use another pattern, or movement(pattern=n_m(...)), which learns N:M masks."
        )

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        found = selected(params, setup, select)
        for path, leaf in found.items():
            own.check(path, leaf.shape)
        center, gates = math.log((1 - droprate) / droprate), {}
        for key_, (path, leaf) in zip(
            jax.random.split(key, len(found)), found.items(), strict=True
        ):
            grid = jax.eval_shape(own.pool, jax.ShapeDtypeStruct(leaf.shape, jnp.float32)).shape
            gates[path] = center + 0.01 * jax.random.normal(key_, grid, jnp.float32)
        return {"gate": gates}, {"size": {p: jnp.float32(x.size) for p, x in found.items()}}

    def gated(params: PyTree, gates: Named) -> PyTree:
        named, seen = leaves(params), {}
        for path, gate in gates.items():
            full = own.expand(gate, named[path].shape).astype(named[path].dtype)
            seen[path] = masked(named[path] * full, full > 0)
        return replace(params, seen)

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return gated(params, {p: _stretch(jax.nn.sigmoid(g)) for p, g in extra["gate"].items()})

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        if not ctx.train:
            return export(params, extra, state)
        gates = extra["gate"]
        keys = jax.random.split(ctx.key, len(gates))
        return gated(params, {p: _draw(k, gates[p]) for k, p in zip(keys, gates, strict=True)})

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        size, shift = state["size"], BETA * math.log(-GAMMA / ZETA)
        on = [size[p] * jnp.mean(jax.nn.sigmoid(g - shift)) for p, g in extra["gate"].items()]
        return {"l0": strength * sum(on) / sum(size.values())}

    def report(vars: Vars, state, aux, ctx: Ctx) -> Metrics:
        return _zeros(export(vars.model, vars.extra, state), vars.extra["gate"])

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        return _facts(export(params, extra, state), extra["gate"])

    return Transform(
        init=init,
        view=view,
        loss=loss,
        export=export,
        report=report,
        describe=describe,
        kind="mask",
    )


def _stretch(s: Array) -> Array:
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def _draw(key: Array, gate: Array) -> Array:
    # logit(u) of a uniform u is logistic.
    return _stretch(
        jax.nn.sigmoid((jax.random.logistic(key, gate.shape, gate.dtype) + gate) / BETA)
    )


def _zeros(params: PyTree, paths: Mapping[str, Any]) -> Metrics:
    """The fraction of zeros of some leaves together, and that of the sparsest."""
    named = leaves(params)
    each = jnp.stack([jnp.mean(named[path] == 0, dtype=jnp.float32) for path in paths])
    size = jnp.array([named[path].size for path in paths], jnp.float32)
    return {"sparsity": jnp.sum(each * size) / jnp.sum(size), "sparsest": jnp.max(each)}


def _facts(params: PyTree, paths: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    named = leaves(params)
    return {path: {"sparsity": float(jnp.mean(named[path] == 0))} for path in paths}
