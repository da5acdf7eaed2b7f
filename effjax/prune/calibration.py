"""What one-shot pruning learns from data: means over calibration batches, and what is measured at
the sites of the selected weights.

A site sees its weight as the model lays it out for the operation, perhaps transposed, reshaped or
one of a scan's layers. As layout is linear, its transpose (the pull-back of a gradient) takes what
is laid out like the operation's weight back to the leaf, whoever wrote the model.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.core import Apply, PyTree
from effjax.errors import SetupError, SiteError
from effjax.interpret import Handler, Operation, intercept
from effjax.jaxprs import GATHER
from effjax.select import check_floating, leaves, replace
from effjax.select import select as select_leaves
from effjax.sites import Site, analyze_model, check_reached, check_ruled

Leaves = dict[str, Array]


def chosen_leaves(params: PyTree, select: str) -> Leaves:
    """The selected leaves, checked to be floating point."""
    chosen = select_leaves(params, select)
    check_floating(chosen, select, "scores are computed for floating-point weights")
    return chosen


def mean(f: Callable[..., PyTree], args: tuple[Any, ...], batches: Iterable, key: Array) -> PyTree:
    """The mean of f(*args, batch, key of its own) over batches, in float32 (or wider).

    Raises:
      SetupError: there is no batch, or one differs in shape or dtype from the first.
    """

    def added(total: PyTree, args: tuple[Any, ...], batch: PyTree, key: Array, at: int) -> PyTree:
        found = f(*args, batch, jax.random.fold_in(key, at))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found)

    def zeros(batch: PyTree) -> PyTree:
        shapes = jax.eval_shape(f, *args, batch, key)
        wide = jax.tree.map(lambda x: jnp.promote_types(x.dtype, jnp.float32), shapes)
        return jax.tree.map(lambda x, dtype: jnp.zeros(x.shape, dtype), shapes, wide)

    first, batches = peek(batches)
    step, total, count = jax.jit(added), zeros(first), 0
    for count, batch in enumerate(batches, 1):
        _check_same(first, batch, count)
        total = step(total, args, batch, key, count)
    return jax.tree.map(lambda x: x / count, total)


def peek(batches: Iterable) -> tuple[PyTree, Iterable]:
    """The first batch, and all of them."""
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise SetupError(
        "there are no calibration batches. If `batches` is a generator, it may have been used up "
        "before: make a new one, or pass a list."
    )


def _check_same(first: PyTree, batch: PyTree, count: int) -> None:
    shapes = [
        {n: (jnp.shape(x), jnp.result_type(x)) for n, x in leaves(b).items()}
        for b in (first, batch)
    ]
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{n}: {d}{list(s)}" for n, (s, d) in x.items()) for x in shapes]
        raise SetupError(
            f"calibration batch {count} has {said[1]}, but the first has {said[0]}. Batches of one "
            "shape are compiled once and weigh the same; drop a last smaller one, or pad it."
        )


def checked(scores: Leaves, likely: str) -> Leaves:
    """The scores, if they rank anything: concrete ones are finite, and not all 0 in a leaf."""
    for path, score in scores.items():
        if isinstance(score, jax.core.Tracer):
            continue
        if not bool(jnp.all(jnp.isfinite(score))):
            raise SetupError(
                f"some scores of {path} are NaN or infinite. Likely causes: the loss or its "
                "gradients are not finite for these params and batches, or overflow in their "
                f"dtype ({score.dtype}). Evaluate the loss on each batch, and look at the params."
            )
        if not bool(jnp.any(score != 0)):
            raise SetupError(
                f"all scores of {path} are 0, so that they rank nothing. Likely causes: {likely}; "
                "or its weights are all 0. Leave it out with a selector, or change that."
            )
    return scores


def sites_of(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree, chosen: Mapping[str, Any]
) -> dict[str, list[Site]]:
    """The products with data that each chosen leaf takes part in, all in the order of execution.

    Raises:
      SiteError: a leaf that is in none, or is not the main one of any, or lies in a function with a
        derivative rule of its own.
    """
    analysis = analyze_model(apply, params, model_state, batch, train=False)
    sites = [site for site in analysis.sites if site.leaf in chosen and site.op != GATHER]
    mixed = [site for site in analysis.sites if site.weight is not None and site.op != GATHER]
    check_reached(mixed, chosen, analysis.met)
    for site in sites:
        check_ruled(site)
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.leaf, []).append(site)
    if lost := [path for path in chosen if path not in found]:
        raise SiteError(
            f"{lost} reach data only mixed with larger leaves (a low-rank update, a mask, weight "
            "norm): what their weights are multiplied with is not defined. Select the larger "
            "leaves, or merge the update into them first."
        )
    return found


def measure(
    apply: Apply,
    handler: Handler,
    paths: Iterable[str],
    *,
    given: Mapping[str, PyTree] | None = None,
    merge: Callable[[Array, Array], Array] = jnp.add,
) -> Callable[[PyTree, PyTree, PyTree, Array], dict[str, PyTree]]:
    """What a handler measures at some sites in evaluation, by site path."""
    wanted = frozenset(paths)

    def forward(params: PyTree, model_state: PyTree, batch: PyTree, key: Array) -> PyTree:
        return apply(params, model_state, batch, key, False)[0]

    def choose(site: Site) -> Handler | None:
        return handler if site.path in wanted else None

    run = intercept(forward, choose, given=given, merge=merge)
    return lambda *args: run(*args)[1]


def pull_back(
    measured: Callable[[PyTree, PyTree, PyTree, Array], PyTree],
    chosen: Leaves,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: Array,
) -> Leaves:
    """The gradient, laid out like the chosen leaves, of the sum of what was measured.

    A handler that measures Σ v·w (w its weight, v anything laid out like w) thus gives v laid out
    like the leaf.
    """

    def total(chosen: Leaves) -> Array:
        found = measured(replace(params, chosen), model_state, batch, key)
        return sum((jnp.sum(x) for x in jax.tree.leaves(found)), jnp.zeros(()))

    return jax.grad(total)({path: leaf.astype(jnp.float32) for path, leaf in chosen.items()})


def passed_on(op: Operation) -> Array:
    """The operation's result, cut off from the derivative by its weight."""
    operands = list(op.operands)
    assert op.site.weight is not None
    operands[op.site.weight] = lax.stop_gradient(operands[op.site.weight])
    return op.run(*operands)


def squared_inputs(op: Operation) -> tuple[Array, Array]:
    """Measures Σ w x² over all products w x of the operation: pulled back, each weight's Σ x²."""
    assert op.site.weight is not None
    operands = [x.astype(jnp.float32) for x in op.operands]
    data = 1 - op.site.weight
    operands[data] = jnp.square(lax.stop_gradient(operands[data]))
    return passed_on(op), jnp.sum(op.run(*operands, preferred_element_type=jnp.float32))


def output_numbers(op: Operation) -> tuple[Array, Array]:
    """Measures Σ w n, where n numbers the outputs: pulled back, which output each weight feeds.

    `op.given` is the number of the layer among a scan's layers.
    """
    assert op.site.weight is not None
    weight = op.operands[op.site.weight]
    number = jnp.full(weight.shape, op.given, jnp.int32)
    for axis in op.site.channels[op.site.weight]:
        place = lax.broadcasted_iota(jnp.int32, weight.shape, axis)
        number = number * weight.shape[axis] + place
    return passed_on(op), jnp.sum(weight.astype(jnp.float32) * number.astype(jnp.float32))


def no_key(key: Array | None) -> Array:
    """The key, or a fixed one where none was given."""
    return jax.random.key(0) if key is None else key
