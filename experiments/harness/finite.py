"""NaN and infinity: noticing them before they are saved, and finding where they came from."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.select import leaves


def broken_leaves(state: Any) -> list[str]:
    """The leaves of a TrainState that hold what no healthy run has.

    That is NaN or infinity in `vars` and `model_state`, and NaN in the rest, where infinity may be
    an honest beginning (of a running minimum).

    Returns:
      Path names, weights first: "vars/model/Dense_0/kernel".
    """
    flags = jax.device_get(_flags(state))
    names = [name for name, broken in flags.items() if broken]
    return sorted(names, key=lambda name: not name.startswith("vars/"))


@jax.jit
def _flags(state: Any) -> dict[str, Array]:
    found = {}
    for name, leaf in leaves(state).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            strict = name.startswith(("vars/", "model_state/"))
            found[name] = jnp.any(~jnp.isfinite(leaf) if strict else jnp.isnan(leaf))
    return found


def broken_loss(metrics: Mapping[str, Any]) -> bool:
    """Whether a step's objective, or the user's loss in it, is NaN or infinite."""
    return not all(math.isfinite(metrics[name]) for name in ("loss", "task") if name in metrics)


def broken_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a step that are NaN or infinite, the objective first."""
    names = sorted(metrics, key=lambda n: (n != "loss", n != "task", n))
    return {n: float(metrics[n]) for n in names if not math.isfinite(metrics[n])}


def find_break(stepper: Any, state: Any, batches: Any, frozen: Any, until: int) -> str:
    """Runs again from a good state, one step at a time, and says where it broke.

    Args:
      stepper: as made by `make_stepper`; the same program gives the same bits.
      state: a good state before the break; it is donated.
      until: the step at which the break was seen.
    """
    at = int(state.step)
    while at < until:
        state, [metrics] = stepper(state, batches, frozen, 1)
        at = int(state.step)
        bad, broken = broken_metrics(metrics), broken_leaves(state)
        if broken_loss(metrics):
            terms = ", ".join(f"{n}={x}" for n, x in bad.items())
            return f"{terms} at step {at}, computed from weights that were finite" + (
                f"; its update then broke {_some(broken)}" if broken else ""
            )
        if broken:
            return f"the loss at step {at} was finite, but its update broke {_some(broken)}"
    return "a second run over the same steps stayed finite: the program is not deterministic here"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
