"""Mixed precision: how much the loss suffers when a leaf is rounded, before any retraining."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Setup, Transform, Vars
from effjax.errors import SetupError
from effjax.interpret import Handler, Operation, intercept
from effjax.quantize import engine, lowbit, numerics
from effjax.quantize.hessian import Trace
from effjax.quantize.qat import qat
from effjax.quantize.rules import Bits, by_leaf
from effjax.select import KERNELS
from effjax.sites import Site
from effjax.step import Loss, abstract, forward


def rounding_errors(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    widths: Sequence[int],
    *,
    pattern: str = KERNELS,
    per_channel: bool = True,
) -> dict[str, dict[int, float]]:
    """||Q(w) - w||² of each leaf at each width, rounded as `qat` does, where the model uses it.

    Args:
      batch: one example batch; only its shapes matter.
      widths: bits, 1..8, or 16 and more for floating point.
      pattern, per_channel: as `select` and `per_channel` of `qat`.

    Raises:
      SelectorError, SiteError: as `qat`.
    """
    asked = engine.rules_of("rounding_errors()", Bits(8, 32), (), pattern, False, False)
    for width in widths:
        numerics.check_bits(width, "a leaf in rounding_errors()", 1)
    engine.find(asked, params, Setup(apply, abstract(model_state), abstract(batch)))
    leaf_of: dict[str, str] = {}

    def measure(op: Operation) -> tuple[Array, PyTree]:
        site = op.site
        assert site.weight is not None  # products are not asked for
        leaf_of[site.path] = site.leaf
        w = op.operands[site.weight]
        axes = site.channels[site.weight] if per_channel else ()
        errors = [jnp.sum((lowbit.rounded(w, b, axes) - w) ** 2) for b in widths]
        return op.run(*op.operands), jnp.stack(errors).astype(jnp.float32)

    def choose(site: Site) -> Handler | None:
        return measure if asked.takes(site) else None

    def run(params: PyTree, model_state: PyTree, batch: PyTree, key: Array) -> PyTree:
        return apply(params, model_state, batch, key, False)[0]

    def errors(params: PyTree, model_state: PyTree, batch: PyTree) -> dict[str, Array]:
        return intercept(run, choose)(params, model_state, batch, jax.random.key(0))[1]

    found: dict[str, dict[int, float]] = {}
    for path, value in jax.jit(errors)(params, model_state, batch).items():
        # Over the layers of a scan; a leaf that is used twice is stored once.
        own = np.asarray(value, np.float64).reshape(-1, len(widths)).sum(axis=0)
        known = found.setdefault(leaf_of[path], dict.fromkeys(widths, 0.0))
        known.update({b: max(known[b], float(x)) for b, x in zip(widths, own, strict=True)})
    return found


def hawq(
    traces: Mapping[str, Trace], errors: Mapping[str, Mapping[int, float]]
) -> dict[str, dict[int, float]]:
    """HAWQ-V2's sensitivity: half of a leaf's mean curvature times its squared rounding error.

        loss(w + d) - loss(w) ~ 1/2 d · H d ~ 1/2 tr(H_i) / n_i · ||Q(w_i) - w_i||²

    at a minimum, and for errors that prefer no direction. (The paper leaves out the 1/2, which
    changes no choice.) Negative traces count as 0.

    Args:
      traces: see `hessian_traces`.
      errors: see `rounding_errors`; of the same leaves.

    Reference: Dong et al., 2020, https://arxiv.org/abs/1911.03852.
    """
    if missing := sorted(set(errors) - set(traces)):
        raise SetupError(f"{missing} have rounding errors but no traces; use one pattern for both.")
    return {
        path: {b: 0.5 * max(traces[path].mean, 0.0) / traces[path].size * e for b, e in own.items()}
        for path, own in errors.items()
    }


def drop_one(
    apply: Apply,
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    batches: Sequence[PyTree],
    paths: Iterable[str],
    widths: Sequence[int],
    *,
    rest: int = 32,
    build: Callable[[dict[str, Array]], Transform] | None = None,
) -> dict[str, dict[int, float]]:
    """The rise of the loss when one leaf alone is rounded, for each leaf and width.

    Bit widths are arguments of one compiled program.

    Args:
      apply, loss, params, model_state: the model in evaluation.
      batches: of equal shapes; the loss is the mean over them.
      paths: the leaves.
      widths: bits.
      rest: bits of the others; 32 leaves them in floating point.
      build: from {path: int32 []} to the transform to evaluate; by default `qat` of the weights
        alone, without ranges that would have to be calibrated.

    Returns:
      {path: {bits: loss - loss with all leaves at `rest`}}; noise may make it negative.

    Raises:
      SetupError: no batches, no paths; SelectorError, SiteError: as `qat`.

    Reference: the usual baseline; for example Wu et al., "Integer quantization for deep learning
    inference", 2020, https://arxiv.org/abs/2004.09602, section 5.
    """
    paths = tuple(paths)
    if not paths or not batches:
        raise SetupError(f"there are {len(paths)} leaves and {len(batches)} batches to measure.")
    build = build or (lambda bits: qat(32, 32, rules=by_leaf(bits)))

    def measure(
        bits: dict[str, Array], params: PyTree, model_state: PyTree, batch: PyTree
    ) -> Array:
        transform = build(bits)
        setup = Setup(apply, abstract(model_state), abstract(batch))
        key = jax.random.key(0)
        extra, state = transform.init(key, params, setup)
        ctx = Ctx(jnp.int32(0), key, train=False)
        out = forward(apply, transform, Vars(params, extra), model_state, state, batch, ctx)
        return loss(out.outputs, batch)

    compiled = jax.jit(measure)

    def at(bits: dict[str, int]) -> float:
        widths = {path: jnp.int32(b) for path, b in bits.items()}
        return float(np.mean([compiled(widths, params, model_state, b) for b in batches]))

    everywhere = dict.fromkeys(paths, rest)
    base = at(everywhere)
    return {p: {b: at(everywhere | {p: b}) - base for b in widths} for p in paths}
