"""What a model costs to store and to compute: parameters, non-zeros, bytes and MACs, by leaf."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from effjax.core import Apply, PyTree
from effjax.cost import container
from effjax.cost.coding import code, concrete
from effjax.cost.compute import Compute, compute
from effjax.cost.formats import cheapest, choices, floats
from effjax.cost.layouts import Spec
from effjax.errors import SelectorError, SetupError
from effjax.select import leaves
from effjax.sites import find_sites

SHORT = {"dot_general": "dot", "conv_general_dilated": "conv"}


class HasMacs(Protocol):
    """What is read of an `effjax.Site`: the weight's params path, and no weight in products."""

    @property
    def weight(self) -> int | None: ...
    @property
    def leaf(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def macs(self) -> int: ...


class Leaf(NamedTuple):
    """The costs of one leaf."""

    path: str
    shape: tuple[int, ...]
    parameters: int  # 0 for a leaf of the model state, which is stored but not trained
    nonzeros: int
    bits: int  # of a stored value
    format: str  # the layout of `sizes` that takes the fewest bytes
    bytes: int  # as stored, mask or index and scales included
    op: str  # the operations that use it, or "" for those without MACs (biases, norms)
    macs: int
    effective_macs: int  # with non-zero weights
    bitops: int  # effective MACs, times the bits of both operands
    entropy_bytes: int  # of the stored symbols, each coded by itself, with scales and codebook
    sizes: dict[str, int]  # bytes in each layout, as it is stored and, "float ...", unquantized


class Totals(NamedTuple):
    """The costs of a model."""

    parameters: int
    nonzeros: int
    bytes: int
    macs: int
    effective_macs: int
    bitops: int
    entropy_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the parameters."""
        return 1 - self.nonzeros / max(self.parameters, 1)


class Footprint(NamedTuple):
    """A table of costs: one row a leaf, and the totals. `print` it, or take `to_dict()`."""

    leaves: tuple[Leaf, ...]
    weightless_macs: int  # of operations between activations (attention scores)
    weightless_bitops: int
    file_bytes: int  # of `ej.save_packed` without metadata, header included
    zstd_bytes: int | None = None  # of that file, compressed; None if not asked for
    compute: tuple[Compute, ...] = ()  # one a batch size; empty without `apply`

    @property
    def totals(self) -> Totals:
        """The sums over the leaves."""

        def total(field: str) -> int:
            return sum(getattr(leaf, field) for leaf in self.leaves)

        macs, effective = total("macs"), total("effective_macs")
        return Totals(
            total("parameters"),
            sum(leaf.nonzeros for leaf in self.leaves if leaf.parameters),
            total("bytes"),
            macs + self.weightless_macs,
            effective + self.weightless_macs,
            total("bitops") + self.weightless_bitops,
            total("entropy_bytes"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON: {"totals": {...}, "leaves": [{...}, ...]}."""
        totals = {**self.totals._asdict(), "sparsity": self.totals.sparsity}
        rows = [{**leaf._asdict(), "shape": list(leaf.shape)} for leaf in self.leaves]
        rest = {n: getattr(self, n) for n in self._fields if n not in ("leaves", "compute")}
        measured = [one.to_dict() for one in self.compute]
        return {"totals": totals, "leaves": rows, **rest, "compute": measured}

    def __str__(self) -> str:
        header = "path,shape,params,non-zeros,bits,layout,bytes,entropy,op"
        header += ",MACs,effective,BitOps"
        rows: list[tuple[str, ...]] = []
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            parameters = f"{leaf.parameters:,}" if leaf.parameters else "-"
            stored = (str(leaf.bits), leaf.format, f"{leaf.bytes:,}", f"{leaf.entropy_bytes:,}")
            work = (leaf.macs, leaf.effective_macs, leaf.bitops)
            cells = [f"{n:,}" if leaf.op else "" for n in work]
            rows.append(
                (leaf.path, shape, parameters, f"{leaf.nonzeros:,}", *stored, leaf.op, *cells)
            )
        if self.weightless_macs:
            macs = f"{self.weightless_macs:,}"
            products = f"{self.weightless_bitops:,}"
            rows.append(("(between activations)", *[""] * 8, macs, macs, products))
        total = {name: f"{n:,}" for name, n in self.totals._asdict().items()}
        sizes = (total["parameters"], total["nonzeros"], "", "", total["bytes"])
        work_ = (total["macs"], total["effective_macs"], total["bitops"])
        rows.append(("total", "", *sizes, total["entropy_bytes"], "", *work_))
        packed = "" if self.zstd_bytes is None else f"; {self.zstd_bytes:,} with zstd"
        lines = [_align([tuple(header.split(",")), *rows], left={0, 1, 5, 8})]
        lines.append(f"as a file: {self.file_bytes:,} bytes{packed}")
        return "\n".join([*lines, *map(str, self.compute)])


def footprint(
    params: PyTree,
    sites: Iterable[HasMacs] = (),
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    model_state: PyTree = None,
    apply: Apply | None = None,
    batch: PyTree = None,
    batch_sizes: Sequence[int] = (1, 32),
    zstd: bool = False,
) -> Footprint:
    """The cost of a model as it is shipped.

    Each leaf is stored in the layout that takes the fewest bytes at its bit width (dense, bitmask,
    CSR, or that of its pattern), scales and codebook included: what `ej.save_packed` writes. A site
    whose weight has density d takes d · MACs effective MACs: the products that are not with zero.

    Args:
      params: what is shipped, from `ej.export(transform, state)`; concrete arrays.
      sites: `ej.find_sites(apply, params, model_state, batch)`, for MACs. They count the whole
        batch: give it a batch of one example.
      facts: `transform.describe(params, extra, state)`. Read are "weight_bits" (by default those
        of the leaf's dtype), "act_bits" (32), "scales" (how many; 1), "clusters", "pattern" and
        "sparsity" (checked against the zeros).
      model_state: what is stored beside the params, BatchNorm's statistics for example: it counts
        in bytes, not in parameters.
      apply: `Model.apply`, to compile and time the model as well (`compute`, see
        `effjax.cost.compute`). Sites, where none are given, are found in it.
      batch: examples for that.
      batch_sizes: to compile for.
      zstd: whether to measure the packed file compressed by Zstandard at level 19, too.

    Raises:
      SelectorError: a site or a fact names a path that the params do not have.
      SetupError: abstract params, or fewer zeros than the transform says: not the exported params.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> params = {"kernel": jnp.zeros((8, 8)).at[0].set(1.0), "bias": jnp.ones(8)}
      >>> facts = {"kernel": {"weight_bits": 8, "scales": 8}}
      >>> print(ej.footprint(params, facts=facts))
      path    shape  params  non-zeros  bits  layout   bytes  entropy  op  MACs  effective  BitOps
      ------  -----  ------  ---------  ----  -------  -----  -------  --  ----  ---------  ------
      bias    8           8          8    32  dense       32        4
      kernel  8x8        64          8     8  bitmask     48       37
      ------  -----  ------  ---------  ----  -------  -----  -------  --  ----  ---------  ------
      total              72         16                    80       41         0          0       0
      as a file: 752 bytes

    (48 bytes: 8 of mask, 8 of values, 32 of scales.)
    """
    facts = facts or {}
    if (apply is None) != (batch is None):
        raise SetupError(
            "footprint got only one of apply and batch; to compile and time a model it needs both."
        )
    sites = tuple(sites)
    if apply is not None and not sites:
        single = jax.tree.map(lambda x: x[:1], batch)
        sites = find_sites(apply, params, model_state or {}, single, activations=True)
    arrays = {path: concrete(path, leaf) for path, leaf in leaves(params).items()}
    weightless, products, macs, ops = 0, 0, Counter[str](), dict[str, list[str]]()
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Mapping[str, Spec]] = {}
    values: dict[str, Mapping[str, np.ndarray]] = {}
    for site in sites:
        if site.weight is None:
            weightless += site.macs
            products += site.macs * _activation_bits(facts.get(getattr(site, "path", ""), {})) ** 2
            continue
        macs[site.leaf] += site.macs
        ops.setdefault(site.leaf, []).append(SHORT.get(site.op, site.op))
    for what, named in (("sites", ops), ("facts", facts)):
        # What is said of a single operation ("@...") is about no leaf.
        if unknown := sorted(p for p in set(named) - set(arrays) if not p.startswith("@")):
            raise SelectorError(
                f"the {what} name the paths {unknown}, but the params have {list(arrays)}. "
                f"Take the {what} and the params from the same model."
            )

    def leaf(path: str, array: np.ndarray, fact: Mapping[str, Any], trained: bool) -> Leaf:
        nonzero = array != 0
        count = int(nonzero.sum())
        if 1 - count / max(array.size, 1) < fact.get("sparsity", 0.0) - 1e-4:
            raise SetupError(
                f"{path} has {array.size - count} zeros among {array.size} values, but the "
                f"transform says its sparsity is {fact['sparsity']:.4f}. Give footprint the "
                "exported params: ej.export(transform, state)."
            )
        coded = code(path, array, fact)
        pattern = fact.get("pattern", "")
        options = coded.stored(pattern)
        best = cheapest(options)
        sizes = {name: option.bytes for name, option in options.items()}
        if best.encoding.kind != "float":
            plain = choices(nonzero, [floats(array.dtype)], pattern)
            sizes |= {f"float {name}": option.bytes for name, option in plain.items()}
        name = f"{'params' if trained else 'model_state'}/{path}"
        entries[name], tensors[name] = container.entry(coded, best), best.tensors
        if zstd:
            values[name] = coded.tensors(best)
        # Multiplied before it is divided: exact while MACs · parameters is an exact integer.
        effective = round(macs[path] * count / max(array.size, 1))
        op = "+".join(sorted(set(ops.get(path, []))))
        parameters = array.size if trained else 0
        bits = best.encoding.bits
        return Leaf(
            path,
            array.shape,
            parameters,
            count,
            bits,
            best.layout.name,
            best.bytes,
            op,
            macs[path],
            effective,
            effective * bits * _activation_bits(fact),
            coded.entropy_bytes(),
            sizes,
        )

    rows = [leaf(path, array, facts.get(path, {}), True) for path, array in arrays.items()]
    for path, value in leaves({} if model_state is None else model_state).items():
        if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            rows.append(leaf(path, concrete(path, value), {}, False))
    head, order = container.header(entries, tensors, {})
    size = len(head) + sum(row.bytes for row in rows)
    packed = _zstd(b"".join([head, *container.contents(values, order)])) if zstd else None
    measured: tuple[Compute, ...] = ()
    if apply is not None:
        measured = compute(apply, params, batch, model_state, batch_sizes=batch_sizes)
    return Footprint(tuple(rows), weightless, products, size, packed, measured)


def _zstd(data: bytes) -> int:
    try:
        import zstandard
    except ImportError as error:
        raise SetupError("zstd=True needs the package zstandard: pip install zstandard") from error
    return len(zstandard.ZstdCompressor(level=19).compress(data))


def _activation_bits(fact: Mapping[str, Any]) -> int:
    return int(fact.get("act_bits", 32))


def _align(rows: list[tuple[str, ...]], left: set[int]) -> str:
    """Rows as columns of text; the first is the header and the last the total."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    ruler = tuple("-" * width for width in widths)
    lines = [rows[0], ruler, *rows[1:-1], ruler, rows[-1]]

    def line(row: tuple[str, ...]) -> str:
        cells = zip(row, widths, strict=True)
        aligned = (x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(cells))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
