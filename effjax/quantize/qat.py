"""Quantization-aware training: the operands of the model's operations are rounded to integer grids
while it trains, so that it can be shipped in integers."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Ctx, Forward, Metrics, PyTree, Setup, Transform, Vars
from effjax.errors import SetupError
from effjax.interpret import Operation
from effjax.quantize import engine, levels, lowbit, numerics
from effjax.quantize.backward import Small, check_gradients, round_gradient, stochastic
from effjax.quantize.keys import layer_numbers, own_key
from effjax.quantize.numerics import Grid
from effjax.quantize.ranges import LOW, by_site, observe
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
    symmetric: bool = True,
    per_token: bool = False,
    tile: int | None = None,
    clipped: bool | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    gradients: numerics.Bits | Small | None = None,
    residuals: engine.Residuals = "rounded",
    forward: Literal["float", "integer"] = "float",
    freeze: int | Array | None = None,
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
      weights: bits of the weights, 1..8 (of one bit, sign(w) · mean|w|); 16 and more leave them
        alone. May be a traced array: one compiled step then serves every width.
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
      symmetric: of activations. False rounds them to s · (z ... z + 2^bits - 1) between the range's
        two ends, s = (max(x, 0) - min(x, 0)) / (2^bits - 1), z = round(min(x, 0) / s), so that what
        is never negative has twice the levels. Zero is exact in both.
      per_token: a dynamic range for each row of an activation (each token, each example of a
        convolution) rather than one for all.
      tile: weights have scales of their own also for each run of `tile` values along the last axis
        that is summed over.
      clipped: whether activations outside the range get gradient 0; by default those of static
        ranges do. (Symmetric dynamic ranges leave nothing outside; of asymmetric ones, whose ends
        move to whole steps, up to half a step is.)
      rounding: "stochastic" rounds up with the probability of the fraction in training, weights and
        activations alike, so that values are right on average; evaluation rounds to nearest.
      gradients: bits, 2..8, of the gradient that flows back into each operation, rounded
        stochastically with one scale for each example; then both products of the backward pass
        have integers for operands. Or "e4m3" or "e5m2", the 8-bit floats. Forward-mode derivatives
        are not possible then.
      residuals: at which operands an operation's gradients are taken. "rounded": at those that it
        multiplied, dw = q(x)·g and dx = g·q(w), the derivative of what was computed, in which
        nothing but integers need be kept. "float": at the operands as they were, dw = x·g and dx =
        g·w, as qwix's dots do by default (`use_original_residuals`; its convolutions never). What
        is clipped gets gradient 0 in both.
      forward: what the forward pass of a training step multiplies: the rounded values, which are
        floats, or the integers that they are multiples of, int8 with sums in int32, as qwix does;
        faster where the device multiplies integers faster. Both compute the same but for the
        rounding of float sums. Evaluation and the backward pass multiply floats. Sites with one
        operand in floating point do too.
      freeze: the first step from which static ranges stay as they are. May be traced.

    State: {"scales": {site: number of weight scales}}, and with static ranges {"ranges", "count"}
    by site (a product's are "@name/lhs" and "@name/rhs"), layers of a scan on leading axes; where
    not symmetric, "ranges" are of max(x, 0) and "lows" of max(-x, 0). "form" names what other
    readers of the state must know (asymmetric, per_token), "layer" numbers layers for their keys.
    `aux` carries {"ranges": max|x| of this batch} and "lows". Metrics of static ranges: "saturated"
    is the fraction of activations whose batch maximum lies outside the range, "uncalibrated" counts
    those without.

    Raises:
      SetupError: bits outside 2..8 (weights: 1..8) and below 16, an unknown kind of ranges,
        rounding, gradients, residuals or forward, per_token with static ranges, freeze with
        dynamic ones; forward="integer" with traced bits, one bit, a start above 0, asymmetric
        activations, tiles or freeze; at `init`, a tile that does not divide its axis, and sums
        of integers that may exceed int32.
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
    asked = engine.rules_of("qat", default, rules, select, embeddings, products, Bits(1, 2))
    if ranges not in ("dynamic", "static"):
        raise SetupError(f"ranges is {ranges!r}; activation ranges are 'dynamic' or 'static'.")
    check_fraction(decay, "the decay of the ranges")
    static = ranges == "static"
    if rounding not in ("nearest", "stochastic"):
        raise SetupError(f"rounding is {rounding!r}; it is 'nearest' or 'stochastic'.")
    if per_token and static:
        raise SetupError("per_token ranges follow the batch; take ranges='dynamic' with them.")
    if freeze is not None and not static:
        raise SetupError(f"freeze is {freeze}, but only ranges='static' have ranges to freeze.")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise SetupError(f"tile is {tile!r}; it is how many weights share a scale, 1 or more.")
    if tile is not None and any(is_one(bits.weights) for bits in asked.widths):
        raise SetupError(
            f"weights of one bit have a scale for each channel, not in tiles of {tile}."
        )
    if gradients is not None:
        check_gradients(gradients, "qat")
    if residuals not in ("rounded", "float"):
        raise SetupError(f"residuals are {residuals!r}; they are 'rounded' or 'float'.")
    integers = _integers(forward, asked.widths, start, symmetric, tile, freeze)
    random = rounding == "stochastic" or gradients is not None
    clips = static if clipped is None else clipped
    frozen = freeze is not None

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        sites = engine.find(asked, params, setup)
        if tile is not None:
            engine.check_tiles(sites, tile, "a tile")
        if integers:
            engine.check_sums(asked, sites)
        state: dict[str, Any] = dict(engine.scale_counts(sites, per_channel, tile))
        form = {"asymmetric": not symmetric, "per_token": per_token}
        if any(form.values()):
            state["form"] = {
                n: jnp.ones((), jnp.int32) for n, asked_for in form.items() if asked_for
            }
        if random:
            state["layer"] = layer_numbers(sites)
        if static:
            stacks = {name: site.stack for site in sites for name in asked.inputs(site).values()}
            state["ranges"] = {n: jnp.zeros(stack, jnp.float32) for n, stack in stacks.items()}
            state["count"] = {n: jnp.zeros(stack, jnp.int32) for n, stack in stacks.items()}
            if not symmetric:
                state["lows"] = {n: jnp.zeros(stack, jnp.float32) for n, stack in stacks.items()}
        return {}, state

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def grid(bits: numerics.Bits, shared: dict[str, Any]) -> Grid:
            grid = numerics.grid(bits)
            if not ctx.train or (not is_traced(start) and start <= 0):
                return grid
            return grid._replace(identity=grid.identity | (shared["step"] < shared["start"]))

        def ends(op: Operation, x: Array, i: int) -> list[Array]:
            """max|x|; or max(x, 0) and max(-x, 0). Of the whole, or for each row."""
            rows = op.site.channels[i] if per_token else ()
            over = tuple(axis for axis in range(x.ndim) if axis not in rows)
            if symmetric:
                found = [numerics.absmax(x, rows)]
            else:
                x = lax.stop_gradient(x)
                found = [jnp.max(y, over, keepdims=True, initial=0) for y in (x, -x)]
            if op.axes and not per_token:  # one range for all shards
                found = [lax.pmax(end, op.axes) for end in found]
            return found

        def range_of(
            op: Operation, x: Array, name: str
        ) -> tuple[list[Array], Array, dict[str, Array]]:
            """The activation's range, whether there is one, and what was seen."""
            known = jnp.asarray(True)
            seen: dict[str, Array] = {}
            found: list[Array] = []
            if ctx.train or not static:
                i = _operand(asked.inputs(op.site), name)
                found = ends(op, x, i)
                most = [jnp.max(end).astype(jnp.float32) for end in found]
                seen = dict(zip((name, name + LOW), most, strict=False))
            if static:
                stored, count = op.given[name]
                found = list(stored)
                if ctx.train:
                    moved, learnt = observe(stored, count, most, op.shared["decay"])
                    held = op.shared["step"] >= op.shared["freeze"] if frozen else False
                    found = [jnp.where(held, a, b) for a, b in zip(stored, moved, strict=True)]
                    count = jnp.where(held, count, learnt)
                known = count > 0
                found = [end.reshape((1,) * x.ndim) for end in found]
            return found, known, seen

        def weight(op: Operation, w: Array, bits: numerics.Bits) -> engine.Rounded:
            assert op.site.weight is not None
            g = grid(bits, op.shared)
            channels = op.site.channels[op.site.weight] if per_channel else ()
            axis = engine.tiled_axis(op.site)
            if is_one(bits):
                signs = lowbit.signs(w, channels, clipped=False)
                return engine.Rounded(jnp.where(g.identity, w, signs))
            if tile is None or axis is None:
                largest = numerics.absmax(w, channels)
            else:
                largest = numerics.tiled_absmax(w, channels, axis, tile)
            scale = numerics.scale_of(largest, g)
            found = on_grid(op, w, scale, g, op.site.weight, clips=False, inside=True)
            if is_traced(bits):
                one = lowbit.signs(w, channels, clipped=False)
                some = (jnp.asarray(bits) == 1) & ~g.identity
                found = found._replace(value=jnp.where(some, one, found.value))
            return found

        def on_grid(
            op: Operation, x: Array, scale: Array, g: Grid, i: int, *, clips: bool, inside: bool
        ) -> engine.Rounded:
            near = rounding == "nearest" or not ctx.train
            if near:
                value = numerics.fake_quant(x, scale, g, clips, inside)
            else:
                value = stochastic(lax.stop_gradient(x), scale, g, own_key(op, i))
                passes = jnp.asarray(True)
                if clips:
                    passes = (jnp.abs(x) <= scale * g.bound) | g.identity
                value = numerics.straight_through(x, value, passes)
            if not integers or not ctx.train:
                return engine.Rounded(value)
            source, steps = lax.stop_gradient((x if near else value, scale))
            codes = numerics.round_to(source, steps, g, inside and near).astype(jnp.int8)
            return engine.Rounded(value, integers=(codes, steps))

        def activation(op: Operation, x: Array, bits: numerics.Bits, name: str) -> engine.Rounded:
            g = grid(bits, op.shared)
            found, known, seen = range_of(op, x, name)
            g = g._replace(identity=g.identity | ~known)
            i = _operand(asked.inputs(op.site), name)
            if symmetric:
                scale = numerics.scale_of(found[0], g)
                one = on_grid(op, x, scale, g, i, clips=clips, inside=not static)._replace(
                    seen=seen
                )
                if static and one.integers is not None:
                    # Integers have no NaN, and a static range none of the batch's.
                    codes, steps = one.integers
                    steps = jnp.where(jnp.isnan(seen[name]), jnp.nan, steps)
                    one = one._replace(integers=(codes, steps))
                return one
            key = own_key(op, i) if rounding == "stochastic" and ctx.train else None
            own = levels.unsigned(bits)._replace(identity=g.identity)
            return engine.Rounded(levels.between(x, -found[1], found[0], own, clips, key), seen)

        def result(op: Operation, out: Array) -> Array:
            batch = (0,) if op.site.weight == 1 else ()
            bits = gradients if isinstance(gradients, str) else op.shared["gradients"]
            return round_gradient(out, bits, own_key(op, 2), batch)

        shared: dict[str, Any] = {"step": ctx.step, "start": start, "decay": decay}
        if frozen:
            shared["freeze"] = freeze
        if random:
            shared["key"] = ctx.key
        if gradients is not None and not isinstance(gradients, str):
            shared["gradients"] = jnp.asarray(gradients, jnp.int32)
        rounded = engine.round_sites(
            forward,
            asked,
            weight,
            activation,
            known=[*state["scales"], *state["tables"]],
            train=ctx.train,
            strict=static or random,
            given=by_site(state) if static or random else None,
            shared=shared,
            result=result if ctx.train and gradients is not None else None,
            residuals=residuals,
            integers=integers,
        )

        def quantized(params, model_state, batch, key, train):
            outputs, model_state, aux, seen = rounded(params, model_state, batch, key, train)
            found = {n: value for n, value in seen.items() if not n.endswith(LOW)}
            aux = {**aux, "ranges": found}
            if not symmetric:
                lows = {n: value for n, value in seen.items() if n.endswith(LOW)}
                aux["lows"] = {n.removesuffix(LOW): value for n, value in lows.items()}
            return outputs, model_state, aux

        return quantized

    def update(vars: Vars, opt, state, grads, aux, ctx) -> tuple[Vars, PyTree, PyTree]:
        if not static:
            return vars, opt, state
        kinds = ("ranges",) if symmetric else ("ranges", "lows")
        after: dict[str, dict[str, Array]] = {n: dict(state[n]) for n in (*kinds, "count")}
        for name in aux["ranges"]:
            stored, seen = ([tree[kind][name] for kind in kinds] for tree in (state, aux))
            moved, count = observe(stored, state["count"][name], seen, decay)
            if frozen:
                held = ctx.step >= freeze
                moved = [jnp.where(held, a, b) for a, b in zip(stored, moved, strict=True)]
                count = jnp.where(held, state["count"][name], count)
            after["count"][name] = count
            for kind, value in zip(kinds, moved, strict=True):
                after[kind][name] = value
        return vars, opt, {**state, **after}

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


def _integers(
    forward: str,
    widths: Sequence[Bits],
    start: int | Array,
    symmetric: bool,
    tile: int | None,
    freeze: int | Array | None,
) -> bool:
    """Whether integers are multiplied; raises where they were asked for and cannot be."""
    if forward not in ("float", "integer"):
        raise SetupError(f"forward is {forward!r}; it is 'float' or 'integer'.")
    if forward == "float":
        return False
    reasons = {
        "traced bits": any(is_traced(b) for width in widths for b in width),
        "weights of one bit": any(is_one(width.weights) for width in widths),
        f"start={start}": is_traced(start) or start > 0,
        "symmetric=False": not symmetric,
        f"tile={tile}": tile is not None,
        f"freeze={freeze}": freeze is not None,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise SetupError(
            f"forward='integer' multiplies int8 with one scale for a sum, known when the step is "
            f"compiled; it cannot be had with {', '.join(wrong)}. Take forward='float'."
        )
    return True


def is_one(bits: numerics.Bits) -> bool:
    """Whether a width is known to be one bit."""
    return not is_traced(bits) and int(bits) == 1


def _operand(inputs: dict[int, str], name: str) -> int:
    return next(i for i, own in inputs.items() if own == name)
