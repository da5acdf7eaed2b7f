"""SparseGPT: prune a trained model layer by layer, and let the weights that stay make up for those
that go."""

from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.prune import calibration, matrices, patterns
from effjax.prune.calibration import Leaves, chosen_leaves, mean, no_key, peek
from effjax.prune.counts import Count
from effjax.prune.masks import masked
from effjax.prune.surgeon import prune_matrix
from effjax.schedules import Scalar, check_fraction, is_traced
from effjax.select import KERNELS, replace
from effjax.sites import Site

Sparsity = Scalar | Mapping[str, Scalar | Count]


def sparsegpt(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[PyTree],
    sparsity: Sparsity | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    select: str = KERNELS,
    damping: float = 0.01,
    columns: int = 128,
    sequential: bool = True,
) -> tuple[PyTree, Leaves]:
    """Prunes the selected leaves so that each layer's outputs change little on calibration data.

    For a layer with inputs X [examples, in] and weights W [out, in], it approximately minimizes
    ‖X (W - Ŵ)ᵀ‖² over masks and weights at once; see `prune_matrix`. X is what the weights meet at
    their sites, with the model in evaluation: all positions of a sequence, all patches of a
    convolution (with its strides, padding, dilation; each feature group is a matrix of its own and
    is pruned to the sparsity), each of a scan's layers by itself. A leaf that is used several times
    in the same way has the X of all uses.

    Args:
      apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`.
      params, model_state: a trained model's.
      batches: an iterable of batches of one shape; with `sequential` it is read once a leaf.
      sparsity: the fraction of zeros in each leaf, in [0, 1); or {path: fraction}; or {path: Count}
        of the weights kept, as `budgets.erk` gives them.
      n_m: in place of a sparsity, (N, M): of M neighbouring weights along the last of the input
        axes N are kept. In a kernel [..., in, out] that is the axis of `patterns.n_m(N, M)`.
      select: a regular expression for the params paths.
      damping: what is added to the diagonal of XᵀX, as a fraction of its mean.
      columns: inputs in a block, whose masks are chosen together (but N:M's).
      sequential: in the order of execution, each layer with the inputs that the layers pruned
        before it give. Otherwise all with the dense model's, in one pass. (The layers of a scan are
        one leaf, and have the dense ones' inputs.)

    Returns:
      (params, masks {path: bool, shaped like the leaf}). Pruned weights are exactly 0.

    Raises:
      SelectorError: nothing is selected.
      SiteError: a selected leaf reaches no `dot_general` or `conv_general_dilated`, or not as the
        plain matrix or kernel that this needs.
      SetupError: neither or both of a sparsity and N:M; sizes that M does not divide; no batches;
        inputs or weights that are not finite, or inputs that are all 0.

    Reference: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in
    one-shot", 2023, https://arxiv.org/abs/2301.00774.
    """
    _check_arguments(sparsity, n_m, damping, columns)
    chosen, key = chosen_leaves(params, select), no_key(None)
    if sequential and iter(batches) is batches:
        raise SetupError(
            "sequential SparseGPT goes over the batches once for each leaf, and this is an "
            "iterator that is used up after once. Pass a list, or sequential=False."
        )
    first, again = peek(batches)
    uses = calibration.sites_of(apply, params, model_state, first, chosen)
    amounts = _amounts(sparsity, chosen)
    for sites in uses.values():
        matrices.check_plain(sites)
        if n_m is not None:
            _check_divides(sites[0], n_m)
    masks: Leaves = {}
    for paths in [[path] for path in uses] if sequential else [list(uses)]:
        met = [site.path for path in paths for site in uses[path]]
        measured = calibration.measure(apply, matrices.second_moments, met)
        data = batches if sequential else again
        moments = mean(measured, (params, model_state), data, key)
        weights = jax.jit(
            calibration.measure(apply, matrices.weight_operand, met, merge=jnp.maximum)
        )(params, model_state, first, key)
        solved: dict[str, tuple[Array, Array]] = {}
        for path in paths:
            site, *others = uses[path]
            matrices.check_alike(
                site, weights[site.path], [weights[other.path] for other in others]
            )
            h = sum((moments[other.path] for other in others), moments[site.path])
            matrices.check_inputs(path, h)
            amount = amounts[path]
            solved[site.path] = _solve(site, weights[site.path], h, amount, n_m, damping, columns)
        own = {path: chosen[path] for path in paths}
        place = partial(matrices.place, apply, own, params, model_state, first, key)
        matrices.check_layout(own, place({path: weights[path] for path in solved}))
        kept = place({path: mask.astype(jnp.float32) for path, (_, mask) in solved.items()})
        moved = place({path: weight for path, (weight, _) in solved.items()})
        masks |= {path: kept[path] > 0.5 for path in paths}
        new = {p: masked(moved[p], masks[p]).astype(chosen[p].dtype) for p in paths}
        _check_finite(new)
        params = replace(params, new)
    return params, {path: masks[path] for path in chosen}


