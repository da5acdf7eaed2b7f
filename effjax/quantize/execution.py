"""How each site of a model trained with `qat` is run in integers, and what forbids it."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from effjax.core import Transform
from effjax.errors import SelectorError, SetupError
from effjax.jaxprs import CONV
from effjax.quantize import kernels, numerics
from effjax.select import leaves
from effjax.sites import Analysis, Site
from effjax.step import TrainState


class Entry(NamedTuple):
    """What is known of a quantized site."""

    run: str
    weight_bits: int | None
    act_bits: int | None
    channels: tuple[int, ...]  # axes of the weight that have scales of their own
    names: dict[int, str]  # {operand: name of its static range}
    turned: bool = False  # whether the codes of the weight are stored transposed


def state_of(transform: Transform, state: TrainState) -> Mapping[str, Any]:
    """The state of the one qat in a transform.

    Raises:
      SetupError: no `qat` or several, trained steps, ranges that were never calibrated.
    """
    members = transform.members or (("", transform),)
    found = [name for name, member in members if member.kind == "quantize"]
    if len(found) != 1:
        raise SetupError(
            f"integer() found {len(found)} quantizers in the transform ({found}); it takes the "
            "grids of one qat(): chain(..., quant=ej.quantize.qat(...))."
        )
    own, extra = state.transform, state.vars.extra
    if transform.members:
        own, extra = own[found[0]], extra[found[0]]
    if not isinstance(own, Mapping) or not {"scales", "tables"} <= set(own) or leaves(extra):
        raise SetupError(
            f"integer() takes the grids of qat(), whose scales follow from weights and ranges; "
            f"the quantizer {found[0]!r} has trained ones."
        )
    if own.get("form"):
        raise SetupError(
            f"integer() takes grids that are symmetric, with one scale for an activation; those of "
            f"{found[0]!r} are {sorted(own['form'])}. Train with qat's defaults for these."
        )
    if never := [name for name, n in own.get("count", {}).items() if not np.all(np.asarray(n))]:
        raise SetupError(
            f"the static ranges of {never} were never calibrated: no training step has seen "
            "them, so that there is nothing to round to. Train for a step at least (with a "
            "learning rate of 0, to calibrate alone), or use qat(ranges='dynamic')."
        )
    return own


def entry_of(
    site: Site,
    own: Mapping[str, Any],
    facts: Mapping[str, Mapping[str, Any]],
    grouped: str,
    cpu: bool,
    turned: bool,
) -> Entry:
    """How a site runs.

    Args:
      site: one that was quantized in training.
      own: the state of the `qat`.
      facts: see `Transform.describe`.
      grouped: see `integer`.
      cpu: whether the program is written for XLA's CPU backend.
      turned: store the codes of a weight that is multiplied in integers transposed.

    Raises:
      SetupError: bits outside 2..8, tiled scales, sums that may exceed int32.
    """
    # A leaf's facts are the widest of its uses; the use's own, where it has several, are under "@".
    fact = facts.get("@" + site.path, facts.get(site.path, {}))
    w, a = fact.get("weight_bits"), fact.get("act_bits")
    for what, bits in (("weights", w), ("activations", a)):
        if bits is not None and not 2 <= bits <= numerics.WIDEST:
            raise SetupError(
                f"the {what} of {site.path} have {bits} bits; an integer program multiplies 2 to "
                f"{numerics.WIDEST} bits. Train with fewer, or leave the site in floating point."
            )
    table = site.path in own["tables"]
    names: dict[int, str] = {}
    if a is not None and not table:
        product = {0: f"{site.path}/lhs", 1: f"{site.path}/rhs"}
        names = product if site.weight is None else {1 - site.weight: site.path}
    whole = a is not None and (w is not None or site.weight is None)
    run = "table" if table else "integer" if whole else "weights" if w is not None else "inputs"
    if run == "integer" and site.op == CONV and site.groups > 1:
        depthwise = site.weight == 1 and site.rhs[site.channels[1][0]] == site.groups
        slow = cpu and not depthwise
        run = "float" if grouped == "float" or (grouped == "auto" and slow) else run
    if run == "integer":
        kernels.check_sums(site, 2 ** ((w or a or 0) - 1) - 1, 2 ** ((a or 0) - 1) - 1)
    channels: tuple[int, ...] = ()
    if site.weight is not None and w is not None:
        count = int({**own["scales"], **own["tables"]}[site.path])
        if count == site.scales:
            channels = site.channels[site.weight]
        elif count != math.prod(site.stack):
            raise SetupError(
                f"the weight of {site.path} has {count} scales; an integer sum is scaled once, so "
                f"it takes one for the weight or one for each of its {site.scales} channels. Train "
                "it without tiles."
            )
    return Entry(run, w, a, channels, names, turned and run == "integer")


def check_selected(entries: Mapping[str, Entry], select: str | None, analysis: Analysis) -> None:
    """Raises unless every site that `select` matches is multiplied in integers."""
    if select is None:
        return
    chosen = [site.path for site in analysis.sites if re.search(select, site.path)]
    if not chosen:
        raise SelectorError(
            f"select={select!r} matches none of the sites {[s.path for s in analysis.sites]}."
        )
    runs = {path: entries[path].run if path in entries else "not quantized" for path in chosen}
    if floats := {path: run for path, run in runs.items() if run != "integer"}:
        raise SetupError(
            f"these sites are selected, but would not be multiplied in integers: {floats}. Train "
            "them with 2 to 8 bits of weights and of activations (qat's `select`, `rules` and "
            "`products`); grouped convolutions also need grouped='integer' here."
        )
