"""A chosen sub-network as a model of its own: physically small, trainable and exportable."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import Ctx, Forward, PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.model import Model
from effjax.nas.supernet import Supernet
from effjax.prune.dependencies import STATE
from effjax.select import leaves, map_named
from effjax.step import abstract


class Extracted(NamedTuple):
    """A sub-network.

    model: what `build` made.
    params, model_state: the entries that the sub-network has, for that model.
    config: its configuration, as `Supernet.decode` gives it.
    masks: {params path: bool}, what its sparsity keeps, for `ej.prune.static`; empty without.
    quantizer: quantization-aware training with its bits; None without.
    resolution: the size that images have to be resized to; None if that is not elastic.
    difference: the largest difference of the outputs from those of the supernet's view.
    """

    model: Model
    params: PyTree
    model_state: PyTree
    config: dict[str, Any]
    masks: dict[str, jax.Array]
    quantizer: Transform | None
    resolution: int | None
    difference: float


def extract_subnet(
    net: Supernet,
    arch: Any,
    build: Callable[[Mapping[str, Any], Mapping[str, int]], Model],
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    matrices: PyTree = None,
    tolerance: float = 1e-3,
) -> Extracted:
    """Cuts a sub-network out of a supernet.

    Channels that are not kept are gone from every leaf, kernels have their smaller size, and blocks
    that are skipped have no leaves. Both networks are then computed on the batch and compared.

    Args:
      net: the supernet.
      arch: int [genes].
      build: `(config, channels) -> Model`, the model of the sub-network: `config` as
        `net.decode(arch)`, `channels` as `net.channels(arch)`. It reads the same batch, with
        images at the sub-network's resolution.
      params, model_state: of the supernet; recalibrate the statistics for this architecture before
        (`make_recalibrate`).
      batch: concrete inputs to compare the outputs on.
      matrices: of elastic kernels, the transform's `extra["matrices"]`.
      tolerance: how far outputs may differ, relative to the largest of them: rounding.

    Raises:
      SetupError: `build` made a model with other leaves or shapes, or with other outputs.
    """
    arch = np.asarray(arch)
    config, channels = net.decode(arch), net.channels(arch)
    size = net.resolution(arch)
    model = build(config, channels)
    small = jax.eval_shape(lambda b: net.resized(b, size), batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), small)
    seen = net.view(params, jnp.asarray(arch), matrices)
    cut = [
        _cut(net, tree, whole, prefix, arch, config)
        for tree, whole, prefix in ((shapes[0], seen, ""), (shapes[1], model_state, STATE))
    ]
    quant = net.quantizer(arch, existing=True)
    sparse = [p for p, leaf in net.leaves.items() if leaf.sparsity is not None]
    masks = {p: x != 0 for p, x in leaves(cut[0]).items() if p in sparse}
    found = Extracted(model, cut[0], cut[1], config, masks, quant, size, 0.0)
    difference, largest = _compared(net, arch, found, seen, model_state, batch)
    if not difference <= tolerance * largest:
        raise SetupError(
            f"the extracted model's outputs differ from those of the supernet by {difference:.3g} "
            f"(the largest is {largest:.3g}). The model that `build` made for {config} is another "
            "than the view, or one for which a view is not exact: see `Supernet`."
        )
    return found._replace(difference=difference)


def _cut(
    net: Supernet, wanted: PyTree, whole: PyTree, prefix: str, arch: np.ndarray, config: Any
) -> PyTree:
    named = leaves(whole)
    slices = {p.removeprefix(prefix): x for p, x in net.leaves.items() if _is_of(p, prefix)}

    def one(path: str, shape: Any) -> jax.Array:
        if path not in named:
            raise SetupError(
                f"the model built for {config} has a leaf {path!r} that the supernet does not "
                f"have; it has {list(named)}."
            )
        found = named[path]
        for axis, own in enumerate(slices[path].axes):
            if own.genes:
                found = jnp.take(found, np.flatnonzero(own.kept(arch)), axis=axis)
        if found.shape != shape.shape:
            raise SetupError(
                f"{path} of the sub-network is {list(found.shape)}, and in the model built for "
                f"{config} it is {list(shape.shape)}. Build it with these channels and sizes."
            )
        return found

    cut = map_named(one, wanted)
    missing = [
        path
        for path, leaf in slices.items()
        if path not in leaves(wanted) and bool(leaf.exists(arch))
    ]
    if missing:
        raise SetupError(
            f"the model built for {config} lacks {missing}, which the sub-network has."
        )
    return cut


def _is_of(path: str, prefix: str) -> bool:
    return path.startswith(STATE) == bool(prefix)


def _compared(
    net: Supernet,
    arch: np.ndarray,
    found: Extracted,
    seen: PyTree,
    model_state: PyTree,
    batch: PyTree,
) -> tuple[float, float]:
    """The largest difference of the outputs, and the largest output."""

    def outputs(model: Model, quant: Transform | None) -> Callable[..., PyTree]:
        def plain(params, model_state, batch, key, train):
            return (*model.apply(params, model_state, batch, key, train), {})

        def run(params: PyTree, state: PyTree, batch: PyTree) -> PyTree:
            forward: Forward = plain
            if quant is not None:
                setup = Setup(model.apply, abstract(state), abstract(batch))
                own = quant.init(jax.random.key(0), params, setup)[1]
                ctx = Ctx(jnp.int32(0), jax.random.key(0), train=False)
                forward = quant.wrap(forward, {}, own, ctx)
            return forward(params, state, batch, jax.random.key(0), False)[0]

        return jax.jit(run)

    small = net.resized(batch, found.resolution)
    mine = outputs(found.model, found.quantizer)(found.params, found.model_state, small)
    theirs = outputs(net.model, net.quantizer(arch))(seen, model_state, small)
    pairs = list(zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True))
    if wrong := [(np.shape(a), np.shape(b)) for a, b in pairs if np.shape(a) != np.shape(b)]:
        raise SetupError(f"the extracted model's outputs and the supernet's have shapes {wrong}.")
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    return difference, max(float(jnp.max(jnp.abs(b))) for _, b in pairs)
