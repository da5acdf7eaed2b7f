"""Taps: features of a model by the path of a weight, for Linen, NNX and plain JAX alike.

A tap names a site, the place where a weight meets data (see `effjax.find_sites`): "conv2/kernel",
or the module "conv2" where it holds one site. It gives what the operation computes, before bias,
norm and activation; "conv2:in" gives what it is computed from, which is the layer before as the
next one sees it, after its bias, norm and activation. Layers of a scan take a number:
"layers/kernel[3]". "@outputs" is what the model returns.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jax import Array

from effjax.core import PyTree
from effjax.errors import SetupError
from effjax.interpret import Handler, Operation, intercept
from effjax.sites import Analysis, Site

OUTPUTS = "@outputs"
_INPUT = ":in"


class Tap(NamedTuple):
    """Where a tap was found: a site's path, its "in" or "out", and the layer of a scan."""

    path: str
    side: str
    layer: int | None


def tap(forward, names: Iterable[str], who: str):
    """A function that also returns features.

    Args:
      forward: `(params, model_state, batch, key, train) -> (outputs, ...)`.
      names: the taps.
      who: "student" or "teacher", for messages.

    Returns:
      A function with the same arguments that returns (forward's results, {tap: features}).

    Raises (when traced):
      SetupError: a tap that names nothing, or more than one site; a layer's number where it is not
        one of a scan, or none where it is; a site that a loop over time or a `shard_map` runs more
        than once.
      SiteError: a site inside a function with a custom derivative.
    """
    wanted = [name for name in dict.fromkeys(names) if name != OUTPUTS]
    with_outputs = OUTPUTS in names

    def run(params, model_state, batch, key, train):
        found: dict[str, Tap] = {}

        def closed(params, model_state, batch, key):
            return forward(params, model_state, batch, key, train)

        def check(analysis: Analysis) -> None:
            found.update({name: _find(name, analysis.sites, who) for name in wanted})

        def choose(site: Site) -> Handler | None:
            sides = {t.side for t in found.values() if t.path == site.path}
            if not sides:
                return None

            def handler(op: Operation) -> tuple[Array, PyTree]:
                out = op.run(*op.operands)
                both = {"out": out}
                if "in" in sides and site.weight is not None:
                    both["in"] = op.operands[1 - site.weight]
                return out, {side: both[side] for side in sides}

            return handler

        if wanted:
            evaluate = intercept(closed, choose, merge=_refuse, check=check)
            results, measured = evaluate(params, model_state, batch, key)
        else:
            results, measured = closed(params, model_state, batch, key), {}
        features = {}
        for name, t in found.items():
            value = measured[t.path][t.side]
            features[name] = value if t.layer is None else value[t.layer]
        if with_outputs:
            features[OUTPUTS] = results[0]
        return results, features

    return run


def _find(name: str, sites: Sequence[Site], who: str) -> Tap:
    side = "in" if name.endswith(_INPUT) else "out"
    bare = name.removesuffix(_INPUT)
    numbered = re.fullmatch(r"(.*)\[(-?\d+)\]", bare)
    bare, layer = (numbered[1], int(numbered[2])) if numbered else (bare, None)
    exact = [site for site in sites if site.path == bare]
    found = exact or [site for site in sites if site.path.startswith(f"{bare}/")]
    paths = [site.path for site in sites]
    if not found:
        raise SetupError(
            f"the tap {name!r} names no module or weight of the {who} that meets data. Its sites, "
            f"in the order of execution, are {paths}; a tap is one of these, or a module that "
            f"holds one ({paths[0].rsplit('/', 1)[0]!r}), with {_INPUT!r} for what goes in, or "
            f"{OUTPUTS!r}."
        )
    if len(found) > 1:
        raise SetupError(
            f"the tap {name!r} holds {len(found)} sites of the {who}, "
            f"{[site.path for site in found]}; name one of them."
        )
    [site] = found
    if side == "in" and site.weight is None:
        raise SetupError(f"{name!r} is a product of two activations; tap its output {bare!r}.")
    if len(site.stack) > 1 or (layer is None) is bool(site.stack):
        has = f"is one of {list(site.stack)} stacked layers" if site.stack else "is no stack"
        raise SetupError(
            f"the tap {name!r}: {site.path} of the {who} {has}. Layers of one scan are tapped by "
            f"number, '{site.path}[0]', others without."
        )
    if layer is not None and not -site.stack[0] <= layer < site.stack[0]:
        raise SetupError(f"the tap {name!r}: {site.path} has {site.stack[0]} layers.")
    return Tap(site.path, side, layer)


def _refuse(a: Array, b: Array) -> Array:
    raise SetupError(
        "a tapped weight meets data more than once: in a loop over time, or once on each shard of "
        "a shard_map. There is no one feature to compare; tap a layer outside of it."
    )
