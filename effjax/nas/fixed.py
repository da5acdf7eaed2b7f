"""One sub-network of a supernet by itself: to train it alone, or to go on with it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Ctx, Forward, PyTree, Setup, Transform
from effjax.nas.elastic import check_params, facts_of
from effjax.nas.supernet import Supernet


def fixed(net: Supernet, arch: Any) -> Transform:
    """Trains and evaluates one architecture in the supernet's shapes.

    It computes what the extracted network computes, in training too, at the price of the largest.
    As the architecture may be traced, one compiled program trains any of them: a comparison with
    training from scratch compiles once.

    Gradients: those of the sub-network; what it does not have gets exactly 0 (weight decay acts on
    it nonetheless, unseen).

    Args:
      net: see `Supernet`; elastic kernels with matrices use the taps as they are.
      arch: int32 [genes], perhaps traced.

    Raises:
      SetupError: at `init`, params that are not the supernet's.
    """
    chosen: Array = jnp.asarray(arch, jnp.int32)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        check_params(net, params)
        quant = net.quantizer(net.architecture())
        return {}, {"arch": chosen} | (
            {} if quant is None else {"quant": quant.init(key, params, setup)[1]}
        )

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        return net.view(params, state["arch"])

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        return net.wrap(forward, state["arch"], state.get("quant"), ctx)

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return net.view(params, state["arch"])

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, int]]:
        return facts_of(net, np.asarray(state["arch"]), params, state.get("quant"))

    return Transform(
        init=init, view=view, wrap=wrap, export=export, describe=describe, kind="architecture"
    )
