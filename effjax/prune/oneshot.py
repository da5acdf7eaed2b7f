"""Scores of a whole model at once: before training (SNIP, GraSP, SynFlow) or after it (Taylor,
Fisher, OBD, Wanda).

Each function goes over its batches, compiles once, and returns {params path: score, shaped like the
weight}, float32 (or wider), for the leaves that `select` chooses. The params are left alone: masks
follow from the scores as from any others.

    found = oneshot.snip(model.apply, loss, params, model_state, batches)
    prune = ej.prune.static(0.9, scores=found, budget="global")

Common arguments:
  apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`; see `from_linen`.
  loss: `(outputs, batch) -> scalar`, the mean over the batch.
  params, model_state: arrays; the state is read and not updated.
  batches: an iterable of batches of one shape. Every batch weighs the same.
  select: a regular expression for the params paths that are scored.
  key: randomness of the model (dropout) and of probes; a fixed one where left out.
  train: whether the model runs as in training.

Common errors: SelectorError, nothing is selected. SetupError, there is no batch, one has another
shape, or a leaf's scores are not finite or all 0 (no gradient reaches it).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.prune import budgets, calibration, scores
from effjax.prune.calibration import Leaves, checked, chosen_leaves, mean, no_key, peek
from effjax.prune.masks import masked
from effjax.prune.threshold import largest
from effjax.schedules import Scalar, check_fraction
from effjax.select import KERNELS, replace

Loss = Callable[[PyTree, PyTree], Array]
Batches = Iterable[PyTree]

_NO_GRADIENT = (
    "the loss does not depend on it; or a layer after it is dead, or 0 (a residual branch that "
    "starts at 0)"
)


def snip(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
    key: Array | None = None,
    train: bool = True,
) -> Leaves:
    """SNIP: |g w|, with g the gradient over all batches, normalized to sum 1 over the leaves.

    The paper takes one batch of an untrained network in training mode, and a global budget.

    Reference: Lee et al., 2019, https://arxiv.org/abs/1810.02340.
    """
    chosen, args = chosen_leaves(params, select), (params, model_state)
    slope = _gradient(apply, loss, chosen, train)
    grads = mean(slope, (chosen, *args), batches, no_key(key))
    found = {path: scores.saliency(w, grads[path]) for path, w in chosen.items()}
    total = sum(jnp.sum(s) for s in checked(found, _NO_GRADIENT).values())
    return {path: scores.snip(w, grads[path], total) for path, w in chosen.items()}


def grasp(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
    key: Array | None = None,
    train: bool = True,
) -> Leaves:
    """GraSP: w (H g), signed, with g and H of the mean loss over all batches.

    Two passes: the gradient, then the Hessian-vector products, forward over reverse, batch by
    batch. Both are by the selected leaves alone. The paper divides the outputs by a temperature of
    200 before the loss and takes about ten examples of each class: put that into `loss`, and a
    global budget on signed scores.

    Raises:
      SetupError: `batches` is a generator, which can be read only once.

    Reference: Wang et al., 2020, https://arxiv.org/abs/2002.07376.
    """
    if iter(batches) is batches:
        raise SetupError(
            "GraSP goes over the batches twice, and this is an iterator that is used up after "
            "once. Pass a list, or an object that starts anew each time it is iterated."
        )
    chosen, key = chosen_leaves(params, select), no_key(key)
    slope = _gradient(apply, loss, chosen, train)

    def product(chosen: Leaves, grads: Leaves, *rest: Any) -> Leaves:
        # Tangents of the weights' own dtype.
        direction = {path: grads[path].astype(w.dtype) for path, w in chosen.items()}
        return jax.jvp(lambda chosen: slope(chosen, *rest), (chosen,), (direction,))[1]

    grads = mean(slope, (chosen, params, model_state), batches, key)
    products = mean(product, (chosen, grads, params, model_state), batches, key)
    found = {path: scores.grasp(w, products[path]) for path, w in chosen.items()}
    return checked(found, _NO_GRADIENT + "; or the loss has no curvature")


def taylor(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
    key: Array | None = None,
    train: bool = False,
) -> Leaves:
    """First-order Taylor: the mean over batches of (g w)², with g the gradient on one batch.

    Reference: Molchanov et al., 2019, https://arxiv.org/abs/1906.10771.
    """
    chosen = chosen_leaves(params, select)
    slope = _gradient(apply, loss, chosen, train)

    def terms(chosen: Leaves, *rest: Any) -> Leaves:
        grads = slope(chosen, *rest)
        return {path: scores.taylor(w, grads[path]) for path, w in chosen.items()}

    found = mean(terms, (chosen, params, model_state), batches, no_key(key))
    return checked(found, _NO_GRADIENT)


def fisher(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
) -> Leaves:
    """Fisher pruning: the mean over examples of ½ g² w², with g the gradient of one example's loss.

    The gradients of a batch are computed one example after another (in a scan, with the memory of
    one), with the model in evaluation. Every array of a batch has the examples as its first axis.

    Reference: Theis et al., 2018, https://arxiv.org/abs/1801.05787.
    """
    chosen = chosen_leaves(params, select)
    slope = _gradient(apply, loss, chosen, train=False)

    def term(chosen: Leaves, *rest: Any) -> Leaves:
        grads = slope(chosen, *rest)
        return {path: scores.fisher(w, grads[path]) for path, w in chosen.items()}

    found = mean(_each(term), (chosen, params, model_state), batches, no_key(None))
    return checked(found, _NO_GRADIENT)


def obd(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
    probes: int | None = None,
    key: Array | None = None,
) -> Leaves:
    """Optimal brain damage: ½ h w², with h the diagonal of the loss's Hessian by the weights.

    probes=None: the exact diagonal of the Gauss-Newton matrix, E[Jᵀ A J], as in the paper, where J
      is the Jacobian of one example's outputs and A the (positive part of the) loss's Hessian by
      them. Never negative. It costs one backward pass for each output of each example.
    probes=n: the Hessian itself by Hutchinson's estimate, E[v ∘ H v] over n random sign vectors v
      for each batch. Unbiased, of either sign, and noisy: the variance of hⱼ is 2 Σ_{k≠j} Hⱼₖ² / n.

    The model runs in evaluation.

    References: LeCun et al., "Optimal brain damage", 1989; Hutchinson, "A stochastic estimator of
    the trace of the influence matrix", 1990, https://doi.org/10.1080/03610919008812866; Martens,
    "New insights and perspectives on the natural gradient method", 2020,
    https://arxiv.org/abs/1412.1193.
    """
    if probes is not None and probes < 1:
        raise SetupError(
            f"probes={probes}: Hutchinson's estimate takes at least one. Leave it out for the "
            "exact diagonal of the Gauss-Newton matrix."
        )
    chosen = chosen_leaves(params, select)
    if probes is None:
        diagonal = _each(_gauss_newton(apply, loss))
    else:
        diagonal = _hutchinson(_gradient(apply, loss, chosen, train=False), probes)
    h = mean(diagonal, (chosen, params, model_state), batches, no_key(key))
    found = {path: scores.obd(w, h[path]) for path, w in chosen.items()}
    return checked(found, _NO_GRADIENT + "; or the loss has no curvature")


def wanda(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batches: Batches,
    *,
    select: str = KERNELS,
    per_output: bool = True,
) -> Leaves:
    """Wanda: |w| ‖x‖₂, with x the input that w is multiplied with, over all examples and positions.

    The norms are measured where the weights meet data, so the model may be written anyhow. A
    convolution's inputs are the entries of its patches: each of height x width x channels has a
    norm of its own, with strides, padding and groups as they are. A leaf that is used several times
    has the norm over all uses. The model runs in evaluation.

    Args:
      per_output: compare within each output only, as the paper does: the scores are then the ranks
        of `scores.within`, which a per-layer budget prunes to the same sparsity in each output, and
        N:M as the scores themselves. False gives the scores themselves.

    Raises:
      SiteError: a selected leaf reaches no `dot_general` or `conv_general_dilated`.

    Reference: Sun et al., 2024, https://arxiv.org/abs/2306.11695.
    """
    chosen = chosen_leaves(params, select)
    first, batches = peek(batches)
    sites = calibration.sites_of(apply, params, model_state, first, chosen)
    paths = [site.path for own in sites.values() for site in own]
    inputs = calibration.measure(apply, calibration.squared_inputs, paths)

    def squares(*args: Any) -> Leaves:
        return calibration.pull_back(inputs, *args)

    key = no_key(None)
    squared = mean(squares, (chosen, params, model_state), batches, key)
    found = {path: scores.wanda(w, jnp.sqrt(squared[path])) for path, w in chosen.items()}
    checked(found, "its inputs are 0 on all batches")
    if not per_output:
        return found
    # Of several uses the first says what an output is.
    stacks = {own[0].path: own[0].stack for own in sites.values()}
    layers = {path: jnp.arange(math.prod(n)).reshape(n) for path, n in stacks.items()}
    numbers = calibration.measure(
        apply, calibration.output_numbers, layers, given=layers, merge=jnp.maximum
    )
    outputs = jax.jit(lambda *args: calibration.pull_back(numbers, *args))(
        chosen, params, model_state, first, key
    )
    rank = jax.jit(lambda score, n: scores.within(score, jnp.round(n).astype(jnp.int32)))
    return {path: rank(score, outputs[path]) for path, score in found.items()}


def synflow(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    sparsity: Scalar,
    *,
    select: str = KERNELS,
    rounds: int = 100,
) -> Leaves:
    """SynFlow: |w| ∂R/∂|w| without data, iterated: R is the sum of the outputs for inputs of ones.

    In round k of n the scores are those of the network in which the best (1 - s)^(k/n) of the
    weights were left by the round before, by one global threshold. The scores of the last round are
    returned, 0 for what is pruned by then: a global budget of the same sparsity completes it.

    As in the authors' code every floating-point leaf of the params (biases, BatchNorm's scale and
    shift) and of the model's state is replaced by its absolute value, and the model runs in
    evaluation: BatchNorm is the map x ↦ |a| (x - |μ|) / √(|σ²| + ε) + |b| of its running
    statistics, which in an untrained network are μ = 0, σ² = 1.

    Args:
      batch: read for its shapes: floating-point arrays [examples, ...] are replaced by ones
        [1, ...], others by their first example.
      sparsity: s, in [0, 1), perhaps traced.
      rounds: n.

    Raises:
      SetupError: scores overflow or vanish. Deep networks need double precision, as the authors
        use: enable x64 and give params in float64. The scores are then divided by a power of two
        so that they fit into float32.

    Reference: Tanaka et al., 2020, https://arxiv.org/abs/2006.05467; section 5 for n = 100.
    """
    check_fraction(sparsity, "the sparsity")
    if rounds < 1:
        raise SetupError(f"rounds={rounds}; SynFlow takes at least one round, in the paper 100.")
    chosen = {path: jnp.abs(w) for path, w in chosen_leaves(params, select).items()}
    size = sum(w.size for w in chosen.values())
    linear, state, ones = absolute(params), absolute(model_state), jax.tree.map(one_of_ones, batch)

    @jax.jit
    def run(chosen: Leaves, params: PyTree, state: PyTree, ones: PyTree, sparsity: Array) -> Leaves:
        def score(mask: Leaves) -> Leaves:
            left = {path: masked(w, mask[path]) for path, w in chosen.items()}
            grads = jax.grad(lambda left: flow(apply, replace(params, left), state, ones))(left)
            return {path: scores.synflow(w, grads[path]) for path, w in left.items()}

        def step(k: Array, mask: Leaves) -> Leaves:
            density = (1 - sparsity) ** ((k + 1) / rounds)
            return largest(_single(score(mask)), budgets.keep(size, 1 - density))

        whole = {path: jnp.ones(w.shape, bool) for path, w in chosen.items()}
        return _single(score(lax.fori_loop(0, rounds - 1, step, whole)))

    found = run(chosen, linear, state, ones, jnp.asarray(sparsity, jnp.float32))
    return checked(found, "the outputs are probabilities, which add up to 1, not logits")


def _gradient(apply: Apply, loss: Loss, chosen: Leaves, train: bool) -> Callable[..., Leaves]:
    """(chosen, params, model_state, batch, key) -> gradients by the chosen leaves."""

    def objective(chosen, params, model_state, batch, key) -> Array:
        outputs, _ = apply(replace(params, chosen), model_state, batch, key, train)
        return loss(outputs, batch)

    return jax.grad(objective)


def _each(f: Callable[..., Leaves]) -> Callable[..., Leaves]:
    """The mean of f over a batch's examples, each given as a batch of one."""

    def average(chosen: Leaves, params, model_state, batch, key) -> Leaves:
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
        if len(sizes) != 1 or () in sizes:
            raise SetupError(
                "scores of single examples need batches whose arrays all have the examples as "
                f"their first axis; these begin with {sorted(sizes)}."
            )
        [(count,)] = sizes

        def add(total: Leaves, example: PyTree) -> tuple[Leaves, None]:
            found = f(chosen, params, model_state, jax.tree.map(lambda x: x[None], example), key)
            return jax.tree.map(lambda a, b: a + b / count, total, found), None

        shapes = {path: jnp.promote_types(w.dtype, jnp.float32) for path, w in chosen.items()}
        zeros = {path: jnp.zeros(w.shape, shapes[path]) for path, w in chosen.items()}
        return lax.scan(add, zeros, batch)[0]

    return average


