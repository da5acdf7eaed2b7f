"""Which sites are quantized, and to how many bits."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.core import PyTree
from effjax.errors import SelectorError
from effjax.jaxprs import GATHER
from effjax.quantize import numerics
from effjax.schedules import is_traced
from effjax.select import check_floating, leaves, select
from effjax.sites import Analysis, Site, check_reached, check_ruled


class Bits(NamedTuple):
    """Bit widths at a site: 2..8, or 16 and more for floating point. May be traced."""

    weights: numerics.Bits = 8
    activations: numerics.Bits = 8


def by_leaf(
    bits: Mapping[str, "Bits | numerics.Bits"], activations: numerics.Bits = 32
) -> tuple[tuple[str, Bits], ...]:
    """Rules that give each leaf bits of its own, at all its uses: mixed precision.

    Args:
      bits: {params path: bits of the weights, or `Bits`}; traced widths share one program.
      activations: bits of what they are multiplied with, where only the weights' are given.

    Example:
      >>> import effjax as ej
      >>> mixed = ej.quantize.by_leaf({"conv/kernel": 4, "head/kernel": 2}, activations=8)
      >>> mixed[1]
      ('^head/kernel(#[0-9]+)?$', Bits(weights=2, activations=8))
      >>> ej.quantize.qat(8, 8, rules=mixed).kind
      'quantize'
    """

    def both(found: "Bits | numerics.Bits") -> Bits:
        return found if isinstance(found, Bits) else Bits(found, activations)

    return tuple((f"^{re.escape(path)}(#[0-9]+)?$", both(found)) for path, found in bits.items())


class Rules(NamedTuple):
    """Regular expressions over site paths, and what they ask for; see `qat`."""

    select: str
    bits: tuple[tuple[str, Bits], ...]
    default: Bits
    embeddings: str | None  # over params paths; None for no embeddings
    products: str | None  # over the names of products; None for no products

    def takes(self, site: Site) -> bool:
        """Whether a site is quantized."""
        operands = site.dtypes[:1] if site.op == GATHER else site.dtypes[:2]
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in operands):
            return False
        if site.weight is None:
            return self.products is not None and bool(re.search(self.products, site.path))
        if self.embeddings is not None and _any(self.embeddings, site.leaves):
            return True
        return site.op != GATHER and _any(self.select, site.leaves)

    @property
    def widths(self) -> tuple[Bits, ...]:
        """The default and the rules' bits."""
        return self.default, *(bits for _, bits in self.bits)

    def which(self, path: str) -> int:
        """Which of the `widths` a site has."""
        found = (i for i, (pattern, _) in enumerate(self.bits, 1) if re.search(pattern, path))
        return next(found, 0)

    def at(self, path: str) -> Bits:
        """The bits at a site."""
        return self.widths[self.which(path)]

    def inputs(self, site: Site) -> dict[int, str]:
        """The operands that are rounded as activations, and the names of their ranges."""
        if site.op == GATHER or is_float(self.at(site.path).activations):
            return {}
        if site.weight is None:
            return {0: f"{site.path}/lhs", 1: f"{site.path}/rhs"}
        return {1 - site.weight: site.path}

    def check(self, params: PyTree, analysis: Analysis) -> list[Site]:
        """The sites that are quantized.

        Raises:
          SelectorError: an expression that matches nothing.
          SetupError: a selected matrix that is not floating point.
          SiteError: a selected matrix that reaches no site, or a site that cannot be rewritten.
        """
        wanted: dict[str, Any] = {}
        for pattern in (self.select, self.embeddings):
            if pattern is not None:
                chosen = _matrices(select(params, pattern))
                check_floating(chosen, pattern, "floats are what is rounded to integers")
                wanted |= chosen
        sites = [site for site in analysis.sites if self.takes(site)]
        check_reached(sites, wanted, analysis.met)
        for site in sites:
            check_ruled(site)
        if not sites:
            raise SelectorError(
                f"the selector {self.select!r} matches {list(select(params, self.select))}, none "
                "of which is a matrix: nothing would be quantized. The sites of the model are "
                f"{[site.path for site in analysis.sites]}."
            )
        names = [site.path for site in sites]
        unused = [p for p, _ in self.bits if not any(re.search(p, name) for name in names)]
        if self.products is not None and all(site.weight is not None for site in sites):
            unused.append(self.products)
        if unused:
            others = [site.path for site in analysis.sites if site.path not in names]
            raise SelectorError(
                f"the patterns {unused} match none of the quantized sites {names}. "
                f"Sites that are not quantized: {others}."
            )
        return sites

    def describe(self, params: PyTree, state: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """The facts of `Transform.describe`, from the state of a `qat`."""
        facts: dict[str, dict[str, int]] = {}
        for path, scales in {**state["scales"], **state["tables"]}.items():
            bits = self.at(path)
            fact: dict[str, int] = {}
            if not path.startswith("@") and not is_float(bits.weights):
                fact |= {"weight_bits": int(bits.weights), "scales": int(scales)}
            multiplies, counts = path in state["scales"], state.get("count", {})
            inputs = [counts[n] for n in (path, f"{path}/lhs", f"{path}/rhs") if n in counts]
            calibrated = all(np.all(np.asarray(count) > 0) for count in inputs)
            if multiplies and not is_float(bits.activations) and calibrated:
                fact["act_bits"] = int(bits.activations)
            leaf = path
            if path not in leaves(params) and not path.startswith("@"):
                leaf = path.rpartition("#")[0]
                facts["@" + path] = fact
            elif any(other.startswith(path + "#") for other in state["scales"]):
                facts["@" + path] = fact
            # A leaf used at several sites is stored at the widest.
            known = facts.setdefault(leaf, {})
            facts[leaf] = {n: max(fact.get(n, 0), known.get(n, 0)) for n in {**known, **fact}}
        return facts


def is_float(bits: numerics.Bits) -> bool:
    """Whether a width is known to mean floating point, so that nothing need be computed."""
    return not is_traced(bits) and int(bits) >= numerics.FLOAT


def _any(pattern: str, paths: tuple[str, ...]) -> bool:
    return any(re.search(pattern, path) for path in paths)


def _matrices(found: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf for path, leaf in found.items() if np.ndim(leaf) > 1}
