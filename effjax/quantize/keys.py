"""Random keys of sites: one for each operand, layer and step."""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.interpret import Operation
from effjax.sites import Site


def layer_numbers(sites: Sequence[Site]) -> dict[str, Array]:
    """A number for each layer of each site, for keys of their own."""
    sizes = {site.path: (math.prod(site.stack), site.stack) for site in sites}
    return {p: lax.iota(jnp.int32, size).reshape(stack) for p, (size, stack) in sizes.items()}


def own_key(op: Operation, number: int) -> Array:
    """A key for one operand of a site, layer and step, from the shared "key"."""
    label = zlib.crc32(f"{op.site.path} {number}".encode())
    return jax.random.fold_in(jax.random.fold_in(op.shared["key"], label), op.given["layer"])
