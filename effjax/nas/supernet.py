"""Supernets: the space of a model's sub-networks, each a vector of integers and a view."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Ctx, Forward, PyTree, Transform
from effjax.errors import SelectorError, SetupError
from effjax.model import Model
from effjax.nas.dimensions import Choice, When
from effjax.nas.slices import (
    Bits,
    Kernel,
    Resolution,
    values_of,
)
from effjax.nas.space import Space
from effjax.nas.supernet_leaves import Leaf, Reader
from effjax.prune.grouping import groups
from effjax.prune.masks import masked
from effjax.prune.threshold import largest
from effjax.quantize.qat import qat
from effjax.quantize.rules import Bits as SiteBits
from effjax.quantize.rules import by_leaf
from effjax.select import leaves, replace


class Supernet(Space):
    """The sub-networks of a model that share its weights: a space like others, for all strategies.

    A sub-network is an int32 vector with one gene for each elastic dimension, from the smallest
    choice (0) to the largest. Choosing another one compiles nothing again: it is a view of the
    weights, in which everything that the sub-network does not have is an exact zero (and rounding
    to so many bits, and resizing the images). `ej.nas.elastic` trains the supernet,
    `extract_subnet` cuts a sub-network out, `Costs` counts what it takes.

    What is exact:
      Width: if activations map 0 to 0 (ReLU, GELU, SiLU, tanh; not sigmoid). Channels over which
        statistics are taken (LayerNorm, GroupNorm) are refused.
      Kernel: with stride 1 and "same" padding, or where the padding of the smaller size is the
        larger's less one on each side for every two taps; not from 3 to 1 with stride 2, for
        example.
      Depth: where a block is x + f(x), or relu(x + f(x)) of an x that is not negative, and f ends
        in a layer whose params are named: then a skipped block gives x, bit for bit. A shortcut
        with weights of its own stays if the pattern leaves it out. Not where the sum is normalized
        (post-norm transformers).
      Sparsity, Bits: as pruning by magnitude and `ej.quantize.qat` with dynamic ranges do it.
      Resolution: always; the model must have params and outputs that do not depend on the size.
    `extract_subnet` computes both networks and compares them.

    Args:
      model: with all choices at their largest.
      batch: inputs to trace with, arrays or ShapeDtypeStructs; one example is enough. Costs count
        this batch.
      dimensions: {name: Width, Kernel, Depth, Sparsity, Bits or Resolution}, or a When with one of
        these, for what exists only in deeper networks.
      constraint: see `Space`.
      symmetric: see `ej.quantize.qat`; of quantized activations.

    Raises:
      SetupError: choices that cannot be meant, or channels that have to stay.
      SelectorError: a pattern that matches nothing that it can be about, or two dimensions about
        the same.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), inputs="x")
      >>> net = ej.nas.Supernet(
      ...     model, {"x": jnp.ones((1, 4))}, {"hidden": ej.nas.Width("layers_0/kernel")}
      ... )
      >>> net
      Space of 3 configurations
        hidden: 0.5, 0.75, 1.0 (3)
      >>> net.architecture({"hidden": 0.5}).tolist()
      [0]

    References: Cai et al., "Once-for-All", 2020, https://arxiv.org/abs/1908.09791; Yu et al.,
      "BigNAS", 2020, https://arxiv.org/abs/2003.11142.
    """

    def __init__(
        self,
        model: Model,
        batch: PyTree,
        dimensions: Mapping[str, Any],
        constraint: Callable[[Array], Array] | None = None,
        *,
        symmetric: bool = True,
    ):
        self.elastic = {n: d.then if isinstance(d, When) else d for n, d in dimensions.items()}
        super().__init__({n: _choice(n, d) for n, d in dimensions.items()}, constraint)
        self.model, self.symmetric = model, symmetric
        self.batch = jax.eval_shape(lambda b: b, batch)
        shapes = jax.eval_shape(model.init, jax.random.key(0), self.batch)
        self.params, self.model_state = shapes[0], shapes[1]
        self.groups = groups(model, shapes[0], shapes[1], self.batch)
        reader = Reader(self)
        self.widths = reader.widths()
        self.leaves = reader.leaves(self.widths)
        resolutions = list(self.of(Resolution))
        if len(resolutions) > 1:
            raise SelectorError(
                f"{[self.names[g] for g in resolutions]} are all a Resolution; images have one."
            )
        self.resolution_gene = resolutions[0] if resolutions else None

    def of(self, kind: type) -> dict[int, Any]:
        """The dimensions of a kind, by gene."""
        found = enumerate(self.elastic.values())
        return {gene: own for gene, own in found if isinstance(own, kind)}

    # --- architectures -------------------------------------------------------------------------

    @property
    def smallest(self) -> Array:
        """Every dimension at its smallest choice: int32 [genes]."""
        return jnp.zeros(len(self.names), jnp.int32)

    @property
    def largest(self) -> Array:
        """Every dimension at its largest choice: int32 [genes]."""
        return self.canonical(jnp.asarray(self._counts - 1, jnp.int32))

    def architecture(self, config: Mapping[str, Any] | None = None) -> np.ndarray:
        """The vector of a configuration, int32 [genes]; what is not named is at its largest.

        Raises:
          SetupError: an unknown name or value.
        """
        config, row = dict(config or {}), list[int]()
        for name, values, parent in zip(self.names, self.values, self.parents, strict=True):
            given = config.pop(name, values[-1])
            if given not in values:
                raise SetupError(f"{name} = {given!r} is not one of {values}.")
            row.append(values.index(given) if self.holds(tuple(row), parent) else 0)
        if config:
            raise SetupError(f"{sorted(config)} are no dimensions; those are {self.names}.")
        return np.array(row, np.int32)

    def draw(self, key: Array, count: int, lowest: Array | None = None) -> Array:
        """Architectures with each gene drawn uniformly from `lowest` to its largest.

        As supernets are trained: genes are independent, and a constraint plays no part.

        Args:
          lowest: int32 [genes]; by default zeros.

        Returns:
          int32 [count, genes]
        """
        low = jnp.zeros(len(self.names), jnp.int32) if lowest is None else lowest
        u = jax.random.uniform(key, (count, len(self.names)))
        free = jnp.asarray(self._counts) - low
        return self.canonical(low + jnp.minimum((u * free).astype(jnp.int32), free - 1))

    def channels(self, arch: Any) -> dict[str, int]:
        """The channels of each group that could be narrowed, by the kernel that makes them."""
        arch, found = np.asarray(arch), {}
        for name, group in self.groups.prunable.items():
            gene, kept = self.widths.get(name, (0, None))
            found[name] = group.size if kept is None else int(kept[arch[gene]])
        return found

    # --- what an architecture does -------------------------------------------------------------

    def view(self, params: PyTree, arch: Array, matrices: PyTree = None) -> PyTree:
        """The params of one architecture: exact zeros where it has none.

        Gradients: each weight that it has gets its own, all others exactly 0.

        Args:
          params: of the largest network.
          arch: int32 [genes], perhaps traced.
          matrices: of elastic kernels, see `Kernel`; {params path: {size: [taps, taps]}}.
        """
        new, named = {}, leaves(params)
        arch = jnp.asarray(arch)
        scores, keep = {}, {}
        for path, leaf in self.leaves.items():
            x = named.get(path)
            if x is None or not leaf.changes:
                continue
            if matrices and path in matrices:
                x = self._transformed(x, leaf, arch, matrices[path])
            mask = leaf.mask(arch)
            if mask is not None:
                x = masked(x, jnp.broadcast_to(mask, x.shape))
            if leaf.sparsity is not None:
                scores[path] = jnp.abs(x)
                keep[path] = leaf.entries(arch) - self.zeros(leaf, arch)
            new[path] = x
        if scores:
            new |= {p: masked(new[p], own) for p, own in largest(scores, keep).items()}
        return replace(params, new)

    def zeros(self, leaf: Leaf, arch: Any) -> Any:
        """How many of a leaf's kept entries its sparsity makes zero: floor(sparsity * entries)."""
        entries = leaf.entries(arch)
        if leaf.sparsity is None:
            return entries * 0
        table = np.array(self.values[leaf.sparsity], np.float32)
        if isinstance(arch, np.ndarray):
            return np.floor(table[arch[leaf.sparsity]] * np.float32(entries)).astype(int)
        share = jnp.asarray(table)[arch[leaf.sparsity]]
        return jnp.floor(share * entries.astype(jnp.float32)).astype(jnp.int32)

    def _transformed(
        self, x: Array, leaf: Leaf, arch: Array, matrices: Mapping[str, Array]
    ) -> Array:
        assert leaf.kernel is not None
        sizes = self.values[leaf.kernel]
        spatial, whole = len(leaf.shape) - 2, x
        inner = x
        for choice in reversed(range(len(sizes) - 1)):
            size = sizes[choice]
            cut = (inner.shape[0] - size) // 2
            window = (slice(cut, cut + size),) * spatial
            taps = inner[window].reshape(-1, math.prod(leaf.shape[-2:]))
            inner = (matrices[str(size)] @ taps).reshape(inner[window].shape)
            around = (leaf.shape[0] - size) // 2
            padded = jnp.pad(inner, [(around, around)] * spatial + [(0, 0)] * 2)
            x = jnp.where(arch[leaf.kernel] == choice, padded, x)
        return jnp.where(arch[leaf.kernel] == len(sizes) - 1, whole, x)

    def matrices(self) -> dict[str, dict[str, Array]]:
        """The matrices of elastic kernels that have some, as the identity."""
        found: dict[str, dict[str, Array]] = {}
        for path, leaf in self.leaves.items():
            if leaf.kernel is None:
                continue
            own = self.elastic[self.names[leaf.kernel]]
            if isinstance(own, Kernel) and own.matrices:
                power = len(leaf.shape) - 2
                sizes = self.values[leaf.kernel][:-1]
                found[path] = {str(s): jnp.eye(s**power, dtype=jnp.float32) for s in sizes}
        return found

    def quantizer(self, arch: Any, existing: bool = False) -> Transform | None:
        """The quantization-aware training with the bits of an architecture; None without bits.

        Args:
          arch: int [genes], perhaps traced.
          existing: leave out what the architecture skips, as for an extracted network; not traced.
        """
        chosen: dict[str, SiteBits] = {}
        for path, leaf in self.leaves.items():
            if leaf.bits is None or (existing and not leaf.exists(arch)):
                continue
            own = self.elastic[self.names[leaf.bits]]
            assert isinstance(own, Bits)
            table = np.array(self.values[leaf.bits], np.int32)
            traced = not isinstance(arch, np.ndarray)
            bits = jnp.asarray(table)[arch[leaf.bits]] if traced else int(table[arch[leaf.bits]])
            chosen[path] = SiteBits(bits, bits if own.activations == "same" else own.activations)
        if not chosen:
            return None
        wanted = "|".join(f"^{re.escape(path)}$" for path in chosen)
        return qat(32, 32, select=wanted, rules=by_leaf(chosen), symmetric=self.symmetric)

    def wrap(self, forward: Forward, arch: Any, state: PyTree, ctx: Ctx) -> Forward:
        """A forward pass with an architecture's bits, at its resolution.

        Args:
          forward: of the params that `view` gave.
          arch: int32 [genes], perhaps traced.
          state: of the `quantizer`.
        """
        if (quant := self.quantizer(arch)) is not None:
            rounded = quant.wrap(forward, {}, state, ctx)

            def forward(params, model_state, batch, key, train):
                outputs, model_state, aux = rounded(params, model_state, batch, key, train)
                return outputs, model_state, {n: x for n, x in aux.items() if n not in _SEEN}

        if self.resolution_gene is None:
            return forward
        gene, inner = self.resolution_gene, forward
        own = self.elastic[self.names[gene]]
        assert isinstance(own, Resolution)

        def resized(params, model_state, batch, key, train):
            def at(size: int) -> Callable[[PyTree], Any]:
                return lambda batch: inner(
                    params, model_state, batch_at(batch, own, size), key, train
                )

            branches = [at(size) for size in self.values[gene]]
            _check_alike(branches, batch, self.values[gene])
            return jax.lax.switch(jnp.asarray(arch)[gene], branches, batch)

        return resized

    def resolution(self, arch: Any) -> int | None:
        """The size of the images that an architecture runs at; None if that is not elastic."""
        if self.resolution_gene is None:
            return None
        return self.values[self.resolution_gene][int(np.asarray(arch)[self.resolution_gene])]

    def resized(self, batch: PyTree, size: int | None) -> PyTree:
        """The batch with its images at a size that `resolution` gave."""
        if size is None or self.resolution_gene is None:
            return batch
        own = self.elastic[self.names[self.resolution_gene]]
        assert isinstance(own, Resolution)
        return batch_at(batch, own, size)


_SEEN = ("ranges", "lows")  # what `qat` measures


def batch_at(batch: PyTree, own: Resolution, size: int) -> PyTree:
    """The batch with its images at another size."""
    if own.entry not in batch:
        raise SetupError(f"the batch has no {own.entry!r} to resize; it has {list(batch)}.")
    x = batch[own.entry]
    if x.shape[1:3] == (size, size):
        return batch
    shape = (x.shape[0], size, size, *x.shape[3:])
    return {**batch, own.entry: jax.image.resize(x, shape, "linear")}


def _check_alike(branches: Sequence[Callable], batch: PyTree, sizes: Sequence[int]) -> None:
    shapes = [jax.tree.map(lambda x: x.shape, jax.eval_shape(b, batch)) for b in branches]
    for size, found in zip(sizes, shapes, strict=True):
        if found != shapes[-1]:
            raise SetupError(
                f"at the resolution {size} the model's outputs have the shapes {found}, at "
                f"{sizes[-1]} {shapes[-1]}. An elastic resolution needs a model that pools over "
                "the whole image."
            )


def _choice(name: str, dimension: Any) -> Any:
    choice = Choice(values_of(name, dimension))
    if isinstance(dimension, When):
        return When(dimension.name, dimension.values, choice)
    return choice
