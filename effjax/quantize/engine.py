"""A forward pass whose sites are rounded: what all quantization in training shares."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Forward, PyTree, Setup
from effjax.errors import SetupError, SiteError
from effjax.interpret import Handler, Operation, intercept
from effjax.jaxprs import GATHER
from effjax.quantize import kernels, numerics
from effjax.quantize.rules import Bits, Rules, is_float
from effjax.sites import Analysis, Site, analyze_model

EMBEDDINGS = r"(^|/)embedding$"

Residuals = Literal["rounded", "float"]


class Rounded(NamedTuple):
    """An operand on a grid.

    value: in the operand's shape and dtype.
    seen: what was measured on the way, by name.
    integers: int8 codes and a scale whose product the value is, if it is one; the scale has length
      1 along all axes that the operation sums over.
    """

    value: Array
    seen: Mapping[str, PyTree] = {}
    integers: tuple[Array, Array] | None = None


Weight = Callable[[Operation, Array, numerics.Bits], Rounded]
Activation = Callable[[Operation, Array, numerics.Bits, str], Rounded]


def rules_of(
    what: str,
    default: Bits,
    rules: Sequence[tuple[str, Bits]],
    select: str,
    embeddings: bool | str,
    products: bool | str,
    least: Bits = Bits(2, 2),
) -> Rules:
    """The rules that the arguments of a quantizing transform ask for.

    Raises:
      SetupError: bits that are none; `least` are the smallest widths that are some.
    """
    for whose, bits in ((f"{what}()", default), *((f"the rule {p!r}", b) for p, b in rules)):
        for operand, width, smallest in zip(Bits._fields, Bits(*bits), least, strict=True):
            numerics.check_bits(width, f"{operand} of {whose}", int(smallest))
    return Rules(
        select,
        tuple((pattern, Bits(*bits)) for pattern, bits in rules),
        default,
        EMBEDDINGS if embeddings is True else embeddings or None,
        "^@" if products is True else products or None,
    )


def find(asked: Rules, params: PyTree, setup: Setup) -> list[Site]:
    """The sites that rules ask for, in a model as `init` sees it; raises as `Rules.check`."""
    found = analyze_model(setup.apply, params, setup.model_state, setup.batch, train=True)
    return asked.check(params, found)


def scale_counts(
    sites: Sequence[Site], per_channel: bool, tile: int | None = None
) -> dict[str, dict[str, Array]]:
    """The state's "scales" and "tables": how many scales each site's weight has."""

    def scales(tables: bool) -> dict[str, Array]:
        some = [site for site in sites if (site.op == GATHER) is tables]
        return {s.path: jnp.asarray(_scales(s, per_channel, tile), jnp.int32) for s in some}

    return {"scales": scales(False), "tables": scales(True)}


def round_sites(
    forward: Forward,
    asked: Rules,
    weight: Weight,
    activation: Activation,
    *,
    known: Collection[str],
    train: bool,
    strict: bool,
    given: Mapping[str, PyTree] | None = None,
    shared: Mapping[str, PyTree] | None = None,
    result: Callable[[Operation, Array], Array] | None = None,
    residuals: Residuals = "rounded",
    integers: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, PyTree], dict[str, Array]]]:
    """A forward pass with the operands of the chosen sites exchanged.

    Args:
      forward: what is rewritten.
      asked: which sites, and their bits.
      weight: `(operation, weight, bits) -> Rounded`; not called for known float widths.
      activation: `(operation, activation, bits, name) -> Rounded`; likewise.
      known: the sites that the model had at `init`.
      train: whether this is a training step.
      strict: whether a site that was not there at `init` is an error.
      given, shared: see `intercept`.
      result: what becomes of the operation's result.
      residuals: see `qat`.
      integers: multiply integers where both operands have them.

    Returns:
      `(params, model_state, batch, key, train) -> (outputs, model_state, aux, seen)`, `seen` being
      what was seen at all sites together, by name.
    """

    def handler(op: Operation) -> tuple[Array, PyTree]:
        site, operands = op.site, list(op.operands)
        bits = op.shared["bits"][asked.which(site.path)]
        found: dict[int, Rounded] = {}
        if site.weight is not None and not is_float(asked.at(site.path).weights):
            found[site.weight] = weight(op, operands[site.weight], bits.weights)
        for i, name in asked.inputs(site).items():
            found[i] = activation(op, operands[i], bits.activations, name)
        seen: dict[str, PyTree] = {}
        for i, one in found.items():
            operands[i] = one.value
            seen |= one.seen
        pairs = [pair for i in sorted(found) if (pair := found[i].integers) is not None]
        whole = integers and len(pairs) == 2 and site.op != GATHER
        value = _of_integers(op, pairs) if whole else op.run(*operands)
        out = value
        if residuals == "float":
            out = numerics.straight_through(_at_float(op, operands), value, jnp.asarray(True))
        elif whole:  # only the derivative of the product of floats is used, as below
            out = numerics.straight_through(op.run(*operands), value, jnp.asarray(True))
        return (out if result is None else result(op, out)), seen

    def choose(site: Site) -> Handler | None:
        return handler if asked.takes(site) else None

    def check(analysis: Analysis) -> None:
        found = {site.path for site in analysis.sites if asked.takes(site)}
        _check_same(found, set(known), train, strict)

    def rounded(params, model_state, batch, key, train):
        def closed(params, model_state, batch, key):
            return forward(params, model_state, batch, key, train)

        everywhere = {"bits": asked.widths, **(shared or {})}
        run = intercept(closed, choose, given=given, shared=everywhere, check=check)
        (outputs, model_state, aux), measured = run(params, model_state, batch, key)
        seen = {name: value for found in measured.values() for name, value in found.items()}
        return outputs, model_state, aux, seen

    return rounded


def _of_integers(op: Operation, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The operation on codes and scales."""
    codes, scales = zip(*pairs, strict=True)
    cpu = jax.default_backend() == "cpu"
    return kernels.scaled(op.run, op.site, codes, scales, cpu=cpu)


