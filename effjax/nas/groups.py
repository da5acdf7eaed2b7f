"""The architectures of an elastic width search: which params share a width, and their masks."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import PyTree
from effjax.errors import SelectorError, SetupError
from effjax.select import leaves, replace, select

Groups = Mapping[str, str | Sequence[str]]
WIDTHS = (0.25, 0.5, 0.75, 1.0)


class WidthSpace(NamedTuple):
    """The architectures of a width search: int32 [..., groups] arrays of indices into `choices`.

    An architecture is a value, not a shape: choosing another one compiles nothing again. Made by
    `width_space`.
    """

    groups: dict[str, tuple[str, ...]]  # params paths by group
    sizes: tuple[int, ...]  # channels of each group at width 1
    choices: tuple[float, ...]  # ascending

    @property
    def kept(self) -> np.ndarray:
        """Channels by group and choice, ceil(channels * width): int32 [groups, choices]."""
        # The rounding removes what floats add to exact products: 0.1 * 30 = 3.0000000000000004.
        kept = [[math.ceil(round(c * w, 6)) for w in self.choices] for c in self.sizes]
        return np.array(kept, np.int32)

    @property
    def size(self) -> int:
        """How many architectures there are."""
        return len(self.choices) ** len(self.groups)

    @property
    def smallest(self) -> Array:
        """Every group at its smallest width: int32 [groups]."""
        return jnp.zeros(len(self.groups), jnp.int32)

    @property
    def largest(self) -> Array:
        """Every group at its largest width: int32 [groups]."""
        return jnp.full(len(self.groups), len(self.choices) - 1, jnp.int32)

    def architecture(self, widths: Mapping[str, float]) -> Array:
        """The architecture with these widths; groups that are not named are at their largest.

        Raises:
          SelectorError: an unknown group, or a width that is no choice.
        """
        if unknown := sorted(set(widths) - set(self.groups)):
            raise SelectorError(f"no groups {unknown}; the groups are {list(self.groups)}.")
        if wrong := {n: w for n, w in widths.items() if w not in self.choices}:
            raise SelectorError(f"the widths {wrong} are not among the choices {self.choices}.")
        chosen = [self.choices.index(widths.get(n, self.choices[-1])) for n in self.groups]
        return jnp.array(chosen, jnp.int32)

    def widths(self, arch: Array) -> dict[str, float]:
        """The widths of one architecture by group: the inverse of `architecture`."""
        return {n: self.choices[int(i)] for n, i in zip(self.groups, arch, strict=True)}

    def sample(self, key: Array, count: int) -> Array:
        """Uniformly drawn architectures, int32 [count, groups]."""
        return jax.random.randint(key, (count, len(self.groups)), 0, len(self.choices), jnp.int32)

    def enumerate(self) -> Array:
        """All architectures, int32 [size, groups], the first group's width moving slowest."""
        all_of_them = itertools.product(range(len(self.choices)), repeat=len(self.groups))
        return jnp.array(list(all_of_them), jnp.int32)

    def channels(self, arch: Array) -> Array:
        """The channels that architectures keep, int32 [..., groups]."""
        return jnp.asarray(self.kept)[jnp.arange(len(self.groups)), arch]

    def mask(self, params: PyTree, arch: Array) -> PyTree:
        """The params of one architecture: its first channels, and exact zeros for the rest."""
        new = {}
        named = leaves(params)
        for count, paths in zip(self.channels(arch), self.groups.values(), strict=True):
            for path in paths:
                leaf = named[path]
                new[path] = jnp.where(jnp.arange(leaf.shape[-1]) < count, leaf, 0)
        return replace(params, new)


def width_space(params: PyTree, groups: Groups, choices: Sequence[float] = WIDTHS) -> WidthSpace:
    """The widths that params can take.

    Args:
      params: a tree of arrays or ShapeDtypeStructs.
      groups: {name: a regular expression, or a list of them, over params paths}. The leaves of a
        group have the output channels as their last axis: kernels, biases, and BatchNorm's scale
        and bias. What is added together (a residual branch and its shortcut) belongs into one
        group.
      choices: fractions of the channels in (0, 1].

    Raises:
      SetupError: choices outside (0, 1], repeated or missing; no groups.
      SelectorError: an expression that matches nothing, leaves of one group with different last
        axes, a leaf in two groups, or a layer of which only some leaves are in the group.
    """
    check_choices(choices)
    if not groups:
        raise SetupError("the width search has no groups; name at least one: {'conv': r'conv/'}.")
    found: dict[str, tuple[str, ...]] = {}
    sizes: list[int] = []
    owner: dict[str, str] = {}
    for name, patterns in groups.items():
        chosen: dict[str, tuple[int, ...]] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            chosen |= {path: np.shape(leaf) for path, leaf in select(params, pattern).items()}
        if not chosen:
            raise SelectorError(f"the width group {name!r} lists no patterns.")
        if len({shape[-1:] for shape in chosen.values()}) > 1 or () in chosen.values():
            raise SelectorError(
                f"the width group {name!r} holds leaves of different channel counts: {chosen}. The "
                "leaves of a group share their last axis; make groups of those that do."
            )
        for path in chosen:
            if path in owner:
                raise SelectorError(f"{path} is in the width groups {owner[path]!r} and {name!r}.")
            owner[path] = name
        found[name] = tuple(chosen)
        sizes.append(next(iter(chosen.values()))[-1])
    _check_whole_layers(params, owner)
    return WidthSpace(found, tuple(sizes), tuple(sorted(float(w) for w in choices)))


def check_choices(choices: Sequence[float]) -> None:
    """Raises unless the choices are distinct fractions in (0, 1]."""
    if not len(choices) or len(set(choices)) < len(choices):
        raise SetupError(f"the width choices are {tuple(choices)}; give each width once.")
    if wrong := [w for w in choices if not 0 < w <= 1]:
        raise SetupError(
            f"the width choices {wrong} are not in (0, 1]; a choice is the fraction of channels "
            "kept. For networks wider than yours, build the widest and choose among its fractions."
        )


def _check_whole_layers(params: PyTree, owner: Mapping[str, str]) -> None:
    """A kernel without its bias would leave a constant in the channels that were cut."""
    shapes = {path: np.shape(leaf) for path, leaf in leaves(params).items()}
    for path, name in owner.items():
        layer, _, leaf = path.rpartition("/")
        for other in (f"{layer}/{n}" for n in ("kernel", "scale", "bias") if layer and n != leaf):
            if other in shapes and other not in owner and shapes[other][-1:] == shapes[path][-1:]:
                raise SelectorError(
                    f"the width group {name!r} has {path} but not {other}, which would stay "
                    f"non-zero in channels that are cut. Select the layer: r'{layer}/'."
                )
