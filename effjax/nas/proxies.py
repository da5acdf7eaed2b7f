"""Zero-cost proxies: how good an untrained network will be, from one batch and no training.

    from effjax.nas import proxies

    def score(edges):
        return proxies.snip(apply, params, state, {**batch, "edges": edges}, loss)

Each is a pure function that returns a float32 scalar, larger for what is expected to be better. It
jits and maps over candidates: with a model that takes its architecture as an array of the batch,
`jax.jit(score)` is one compiled program for a whole space.

Common arguments:
  apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`; see `from_linen`.
  params, model_state: of the untrained network; the state is read and not updated.
  batch: one batch, which may hold the architecture besides the examples.
  loss: `(outputs, batch) -> scalar`, the mean over the batch.
  select: a regular expression for the weights that count; by default kernels.
  key: randomness of the model (dropout); a fixed one where left out.
  active: where the network holds more than the candidate, and a proxy looks at layers rather than
    at gradients, which are 0 where an operation is off: {regular expression: how much the layers
    that it matches count}, perhaps traced.

The model runs as in training, so that BatchNorm uses the batch's statistics, but for `synflow`.

Common errors: SelectorError, nothing is selected, or a pattern of `active` matches nothing.
SiteError, a selected layer lies in a function with a derivative rule of its own.

References: Abdelfattah et al., "Zero-cost proxies for lightweight NAS", 2021,
https://arxiv.org/abs/2101.08134, and those named where they are used.
"""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.nas.expressivity_proxies import gaussian, jacob_cov, naswot, spread, zen
from effjax.nas.proxy_parts import Active, shares, total
from effjax.nas.saliency_proxies import fisher, grad_norm, grasp, snip, synflow
from effjax.select import leaves
from effjax.sites import find_sites

__all__ = [
    "fisher",
    "gaussian",
    "grad_norm",
    "grasp",
    "jacob_cov",
    "macs",
    "naswot",
    "params",
    "snip",
    "spread",
    "synflow",
    "zen",
]


def params(params: PyTree, *, active: Active | None = None) -> Array:
    """The number of parameters.

    Args:
      params: arrays or ShapeDtypeStructs.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.nas import proxies
      >>> found = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((3, 2))}}
      >>> float(proxies.params(found)), float(proxies.params(found, active={"^b/": jnp.zeros(())}))
      (18.0, 12.0)
    """
    sizes = {path: jnp.float32(x.size) for path, x in leaves(params).items()}
    share = shares(sizes, active)
    return total(share[path] * size for path, size in sizes.items())


def macs(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    active: Active | None = None,
) -> Array:
    """The multiply-accumulates of one example, of all sites; see `effjax.find_sites`."""
    found = {site.path: site for site in find_sites(apply, params, model_state, batch)}
    share = shares(found, active)
    examples = jnp.float32(max(len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)))
    return total(share[path] * site.macs for path, site in found.items()) / examples
