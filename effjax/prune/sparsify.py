"""A pruned model that multiplies only the blocks it kept, for inference."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax import jaxprs
from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.interpret import Handler, Operation, intercept
from effjax.prune import masks as masking
from effjax.prune.block_sparse import BlockSparse
from effjax.select import leaves, map_named
from effjax.sites import Analysis, Site


class Sparse(NamedTuple):
    """A model some of whose products are block-sparse.

    apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`, as the model's own,
      with these params; jit it.
    params: {"blocks": {site path: BlockSparse}, "dense": {params path: the other leaves}}.
    left: {site path: why its product is dense}.
    """

    apply: Apply
    params: dict[str, dict[str, Any]]
    left: dict[str, str]

    @property
    def blocks(self) -> dict[str, BlockSparse]:
        """The sparse weights by site path."""
        return self.params["blocks"]


def sparsify(
    apply: Apply,
    params: PyTree,
    masks: Mapping[str, Array],
    model_state: PyTree,
    batch: PyTree,
    *,
    block: int | tuple[int, int] = (32, 32),
    work: float = 0.3,
) -> Sparse:
    """Makes a pruned model skip the blocks of zeros in the matrices it multiplies data by.

    The model is run once, in evaluation, to see each weight as its product meets it (cast, scaled,
    transposed), so that it does not matter how the model is written; and once more to see that the
    outputs are the same. What is made sparse is no longer kept densely. Train the dense model: this
    one is for inference.

    Args:
      apply: the model; see `from_linen`, `from_nnx`, `from_function`.
      params: as exported, concrete.
      masks: {params path: bool}, for example `state.transform["prune"]["mask"]`; {} where the
        params have their zeros already.
      model_state: what Flax mutates.
      batch: an example; other batch sizes may follow.
      block: inputs and outputs of a block. Prune with `pattern=block((32, 32))` to get such blocks:
        scattered zeros empty none.
      work: products that would do more than this fraction of the dense multiplications stay dense.
        Where the crossover lies is measured by `experiments/bench/block_sparse.py`.

    Returns:
      A Sparse.

    Raises:
      SetupError: the outputs differ: a weight depends on data, or the model is random in
        evaluation.
      SelectorError: a mask for a path that the params don't have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.prune.sparsify import sparsify
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"] + params["bias"], model_state
      >>> params = {"kernel": jnp.eye(128), "bias": jnp.ones(128)}
      >>> batch = {"x": jnp.ones((8, 128))}
      >>> sparse = sparsify(apply, params, {}, {}, batch, block=32)
      >>> sparse.blocks["kernel"].work, sorted(sparse.params["dense"])
      (0.25, ['bias'])
    """
    params = masking.apply(params, masks)
    seen = _Seen(apply, params, model_state, batch)
    left = {site.path: why for site in seen.sites if (why := seen.reason(site))}
    blocks: dict[str, BlockSparse] = {}
    for site in seen.sites:
        if site.path in left:
            continue
        sparse = BlockSparse.from_dense(seen.weight(site), block=block)
        if sparse.work > work:
            left[site.path] = (
                f"{sparse.density:.0%} of its blocks of {' x '.join(map(str, _pair(block)))} are "
                f"kept, {sparse.work:.0%} where most are; work={work} asks for at most {work:.0%}"
            )
        else:
            blocks[site.path] = sparse
    gone = seen.unneeded(blocks)
    dense = {path: leaf for path, leaf in leaves(params).items() if path not in gone}
    shapes = jax.eval_shape(lambda: params)

    def handler(op: Operation) -> tuple[Array, PyTree]:
        assert op.site.weight is not None
        x, out = op.operands[1 - op.site.weight], op.site.dtypes[2]
        axis = op.site.contracting[1 - op.site.weight][0]
        y = op.given.matmul(jnp.moveaxis(x, axis, -1), preferred_element_type=out)
        return (y if op.site.weight == 1 else jnp.moveaxis(y, -1, 0)), {}

    def run(
        params: PyTree, model_state: PyTree, batch: PyTree, key: Array, train: bool
    ) -> tuple[PyTree, PyTree]:
        # The dense weights are only traced. Should one be used after all, NaN will show it.
        whole = map_named(
            lambda path, x: params["dense"].get(path, jnp.full(x.shape, jnp.nan, x.dtype)), shapes
        )
        evaluate = intercept(
            lambda p, s, b, k: apply(p, s, b, k, train),
            lambda site: handler if site.path in blocks else None,
            given=params["blocks"],
        )
        return evaluate(whole, model_state, batch, key)[0]

    found = Sparse(run, {"blocks": blocks, "dense": dense}, left)
    _check_same(apply, params, found, model_state, batch)
    return found


class _Seen:
    """The sites of a model, and the weights that one run met there."""

    def __init__(self, apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree):
        self.sharded: set[str] = set()
        self.analysis: Analysis

        def keep(analysis: Analysis) -> None:
            self.analysis = analysis

        # Loops begin with zeros and keep the largest: of both signs, to get the weight back.
        def look(op: Operation) -> tuple[Array, PyTree]:
            if op.axes:
                self.sharded.add(op.site.path)
            assert op.site.weight is not None
            w = op.operands[op.site.weight]
            found = {"above": jnp.maximum(w, 0), "below": jnp.maximum(-w, 0), "ran": jnp.ones(())}
            return op.run(*op.operands), found

        def choose(site: Site) -> Handler | None:
            return None if self._unsuited(site) else look

        evaluate = intercept(lambda p, s, b, k: apply(p, s, b, k, False), choose, check=keep)
        _, self.measured = jax.jit(evaluate)(params, model_state, batch, jax.random.key(0))
        self.sites = [s for s in self.analysis.sites if s.weight is not None]

    def _unsuited(self, site: Site) -> str:
        """Why a product cannot be sparse, as far as its site tells."""
        if site.op == jaxprs.GATHER:
            return "it looks rows up"
        if site.op == jaxprs.CONV:
            return "it is a convolution; remove its channels with prune.compact"
        if site.weight is None:
            return "it is a product of activations"
        if site.rule:
            return f"it lies in the {site.rule}, whose own rule would not see the change"
        if site.stack:
            return "it is one of a scan's layers, whose blocks differ"
        x = site.shapes[1 - site.weight]
        one = len(site.contracting[site.weight]) == 1 and len(site.out) == len(x)
        if len(site.shapes[site.weight]) != 2 or not one:
            return f"its weight {list(site.shapes[site.weight])} is no matrix"
        return ""

    def reason(self, site: Site) -> str:
        """Why a product cannot be sparse, with what the run showed; "" if it can."""
        if why := self._unsuited(site):
            return why
        if site.path in self.sharded:
            return "it lies in a shard_map"
        found = self.measured[site.path]
        if not found["ran"]:
            return "it lies in a branch that the example did not take"
        if bool(jnp.any((found["above"] > 0) & (found["below"] > 0))):
            return "its weight changes from one iteration to the next"
        return ""

    def weight(self, site: Site) -> np.ndarray:
        """The weight of a site as [in, out]."""
        assert site.weight is not None
        found = self.measured[site.path]
        w = np.asarray(found["above"] - found["below"])
        return w if site.contracting[site.weight] == (0,) else w.T

    def unneeded(self, chosen: Mapping[str, Any]) -> set[str]:
        """The leaves that reach data at chosen sites only."""
        used = {leaf for s in self.sites if s.path not in chosen for leaf in s.leaves}
        mine = {leaf for s in self.sites if s.path in chosen for leaf in s.leaves}
        return {path for path in mine - used if not self.analysis.met[path]}


def _check_same(
    apply: Apply, params: PyTree, found: Sparse, model_state: PyTree, batch: PyTree
) -> None:
    """Raises unless a model and its sparse form give the same outputs, to rounding."""

    def outputs(apply: Apply, params: PyTree) -> list[Array]:
        key = jax.random.key(0)
        run = jax.jit(lambda p, s, b: apply(p, s, b, key, False)[0])
        return jax.tree.leaves(run(params, model_state, batch))

    for a, b in zip(outputs(apply, params), outputs(found.apply, found.params), strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            continue
        rounding = float(jnp.finfo(a.dtype).eps) ** 0.5
        scale = float(jnp.max(jnp.abs(a), initial=0.0))
        off = jnp.abs(a - b)
        if not jnp.all(off <= rounding * max(scale, 1e-6)):  # so written, NaN is far off
            raise SetupError(
                "the outputs of the block-sparse model are not the dense one's: of values up to "
                f"{scale:.3g} they are {float(jnp.mean(off)):.3g} off on average. Likely causes: "
                "the model returns a weight, computes one from data, or draws random numbers in "
                f"evaluation. The sparse products were {list(found.blocks)}."
            )


def _pair(block: int | tuple[int, int]) -> tuple[int, int]:
    return (block, block) if isinstance(block, int) else block