def _gauss_newton(apply: Apply, loss: Loss) -> Callable[..., Leaves]:
    """The diagonal of Jᵀ A J on one batch, as the sum of squares of Jᵀ a over A = Σ a aᵀ."""

    def diagonal(chosen: Leaves, params, model_state, batch, key) -> Leaves:
        shape, unflatten = ravel_pytree(
            jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(lambda: apply(params, model_state, batch, key, False)[0]),
            )
        )

        def outputs(chosen: Leaves) -> Array:
            found, _ = apply(replace(params, chosen), model_state, batch, key, False)
            return ravel_pytree(found)[0].astype(shape.dtype)

        out, back = jax.vjp(outputs, chosen)
        a = jax.hessian(lambda out: loss(unflatten(out), batch).astype(jnp.float32))(out)
        values, vectors = jnp.linalg.eigh(a.astype(jnp.float32))
        roots = (vectors * jnp.sqrt(jnp.maximum(values, 0))).T.astype(out.dtype)

        def add(total: Leaves, root: Array) -> tuple[Leaves, None]:
            (found,) = back(root)
            return jax.tree.map(lambda a, b: a + jnp.square(b.astype(a.dtype)), total, found), None

        wide = {path: jnp.promote_types(w.dtype, jnp.float32) for path, w in chosen.items()}
        zeros = {path: jnp.zeros(w.shape, wide[path]) for path, w in chosen.items()}
        return lax.scan(add, zeros, roots)[0]

    return diagonal


