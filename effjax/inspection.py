"""`inspect`: the table of a model's sites."""

import inspect as signatures
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import Apply, PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.select import leaves
from effjax.sites import Site, find_sites
from effjax.step import TrainState, abstract

SHORT = {"dot_general": "dot", "conv_general_dilated": "conv"}


class Row(NamedTuple):
    """One site: where it is, and how the transform leaves it."""

    site: Site
    sparsity: float | None  # of the params leaf as the model sees it; None for abstract params
    weight_bits: int | None  # None where there is no weight
    act_bits: int | None  # None where nothing is multiplied

    @property
    def path(self) -> str:
        """The site's path."""
        return self.site.path

    @property
    def macs(self) -> int:
        """Multiply-accumulates for the example batch."""
        return self.site.macs


class Table(NamedTuple):
    """The sites of a model. `print` it, or read its rows."""

    rows: tuple[Row, ...]
    unreached: tuple[tuple[str, tuple[int, ...]], ...]  # (path, shape) of leaves that reach no site

    def __getitem__(self, path: Any) -> Any:
        """The row of a site by its path."""
        if not isinstance(path, str):
            return tuple.__getitem__(self, path)
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no site {path!r}; the sites are {[row.path for row in self.rows]}")

    def __str__(self) -> str:
        header = ("path", "op", "lhs", "rhs", "out", "MACs", "sparsity", "weight bits", "act bits")
        cells: list[tuple[str, ...]] = [header]
        for row in self.rows:
            site = row.site
            op = SHORT.get(site.op, site.op) + (f" /{site.groups}" if site.groups > 1 else "")
            path = site.path + "".join(f" x{length}" for length in site.stack)
            sparsity = "-" if row.sparsity is None else f"{row.sparsity:.1%}"
            bits = ("-" if b is None else str(b) for b in (row.weight_bits, row.act_bits))
            cells.append((path, op, *map(_shape, site.shapes), f"{site.macs:,}", sparsity, *bits))
        total = f"{sum(row.macs for row in self.rows):,}"
        cells.append(("total", "", "", "", "", total, "", "", ""))
        text = _aligned(cells)
        if self.unreached:
            named = ", ".join(f"{path} [{_shape(shape)}]" for path, shape in self.unreached)
            text += f"\nparams that meet data in no site: {named}"
        return text


def inspect(
    apply: Apply | Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batch: PyTree,
    model_state: PyTree = None,
    *,
    transform: Transform | None = None,
    extra: PyTree = None,
    state: PyTree = None,
) -> Table:
    """The sites of a model in evaluation: where weights meet data, how large, how sparse, how wide.

    Args:
      apply: `model.apply`, or a plain function `f(params, inputs) -> outputs`. They are told apart
        by how many positional arguments they take: five or two.
      params: arrays, or ShapeDtypeStructs (then without sparsities and transform).
      batch: an example batch, or the plain function's inputs; may be abstract.
      model_state: what Flax mutates.
      transform: show the sparsity of the weights as it exports them, and its bits.
      extra, state: the transform's own; or `state=` a whole TrainState. Where both are left out,
        the transform is initialised for these params: the table of step 0.

    Raises:
      SetupError: `apply` is no such function, or a transform was given with abstract params.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> model = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> print(ej.inspect(model, params, jnp.ones((8, 4))))
      path    op   lhs  rhs  out  MACs  sparsity  weight bits  act bits
      ------  ---  ---  ---  ---  ----  --------  -----------  --------
      kernel  dot  8x4  4x2  8x2    64      0.0%           32        32
      total                         64
      params that meet data in no site: bias [2]
    """
    if isinstance(state, TrainState):
        model_state = state.model_state if model_state is None else model_state
        extra, state = state.vars.extra, state.transform
    model_state = {} if model_state is None else model_state
    apply = _as_apply(apply)
    facts: Mapping[str, Mapping[str, Any]] = {}
    seen = leaves(params)
    if transform is not None:
        if any(_is_abstract(leaf) for leaf in seen.values()):
            raise SetupError(
                "inspect got a transform and abstract params; what the transform makes of them is "
                "known of arrays only. Leave the transform out, or give arrays."
            )
        if extra is None and state is None:
            setup = Setup(apply, abstract(model_state), abstract(batch))
            extra, state = transform.init(jax.random.key(0), params, setup)
        facts = transform.describe(params, extra, state)
        seen = leaves(transform.export(params, extra, state))
    sites = find_sites(apply, params, model_state, batch, activations=True)
    rows = tuple(_row(site, seen.get(site.leaf), facts) for site in sites)
    reached = {path for site in sites for path in site.leaves}
    unreached = [(p, tuple(np.shape(x))) for p, x in leaves(params).items() if p not in reached]
    return Table(rows, tuple(unreached))


def _row(site: Site, leaf: Any, facts: Mapping[str, Mapping[str, Any]]) -> Row:
    # What is said of one site, under its name after an "@", goes before what is said of its leaf.
    fact = facts.get("@" + site.path.removeprefix("@"), facts.get(site.leaf, {}))
    weight = 0 if site.weight is None else site.weight
    leaf = None if site.weight is None else leaf
    weight_bits = fact.get("weight_bits", _width(site.dtypes[weight]))
    act_bits = fact.get("act_bits", _width(site.dtypes[1 - weight]))
    sparsity = None
    if leaf is not None and not _is_abstract(leaf):
        sparsity = float(np.mean(np.asarray(leaf) == 0)) if np.size(leaf) else 0.0
    return Row(
        site,
        sparsity,
        None if site.weight is None else int(weight_bits),
        None if site.op == "gather" else int(act_bits),
    )


def _width(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize * 8


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)


def _as_apply(function: Any) -> Apply:
    if not callable(function):
        raise SetupError(
            f"inspect got a {type(function).__name__}; it takes model.apply, or a function of "
            "(params, inputs)."
        )
    signature = signatures.signature(function)
    if _takes(signature, 5):
        return function
    if _takes(signature, 2):
        return lambda params, model_state, batch, key, train: (function(params, batch), model_state)
    raise SetupError(
        f"inspect got a function of {signature}; it takes an apply of (params, model_state, batch, "
        "key, train), or a plain function of (params, inputs)."
    )


def _takes(signature: signatures.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]

    def line(row: tuple[str, ...]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(x.ljust(w) if i < 5 else x.rjust(w) for i, (x, w) in cells).rstrip()

    return "\n".join(map(line, rows))
