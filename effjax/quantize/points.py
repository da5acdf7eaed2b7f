"""Where a frozen program rounds what it computes, beside the inputs of its sites.

An engine multiplies in integers only where an operation's result is rounded too. So each value that
a site, a sum or a pool makes is looked at: what becomes of it says where one quantizer serves all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from effjax.quantize.marker import Quantizer

SITE, SUM, POOL, OTHER = "site", "sum", "pool", "other"


@dataclass
class Made:
    """A value that the program makes, and what becomes of it.

    kind: SITE (a dense layer, a convolution or a product, with what was added and a ReLU), SUM of
      two values, POOL, or OTHER.
    name: of the site, or "sum", "sum#1", ....
    sites: the quantizers of the site inputs that it is.
    uses: what else reads it: "relu", SUM, POOL, OTHER, "output".
    """

    kind: str
    name: str
    sites: list[Quantizer] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)


class Point(NamedTuple):
    """What is done to a value when it is made.

    shared: the quantizer of a site's input that all its uses may share, if one can.
    name: of the quantizer that it gets where that does not cover it, or "" for none.
    """

    shared: Quantizer | None
    name: str


def points(made: Mapping[int, Made], outputs: bool) -> dict[int, Point]:
    """The values that are rounded when they are made.

    Args:
      made: by number.
      outputs: whether the model's outputs are rounded.
    """
    found = {}
    for number, value in made.items():
        grids = {(float(q.scale), q.low, q.high) for q in value.sites}
        others = value.uses - ({"output"} if not outputs else set())
        one = value.sites[0] if len(grids) == 1 else None
        if not others:
            # Sites alone: one quantizer where they agree, else each has its own.
            if one is not None and "output" not in value.uses:
                found[number] = Point(one, "")
            continue
        if others == {"relu"} and not value.sites and "output" not in value.uses:
            continue  # the ReLU's result is rounded
        wide = one if one is not None and one.bits == 8 and "output" not in value.uses else None
        own = f"{value.name}:output"
        if value.kind == SITE or (value.kind == SUM and (wide or _only_pooled(others))):
            found[number] = Point(wide, own)
        elif value.kind == POOL and "output" in others:
            found[number] = Point(None, own)
    return found


def _only_pooled(uses: set[str]) -> bool:
    """Whether a sum goes on as an image does, rather than into a normalization."""
    return POOL in uses and uses <= {POOL, SUM, "output"}
