"""Search spaces: configurations as vectors of integers, drawn and changed inside programs."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.nas.dimensions import Repeat, When, from_plain, to_plain, values_of

# Spaces of at most so many configurations are counted by listing them.
_LISTED = 2**18
_TRIES = 64


class Space:
    """The configurations of a search, each an int32 vector with one gene a dimension.

    A gene is an index into its dimension's values. Genes whose condition does not hold are
    inactive, and 0, so every configuration is exactly one vector. `sample`, `mutate`, `crossover`
    and `valid` are jittable and take any leading axes. Bits, sparsities, ranks and widths are
    dimensions like others.

    Example:
      >>> from effjax.nas import Choice, Integer, Repeat, Space, When
      >>> space = Space({
      ...     "cell": Repeat(2, {"op": Choice(("conv", "pool")),
      ...                        "bits": When("op", ("conv",), Integer(2, 8, 2))}),
      ... })
      >>> space.size
      25
      >>> config = {"cell": [{"op": "conv", "bits": 4}, {"op": "pool"}]}
      >>> space.encode(config).tolist()
      [0, 1, 1, 0]
      >>> space.decode(space.encode(config)) == config
      True

    Args:
      dimensions: {name: Choice, Integer, Float, When or Repeat}; names without dots.
      constraint: from one vector, int32 [genes], to a boolean scalar; traced. What it refuses is
        drawn again.

    Raises:
      SetupError: an empty or repeated choice, a condition on an unknown name or value, a
        constraint that nothing satisfies.
    """

    def __init__(
        self, dimensions: Mapping[str, Any], constraint: Callable[[Array], Array] | None = None
    ):
        self.dimensions, self.constraint = dict(dimensions), constraint
        self.names: list[str] = []
        self.values: list[tuple[Any, ...]] = []
        self.parents: list[tuple[int, frozenset[int]] | None] = []
        self._flatten("", self.dimensions)
        if not self.names:
            raise SetupError("the space has no dimensions; give it at least one.")
        self._counts = np.array([len(v) for v in self.values], np.int32)
        self._weights = self._weigh()
        roots = [sum(w) for w, p in zip(self._weights, self.parents, strict=True) if p is None]
        self._unconstrained = math.prod(roots)
        if constraint is not None:
            self._check_constraint()

    def _flatten(self, prefix: str, dimensions: Mapping[str, Any]) -> None:
        for name, dimension in dimensions.items():
            full = prefix + name
            if "." in name:
                raise SetupError(f"the name {name!r} has a dot, which separates cells' names.")
            if isinstance(dimension, Repeat):
                if dimension.times < 1:
                    raise SetupError(f"{full} is repeated {dimension.times} times; use 1 or more.")
                for i in range(dimension.times):
                    self._flatten(f"{full}.{i}.", dimension.dimensions)
                continue
            parent = None
            if isinstance(dimension, When):
                on = prefix + dimension.name
                if on not in self.names:
                    raise SetupError(f"{full} depends on {on}, which is no dimension before it.")
                at = self.names.index(on)
                if lost := [v for v in dimension.values if v not in self.values[at]]:
                    raise SetupError(f"{full} waits for {on} = {lost}, not of {self.values[at]}.")
                parent = (at, frozenset(self.values[at].index(v) for v in dimension.values))
                dimension = dimension.then
            self.names.append(full)
            self.values.append(values_of(full, dimension))
            self.parents.append(parent)

    def _weigh(self) -> list[list[int]]:
        """How many configurations of what depends on a gene there are, by the gene's value."""
        weights = [[1] * len(v) for v in self.values]
        for gene in reversed(range(len(self.names))):
            if (parent := self.parents[gene]) is not None:
                for value in parent[1]:
                    weights[parent[0]][value] *= sum(weights[gene])
        return weights

    def _check_constraint(self) -> None:
        if self._unconstrained <= _LISTED:
            found = len(self.enumerate())
        else:
            drawn = self._draw(jax.random.key(0), (2**14,))
            found = int(jnp.sum(self.valid(drawn)))
        if not found:
            raise SetupError(
                f"nothing satisfies the constraint: of {self._unconstrained:,} configurations, "
                f"{min(self._unconstrained, 2**14):,} were tried. Loosen it, or build the space "
                "so that most configurations satisfy it."
            )

    @property
    def size(self) -> int:
        """How many configurations there are, exactly; Python's integers do not overflow.

        Raises:
          SetupError: there is a constraint and the space is too large to list.
        """
        return self._unconstrained if self.constraint is None else len(self.enumerate())

    def active(self, genes: Array) -> Array:
        """Which genes' conditions hold: bool [..., genes]."""
        found: list[Array] = []
        for parent in self.parents:
            if parent is None:
                found.append(jnp.ones(genes.shape[:-1], bool))
            else:
                at, wanted = parent
                holds = [genes[..., at] == v for v in sorted(wanted)]
                found.append(found[at] & jnp.any(jnp.stack(holds), axis=0))
        return jnp.stack(found, axis=-1)

    def valid(self, genes: Array) -> Array:
        """Whether vectors are configurations of the space: bool [...]."""
        inside = (genes >= 0) & (genes < self._counts) & (self.active(genes) | (genes == 0))
        good = jnp.all(inside, axis=-1)
        if self.constraint is None:
            return good
        flat = genes.reshape(-1, genes.shape[-1])
        return good & jax.vmap(self.constraint)(flat).reshape(good.shape)

    def _draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Uniform draws that know no constraint."""
        return self.canonical(self._independent(key, shape))

    def _independent(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Each gene as if it were active: given that, genes are independent of each other."""
        u = jax.random.uniform(key, (*shape, len(self.names)))
        genes = jnp.minimum((u * self._counts).astype(jnp.int32), self._counts - 1)
        for gene, weights in enumerate(self._weights):
            if len(set(weights)) > 1:
                below = np.array(list(itertools.accumulate(weights))[:-1]) / sum(weights)
                edges = below.astype(np.float32)
                drawn = jnp.sum(u[..., gene, None] >= edges, axis=-1, dtype=jnp.int32)
                genes = genes.at[..., gene].set(drawn)
        # XLA's CPU backend would otherwise draw the random numbers again for each gene that asks
        # whether another is active: eight times slower.
        return jax.lax.optimization_barrier(genes)

    def canonical(self, genes: Array) -> Array:
        """Vectors with 0 for their inactive genes: int32 [..., genes]."""
        if all(parent is None for parent in self.parents):
            return genes
        return jnp.where(self.active(genes), genes, 0)

    def _until_valid(self, key: Array, first: Callable, tries: int | None, other: Array) -> Array:
        """Draws again what the constraint refuses; after `tries`, `other`."""
        if self.constraint is None:
            return first(key)

        def again(carry):
            genes, count = carry
            drawn = first(jax.random.fold_in(key, count))
            return jnp.where(self.valid(genes)[..., None], genes, drawn), count + 1

        def wanted(carry):
            genes, count = carry
            left = ~jnp.all(self.valid(genes))
            return left if tries is None else left & (count < tries)

        genes, _ = jax.lax.while_loop(wanted, again, (first(key), jnp.int32(1)))
        return jnp.where(self.valid(genes)[..., None], genes, other)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Configurations drawn uniformly from those of the space: int32 [*shape, genes]."""
        zero = jnp.zeros((*shape, len(self.names)), jnp.int32)
        return self._until_valid(key, lambda k: self._draw(k, shape), None, zero)

    def mutate(self, key: Array, genes: Array) -> Array:
        """One active gene of each vector takes another value, both drawn uniformly.

        Genes that become active by it are drawn anew, those that become inactive are 0. Where 64
        draws meet no configuration that the constraint accepts, a vector stays as it is.
        """

        def once(key: Array) -> Array:
            u = jax.random.uniform(key, (2, *genes.shape[:-1]))
            old = self.active(genes)
            free = old & (self._counts > 1)
            rank = jnp.cumsum(free, axis=-1, dtype=jnp.int32)
            total = rank[..., -1]
            pick = jnp.minimum((u[0] * total).astype(jnp.int32), total - 1)
            chosen = free & (rank == pick[..., None] + 1)
            others = self._counts - 1
            move = jnp.minimum((u[1][..., None] * others).astype(jnp.int32), others - 1) + 1
            moved = jnp.where(chosen, (genes + move) % self._counts, genes)
            old, moved = jax.lax.optimization_barrier((old, moved))
            if all(parent is None for parent in self.parents):
                return moved
            fresh = self._independent(jax.random.fold_in(key, 1), genes.shape[:-1])
            return self.canonical(jnp.where(old, moved, fresh))

        return self._until_valid(key, once, _TRIES, genes)

    def crossover(self, key: Array, a: Array, b: Array) -> Array:
        """Each gene from one of two parents by a fair coin, if both have it, else from who has."""

        def once(key: Array) -> Array:
            in_a, in_b = self.active(a), self.active(b)
            coin = jax.random.bernoulli(key, 0.5, a.shape)
            return self.canonical(jnp.where(jnp.where(in_a == in_b, coin, in_a), a, b))

        return self._until_valid(key, once, _TRIES, a)

    def one_hot(self, genes: Array) -> Array:
        """Features for a predictor, float32 [..., values of all genes]; 0 for inactive genes."""
        active = self.active(genes)
        parts = [
            jax.nn.one_hot(genes[..., i], n) * active[..., i, None]
            for i, n in enumerate(self._counts.tolist())
        ]
        return jnp.concatenate(parts, axis=-1)

    def numbers(self, genes: Array) -> dict[str, Array]:
        """The values of numeric genes, float32 [...], for use inside a program (bits, sparsity)."""
        numeric = {
            n: (i, v)
            for i, (n, v) in enumerate(zip(self.names, self.values, strict=True))
            if all(isinstance(x, int | float) for x in v)
        }
        return {n: jnp.asarray(v, jnp.float32)[genes[..., i]] for n, (i, v) in numeric.items()}

    def neighbours(self, genes: Any) -> np.ndarray:
        """All valid vectors that differ in one active gene; what it activates is at its first."""
        genes = np.asarray(genes, np.int32)
        active = np.asarray(self.active(jnp.asarray(genes)))
        rows = []
        for i in np.flatnonzero(active):
            for value in range(self._counts[i]):
                if value != genes[i]:
                    rows.append(genes.copy())
                    rows[-1][i] = value
        found = np.array(rows, np.int32).reshape(-1, len(genes))
        found = np.asarray(self.canonical(jnp.asarray(found)))
        return found[np.asarray(self.valid(jnp.asarray(found)))]

    def enumerate(self) -> np.ndarray:
        """All configurations, int32 [size, genes], in lexical order.

        Raises:
          SetupError: there are more than 262,144, before the constraint.
        """
        if self._unconstrained > _LISTED:
            raise SetupError(
                f"the space has {self._unconstrained:,} configurations before its constraint; at "
                f"most {_LISTED:,} are listed. Sample it, or leave out the constraint to count."
            )
        rows: list[tuple[int, ...]] = [()]
        for gene, parent in enumerate(self.parents):
            every = range(self._counts[gene])
            # The parent's 0 may stand for "inactive": then so is this one.
            rows = [(*r, v) for r in rows for v in (every if self.holds(r, parent) else (0,))]
        genes = jnp.array(rows, jnp.int32)
        return np.asarray(genes[self.valid(genes)])

    def holds(self, row: tuple[int, ...], parent: tuple[int, frozenset[int]] | None) -> bool:
        """Whether a gene with this entry of `parents` is active, from the genes before it."""
        return parent is None or (
            row[parent[0]] in parent[1] and self.holds(row, self.parents[parent[0]])
        )

    def encode(self, config: Mapping[str, Any]) -> np.ndarray:
        """The vector of a configuration: int32 [genes].

        Raises:
          SetupError: a name or value is unknown or missing, or the constraint refuses it.
        """
        flat = _flat("", config)
        row: list[int] = []
        for name, values, parent in zip(self.names, self.values, self.parents, strict=True):
            here = self.holds(tuple(row), parent)
            if here != (name in flat):
                raise SetupError(f"{name} {'is missing' if here else 'is inactive'} in {config}.")
            value = flat.pop(name, None)
            if here and value not in values:
                raise SetupError(f"{name} = {value!r} is not one of {values}.")
            row.append(values.index(value) if here else 0)
        if flat:
            raise SetupError(f"{sorted(flat)} are no dimensions; those are {self.names}.")
        genes = np.array(row, np.int32)
        if not bool(self.valid(jnp.asarray(genes))):
            raise SetupError(f"the constraint refuses {config}.")
        return genes

    def decode(self, genes: Any) -> dict[str, Any]:
        """The configuration of one vector: inactive dimensions are left out.

        Raises:
          SetupError: the vector is no configuration.
        """
        genes = np.asarray(genes)
        if genes.shape != (len(self.names),) or not bool(self.valid(jnp.asarray(genes))):
            raise SetupError(f"{genes.tolist()} is no configuration of {self}.")
        config: dict[str, Any] = {}
        for i, name in enumerate(self.names):
            if self.holds(tuple(genes.tolist()), self.parents[i]):
                _put(config, name.split("."), self.values[i][int(genes[i])])
        return config

    def to_json(self) -> str:
        """The space as text that `from_json` reads; a constraint is a program, and left out."""
        return json.dumps({name: to_plain(d) for name, d in self.dimensions.items()})

    @classmethod
    def from_json(cls, text: str, constraint: Callable[[Array], Array] | None = None) -> "Space":
        """The space that `to_json` wrote."""
        return cls({n: from_plain(d) for n, d in json.loads(text).items()}, constraint)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any dimension, name or value, or their order."""
        text = self.to_json() + ("" if self.constraint is None else " constrained")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        lines = [f"Space of {self._unconstrained:,} configurations"]
        for name, values, parent in zip(self.names, self.values, self.parents, strict=True):
            shown = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
            when = ""
            if parent is not None:
                on = [self.values[parent[0]][v] for v in sorted(parent[1])]
                when = f" if {self.names[parent[0]]} in {on}"
            lines.append(f"  {name}: {shown} ({len(values)}){when}")
        return "\n".join(lines)


def _flat(prefix: str, config: Any) -> dict[str, Any]:
    pairs = enumerate(config) if isinstance(config, list) else config.items()
    found: dict[str, Any] = {}
    for name, value in pairs:
        if isinstance(value, list | dict):
            found |= _flat(f"{prefix}{name}.", value)
        else:
            found[f"{prefix}{name}"] = value
    return found


def _put(config: Any, parts: list[str], value: Any) -> None:
    """Sets a nested entry; a number among the parts is a place in a list."""
    for part, following in itertools.pairwise(parts):
        if isinstance(config, list):
            while len(config) <= int(part):
                config.append({})
            config = config[int(part)]
        else:
            config = config.setdefault(part, [] if following.isdigit() else {})
    config[parts[-1]] = value
