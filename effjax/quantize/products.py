"""Layers as engines compute them: data [..., summed] times a matrix [summed, channels]."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax import jaxprs
from effjax.errors import SiteError
from effjax.quantize.values import Pending
from effjax.sites import Site


def channels(eqn: jaxprs.Eqn, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a site's result along which its weight's channels lie, and their sizes."""
    assert site.weight is not None
    shape = site.shapes[site.weight]
    if site.op == jaxprs.CONV:
        if site.weight != 1:
            raise SiteError(
                f"{site.path} is the first operand of its convolution; engines want "
                "the kernel second."
            )
        numbers = eqn.params["dimension_numbers"]
        return (numbers.out_spec[1],), (shape[numbers.rhs_spec[0]],)
    (_, batch) = eqn.params["dimension_numbers"]
    if batch[0]:
        raise SiteError(
            f"{site.path} is multiplied with a batch axis of its own (a matrix for each expert or "
            "head); engines multiply one matrix. Write it as separate layers, or leave it out of "
            "the quantizer's `select`."
        )
    free = [axis for axis in range(len(shape)) if axis not in site.contracting[site.weight]]
    rank = len(jaxprs.shape(eqn.outvars[0]))
    first = 0 if site.weight == 0 else rank - len(free)
    return tuple(range(first, first + len(free))), tuple(shape[axis] for axis in free)


def matrix(values: np.ndarray, eqn: jaxprs.Eqn, site: Site) -> np.ndarray:
    """A dot's weight as [summed, channels]."""
    assert site.weight is not None
    summed = eqn.params["dimension_numbers"][0][site.weight]
    free = [axis for axis in range(values.ndim) if axis not in summed]
    ordered = values.transpose(*summed, *free)
    return ordered.reshape(int(np.prod([values.shape[a] for a in summed])), -1)


def dense(x: Array, w: Array, eqn: jaxprs.Eqn, site: Site) -> Array:
    """x [..., summed] times w [summed, channels]."""
    assert site.weight is not None
    summed = eqn.params["dimension_numbers"][0][1 - site.weight]
    free = [axis for axis in range(x.ndim) if axis not in summed]
    order = (*free, *summed)
    if order != tuple(range(x.ndim)):
        x = x.transpose(order)
    if len(summed) != 1:
        x = x.reshape(*x.shape[: len(free)], w.shape[0])
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    with jax.named_scope(str(eqn.source_info.name_stack) or site.path):  # as a convolution keeps it
        return lax.dot_general(
            x,
            w,
            dims,
            precision=eqn.params["precision"],
            preferred_element_type=jnp.float32,
        )


def shaped(out: Array, own: Pending, site: Site) -> Array:
    """[..., channels] as the dot's own result."""
    if len(own.channels) == 1 and site.weight == 1:
        return out
    sizes = [own.shape[axis] for axis in own.channels]
    out = out.reshape(*out.shape[:-1], *sizes)
    if site.weight == 0:  # channels first
        rest = out.ndim - len(sizes)
        out = out.transpose(*range(rest, out.ndim), *range(rest))
    return out