def _at_float(op: Operation, rounded: Sequence[Array]) -> Array:
    """The operation at its operands as they were, which get the gradients of the rounded ones. Only
    its derivative is used: compiled, the operation itself is gone."""
    pairs = zip(rounded, op.operands, strict=True)
    passed = (
        x if q is x else numerics.straight_through(q, lax.stop_gradient(x), jnp.asarray(True))
        for q, x in pairs
    )
    return op.run(*passed)


def _scales(site: Site, per_channel: bool, tile: int | None) -> int:
    if site.weight is None:
        return 0
    scales = site.scales if per_channel else math.prod(site.stack)
    axis = tiled_axis(site)
    if tile is not None and axis is not None:
        scales *= site.shapes[site.weight][axis] // tile
    return scales


def tiled_axis(site: Site) -> int | None:
    """The axis of a site's weight along which tiles run: the last that is summed over."""
    if site.weight is None or not site.contracting[site.weight]:
        return None
    return max(site.contracting[site.weight])


def _check_same(found: set[str], known: set[str], train: bool, strict: bool) -> None:
    """Raises if the forward pass has other sites than the model had at `init`."""
    missing, added = sorted(known - found), sorted(found - known)
    if found and not (train and missing) and not (strict and added):
        return
    raise SiteError(
        f"the forward pass has other sites than the model at init: missing {missing}, added "
        f"{added}. Likely causes: another apply than the one init was given; another transform "
        "whose wrap runs the model twice (put the quantization inside it: later in the chain); "
        "params closed over instead of passed; or, for static ranges and learned steps, a model "
        "that does more in evaluation than in training."
    )


def check_sums(asked: Rules, sites: Sequence[Site]) -> None:
    """Raises SetupError if sums of integers may exceed int32 at a site."""
    for site in sites:
        bits = asked.at(site.path)
        widths = [bits.activations] * 2
        if site.weight is not None:
            widths[site.weight] = bits.weights
        if site.op != GATHER and not any(is_float(b) for b in widths):
            kernels.check_sums(site, *(2 ** (int(b) - 1) - 1 for b in widths))


def check_tiles(sites: Sequence[Site], size: int, what: str) -> None:
    """Raises SetupError if a size does not divide the axis of each weight that tiles run along."""
    for site in sites:
        axis = tiled_axis(site)
        if site.weight is None or axis is None:
            continue
        shape = site.shapes[site.weight]
        if shape[axis] % size:
            raise SetupError(
                f"{what} of {size} does not divide axis {axis} of {site.path}, which is used in "
                f"shape {shape}. Choose a divisor of {shape[axis]}, or leave the weight out with "
                "`select`."
            )
