"""Weights at their sites as matrices, [outputs, inputs], and the second moments of those inputs.

A convolution is the product of its kernel, as one matrix for each group of features, with the
patches of its input.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError, SiteError
from effjax.interpret import Operation
from effjax.jaxprs import CONV
from effjax.prune import calibration
from effjax.prune.calibration import Leaves
from effjax.sites import Site

Shape = tuple[int, ...]


def second_moments(op: Operation) -> tuple[Array, Array]:
    """Measures XᵀX of the inputs at a site, [groups, in, in]."""
    if op.axes:
        raise SiteError(
            f"{op.site.path} lies in a shard_map, where only a shard of its inputs is seen. Prune "
            "the model without it: the same function on one device."
        )
    assert op.site.weight is not None
    x = op.operands[1 - op.site.weight]
    if op.site.op == CONV:
        patches = _patches(op)
    else:
        contracting = op.site.contracting[1 - op.site.weight]
        free = [axis for axis in range(x.ndim) if axis not in contracting]
        size = [x.shape[axis] for axis in contracting]
        patches = x.transpose(*free, *contracting).reshape(-1, 1, math.prod(size))
    patches = patches.astype(jnp.float32)
    return op.run(*op.operands), jnp.einsum("ngi,ngj->gij", patches, patches)


def _patches(op: Operation) -> Array:
    """A convolution's inputs, [positions, groups, in]: its outputs with kernels of a single 1."""
    assert op.site.weight is not None
    x, kernel = (op.operands[i] for i in (1 - op.site.weight, op.site.weight))
    [features] = op.site.channels[op.site.weight]
    groups = op.site.groups
    taps = [n for axis, n in enumerate(kernel.shape) if axis != features]
    inputs = math.prod(taps)

    def run(kernel: Array) -> Array:
        return op.run(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    def kernels(ones: Array) -> Array:
        each = jnp.tile(ones, (1, groups))
        return jnp.moveaxis(each.reshape(*taps, -1), -1, features)

    # Which axis of the output holds its features: the one that depends on their number.
    shapes = [jax.eval_shape(lambda n=n: run(kernels(jnp.ones((inputs, n))))).shape for n in (1, 2)]
    axis = next(i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b)
    return jnp.moveaxis(run(kernels(jnp.eye(inputs))), axis, -1).reshape(-1, groups, inputs)


def _axes(site: Site) -> Shape:
    """A weight's axes with those of its outputs first and those of its inputs last."""
    assert site.weight is not None
    depth = len(site.stack)
    outputs, inputs = site.channels[site.weight], site.contracting[site.weight]
    return (*range(depth), *(depth + axis for axis in (*outputs, *inputs)))


def to_rows(site: Site, weight: Array) -> Array:
    """[*stack, groups, outputs, inputs] from a weight as the operation has it."""
    assert site.weight is not None
    depth = len(site.stack)
    inputs = math.prod([weight.shape[depth + axis] for axis in site.contracting[site.weight]])
    ordered = weight.transpose(_axes(site))
    outputs = weight.size // math.prod([*site.stack, site.groups, inputs])
    return ordered.reshape(*site.stack, site.groups, outputs, inputs)


def from_rows(site: Site, rows: Array, shape: Shape) -> Array:
    """The other way round."""
    axes = _axes(site)
    ordered = rows.reshape([shape[axis] for axis in axes])
    return ordered.transpose([axes.index(axis) for axis in range(len(axes))])


def weight_operand(op: Operation) -> tuple[Array, Array]:
    """Measures the weight as the operation has it."""
    assert op.site.weight is not None
    return op.run(*op.operands), op.operands[op.site.weight].astype(jnp.float32)


def product_with_given(op: Operation) -> tuple[Array, Array]:
    """Measures Σ w v with the given v: pulled back, v laid out like the leaf."""
    assert op.site.weight is not None
    weight = op.operands[op.site.weight].astype(jnp.float32)
    return calibration.passed_on(op), jnp.sum(weight * op.given)


def place(
    apply: Apply,
    own: Leaves,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: Array,
    given: Leaves,
) -> Leaves:
    """Arrays like the operations' weights, laid out like the leaves that these come from.

    `own` are those leaves, `given` the arrays by site path.
    """

    def run(given: Leaves, *args: PyTree) -> Leaves:
        handler = product_with_given
        measured = calibration.measure(apply, handler, given, given=given, merge=jnp.maximum)
        return calibration.pull_back(measured, *args)

    return jax.jit(run)(given, own, params, model_state, batch, key)


def check_layout(own: Leaves, placed: Leaves) -> None:
    """Raises unless the weights at the sites, laid out like the leaves, are the leaves."""
    for path, leaf in own.items():
        w = leaf.astype(jnp.float32)
        if bool(jnp.all(jnp.isfinite(w))) and not bool(
            jnp.allclose(w, placed[path], rtol=1e-2, atol=1e-6)
        ):
            raise SiteError(
                f"{path} does not meet data as it is: the model scales, masks, repeats or mixes it "
                "with other leaves first. Merge that into the params, or leave it out."
            )


def check_plain(sites: Sequence[Site]) -> None:
    """Raises if a leaf's sites are not products of one plain matrix or kernel."""

    def geometry(site: Site) -> tuple[str, Shape, Shape, Shape]:
        assert site.weight is not None
        return site.op, site.shapes[site.weight], site.contracting[site.weight], site.stack

    first = sites[0]
    for site in sites:
        lhs, rhs = (len(shape) for shape in site.shapes[:2])
        summed = 2 * len(site.contracting[0])
        if site.op == CONV and site.weight != 1:
            raise SiteError(f"{site.path} is the first operand of a convolution, not its kernel.")
        if site.op != CONV and lhs + rhs - summed != len(site.out):
            raise SiteError(
                f"{site.path} is a batch of matrices that each meet data of their own "
                f"({site.lhs} with {site.rhs}, as in a mixture of experts), which no matrix is "
                "solved for. Leave it out of the selector; `oneshot.wanda` can prune it."
            )
        if geometry(site) != geometry(first):
            _other_layout(first.leaf)


def check_alike(site: Site, weight: Array, others: Sequence[Array]) -> None:
    """Raises if the uses of a leaf do not meet the same weight."""
    if any(not bool(jnp.array_equal(weight, other, equal_nan=True)) for other in others):
        _other_layout(site.leaf)


def _other_layout(path: str) -> None:
    raise SiteError(
        f"{path} is used several times in different layouts (a table that is transposed for the "
        "outputs), so that it has no one matrix to solve for. Leave it out of the selector; "
        "`oneshot.wanda`, which adds up its uses, can prune it."
    )


def check_inputs(path: str, moments: Array) -> None:
    """Raises if second moments say nothing about a leaf's weights."""
    total = jnp.trace(moments, axis1=-2, axis2=-1)
    if not bool(jnp.all(jnp.isfinite(total)) & jnp.any(total > 0)):
        raise SetupError(
            f"the inputs of {path} are not finite on the calibration batches, or all 0: nothing "
            "says which of its weights matter. Look at the batches and the layers before it."
        )
