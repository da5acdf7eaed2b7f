"""SparseGPT's pruning of one matrix: which weights go, and how those that stay make up for it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from effjax.prune import budgets, patterns
from effjax.prune.counts import Count
from effjax.prune.threshold import largest
from effjax.schedules import Scalar


@partial(jax.jit, static_argnames=("n_m", "columns"))
def prune_matrix(
    weight: Array,
    moments: Array,
    sparsity: Scalar = 0.0,
    *,
    n_m: tuple[int, int] | None = None,
    damping: Scalar = 0.01,
    columns: int = 128,
) -> tuple[Array, Array]:
    """One matrix pruned by SparseGPT.

    With H = XᵀX + λI and the upper triangular U of H⁻¹ = UᵀU, inputs j are settled one after the
    other. In each block of them the weights with the smallest wⱼ² / Uⱼⱼ² go: `obs` scores, given
    that all inputs before j are settled. What input j loses is made up for by those after it,

      w[:, j:] -= (wⱼ - ŵⱼ) / Uⱼⱼ · U[j, j:].

    The weights that are left after each block are as many of those seen as the sparsity says, so
    that exactly `budgets.keep(out * in, sparsity)` stay in all. Inputs that are always 0 are pruned
    first, and those of their weights that stay are left alone. (The authors set them to 0.)

    Args:
      weight: float [out, in].
      moments: XᵀX, or the mean over examples: float [in, in]. Its scale has no effect.
      sparsity: the fraction of zeros.
      n_m: (N, M), in place of the sparsity; M divides `in`.
      damping: λ as a fraction of the mean diagonal of XᵀX.
      columns: inputs in a block.

    Returns:
      (weight float32, 0 where pruned; mask bool), both [out, in].

    Reference: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in
    one-shot", 2023, https://arxiv.org/abs/2301.00774, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> same = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # the second input repeats the first
      >>> weight, mask = prune_matrix(jnp.array([[1.0, 2.0]]), same, 0.5, damping=1e-4)
      >>> [round(float(w), 2) for w in weight[0]]  # and takes over its weight
      [0.0, 3.0]
    """
    rows, inputs = weight.shape
    width = min(columns, inputs)
    width = width if n_m is None else -(-width // n_m[1]) * n_m[1]
    blocks = -(-inputs // width)
    extra = blocks * width - inputs
    upper = factor(moments.astype(jnp.float32), damping, extra)
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, extra)))
    seen = [rows * min(b * width, inputs) for b in range(blocks + 1)]
    stay = [budgets.keep(size, sparsity) for size in seen]
    budget = Count.stack([after.minus(before) for before, after in itertools.pairwise(stay)])
    place = jnp.arange(blocks * width)

    def block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, kept = carry
        start = b * width
        part = lax.dynamic_slice(weight, (0, start), (rows, width))
        u_rows = lax.dynamic_slice(upper, (start, 0), (width, blocks * width))
        u = lax.dynamic_slice(u_rows, (0, start), (width, width))
        diagonal = jnp.diagonal(u)

        def best(part: Array) -> Array:
            score = jnp.square(part / diagonal)
            score = jnp.where(start + jnp.arange(width) < inputs, score, -1.0)
            count = jax.tree.map(lambda x: x[b], budget)
            return largest({"": score}, count, signed=True)[""]

        def best_of_group(i: Array, part: Array, keep: Array) -> Array:
            assert n_m is not None
            group = lax.dynamic_slice(part, (0, i), (rows, n_m[1]))
            score = jnp.square(group / lax.dynamic_slice(diagonal, (i,), (n_m[1],)))
            found = patterns.n_m(*n_m, axis=-1).choose({"": score})[""]
            return lax.dynamic_update_slice(keep, found, (0, i))

        def column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, keep, errors = carry
            if n_m is not None:
                choose = partial(best_of_group, i)
                keep = lax.cond(i % n_m[1] == 0, choose, lambda part, keep: keep, part, keep)
            lost = jnp.where(keep[:, i], 0.0, part[:, i]) / diagonal[i]
            return part - lost[:, None] * u[i], keep, errors.at[:, i].set(lost)

        keep = best(part) if n_m is None else jnp.ones(part.shape, bool)
        part, keep, errors = lax.fori_loop(0, width, column, (part, keep, jnp.zeros_like(part)))
        later = jnp.where(place >= start + width, errors @ u_rows, 0.0)
        part = jnp.where(keep, part, 0.0)
        weight = lax.dynamic_update_slice(weight - later, part, (0, start))
        return weight, lax.dynamic_update_slice(kept, keep, (0, start))

    whole = jnp.ones(weight.shape, bool)
    weight, kept = lax.fori_loop(0, blocks, block, (weight, whole))
    return weight[:, :inputs], kept[:, :inputs]


def factor(moments: Array, damping: Scalar, extra: int) -> Array:
    """The upper triangular U of (H + λI)⁻¹ = UᵀU, with `extra` inputs that meet nothing."""
    size = jnp.mean(jnp.diagonal(moments))
    damp = jnp.where(size > 0, damping * size, 1.0)  # inputs that are all 0: by magnitude
    h = moments + damp * jnp.eye(len(moments))
    # With H = V Vᵀ, V upper triangular (the Cholesky factor from the other end), U = V⁻¹.
    v = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    upper = solve_triangular(v, jnp.eye(len(h)), lower=False)
    n = len(h)
    return jnp.eye(n + extra).at[:n, :n].set(upper)
