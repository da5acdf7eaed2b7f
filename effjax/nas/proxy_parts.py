"""What the proxies share: where they look, and which parts of a network of all candidates count."""

import re
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SelectorError
from effjax.interpret import Handler
from effjax.prune.calibration import Leaves
from effjax.sites import Site

Active = Mapping[str, Array]
"""{regular expression over paths: how much what it matches counts}, perhaps traced; what none
matches counts 1."""


def shares(paths: Iterable[str], active: Active | None) -> dict[str, Array]:
    """How much each path counts: by the first pattern that matches it.

    Raises:
      SelectorError: a pattern that matches no path.
    """
    found, unused, paths = {}, dict.fromkeys(active or {}), list(paths)
    for path in paths:
        pattern = next((p for p in active or {} if re.search(p, path)), None)
        if active is None or pattern is None:
            found[path] = jnp.ones(())
        else:
            found[path] = active[pattern]
            unused.pop(pattern, None)
    if unused:
        raise SelectorError(f"the patterns {list(unused)} of `active` match none of {paths}.")
    return found


def training(apply: Apply) -> Callable[[PyTree, PyTree, PyTree, Array], PyTree]:
    """The outputs in training, as `intercept` takes them."""
    return lambda params, model_state, batch, key: apply(params, model_state, batch, key, True)[0]


def at(handler: Handler, chosen: Leaves) -> Callable[[Site], Handler | None]:
    """The handler at the sites of the chosen leaves."""
    return lambda site: handler if site.leaf in chosen else None


def wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def total(terms: Iterable[Array]) -> Array:
    """Their sum, one term after another."""
    return sum(terms, jnp.zeros(()))