def _hutchinson(slope: Callable[..., Leaves], probes: int) -> Callable[..., Leaves]:
    """The mean of v ∘ H v over random sign vectors v."""

    def diagonal(chosen: Leaves, params, model_state, batch, key) -> Leaves:
        def add(total: Leaves, key: Array) -> tuple[Leaves, None]:
            keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))
            v = {p: jax.random.rademacher(keys[p], w.shape, w.dtype) for p, w in chosen.items()}
            gradient = lambda chosen: slope(chosen, params, model_state, batch, key)  # noqa: E731
            product = jax.jvp(gradient, (chosen,), (v,))[1]
            return {p: total[p] + (v[p] * product[p]) / probes for p in total}, None

        wide = {path: jnp.promote_types(w.dtype, jnp.float32) for path, w in chosen.items()}
        zeros = {path: jnp.zeros(w.shape, wide[path]) for path, w in chosen.items()}
        return lax.scan(add, zeros, jax.random.split(key, probes))[0]

    return diagonal


def _single(scores: Leaves) -> Leaves:
    """Scores in float32: double ones divided by the power of two that makes the largest about 1."""
    if all(score.dtype == jnp.float32 for score in scores.values()):
        return scores
    top = jnp.max(jnp.stack([jnp.max(score) for score in scores.values()]))
    _, exponent = jnp.frexp(top)
    return {p: jnp.ldexp(score, -exponent).astype(jnp.float32) for p, score in scores.items()}


def flow(apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree) -> Array:
    """SynFlow's R: the sum of the outputs in evaluation, for what `absolute` and ones gave."""
    outputs, _ = apply(params, model_state, batch, no_key(None), False)
    return sum((jnp.sum(x) for x in jax.tree.leaves(outputs)), jnp.zeros(()))


def absolute(tree: PyTree) -> PyTree:
    """A tree with the absolute values of its floating-point leaves."""
    return jax.tree.map(
        lambda x: jnp.abs(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree
    )


def one_of_ones(x: Any) -> Any:
    """Floating point [examples, ...] as ones [1, ...], others as their first example."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x[:1]
    return jnp.ones((1, *jnp.shape(x)[1:]), jnp.result_type(x))
