"""What an integer program stores: codes of weights, and the check that evaluation agrees."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform
from effjax.errors import SetupError, SiteError
from effjax.interpret import Handler, Operation, intercept
from effjax.quantize import kernels, numerics
from effjax.quantize.execution import Entry
from effjax.sites import Analysis, Site
from effjax.step import TrainState


def store(
    apply: Apply,
    entries: Mapping[str, Entry],
    analysis: Analysis,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
) -> dict[str, dict[str, Array]]:
    """Codes and scales of the weights, as they arrive at their sites."""

    def forward(params, model_state, batch, key):
        return apply(params, model_state, batch, key, False)[0]

    def handler(op: Operation) -> tuple[Array, PyTree]:
        entry = entries[op.site.path]
        assert op.site.weight is not None  # `choose` asked
        assert entry.weight_bits is not None
        if op.axes:
            raise SiteError(
                f"{op.site.path} lies inside a shard_map over {op.axes}; an integer program is "
                "made of the function for one device. Give integer() the model without it."
            )
        w, grid = op.operands[op.site.weight], numerics.grid(entry.weight_bits)
        scale = numerics.scale_of(numerics.absmax(w, entry.channels), grid)
        codes = numerics.round_to(w, scale, grid).astype(jnp.int8)
        codes = kernels.turn(codes, op.site) if entry.turned else codes
        found = {"codes": kernels.pack(codes, entry.weight_bits), "scale": scale}
        return op.run(*op.operands), found

    def choose(site: Site) -> Handler | None:
        entry = entries.get(site.path)
        return handler if entry is not None and entry.weight_bits is not None else None

    def either(a: Array, b: Array) -> Array:  # a branch or loop that did not run has zeros
        return jnp.where(a != 0, a, b)

    measure = intercept(forward, choose, merge=either)
    found = jax.jit(lambda *args: measure(*args)[1])(params, model_state, batch, jax.random.key(0))
    wanted = [path for path, entry in entries.items() if entry.weight_bits is not None]
    # A scale is never 0.
    ran = [path for path, one in found.items() if np.all(np.asarray(one["scale"]))]
    if unseen := [path for path in wanted if path not in ran]:
        raise SiteError(
            f"the sites {unseen} lie in a branch or loop that does not run for this batch, or in "
            "the condition of a loop, so that their weights cannot be taken from it. Give "
            "integer() a batch for which it runs, or leave these weights out of qat's `select`."
        )
    return found


def codes_of(op: Operation, entry: Entry) -> Array:
    """The stored codes of a site's weight, int8: of the weight's shape, or as `kernels.turn` makes
    them."""
    assert op.site.weight is not None
    assert entry.weight_bits is not None
    shape = op.site.shapes[op.site.weight]
    if entry.turned:
        terms = kernels.terms(op.site)
        shape = (math.prod(shape) // terms, terms)
    return kernels.unpack(op.given["codes"], shape, entry.weight_bits)


def check_grids(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    entries: Mapping[str, Entry],
    stored: Mapping[str, dict[str, Array]],
    inputs: Mapping[str, Array],
    batch: PyTree,
) -> None:
    """Raises unless the operands in evaluation lie on the grids that the program has."""
    ctx = Ctx(state.step, state.key, train=False)

    def plain(params, model_state, batch, key, train):
        return (*apply(params, model_state, batch, key, train), {})

    def forward(params, model_state, batch, key):
        viewed = transform.view(params, state.vars.extra, state.transform, ctx)
        wrapped = transform.wrap(plain, state.vars.extra, state.transform, ctx)
        return wrapped(viewed, model_state, batch, key, False)[0]

    def handler(op: Operation) -> tuple[Array, PyTree]:
        entry, site, away = entries[op.site.path], op.site, jnp.zeros(())
        if entry.weight_bits is not None and site.weight is not None:
            w, scale = op.operands[site.weight], op.given["scale"]
            codes = codes_of(op, entry)
            codes = kernels.turn_back(codes, site) if entry.turned else codes
            # In bfloat16 the points of the grid are rounded.
            exact = (codes.astype(scale.dtype) * scale).astype(w.dtype)
            away = jnp.max(jnp.abs((w - exact).astype(scale.dtype) / scale))
        grid = numerics.grid(entry.act_bits or numerics.WIDEST)
        for i, name in entry.names.items():
            x = op.operands[i]
            scale = numerics.scale_of(numerics.absmax(x), grid)
            if name in op.given["inputs"]:
                scale = op.given["inputs"][name].reshape((1,) * x.ndim)
            codes = numerics.round_to(x, scale, grid)
            error = jnp.abs((x - (codes * scale).astype(x.dtype)).astype(scale.dtype) / scale)
            away = jnp.maximum(away, jnp.max(error))
        return op.run(*op.operands), away

    given = {
        path: {
            **stored.get(path, {}),
            "inputs": {n: inputs[n] for n in entry.names.values() if n in inputs},
        }
        for path, entry in entries.items()
    }
    check = intercept(forward, lambda s: handler if s.path in entries else None, given=given)
    args = (state.vars.model, state.model_state, batch, jax.random.key(0))
    found = jax.jit(lambda *args: check(*args)[1])(*args)
    # A hundredth of a step: rounding of floats makes 1e-5 of it, another grid up to a half.
    off = {p: float(np.max(np.asarray(x))) for p, x in found.items()}
    if wrong := [path for path, x in off.items() if not x < 0.01]:
        raise SetupError(
            f"in evaluation the operands of {wrong} do not lie on the grids of an integer "
            "program: symmetric, of 2 to 8 bits, with scales max|w| / (2^(bits-1) - 1) and one "
            "range for an activation. Train with qat() and its default options, or evaluate what "
            "was trained with effjax.quantize's other transforms in floating point."
        )
