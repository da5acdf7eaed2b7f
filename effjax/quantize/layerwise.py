"""Weights rounded layer by layer, each with the inputs that the layers rounded before it give.

What is learned is which way each weight is rounded, and it is kept in the weights themselves: they
move to points of the grid that `qat` puts them on, where rounding to nearest leaves them. The
largest weight of each scale stays, and with it the scale; so do weights that are on the grid, zeros
for one. Integer programs, packed files and exports need not know.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform
from effjax.errors import SetupError
from effjax.prune import calibration, matrices
from effjax.prune.calibration import Leaves
from effjax.quantize import numerics
from effjax.select import replace
from effjax.sites import Site
from effjax.step import TrainState

ON_GRID = 1e-4  # of a step


class Problem(NamedTuple):
    """Matrices to be rounded so that their products with the inputs x change little.

    weight: float32 [matrices, out, in].
    moments: mean x xᵀ, float32 [matrices, in, in].
    scale: the grid's step at each weight, shaped like them.
    bound: the largest integer of the grid, [].
    fixed: which weights are on the grid already and stay, bool like them.
    """

    weight: Array
    moments: Array
    scale: Array
    bound: Array
    fixed: Array


Solve = Callable[[Problem], Array]  # integers, as floats, shaped like the weights


def round_layers(
    what: str,
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    select: str,
    sequential: bool,
    solve: Solve,
) -> TrainState:
    """The state with the selected weights on their grids; see `gptq` and `adaround`."""
    if sequential and iter(batches) is batches:
        raise SetupError(
            f"{what}() goes over the batches once for each layer, and this is an iterator that is "
            "used up after once. Pass a list, or sequential=False."
        )
    params, model_state, key = state.vars.model, state.model_state, calibration.no_key(None)
    first, again = calibration.peek(batches)
    again = batches if sequential else again
    facts = transform.describe(params, state.vars.extra, state.transform)
    own = {p: f for p, f in facts.items() if "weight_bits" in f and re.search(select, p)}
    if not own:
        raise SetupError(
            f"{what}() finds no quantized weight that {select!r} matches; those of the transform "
            f"are {[p for p, f in facts.items() if 'weight_bits' in f]}."
        )
    chosen = calibration.chosen_leaves(params, f"^({'|'.join(map(re.escape, own))})$")
    uses = calibration.sites_of(apply, params, model_state, first, chosen)
    for sites in uses.values():
        matrices.check_plain(sites)
    met = {site.path: site for sites in uses.values() for site in sites}
    look = jax.jit(calibration.measure(apply, matrices.weight_operand, met, merge=jnp.maximum))
    weights = look(params, model_state, first, key)
    grids = {}
    for path, (site, *others) in uses.items():
        matrices.check_alike(site, weights[site.path], [weights[o.path] for o in others])
        bits, count = own[path]["weight_bits"], own[path]["scales"]
        grids[path] = numerics.grid(bits), _ranges(site, weights[site.path], count)
    _check_grids(what, apply, transform, state, first, uses, weights, grids)
    moments: Leaves = {}
    for path, (site, *others) in uses.items():
        paths = [site.path, *(other.path for other in others)]
        if sequential or not moments:
            wanted = paths if sequential else list(met)
            measured = calibration.measure(apply, matrices.second_moments, wanted)
            moments = calibration.mean(measured, (params, model_state), again, key)
        h = sum((moments[p] for p in paths[1:]), moments[site.path])
        matrices.check_inputs(path, h)
        new = _rounded(site, weights[site.path], h, *grids[path], solve)
        if not bool(jnp.array_equal(weights[site.path], chosen[path])):
            place = partial(matrices.place, apply, {path: chosen[path]}, params, model_state)
            matrices.check_layout(chosen, place(first, key, {site.path: weights[site.path]}))
            new = place(first, key, {site.path: new})[path]
        params = replace(params, {path: new.astype(chosen[path].dtype)})
    return state._replace(vars=state.vars._replace(model=params))


@partial(jax.jit, static_argnums=(0, 2))
def _ranges(site: Site, weight: Array, count: int) -> Array:
    """The largest magnitude that shares a scale with each weight, laid out like the operation's."""
    assert site.weight is not None
    rows = matrices.to_rows(site, weight)
    per_channel = count % site.scales == 0
    tiles = count // (site.scales if per_channel else math.prod(site.stack))
    last = site.shapes[site.weight][site.contracting[site.weight][-1]]
    split = rows.reshape(*rows.shape[:-1], -1, tiles, last // tiles)  # taps, tiles, their values
    over = (-1, -3) if per_channel else (-1, -3, -4, -5)
    largest = jnp.broadcast_to(jnp.max(jnp.abs(split), over, keepdims=True), split.shape)
    return matrices.from_rows(site, largest.reshape(rows.shape), weight.shape)


def _rounded(
    site: Site, weight: Array, moments: Array, grid: numerics.Grid, largest: Array, solve: Solve
) -> Array:
    """New weights, laid out like the operation's."""
    rows, largest = (matrices.to_rows(site, x) for x in (weight, largest))
    scale = numerics.scale_of(largest, grid)
    fixed = jnp.abs(rows / scale - jnp.round(rows / scale)) < ON_GRID
    w, h, steps, stays = (x.reshape(-1, *x.shape[-2:]) for x in (rows, moments, scale, fixed))
    codes = solve(Problem(w, h, steps, grid.bound, stays)).reshape(rows.shape)
    # Not an ulp more than the largest weight, which sets the scale.
    new = jnp.where(fixed, rows, jnp.clip(codes * scale, -largest, largest))
    return matrices.from_rows(site, new, weight.shape)


def _check_grids(what, apply, transform, state, batch, uses, weights, grids) -> None:
    """Raises unless the transform rounds weights to these grids, and does nothing else to them."""
    paths = {sites[0].path: path for path, sites in uses.items()}
    ctx = Ctx(state.step, state.key, None, train=False)

    def plain(params, model_state, batch, key, train):
        return (*apply(params, model_state, batch, key, train), {})

    def shown(params, model_state, batch, key, train):
        viewed = transform.view(params, state.vars.extra, state.transform, ctx)
        wrapped = transform.wrap(plain, state.vars.extra, state.transform, ctx)
        return wrapped(viewed, model_state, batch, key, train)[:2]

    look = calibration.measure(shown, matrices.weight_operand, paths, merge=jnp.maximum)
    seen = jax.jit(look)(state.vars.model, state.model_state, batch, state.key)
    for name, path in paths.items():
        grid, largest = grids[path]
        scale = numerics.scale_of(largest, grid)
        want = numerics.fake_quant(weights[name], scale, grid)
        if not bool(jnp.allclose(seen[name], want, atol=1e-3 * float(jnp.max(scale)))):
            raise SetupError(
                f"{what}() rounds to qat's symmetric grids, but {path!r} is not one of them after "
                "the transform: another quantizer, or masks that hide weights. Give it the params "
                "with masks applied, and a `qat`."
            )


def check_size(what: str, **sizes: float) -> None:
    """Raises unless each is positive."""
    if wrong := {name: x for name, x in sizes.items() if not x > 0}:
        raise SetupError(f"{what}() got {wrong}; these are positive.")
