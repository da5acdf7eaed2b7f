"""What a step of training costs when zeros are skipped, by the formulas of the RigL paper."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SelectorError, SetupError
from effjax.prune.counts import count
from effjax.sites import find_sites
from effjax.step import abstract


class Flops(NamedTuple):
    """The operations of one forward pass: multiplications and additions with weights, two for each
    multiply-accumulate.

    A step is one forward pass and two like it backwards, to the activations and to the weights.
    Only the last depends on whether pruned weights need a gradient. Everything that is no product
    with a weight is left out (activations, normalization, the optimizer, finding masks), as in the
    paper. These are costs with hardware that skips zeros; XLA's dense products do not.

    sparse: f_S, with the zeros of the masks skipped.
    dense: f_D, of the dense model.
    """

    sparse: float
    dense: float

    def step(self, moving: bool = False) -> float:
        """One step: 3 f_S, or 2 f_S + f_D where it takes dense gradients, as the steps of RigL do
        that move masks, and every step of sparse momentum."""
        return 2 * self.sparse + (self.dense if moving else self.sparse)

    def rigl(self, every: float) -> float:
        """The mean over `every` sparse steps and one that moves masks:

            (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1),    ΔT = every

        `prune.rigl(every=n)` moves masks in each n-th step, so that n - 1 sparse ones lie between:
        its mean is `rigl(n - 1)`.
        """
        if every < 0:
            raise SetupError(f"every is {every}; it is a number of steps, 0 or more.")
        return (self.step() * every + self.step(moving=True)) / (every + 1)


def flops(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    masks: Mapping[str, Array],
) -> Flops:
    """The operations of a forward pass over a batch, dense and under masks.

    An operation of a masked leaf counts with the fraction of its weights that are kept. With
    stride or padding single entries of a convolution are used more or less often than others; as in
    the paper, that is left out.

    Args:
      apply: `model.apply`.
      params: arrays or ShapeDtypeStructs.
      model_state: goes with them.
      batch: an example batch; only its shapes are read.
      masks: {params path: bool}, concrete; leaves without one are dense.

    Raises:
      SelectorError: a mask for a leaf that meets no data, or that the params do not have.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch @ params["kernel"], model_state
      >>> mask = jnp.arange(20).reshape(4, 5) < 5
      >>> found = flops(apply, {"kernel": jnp.ones((4, 5))}, {}, jnp.ones((8, 4)), {"kernel": mask})
      >>> found.dense, found.sparse, found.rigl(every=3)
      (320.0, 80.0, 300.0)

    Reference: Evci et al., "Rigging the lottery", 2020, appendix H,
    https://arxiv.org/abs/1911.11134.
    """
    sites = find_sites(apply, abstract(params), abstract(model_state), abstract(batch))
    if unused := sorted(set(masks) - {site.leaf for site in sites}):
        raise SelectorError(
            f"there are masks for {unused}, which meet no data in an operation that is counted. "
            f"Those that do are {sorted({site.leaf for site in sites})}."
        )
    density = {path: int(count(mask)) / np.size(mask) for path, mask in masks.items()}
    dense = [2.0 * site.macs for site in sites]
    sparse = [n * density.get(s.leaf, 1.0) for n, s in zip(dense, sites, strict=True)]
    return Flops(float(sum(sparse)), float(sum(dense)))
