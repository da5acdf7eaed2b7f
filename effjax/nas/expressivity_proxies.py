"""Proxies from how an untrained network tells examples apart.

Arguments that all have are those of `effjax.nas.proxies`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.interpret import Operation, intercept
from effjax.nas.proxy_parts import Active, at, shares, total, training, wide
from effjax.prune.calibration import chosen_leaves, no_key
from effjax.select import KERNELS, replace
from effjax.select import select as select_leaves

# Moving averages started 0 and here move by known amounts, from which a batch's own follow.
_PROBE = 2.0**20


def jacob_cov(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    entry: str = "image",
    key: Array | None = None,
) -> Array:
    """How differently the outputs depend on the examples: -Σ_i (log(λ_i + k) + 1 / (λ_i + k)).

    λ are the eigenvalues of the correlations between the examples' Jacobians (of the sum of all
    outputs by the input), k = 1e-5. NaN where an example's Jacobian is constant: nothing of it
    reaches the outputs.

    Args:
      entry: the input, floating point, of the batch.

    Raises:
      SetupError: the batch has no such entry, or it is not floating point.

    Reference: Mellor et al., "Neural architecture search without training", first version, 2020,
    https://arxiv.org/abs/2006.04647v1.
    """
    _check(batch, entry, "jacob_cov differentiates by")

    def outputs(x: Array) -> Array:
        found = apply(params, model_state, {**batch, entry: x}, no_key(key), True)[0]
        return total(jnp.sum(y) for y in jax.tree.leaves(found))

    jacobian = jax.grad(outputs)(batch[entry])
    return spread(jacobian.reshape(len(jacobian), -1))


def spread(jacobian: Array) -> Array:
    """-Σ_i (log(λ_i + k) + 1 / (λ_i + k)), with λ the eigenvalues of the rows' correlations.

    Args:
      jacobian: float [examples, inputs].

    Returns:
      float32 (or wider); NaN if a row is constant.
    """
    rows = wide(jacobian) - jnp.mean(wide(jacobian), axis=1, keepdims=True)
    # First by the largest entry, as the squares of tiny gradients would vanish.
    rows /= jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
    # Rounding makes eigenvalues of 0 negative by less than k.
    values = jnp.maximum(jnp.linalg.eigvalsh(rows @ rows.T), 0) + 1e-5
    return -jnp.sum(jnp.log(values) + 1 / values)


def naswot(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    select: str = KERNELS,
    active: Active | None = None,
    key: Array | None = None,
) -> Array:
    """How differently ReLUs switch for the examples: log |det Σ_l (C Cᵀ + (1 - C)(1 - C)ᵀ)|.

    Row n of C_l tells which inputs of the selected weight l are above 0 for example n: where they
    come from a ReLU, which of its units are on. Leave out weights whose inputs are none of a
    ReLU's, such as the first layer's, with `select`. Examples lie along the first axis. -inf where
    two examples have the same switches.

    Reference: Mellor et al., "Neural architecture search without training", 2021,
    https://arxiv.org/abs/2006.04647.
    """

    def switches(op: Operation) -> tuple[Array, PyTree]:
        assert op.site.weight is not None
        x = op.operands[1 - op.site.weight]
        on = (x > 0).reshape(len(x), -1).astype(jnp.float32)
        return op.run(*op.operands), on @ on.T + (1 - on) @ (1 - on).T

    chosen = chosen_leaves(params, select)
    run = intercept(training(apply), at(switches, chosen), merge=jnp.add)
    alike = run(params, model_state, batch, no_key(key))[1]
    share = shares(alike, active)
    size = next(iter(alike.values())).shape[-2:]
    kernel = total(share[p] * jnp.sum(k.reshape(-1, *size), 0) for p, k in alike.items())
    return jnp.linalg.slogdet(kernel)[1]


def zen(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: Array,
    *,
    entry: str = "image",
    gamma: float = 0.01,
    statistics: str = r"(^|/)var$",
    active: Active | None = None,
) -> Array:
    """The Zen-score: log E |f(x) - f(x + γε)| + Σ_l log √(mean over channels of σ²_l).

    x and ε are Gaussian, |.| is the sum of absolute values (as in the paper's code), and σ²_l are
    the batch variances of BatchNorm l for x; one that nothing reaches does not count. f is what
    `apply` returns; the paper takes the feature maps before pooling, so give it a model that ends
    there, with weights from N(0, 1): see `gaussian`. The paper averages over 32 draws of weights
    and inputs.

    Args:
      key: of x and ε.
      entry: the input of the batch, read for its shape.
      gamma: how far the input is moved, above 0.
      statistics: a regular expression for BatchNorm's variances in the model's state.

    Reference: Lin et al., "Zen-NAS: A zero-shot NAS for high-performance image recognition", 2021,
    https://arxiv.org/abs/2102.01063.
    """
    _check(batch, entry, "zen draws Gaussian")
    like, keys = batch[entry], jax.random.split(key, 3)
    x = jax.random.normal(keys[0], like.shape, like.dtype)
    moved = x + gamma * jax.random.normal(keys[1], like.shape, like.dtype)
    old = select_leaves(model_state, statistics)

    def run(x: Array, start: float) -> tuple[PyTree, dict[str, Array]]:
        begun = replace(model_state, {n: jnp.full_like(v, start) for n, v in old.items()})
        outputs, state = apply(params, begun, {**batch, entry: x}, keys[2], True)
        return outputs, select_leaves(state, statistics)

    # The passes over x differ in the averages only: XLA computes what they share once.
    (outputs, low), (_, high), (others, _) = run(x, 0.0), run(x, _PROBE), run(moved, 0.0)
    variances = {n: low[n] / (1 - (high[n] - low[n]) / _PROBE) for n in old}
    gaps = jax.tree.map(lambda a, b: jnp.sum(jnp.abs(wide(a) - wide(b))) / len(a), outputs, others)
    share = shares(old, active)
    means = {n: jnp.mean(v) for n, v in variances.items()}
    terms = {n: jnp.log(jnp.where(m > 0, m, 1)) / 2 for n, m in means.items()}
    scale = total(share[n] * term for n, term in terms.items())
    return jnp.log(total(jax.tree.leaves(gaps))) + scale


def gaussian(key: Array, params: PyTree, select: str = KERNELS) -> PyTree:
    """The params with the selected weights drawn from N(0, 1) anew, as `zen` takes them."""
    chosen = chosen_leaves(params, select)
    keys = jax.random.split(key, len(chosen))
    drawn = zip(keys, chosen.items(), strict=True)
    return replace(params, {n: jax.random.normal(k, w.shape, w.dtype) for k, (n, w) in drawn})


def _check(batch: PyTree, entry: str, what: str) -> None:
    known = batch if isinstance(batch, dict) else {}
    if entry not in known or not jnp.issubdtype(jnp.result_type(known[entry]), jnp.floating):
        has = {name: str(jnp.result_type(x)) for name, x in known.items()}
        raise SetupError(
            f"{what} batch[{entry!r}], a floating-point array, but the batch has {has}. Say which "
            "entry is the input with entry=...; scale integers first."
        )
