"""Params paths and what is chosen by them: regex selectors, label trees, and the leaves of other
trees (optimizer moments, masks) that belong to a params leaf."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import SelectorError, SetupError

PyTree = Any
KERNELS = r"(^|/)kernel$"


def path_name(path: Sequence[Any]) -> str:
    """A key path as one string: "Dense_0/kernel", "layers/3/bias"."""
    return "/".join(_part(entry) for entry in path)


def _part(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path name, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(f: Any, tree: PyTree) -> PyTree:
    """`jax.tree.map` with the path name as first argument: `f(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_name(path), leaf), tree)


def replace(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
    """The tree with the leaves named in `new` exchanged."""
    if missing := sorted(set(new) - set(leaves(tree))):
        raise SelectorError(f"no leaves {missing} to replace; the tree has {list(leaves(tree))}.")
    return map_named(lambda name, leaf: new.get(name, leaf), tree)


def check_floating(chosen: Mapping[str, Any], pattern: Any, why: str) -> None:
    """Raises unless the leaves that a selector chose are floating point; `why` they must be.

    Raises:
      SetupError: one is not.
    """
    for path, leaf in chosen.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise SetupError(
                f"the selector {pattern!r} chooses {path}, which is {leaf.dtype}; {why}. Leave it "
                "out of the selector."
            )


def select(params: PyTree, pattern: str = KERNELS, *, min_ndim: int = 0) -> dict[str, Any]:
    """The leaves whose path matches a regular expression (`re.search`).

    Args:
      params: a tree of arrays or ShapeDtypeStructs.
      pattern: for example r"kernel$", r"^encoder/", or r"^(?!head).*kernel$".
      min_ndim: leaves with fewer axes are left out.

    Returns:
      {path name: leaf}, in the tree's order; never empty.

    Raises:
      SelectorError: the pattern is no regular expression, or nothing matches.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise SelectorError(f"{pattern!r} is not a regular expression: {error}.") from error
    named = leaves(params)
    found = {n: x for n, x in named.items() if search(n) and np.ndim(x) >= min_ndim}
    if not found:
        axes = f" with at least {min_ndim} axes" if min_ndim else ""
        raise SelectorError(
            f"the selector {pattern!r} matches no leaf{axes}. The params' paths are: "
            f"{', '.join(named) or '(none)'}."
        )
    return found


def label_tree(tree: PyTree, rules: Sequence[tuple[str, str]]) -> PyTree:
    """Labels for `optax.partition`: the label of the first rule whose pattern matches each path.

    Args:
      tree: usually a `Vars`, whose paths begin with "model/" or "extra/".
      rules: (pattern, label) pairs.

    Raises:
      SelectorError: a leaf that no rule covers, or a rule that is the first match of no leaf.
    """
    used: set[str] = set()

    def label(name: str, leaf: Any) -> str:
        for pattern, value in rules:
            if re.search(pattern, name):
                used.add(pattern)
                return value
        raise SelectorError(
            f"no rule labels {name!r}; the patterns are {[p for p, _ in rules]}. "
            "End the rules with ('', 'default') to cover the rest."
        )

    labels = map_named(label, tree)
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise SelectorError(f"the patterns {unused} label no leaf of {list(leaves(tree))}.")
    return labels


def owners(tree: PyTree, params: PyTree) -> dict[str, str]:
    """Which params leaf each leaf of another tree belongs to.

    A leaf belongs to a params leaf if its path ends in that leaf's path (the longest one wins) and
    it has the same shape. This finds Adam's moments, a momentum trace, an average of the weights,
    or a mask, in any optax state, also behind `optax.partition`, without knowing their types.

    Returns:
      {path name in `tree`: path name in `params`}; leaves that belong to none are left out.
    """
    shapes = {name: np.shape(leaf) for name, leaf in leaves(params).items()}
    found = {}
    for name, leaf in leaves(tree).items():
        # NNX optimizers keep their moments in Variables, whose path ends in "value".
        parts = name.removesuffix("/value").split("/")
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate in shapes:
                if shapes[candidate] == np.shape(leaf):
                    found[name] = candidate
                break
    return found


def map_owned(f: Any, tree: PyTree, params: PyTree, values: Mapping[str, Any]) -> PyTree:
    """Applies `f(leaf, values[path])` to each leaf that belongs to a params path in `values`.

    For example, zero the optimizer's moments of pruned weights:
    `map_owned(lambda moment, mask: moment * mask, opt, params, masks)`.
    """
    belongs = owners(tree, params)
    return map_named(
        lambda name, x: f(x, values[belongs[name]]) if belongs.get(name) in values else x, tree
    )
