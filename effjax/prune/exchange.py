"""How connections move: each layer drops some of its weights and grows others in their place."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from effjax.prune.counts import Count, count
from effjax.prune.engine import Named, Scene
from effjax.prune.patterns import Pattern


def exchange(
    scene: Scene,
    growth: Named,
    dropped: Mapping[str, Count],
    grown: Mapping[str, Count],
    pattern: Pattern,
) -> Named:
    """The masks after each layer has dropped its smallest weights and grown others.

    Args:
      scene: whose kept weights are dropped by magnitude.
      growth: scores >= 0 by path; the largest are grown among all that are not kept, those just
        dropped included.
      dropped: how many units each layer drops, at most all it has.
      grown: how many it grows, at most what is not kept then.
      pattern: what is dropped and grown together.
    """

    def choose(scores: Named, keep: dict[str, Count]) -> Named:
        return pattern.choose(scores, lambda units: keep, signed=True)

    # Below every magnitude, so that nothing but what is free is passed over.
    left = choose(
        {path: jnp.where(m, jnp.abs(scene.weights[path]), -1.0) for path, m in scene.mask.items()},
        {path: kept_units(m, pattern).minus(dropped[path]) for path, m in scene.mask.items()},
    )
    free = {path: jnp.where(kept, -1.0, growth[path]) for path, kept in left.items()}
    new = choose(free, dict(grown))
    return {path: kept | new[path] for path, kept in left.items()}


def shared_out(total: Count, room: list[Count], weight: Array) -> list[Count]:
    """A number in parts, in proportion to weights and none larger than its room; exact in sum.

    Args:
      total: at most the sum of the rooms.
      room: n Counts.
      weight: float32 [n], not negative; where all that have room left are 0, room counts instead.

    Returns:
      n Counts.

    Example:
      >>> import jax.numpy as jnp
      >>> room = [Count.of(3), Count.of(20), Count.of(20)]
      >>> [int(part) for part in shared_out(Count.of(16), room, jnp.array([4.0, 2.0, 2.0]))]
      [3, 7, 6]
    """
    limit = Count.stack(room).value()

    def fill(_: int, part: Array) -> Array:
        is_open = part < limit
        wanted = jnp.where(is_open, weight, 0.0)
        wanted = jnp.where(jnp.sum(wanted) > 0, wanted, limit - part)
        more = (total.value() - jnp.sum(part)) * wanted / jnp.maximum(jnp.sum(wanted), 1e-30)
        return jnp.minimum(part + jnp.maximum(more, 0.0), limit)

    # Each round fills at least one more layer or ends with all shared out.
    part = lax.fori_loop(0, len(room), fill, jnp.zeros_like(limit))
    bounds, later = jnp.cumsum(part), Count.stack(room).after()
    left, found = total, []
    for i, own in enumerate(room):
        given = total.minus(left)
        wanted = Count.rounded(bounds[i]).minus(given)
        least = left.minus(Count(later.high[i], later.low[i]))  # what finds no room after this one
        found.append(wanted.maximum(least).minimum(own).minimum(left))
        left = left.minus(found[-1])
    return found


def kept_units(mask: Array, pattern: Pattern) -> Count:
    """How many units a mask keeps."""
    return count(pattern.pool(mask.astype(jnp.float32)) > 0.5)
