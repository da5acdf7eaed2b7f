"""BatchNorm folded into the layer before it: what is quantized is then what is multiplied."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, Ctx, Forward, PyTree, Transform
from effjax.errors import SetupError
from effjax.select import leaves, map_named

STATISTICS = "batch_stats/"  # where Linen keeps them; NNX keeps them under the module's own path


class _Norm(NamedTuple):
    mean: str  # paths in model_state
    var: str
    size: int


def fold_batchnorm(
    params: PyTree,
    model_state: PyTree,
    pairs: Mapping[str, str] | None = None,
    *,
    epsilon: float = 1e-5,
    apply: Apply | None = None,
    batch: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Moves each BatchNorm's scale and shift into the dense or convolutional layer before it.

    In evaluation BatchNorm of a layer's output x · W + b is g (x · W + b - m) / d + c, with its
    scale g, shift c, running mean m and d = sqrt(variance + epsilon). The layer takes

        W' = W g / d (along the last axis, its output features),   b' = (b - m) g / d + c

    and the BatchNorm is left as the identity (mean 0, variance 1 - epsilon, scale 1, shift 0), so
    that the same model, unchanged, computes the same in evaluation. A layer without a bias leaves
    b' with the BatchNorm, as its shift (or as its mean, where it has no shift). In training mode
    BatchNorm would normalise anew: fold what is trained, or train with `folded`.

    Args:
      params, model_state: of a Linen or an NNX model, nested dicts.
      pairs: {path of the layer: path of its BatchNorm}, for example {"conv1": "norm1"}. Left out,
        they are found by name: of the layers next to a BatchNorm that have as many features, the
        one with its number (conv1 and norm1, Conv_0 and BatchNorm_0), or the only one.
      epsilon: the BatchNorms'; 1e-5 is Flax's.
      apply, batch: with these, the outputs on the batch are compared before and after. Names do not
        say in which order layers run: do this at least once where pairs were found by name.

    Returns:
      (params, model_state) of the same structure.

    Raises:
      SetupError: no BatchNorm; a layer that does not exist or does not fit; a BatchNorm for which
        no layer, or more than one, can be meant; leaves that are not floating point; outputs
        that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.quantize import fold_batchnorm
      >>> params = {"conv": {"kernel": jnp.ones((1, 2))}, "norm": {"scale": jnp.array([2.0, 3.0])}}
      >>> stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.array([1.0, 9.0]) - 1e-5}}
      >>> folded, _ = fold_batchnorm(params, {"batch_stats": stats})
      >>> folded["conv"]["kernel"].tolist(), folded["norm"]["scale"].tolist()
      ([[2.0, 1.0]], [1.0, 1.0])

    Reference: Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", 2018, https://arxiv.org/abs/1712.05877, section 3.2.
    """
    found = _pairs(params, model_state, pairs)
    after = _fold(params, model_state, found, epsilon)
    if apply is not None:
        _check_equal(apply, (params, model_state), after, batch, found)
    return after


def folded(pairs: Mapping[str, str] | None = None, *, epsilon: float = 1e-5) -> Transform:
    """Training with BatchNorms folded, their statistics frozen: put it before `qat` in the chain.

    Each forward pass sees what `fold_batchnorm` makes of the weights and of the running statistics
    at hand, so that quantization rounds folded weights, W g / d. Gradients flow through the folding
    to weights, biases, scales and shifts; statistics get none and stay as they are. Begin with a
    trained model. The model runs in evaluation mode (dropout is off too), as batch statistics would
    undo the folding. Jacob et al. fold with batch statistics at first; this is their later phase.

    Args: as `fold_batchnorm`.

    Raises:
      SetupError (at `init`): as `fold_batchnorm`.

    Example:
      >>> import effjax as ej
      >>> both = ej.chain(fold=ej.quantize.folded({"conv1": "norm1"}), quant=ej.quantize.qat())

    Reference: Jacob et al., 2018, https://arxiv.org/abs/1712.05877; Krishnamoorthi, 2018,
    https://arxiv.org/abs/1806.08342, on freezing statistics.
    """

    def init(key, params, setup):
        _pairs(params, setup.model_state, pairs)
        return {}, {}

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def fold(params, model_state, batch, key, train):
            found = _pairs(params, model_state, pairs)
            after = _fold(params, jax.lax.stop_gradient(model_state), found, epsilon)
            outputs, _, aux = forward(*after, batch, key, False)
            return outputs, model_state, aux

        return fold

    return Transform(init=init, wrap=wrap)


