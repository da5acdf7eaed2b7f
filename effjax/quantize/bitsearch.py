"""A differentiable search for bit widths: every leaf's is a softmax over candidates, trained with
the weights under a penalty on the expected size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.core import Ctx, Forward, Metrics, PyTree, Setup, Transform
from effjax.errors import ScheduleError, SetupError
from effjax.interpret import Operation
from effjax.quantize import engine, levels, lowbit, numerics
from effjax.quantize.budget import Allocation, Table, allocate
from effjax.quantize.rules import Bits, Rules, by_leaf
from effjax.schedules import Scalar, as_schedule, is_traced
from effjax.select import KERNELS
from effjax.sites import Site


def bit_search(
    budget: Scalar = 3.0,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    activations: numerics.Bits | Literal["same"] = 8,
    *,
    unit: Literal["bits", "bitops"] = "bits",
    strength: Scalar = 1.0,
    temperature: Scalar | Callable[[Array], Array] = 1.0,
    draw: Literal["gumbel", "softmax"] = "gumbel",
    select: str = KERNELS,
    per_channel: bool = True,
    symmetric: bool = True,
    rules: Sequence[tuple[str, Bits]] = (),
) -> Transform:
    """Differentiable search for the bits of each layer (EdMIPS, DNAS).

    In training each leaf is seen as a mixture of its roundings to the candidate widths b,

        q(w) = sum_b p_b Q_b(w),  p = softmax((logits + noise) / temperature)

    where `draw` is "gumbel" (DNAS: noise is Gumbel's, drawn anew in each step, so that p is near
    one-hot at low temperatures) or "softmax" (EdMIPS: no noise). Rounding is straight-through,
    dq/dw = 1, and dq/dp_b = Q_b(w). To the loss is added

        strength · max(0, E[bits] / budget - 1),  E[bits] = sum_i u_i sum_b p_ib b / sum_i u_i

    with p without noise, and u_i the leaf's weights ("bits") or its MACs ("bitops"). Evaluation
    rounds each leaf to its most probable width alone, as `qat` would; zeros stay zeros.

    What is found need not meet the budget exactly. `within` gives the most probable bits that do,
    to train with by `qat(rules=by_leaf(...))`.

    Args:
      budget: the average number of bits; may be traced, as `strength` and `activations`.
      widths: candidates, 1..8, or 16 and more for floating point.
      activations: bits of what the weights are multiplied with, with dynamic ranges as in `qat`,
        which are not searched for; or "same", a layer's width for both of its operands: then its
        activations are mixed as its weights are, of widths from 2.
      unit: what the average is over.
      strength: of the penalty.
      temperature: above 0; a number or a schedule.
      draw: see above.
      select, per_channel, symmetric: as `qat`.
      rules: (pattern, Bits) pairs; sites that one matches have these bits and are not searched, nor
        counted.

    Extra: {"logits": {params path: float32 [widths]}}, zeros at first. Give them a label, and
    thereby a learning rate, of their own, without weight decay: (r"^extra/.*logits/", "bits").

    State: "scales" and "tables" as `qat`, and {"units": {params path: u_i}}. Metrics: "bits" is
    E[bits], "chosen" the average of the most probable ones.

    Raises:
      SetupError: fewer than two widths, some that are none or twice the same, a budget outside of
        them, an unknown unit or draw; every site matched by a rule (at `init`).
      ScheduleError: a temperature that is not positive.
      SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> search = ej.quantize.bit_search(3.0, (2, 4, 8), temperature=0.5)
      >>> search.kind
      'quantize'

    Reference: Cai and Vasconcelos, "Rethinking differentiable search for mixed-precision neural
    networks", 2020, https://arxiv.org/abs/2004.05795 (EdMIPS); Wu et al., "Mixed precision
    quantization of ConvNets via differentiable neural architecture search", 2018,
    https://arxiv.org/abs/1812.00090 (DNAS).
    """
    widths = _check(widths, budget, activations, unit, draw)
    if not callable(temperature) and not is_traced(temperature) and temperature <= 0:
        raise ScheduleError(f"the temperature is {temperature}; a softmax needs one above 0.")
    hotness = as_schedule(temperature)
    # Sites that no rule matches are searched; their own bits are read in `describe` alone.
    same = isinstance(activations, str)
    default = Bits(min(widths), min(widths) if isinstance(activations, str) else activations)
    asked = engine.rules_of("bit_search", default, rules, select, False, False, Bits(1, 2))
    candidates = jnp.asarray(widths, jnp.float32)

    def searched(path: str) -> bool:
        return asked.which(path) == 0

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        sites = engine.find(asked, params, setup)
        units: dict[str, float] = {}
        for site in sites:
            if searched(site.path):
                own = _units(site, unit)
                # A leaf that is used twice is stored once, and multiplied twice.
                known = units.get(site.leaf, 0)
                units[site.leaf] = known + own if unit == "bitops" else max(known, own)
        if not units:
            raise SetupError(
                f"rules give bits to all sites {[s.path for s in sites]}; none is left to search."
            )
        state: dict[str, Any] = dict(engine.scale_counts(sites, per_channel))
        if not symmetric:
            state["form"] = {"asymmetric": jnp.ones((), jnp.int32)}
        total = sum(units.values())
        state["units"] = {leaf: jnp.asarray(n / total, jnp.float32) for leaf, n in units.items()}
        return {"logits": {leaf: jnp.zeros(len(widths), jnp.float32) for leaf in units}}, state

    def shares(extra: PyTree, ctx: Ctx) -> dict[str, Array]:
        """The mixture of each leaf: float32 [widths]."""
        found = {}
        for i, (leaf, logits) in enumerate(extra["logits"].items()):
            if not ctx.train:
                found[leaf] = jax.nn.one_hot(jnp.argmax(logits), len(widths), dtype=jnp.float32)
                continue
            if draw == "gumbel":
                logits = logits + jax.random.gumbel(jax.random.fold_in(ctx.key, i), logits.shape)
            found[leaf] = jax.nn.softmax(logits / hotness(ctx.step))
        return found

    def expected(extra: PyTree, state: PyTree, hard: bool) -> Array:
        total = jnp.zeros(())
        for leaf, logits in extra["logits"].items():
            mean = candidates[jnp.argmax(logits)] if hard else jax.nn.softmax(logits) @ candidates
            total += state["units"][leaf] * mean
        return total

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def mixed(op: Operation, x: Array, rounded: Callable[[Array, int], Array]) -> Array:
            share = op.shared["mixtures"][op.site.leaf]
            mixture = jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))
            for i, width in enumerate(widths):
                mixture += share[i] * rounded(x, width)
            return mixture.astype(x.dtype)

        def weight(op: Operation, w: Array, bits: numerics.Bits) -> engine.Rounded:
            assert op.site.weight is not None  # no products are asked for
            axes = op.site.channels[op.site.weight] if per_channel else ()
            if searched(op.site.path):
                return engine.Rounded(mixed(op, w, lambda w, b: lowbit.rounded(w, b, axes)))
            return engine.Rounded(lowbit.rounded(w, bits, axes))

        def ranged(x: Array, bits: numerics.Bits) -> Array:
            if symmetric:
                return lowbit.rounded(x, bits)
            still = lax.stop_gradient(x)
            high, low = (jnp.max(y, keepdims=True, initial=0) for y in (still, -still))
            return levels.between(x, -low, high, levels.unsigned(bits), False)

        def activation(op: Operation, x: Array, bits: numerics.Bits, name: str) -> engine.Rounded:
            both = same and searched(op.site.path)
            return engine.Rounded(mixed(op, x, ranged) if both else ranged(x, bits))

        rounded = engine.round_sites(
            forward,
            asked,
            weight,
            activation,
            known=[*state["scales"], *state["tables"]],
            train=ctx.train,
            strict=True,
            shared={"mixtures": shares(extra, ctx)},
        )

        def quantized(params, model_state, batch, key, train):
            return rounded(params, model_state, batch, key, train)[:3]

        return quantized

    def loss(outputs, batch, aux, extra, state, ctx) -> Metrics:
        excess = expected(extra, state, False) / jnp.asarray(budget, jnp.float32) - 1
        return {"size": jnp.asarray(strength, jnp.float32) * jnp.maximum(excess, 0.0)}

    def report(vars, state, aux, ctx) -> Metrics:
        return {
            "bits": expected(vars.extra, state, False),
            "chosen": expected(vars.extra, state, True),
        }

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        found = {
            leaf: widths[int(np.argmax(np.asarray(logits)))]
            for leaf, logits in extra["logits"].items()
        }
        both = {
            leaf: Bits(b, b if isinstance(activations, str) else activations)
            for leaf, b in found.items()
        }
        decided: Rules = asked._replace(bits=(*asked.bits, *by_leaf(both)))
        return decided.describe(params, state)

    return Transform(
        init=init, wrap=wrap, loss=loss, report=report, describe=describe, kind="quantize"
    )


def within(extra: PyTree, widths: Sequence[int], costs: Table, budget: float) -> Allocation:
    """The most probable bits of a finished search that meet a budget: exact, see `allocate`.

        maximise sum_i log softmax(logits_i)[b_i],  subject to  sum_i costs[i][b_i] <= budget

    Args:
      extra: of a `bit_search`, concrete: `state.vars.extra[name]`.
      widths: those that it was given.
      costs: see `bit_costs`; of the leaves that were searched, at these widths.
      budget: in the unit of the costs.

    Raises:
      SetupError: as `allocate`; other widths than logits.
    """
    found: dict[str, dict[int, float]] = {}
    for leaf, logits in extra["logits"].items():
        if len(logits) != len(widths):
            raise SetupError(f"{leaf} has {len(logits)} logits for the {len(widths)} widths given.")
        likely = np.asarray(jax.nn.log_softmax(logits), np.float64)
        found[leaf] = {b: -float(x) for b, x in zip(widths, likely, strict=True)}
    return allocate(found, costs, budget)


def _check(
    widths: Sequence[int], budget: Scalar, activations: Any, unit: str, draw: str
) -> tuple[int, ...]:
    widths = tuple(widths)
    if any(is_traced(width) for width in widths):
        raise SetupError("candidate widths are Python numbers; the budget may be traced.")
    if len(widths) < 2 or len(set(widths)) < len(widths):
        raise SetupError(f"the widths are {widths}; a search needs two or more different ones.")
    if isinstance(activations, str) and activations != "same":
        raise SetupError(f"activations are {activations!r}; they have some bits, or 'same'.")
    for width in widths:
        least = 2 if isinstance(activations, str) else 1
        numerics.check_bits(width, "a candidate of bit_search()", least)
    if not is_traced(budget) and not min(widths) <= budget <= max(widths):
        raise SetupError(f"the budget is {budget} bits on average; the candidates are {widths}.")
    if unit not in ("bits", "bitops"):
        raise SetupError(f"the unit is {unit!r}; averages are over 'bits' or 'bitops'.")
    if draw not in ("gumbel", "softmax"):
        raise SetupError(f"draw is {draw!r}; mixtures are drawn by 'gumbel' or are the 'softmax'.")
    return widths


def _units(site: Site, unit: str) -> float:
    assert site.weight is not None  # no products are asked for
    if unit == "bitops":
        return float(site.macs)
    return float(math.prod(site.stack) * math.prod(site.shapes[site.weight]))
