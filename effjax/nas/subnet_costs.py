"""What a sub-network costs, as a function of its architecture: exact, from the traced model."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import PyTree
from effjax.errors import SetupError
from effjax.nas.slices import Axis, Bits
from effjax.nas.supernet import Leaf, Supernet
from effjax.prune.dependencies import STATE, Dependencies, trace
from effjax.quantize.numerics import FLOAT
from effjax.select import leaves
from effjax.sites import find_sites


class SubnetCost(NamedTuple):
    """The costs of one sub-network; integers of NumPy, or float32 where the architecture is traced.

    macs: multiply-accumulates over the supernet's batch, as `find_sites` counts.
    effective_macs: those with weights that are not pruned.
    bitops: effective MACs, times the bits of both operands.
    parameters, nonzeros: of the params.
    bytes: of params and model_state as they are stored: each leaf with its bits, dense or as a
      bitmask and its non-zeros, whichever is less, and a float32 scale for each channel of a
      quantized one. `ej.footprint` of the extracted network finds no more: it knows further
      formats, and the zeros that rounding makes.
    """

    macs: Any
    effective_macs: Any
    bitops: Any
    parameters: Any
    nonzeros: Any
    bytes: Any


class _Product(NamedTuple):
    leaf: str
    unit: tuple[int, ...]  # MACs of one entry of every axis, by resolution
    axes: tuple[Axis, ...]


class Costs:
    """The costs of a supernet's sub-networks.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), inputs="x")
      >>> net = ej.nas.Supernet(
      ...     model, {"x": jnp.ones((1, 4))}, {"hidden": ej.nas.Width("layers_0/kernel")}
      ... )
      >>> cost = ej.nas.Costs(net)
      >>> int(cost(net.architecture()).macs), int(cost(net.architecture({"hidden": 0.5})).macs)
      (56, 28)

    Args:
      net: see `Supernet`; MACs are of its batch.

    Raises:
      SetupError: a product of the model that cannot be followed.
    """

    def __init__(self, net: Supernet):
        self.net = net
        gene = net.resolution_gene
        sizes: tuple[int | None, ...] = (None,) if gene is None else net.values[gene]
        self._gene = gene
        traced = [
            trace(net.model.apply, net.params, net.model_state, _batch(net, s)) for s in sizes
        ]
        units = _units(net)
        found = [
            self._products(deps, units, size) for deps, size in zip(traced, sizes, strict=True)
        ]
        self._all = [
            first._replace(unit=tuple(unit for p in same for unit in p.unit))
            for first, *same in ((ps[0], *ps) for ps in zip(*found, strict=True))
        ]
        roles = traced[0].roles
        self._makes = {
            path: [i for i in range(len(leaf.shape)) if "out" in roles.get((path, i), ())]
            for path, leaf in net.leaves.items()
        }
        everything = leaves(net.params) | {STATE + p: x for p, x in leaves(net.model_state).items()}
        self._itemsize = {path: jnp.dtype(x.dtype).itemsize for path, x in everything.items()}

    def __call__(self, arch: Any) -> SubnetCost:
        """The costs of an architecture, int [genes]: exact for NumPy's; traced, in float32."""
        concrete = not isinstance(arch, jax.Array)
        arch = np.asarray(arch) if concrete else arch
        macs = effective = bitops = 0
        for product in self._all:
            leaf = self.net.leaves[product.leaf]
            own = self._unit(product, arch) * _number(leaf.exists(arch), concrete)
            for axis in product.axes:
                own = own * _number(axis.count(arch), concrete)
            for axis in leaf.axes[: -2 if leaf.kernel is not None else 0]:
                own = own * _number(axis.count(arch), concrete)
            share = self._share(leaf, own, arch, concrete)
            weight, act = self._bits(product.leaf, leaf, arch, concrete)
            macs, effective = macs + own, effective + share
            bitops = bitops + share * weight * act
        parameters = nonzeros = stored = 0
        for path, leaf in self.net.leaves.items():
            entries = _number(leaf.entries(arch), concrete)
            kept = entries - _number(self.net.zeros(leaf, arch), concrete)
            if not path.startswith(STATE):
                parameters, nonzeros = parameters + entries, nonzeros + kept
            stored = stored + self._stored(path, leaf, entries, kept, arch, concrete)
        return SubnetCost(macs, effective, bitops, parameters, nonzeros, stored)

    def _unit(self, product: _Product, arch: Any) -> Any:
        if self._gene is None:
            return product.unit[0]
        if isinstance(arch, np.ndarray):
            return product.unit[arch[self._gene]]
        return jnp.array(product.unit, jnp.float32)[arch[self._gene]]

    def _share(self, leaf: Leaf, macs: Any, arch: Any, concrete: bool) -> Any:
        if leaf.sparsity is None:
            return macs
        entries = _number(leaf.entries(arch), concrete)
        kept = entries - _number(self.net.zeros(leaf, arch), concrete)
        if concrete:
            return round(macs * kept / max(entries, 1))
        return macs * kept / jnp.maximum(entries, 1)

    def _bits(self, path: str, leaf: Leaf, arch: Any, concrete: bool) -> tuple[Any, Any]:
        plain = 8 * self._itemsize[path]
        if leaf.bits is None:
            return plain, 32
        own = self.net.elastic[self.net.names[leaf.bits]]
        assert isinstance(own, Bits)
        table = np.array([b if b < FLOAT else plain for b in self.net.values[leaf.bits]])
        weight = int(table[arch[leaf.bits]]) if concrete else jnp.asarray(table)[arch[leaf.bits]]
        if own.activations == "same":
            return weight, weight
        return weight, own.activations if own.activations < FLOAT else 32

    def _stored(
        self, path: str, leaf: Leaf, entries: Any, kept: Any, arch: Any, concrete: bool
    ) -> Any:
        bits, _ = self._bits(path, leaf, arch, concrete)
        number: Any = np if concrete else jnp
        dense = -(-entries * bits // 8)
        if leaf.sparsity is not None:
            dense = number.minimum(dense, -(-entries // 8) + -(-kept * bits // 8))
        if leaf.bits is None:
            return dense
        scales = _number(leaf.exists(arch), concrete)
        for i in self._makes[path]:
            scales = scales * _number(leaf.axes[i].count(arch), concrete)
        return dense + number.where(bits < FLOAT, 4 * scales, 0)

    def _products(
        self, deps: Dependencies, units: Mapping[int, Any], size: int | None
    ) -> list[_Product]:
        net, found = self.net, []
        # A new trace numbers its units alike: the program is the same but for sizes of images.
        for product in deps.products:
            if product is None or not product.macs:
                continue
            leaf = net.leaves.get(product.where)
            if leaf is None:
                raise SetupError(
                    f"the weight of a product at {product.where!r} is no params leaf as it is "
                    "(it is computed from several), so that its MACs cannot be told from "
                    "architectures. Multiply with params as they are."
                )
            whole = list(product.out)
            if product.inner is not None:
                whole.append(product.inner)
            else:
                whole += [product.axes[0][a] for a, _ in product.summed]
            axes = [_governed(deps.units.resolved(axis), units) for axis in whole]
            full = math.prod(len(axis) for axis in whole)
            taps = leaf.shape[:-2] if leaf.kernel is not None else ()
            unit, left = divmod(product.macs, full * math.prod(taps))
            if left:
                raise SetupError(
                    f"{product.where} multiplies {product.macs:,} times, which its axes and "
                    "taps do not divide: a transposed convolution cannot have an elastic kernel."
                )
            # Axes that are always whole are a number.
            unit *= math.prod(axis.table.shape[-1] for axis in axes if not axis.genes)
            found.append(
                _Product(product.where, (unit,), tuple(axis for axis in axes if axis.genes))
            )
        batch = _batch(net, size)
        sites = find_sites(net.model.apply, net.params, net.model_state, batch)
        total = sum(site.macs for site in sites)
        if total != (followed := sum(p.macs for p in deps.products if p is not None)):
            raise SetupError(
                f"the model multiplies {total:,} times with weights, of which {followed:,} could "
                "be followed through the program; loops (scan, while) cannot be."
            )
        return found


def _number(x: Any, concrete: bool) -> Any:
    """An exact Python integer, or float32 in which integers up to 2^24 are exact."""
    return int(x) if concrete else jnp.asarray(x).astype(jnp.float32)


def _batch(net: Supernet, size: int | None) -> PyTree:
    return jax.eval_shape(lambda batch: net.resized(batch, size), net.batch)


def _units(net: Supernet) -> dict[int, tuple[int, np.ndarray]]:
    """{unit: (gene, bool [choices], whether its channel is kept)}."""
    found: dict[int, tuple[int, np.ndarray]] = {}
    for name, (gene, kept) in net.widths.items():
        for channel, unit in enumerate(net.groups[name].units):
            found[int(unit)] = gene, channel < kept
    return found


def _governed(axis: np.ndarray, units: Mapping[int, tuple[int, np.ndarray]]) -> Axis:
    """Which entries of an axis of units [size, k] are kept, by the genes that decide it."""
    own = {int(u): units[int(u)] for u in np.unique(axis) if int(u) in units}
    genes = tuple(sorted({gene for gene, _ in own.values()}))
    lengths = [max(len(table) for g, table in own.values() if g == gene) for gene in genes]
    table = np.ones((*lengths, len(axis)), bool)
    for entry, row in enumerate(axis):
        for unit in {int(u) for u in row} & set(own):
            gene, kept = own[unit]
            shape = [1] * len(genes)
            shape[genes.index(gene)] = len(kept)
            table[..., entry] &= kept.reshape(shape)
    return Axis(genes, table)
