"""What a differentiable search found: genes, with a warning where it collapsed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.errors import SetupError
from effjax.step import TrainState


class CollapseWarning(UserWarning):
    """A search that chose skip connections for most edges: it says little about the network."""


def extract(
    state: Any,
    operations: Sequence[str],
    *,
    name: str | None = None,
    exclude: Sequence[str] = (),
    skip: str | None = "skip",
    threshold: float = 0.5,
) -> dict[str, np.ndarray]:
    """The most probable operation of every edge: {entry: int32 [edges]}.

    Together with the model's file, which builds a network from genes, this is the found network:
    to train from scratch, or with the search's weights where its leaves have the same names.

    Args:
      state: a TrainState, or the search's part of `extra`; concrete.
      operations: as `darts` was given them.
      name: the search's in the chain, needed if there are several.
      exclude: operations that are not chosen; DARTS leaves out its zero operation.
      skip: the skip connection's name, or None.
      threshold: the fraction of skip connections above which a CollapseWarning is given.

    Raises:
      SetupError: no search of that name, or several; logits of other operations; none left.
    """
    logits = _logits(state, name)
    names = list(operations)
    if unknown := sorted({*exclude, *([skip] if skip else [])} - set(names)):
        raise SetupError(f"{unknown} are none of the operations {names}.")
    allowed = np.array([o not in exclude for o in names])
    if not allowed.any():
        raise SetupError(f"exclude={list(exclude)} leaves no operation of {names}.")
    genes = {}
    for entry, own in logits.items():
        if np.shape(own)[-1] != len(names):
            raise SetupError(
                f"{entry} has logits of {np.shape(own)[-1]} operations; {len(names)} are given."
            )
        genes[entry] = np.where(allowed, np.asarray(own), -np.inf).argmax(-1).astype(np.int32)
    if skip is not None:
        chosen = np.concatenate(list(genes.values()))
        share = float((chosen == names.index(skip)).mean())
        if share > threshold:
            warnings.warn(
                f"the search chose {skip!r} for {share:.0%} of the edges: it has collapsed, as "
                "DARTS does when it goes on for long. Stop it earlier, or use auxiliary=... "
                "(DARTS-) or relax='sigmoid' with zero_one=... (FairDARTS).",
                CollapseWarning,
                stacklevel=2,
            )
    return genes


def _logits(state: Any, name: str | None) -> Mapping[str, Any]:
    extra = state.vars.extra if isinstance(state, TrainState) else state
    if name is None and _is_search(extra):
        return extra["logits"]
    slots = [n for n, own in extra.items() if _is_search(own)] if isinstance(extra, Mapping) else []
    if name is None and len(slots) == 1:
        name = slots[0]
    if name not in slots:
        wanted = "one differentiable search" if name is None else f"a search named {name!r}"
        raise SetupError(f"the state should hold {wanted}; those it holds are named {slots}.")
    return extra[name]["logits"]


def _is_search(extra: Any) -> bool:
    return (
        isinstance(extra, Mapping)
        and set(extra) == {"logits"}
        and all(np.ndim(x) == 2 for x in extra["logits"].values())
    )