def _fold(
    params: PyTree, model_state: PyTree, pairs: Mapping[str, str], epsilon: float
) -> tuple[PyTree, PyTree]:
    named, state = leaves(params), leaves(model_state)
    norms = _norms(model_state)
    new: dict[str, Array] = {}
    stats: dict[str, Array] = {}
    for layer, norm in pairs.items():
        own = norms[norm]
        _check_floats(named, (f"{layer}/kernel", f"{layer}/bias", f"{norm}/scale", f"{norm}/bias"))
        _check_floats(state, (own.mean, own.var))
        kernel = named[f"{layer}/kernel"]
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        factor = jax.lax.rsqrt(state[own.var].astype(wide) + epsilon)
        if f"{norm}/scale" in named:
            factor = factor * named[f"{norm}/scale"].astype(wide)
        new[f"{layer}/kernel"] = (kernel.astype(wide) * factor).astype(kernel.dtype)
        shift = -state[own.mean].astype(wide)
        if f"{layer}/bias" in named:
            shift = shift + named[f"{layer}/bias"].astype(wide)
        shift = shift * factor
        if f"{norm}/bias" in named:
            shift = shift + named[f"{norm}/bias"].astype(wide)
        mean = jnp.zeros_like(shift)
        for leaf in (f"{layer}/bias", f"{norm}/bias"):
            if leaf in named:
                new[leaf], shift = shift.astype(named[leaf].dtype), jnp.zeros_like(shift)
        if f"{layer}/bias" not in named and f"{norm}/bias" not in named:
            mean = -shift
        if f"{norm}/scale" in named:
            new[f"{norm}/scale"] = jnp.ones_like(named[f"{norm}/scale"])
        stats[own.mean] = mean.astype(state[own.mean].dtype)
        stats[own.var] = jnp.full_like(state[own.var], 1.0 - epsilon)
    return _exchanged(params, new), _exchanged(model_state, stats)


def _check_floats(named: Mapping[str, Array], paths: Sequence[str]) -> None:
    for path in paths:
        if path in named and not jnp.issubdtype(named[path].dtype, jnp.floating):
            raise SetupError(
                f"{path} is {named[path].dtype}: folding a BatchNorm multiplies it, which takes "
                "floating point. If it is quantized already, restore the float weights and fold "
                "first."
            )


def _exchanged(tree: PyTree, new: Mapping[str, Array]) -> PyTree:
    return map_named(lambda name, leaf: new.get(name, leaf), tree)


def _norms(model_state: PyTree) -> dict[str, _Norm]:
    """The BatchNorms by path: what has a running mean and a variance."""
    state = leaves(model_state)
    found = {}
    for path, leaf in state.items():
        norm, _, last = path.rpartition("/")
        if last == "mean" and f"{norm}/var" in state:
            size = int(np.prod(np.shape(leaf)))
            found[norm.removeprefix(STATISTICS)] = _Norm(path, f"{norm}/var", size)
    return found


def _pairs(params: PyTree, model_state: PyTree, given: Mapping[str, str] | None) -> dict[str, str]:
    norms = _norms(model_state)
    if not norms:
        raise SetupError(
            "there is no BatchNorm to fold: no module of the model_state has a 'mean' and a 'var'. "
            f"It has {list(leaves(model_state)) or 'nothing'}. Pass the model_state that goes with "
            "the params, for Linen {'batch_stats': ...}."
        )
    kernels = {
        path.rpartition("/")[0]: np.shape(leaf)
        for path, leaf in leaves(params).items()
        if path.endswith("/kernel")
    }
    if given is None:
        return {_layer(norm, own.size, kernels): norm for norm, own in norms.items()}
    if not given:
        raise SetupError(f"pairs is empty; the BatchNorms are {list(norms)}.")
    for layer, norm in given.items():
        if norm not in norms or layer not in kernels:
            raise SetupError(
                f"the pair {layer!r}: {norm!r} names "
                f"{'no BatchNorm' if norm not in norms else 'no layer with a kernel'}. "
                f"BatchNorms: {list(norms)}; layers: {list(kernels)}."
            )
        if kernels[layer][-1] != norms[norm].size:
            raise SetupError(
                f"{norm} normalises {norms[norm].size} features, but the kernel of {layer} has "
                f"shape {kernels[layer]}: {kernels[layer][-1]} output features."
            )
    if len(set(given.values())) < len(given):
        raise SetupError(f"a BatchNorm is folded into more than one layer: {dict(given)}.")
    return dict(given)


def _layer(norm: str, size: int, kernels: Mapping[str, tuple[int, ...]]) -> str:
    """The layer that a BatchNorm belongs to, by name."""
    parent, _, name = norm.rpartition("/")
    near = [p for p, s in kernels.items() if p.rpartition("/")[0] == parent and s[-1] == size]
    number = re.search(r"\d*$", name)
    alike = [p for p in near if (n := re.search(r"\d*$", p)) and number and n[0] == number[0]]
    found = near if len(near) == 1 else alike
    if len(found) != 1:
        raise SetupError(
            f"the layer before {norm} cannot be told by name: of the layers next to it with {size} "
            f"output features, {near}, {'none has' if not found else 'several have'} its number. "
            "Say which: pairs={'path of the layer': 'path of the BatchNorm'}."
        )
    return found[0]


def _check_equal(
    apply: Apply,
    before: tuple[PyTree, PyTree],
    after: tuple[PyTree, PyTree],
    batch: PyTree,
    pairs: Mapping[str, str],
) -> None:
    key = jax.random.key(0)
    want, got = (jax.tree.leaves(apply(*v, batch, key, False)[0]) for v in (before, after))
    for a, b in zip(want, got, strict=True):
        error = float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-6))
        if not error < 1e-3:
            raise SetupError(
                f"folding changes the outputs, by {error:.1e} of the largest: in one of the pairs "
                f"{dict(pairs)} the BatchNorm does not directly follow the layer, or epsilon is "
                "another than the model's. Say which belong together with `pairs`."
            )