def _solve(
    site: Site,
    weight: Array,
    moments: Array,
    sparsity: Scalar,
    n_m: tuple[int, int] | None,
    damping: float,
    columns: int,
) -> tuple[Array, Array]:
    """New weights and mask, laid out like the operation's weight."""
    rows = matrices.to_rows(site, weight)
    flat = rows.reshape(-1, *rows.shape[-2:]), moments.reshape(-1, *moments.shape[-2:])
    found, kept = _prune_all(*flat, sparsity, n_m, damping, columns)
    back = partial(matrices.from_rows, site, shape=weight.shape)
    return back(found.reshape(rows.shape)), back(kept.reshape(rows.shape))


@partial(jax.jit, static_argnums=(3, 5))  # compiled once for all layers of one shape
def _prune_all(rows, moments, sparsity, n_m, damping, columns) -> tuple[Array, Array]:
    """`prune_matrix` of one matrix after another, [matrices, outputs, inputs]."""

    def one(args: tuple[Array, Array]) -> tuple[Array, Array]:
        return prune_matrix(*args, sparsity, n_m=n_m, damping=damping, columns=columns)

    return lax.map(one, (rows, moments))


def _amounts(sparsity: Sparsity | None, chosen: Leaves) -> dict[str, Scalar]:
    """The fraction of zeros in each leaf."""
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(chosen, 0.0 if sparsity is None else sparsity)
    if set(sparsity) != set(chosen):
        raise SetupError(
            f"there are sparsities for {sorted(sparsity)}, but the selected leaves are "
            f"{sorted(chosen)}. Give one for each, or a single number."
        )
    amounts: dict[str, Scalar] = {}
    for path, amount in sparsity.items():
        if isinstance(amount, Count):
            amount = 1 - amount.value() / chosen[path].size
        amounts[path] = amount
    return amounts


def _check_arguments(
    sparsity: Sparsity | None,
    n_m: tuple[int, int] | None,
    damping: float,
    columns: int,
) -> None:
    if (sparsity is None) == (n_m is None):
        raise SetupError(
            f"sparsegpt got sparsity={sparsity} and n_m={n_m}; it takes one of them: a fraction of "
            "zeros, or for example n_m=(2, 4)."
        )
    if n_m is not None:
        patterns.n_m(*n_m)  # raises unless 0 < N <= M
    values = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    for value in values:
        if value is not None and not isinstance(value, Count):
            check_fraction(value, "the sparsity")
    if columns < 1 or (not is_traced(damping) and not damping > 0):
        raise SetupError(
            f"columns={columns} and damping={damping}; both are positive (the paper's are 128 and "
            "0.01). Without damping the moments of few or related inputs have no inverse."
        )


def _check_divides(site: Site, n_m: tuple[int, int]) -> None:
    assert site.weight is not None
    length = site.shapes[site.weight][site.contracting[site.weight][-1]]
    if length % n_m[1]:
        raise SetupError(
            f"the last input axis of {site.path} is {length} long, which {n_m[1]} does not "
            f"divide: {n_m[0]}:{n_m[1]} does not fit. Leave it out of the selector, or take "
            "another M or a sparsity."
        )


def _check_finite(new: Leaves) -> None:
    for path, leaf in new.items():
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise SetupError(
                f"pruning {path} gave weights that are not finite. Either they were so before, or "
                "the inputs are so closely related that their moments have no inverse in float32: "
                "raise `damping`, or use more calibration data."
            )
