"""Quantization-aware training: the operands of the model's operations are rounded to integer grids
while it trains, so that it can be shipped in integers."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Forward, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import SetupError
from effjax.interpret import Operation
from effjax.quantize import engine, numerics
from effjax.quantize.numerics import Grid
from effjax.quantize.rules import Bits
from effjax.schedules import check_fraction, is_traced
from effjax.select import KERNELS


def qat(
    weights: numerics.Bits = 8,
    activations: numerics.Bits = 8,
    *,
    select: str = KERNELS,
    ranges: Literal["dynamic", "static"] = "dynamic",
    decay: float | Array = 0.99,
    per_channel: bool = True,
    start: int | Array = 0,
    rules: Sequence[tuple[str, Bits]] = (),
    embeddings: bool | str = False,
    products: bool | str = False,
) -> Transform:
    """Quantization-aware training of weights and activations, at the model's sites.

    Wherever a selected weight meets data in a `dot_general` or `conv_general_dilated`, both of them
    are rounded, q(x) = s · clip(round(x / s), -B, B), where B = 2^(bits-1) - 1, with one s =
    max|w| / B for each output channel of the weight and one for the whole activation. `ej.inspect`
    shows the sites of a model.

    Gradients are straight-through: a rounded weight or activation gets the gradient of its rounded
    value unchanged, and scales get none. Weights and, with dynamic ranges, activations are never
    clipped. With static ranges an activation outside the range gets gradient 0. Zeros stay exact
    zeros, so pruned weights stay pruned.

    Activation ranges:
      "dynamic": max|x| of the batch at hand, in training and in evaluation.
      "static": a bias-corrected moving average of max|x| over training steps (also those before
        `start`), kept in the state by site. A training step includes its own batch in the average
        before it uses it. Evaluation reads the state alone, never the batch. Until a site has been
        observed there is no range, and evaluation leaves its activations in floating point;
        `describe` then gives no "act_bits" for it and the metric "uncalibrated" counts it.

    Quantization happens where the weight is used, so `export` returns the params as they are: what
    evaluates them through this transform computes exactly what was trained. `describe` gives, for
    each selected leaf, "weight_bits", "scales" and "act_bits", where they are not float; and under
    "@name" the same of a product, and of another use ("@path#1") of a leaf.

    Args:
      weights: bits of the weights, 2..8; 16 and more leave them alone. May be a traced array: one
        compiled step then serves every width.
      activations: bits of what they are multiplied with; likewise.
      select: regular expression over params paths. Every leaf it matches that has two axes or more
        must reach a site.
      ranges: of the activations, "dynamic" or "static".
      decay: of the moving average, in [0, 1); may be traced.
      per_channel: one scale for each output channel of a weight (rows of an embedding); otherwise
        one for the weight. Layers of a scan have their own in any case.
      start: first step that is quantized; before, training runs in floating point. Evaluation shows
        the model as it would be shipped: always quantized. May be traced.
      rules: (pattern, Bits) pairs; the first pattern found in a site's path (the params path, or
        "path#1" where the leaf is used again) gives its bits in place of the two above.
      embeddings: also quantize embedding tables, where they are indexed and where they are
        multiplied with. True takes the leaves named "embedding"; or a regular expression.
      products: also quantize products of activations with activations, both operands at the bits of
        activations. True takes all; or a regular expression over their names, which begin with "@".

    State: {"scales": {site: number of weight scales}}, and with static ranges {"ranges", "count"}
    by site (a product's are "@name/lhs" and "@name/rhs"), layers of a scan on leading axes. `aux`
    carries {"ranges": max|x| of this batch}. Metrics of static ranges: "saturated" is the fraction
    of activations whose batch maximum lies outside the range, "uncalibrated" counts those without.

    Raises:
      SetupError: bits outside 2..8 and below 16, an unknown kind of ranges.
      ScheduleError: decay outside [0, 1).
      SelectorError: `select`, a rule, `embeddings` or `products` matches nothing (at `init`).
      SiteError: a selected weight reaches no operation, or lies in a function with a custom
        derivative (at `init`).

    Example:
      >>> import effjax as ej
      >>> first_and_last = [(r"^(stem|head)/", ej.quantize.Bits(8, 8))]
      >>> ej.quantize.qat(weights=4, activations=8, rules=first_and_last).kind
      'quantize'

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877; Krishnamoorthi,
    2018, https://arxiv.org/abs/1806.08342.
    """
    default = Bits(weights, activations)
    asked = engine.rules_of("qat", default, rules, select, embeddings, products)
    if ranges not in ("dynamic", "static"):
        raise SetupError(f"ranges is {ranges!r}; activation ranges are 'dynamic' or 'static'.")
    check_fraction(decay, "the decay of the ranges")
    static = ranges == "static"

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        sites = engine.find(asked, params, setup)
        state: dict[str, Any] = dict(engine.scale_counts(sites, per_channel))
        if static:
            stacks = {name: site.stack for site in sites for name in asked.inputs(site).values()}
            state["ranges"] = {n: jnp.zeros(stack, jnp.float32) for n, stack in stacks.items()}
            state["count"] = {n: jnp.zeros(stack, jnp.int32) for n, stack in stacks.items()}
        return {}, state

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def grid(bits: numerics.Bits, shared: dict[str, Any]) -> Grid:
            grid = numerics.grid(bits)
            if not ctx.train or (not is_traced(start) and start <= 0):
                return grid
            return grid._replace(identity=grid.identity | (shared["step"] < shared["start"]))

        def range_of(op: Operation, x: Array, name: str) -> tuple[Array, Array, dict[str, Array]]:
            """The activation's range, whether there is one, and what was seen."""
            known = jnp.asarray(True)
            seen: dict[str, Array] = {}
            largest = jnp.zeros(())
            if ctx.train or not static:
                largest = numerics.absmax(x)
                if op.axes:  # one range for all shards
                    largest = lax.pmax(largest, op.axes)
                seen = {name: largest.reshape(()).astype(jnp.float32)}
            if static:
                largest, count = op.given[name]
                if ctx.train:
                    largest, count = _observe(largest, count, seen[name], op.shared["decay"])
                known = count > 0
            return largest.reshape((1,) * x.ndim), known, seen

        def weight(op: Operation, w: Array, bits: numerics.Bits) -> tuple[Array, PyTree]:
            assert op.site.weight is not None
            g = grid(bits, op.shared)
            channels = op.site.channels[op.site.weight] if per_channel else ()
            return numerics.fake_quant(w, numerics.scale_of(numerics.absmax(w, channels), g), g), {}

        def activation(
            op: Operation, x: Array, bits: numerics.Bits, name: str
        ) -> tuple[Array, PyTree]:
            g = grid(bits, op.shared)
            largest, known, seen = range_of(op, x, name)
            g = g._replace(identity=g.identity | ~known)
            return numerics.fake_quant(x, numerics.scale_of(largest, g), g, static), seen

        rounded = engine.round_sites(
            forward,
            asked,
            weight,
            activation,
            known=[*state["scales"], *state["tables"]],
            train=ctx.train,
            strict=static,
            given=_by_site(state) if static else None,
            shared={"step": ctx.step, "start": start, "decay": decay},
        )

        def quantized(params, model_state, batch, key, train):
            outputs, model_state, aux, seen = rounded(params, model_state, batch, key, train)
            return outputs, model_state, {**aux, "ranges": seen}

        return quantized

    def update(vars: Vars, opt, state, grads, aux, ctx) -> tuple[Vars, PyTree, PyTree]:
        if not static:
            return vars, opt, state
        averages, counts = dict(state["ranges"]), dict(state["count"])
        for name, seen in aux["ranges"].items():
            averages[name], counts[name] = _observe(averages[name], counts[name], seen, decay)
        return vars, opt, {**state, "ranges": averages, "count": counts}

    def report(vars: Vars, state, aux, ctx) -> Metrics:
        if not static or not state["ranges"]:
            return {}
        outside = [jnp.ravel(x > state["ranges"][name]) for name, x in aux["ranges"].items()]
        unseen = [jnp.ravel(count == 0) for count in state["count"].values()]
        return {
            "saturated": jnp.mean(jnp.concatenate(outside), dtype=jnp.float32),
            "uncalibrated": jnp.sum(jnp.concatenate(unseen), dtype=jnp.int32),
        }

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, Any]]:
        return asked.describe(params, state)

    return Transform(
        init=init, wrap=wrap, update=update, report=report, describe=describe, kind="quantize"
    )


def _observe(
    average: Array, count: Array, seen: Array, decay: float | Array
) -> tuple[Array, Array]:
    """One step of a moving average corrected for its bias.

    average_n = sum_i d^(n-i) x_i / sum_i d^(n-i), computed as a step of size (1 - d) / (1 - d^n).
    Nothing is learnt from zeros (a branch that did not run) and from numbers that are not finite.
    """
    n, d = count + 1, jnp.asarray(decay, jnp.float32)
    moved = average + (1 - d) / (1 - d ** n.astype(jnp.float32)) * (seen - average)
    learnt = (seen > 0) & jnp.isfinite(seen)
    return jnp.where(learnt, moved, average), jnp.where(learnt, n, count)


def _by_site(state: PyTree) -> dict[str, dict[str, tuple[Array, Array]]]:
    """The ranges and counts under their sites' paths, where handlers find them."""
    ranges, count = state["ranges"], state["count"]
    names = {path: (path, f"{path}/lhs", f"{path}/rhs") for path in state["scales"]}
    return {p: {n: (ranges[n], count[n]) for n in own if n in ranges} for p, own in names.items()}
