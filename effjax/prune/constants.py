"""Which terms of a model's products are zero whatever the input.

The program is evaluated on values of which only some entries are known: those that depend on the
weights alone. An entry of a product is known if every term of it with an unknown factor has a zero
for the other. So a channel whose kernel, scale and bias are zero is known to be zero after
BatchNorm and ReLU, and one that is constant is known to be constant.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax import jaxprs
from effjax.prune.channels import Axis
from effjax.prune.dependencies import Dependencies, Product, entered
from effjax.prune.layout import ELEMENTWISE, REDUCTIONS, WINDOWS

_MOVES = "broadcast_in_dim concatenate pad reshape rev slice squeeze transpose"
MOVES = frozenset(_MOVES.split())


class Part(NamedTuple):
    """An array of which some entries are unknown: there the value is 0.

    value: the array; None for one that nothing is known of and nothing asked (a random key).
    unknown: bool, of the same shape; None where all is known.
    """

    value: Any
    unknown: Array | None = None

    @property
    def mask(self) -> Array:
        """Where it is unknown."""
        return jnp.zeros(jnp.shape(self.value), bool) if self.unknown is None else self.unknown

    @property
    def nonzero(self) -> Array:
        """Where it may be other than 0."""
        return jnp.asarray(self.value != 0) | self.mask


def terms(deps: Dependencies) -> Callable[[Sequence[Array], Array], list[Array]]:
    """A function that says which terms of the model's products may be other than 0.

    Returns:
      A jitted function of the leaves of params and model_state, and of which units are removed,
      bool [units + 1] (the last one is False). For each product that is followed it gives a bool
      array over the axes that are summed over, in the order of `summed`; for a convolution over
      the input features of one group. Terms in entries that are removed don't count.
    """
    labels = [_resolved(deps, product) for product in deps.products]

    def run(values: Sequence[Array], removed: Array) -> list[Array]:
        flag = ~removed[-1]  # True, but not for the compiler, which would fold masks for minutes
        walker = _Evaluation(deps, labels, removed, flag)
        unknown = [walker.unknown(v) for v in deps.closed.jaxpr.invars[len(values) :]]
        consts = [Part(c) for c in deps.closed.consts]
        walker.run(deps.closed.jaxpr, consts, [*(Part(v) for v in values), *unknown])
        return walker.found

    return jax.jit(run)


def _resolved(deps: Dependencies, product: Product | None) -> list[list[Axis]]:
    if product is None:
        return []
    return [[deps.units.resolved(axis) for axis in axes] for axes in product.axes]


class _Evaluation:
    def __init__(self, deps: Dependencies, labels: list, removed: Array, flag: Array):
        self.products, self.labels = deps.products, labels
        self.removed, self.flag = removed, flag
        self.met = 0  # dots and convolutions so far
        self.found: list[Array] = []

    def unknown(self, atom: Any) -> Part:
        shape, dtype = atom.aval.shape, atom.aval.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return Part(None)
        return Part(jnp.zeros(shape, dtype), jnp.broadcast_to(self.flag, shape))

    def run(
        self, jaxpr: jaxprs.Jaxpr, consts: Sequence[Part], inputs: Sequence[Part]
    ) -> list[Part]:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Part:
            return Part(jnp.asarray(atom.val)) if jaxprs.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.step(jaxpr, eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, jaxpr: jaxprs.Jaxpr, eqn: jaxprs.Eqn, parts: list[Part]) -> list[Part]:
        if (body := entered(eqn)) is not None:
            return self.run(body.jaxpr, [Part(c) for c in body.consts], parts)
        name = eqn.primitive.name
        opaque = any(part.value is None for part in parts)
        known = not opaque and all(part.unknown is None for part in parts)
        product = self.product(eqn, parts)
        if known:
            pairs = zip(eqn.invars, parts, strict=True)
            env = {v: part.value for v, part in pairs if not jaxprs.is_literal(v)}
            jaxprs.rerun(jaxpr, [eqn], eqn.outvars, env)
            return [Part(env[v]) for v in eqn.outvars]
        if opaque or (len(eqn.outvars) != 1 and name != "split"):
            return [self.unknown(v) for v in eqn.outvars]
        if name == "split":
            sizes, axis = [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
            values, masks = (lax.split(x, sizes, axis) for x in (parts[0].value, parts[0].mask))
            return [Part(v, m) for v, m in zip(values, masks, strict=True)]
        run = jaxprs.operation(jaxpr, eqn)
        mask = self.spread(eqn, parts, run, product)
        if mask is None:
            return [self.unknown(v) for v in eqn.outvars]
        if name == jaxprs.GATHER and parts[1].unknown is not None:
            value = jnp.zeros(mask.shape, _aval(eqn).dtype)
        else:
            value = run(*(part.value for part in parts))
        return [Part(jnp.where(mask, jnp.zeros((), value.dtype), value), mask)]

    def spread(
        self, eqn: jaxprs.Eqn, parts: list[Part], run: Callable[..., Array], product: bool
    ) -> Array | None:
        """Where the result of an operation with one is unknown; None for all of it."""
        name, p, first = eqn.primitive.name, eqn.params, parts[0]
        if name == "mul":
            a, b = parts
            return (a.mask & b.nonzero) | (b.mask & a.nonzero)
        if name in ELEMENTWISE:
            shape = _aval(eqn).shape
            mask = jnp.zeros(shape, bool)
            for part in parts:
                mask = mask | part.mask
            return mask
        if name in MOVES:
            return run(*(part.mask for part in parts))
        if name in REDUCTIONS:
            return jnp.any(first.mask, axis=tuple(p["axes"]))
        if name in WINDOWS and len(parts) == 1:
            zero = jnp.float32(0)
            window = p["window_dimensions"], p["window_strides"], p["padding"]
            dilations = p["base_dilation"], p["window_dilation"]
            mask = lax.reduce_window(
                first.mask.astype(jnp.float32), zero, lax.max, *window, *dilations
            )
            return mask > 0
        if product:
            a, b = parts

            def count(x: Array, y: Array) -> Array:
                ones = (x.astype(jnp.float32), y.astype(jnp.float32))
                return run(*ones, preferred_element_type=jnp.float32) > 0

            mask = jnp.zeros(_aval(eqn).shape, bool)
            if a.unknown is not None:
                mask = mask | count(a.mask, b.nonzero)
            if b.unknown is not None:
                mask = mask | count(a.nonzero, b.mask)
            return mask
        if name == jaxprs.GATHER:
            return self.lookup(eqn, parts, run)
        return None

    def lookup(self, eqn: jaxprs.Eqn, parts: list[Part], run: Callable) -> Array | None:
        table, indices = parts
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if indices.unknown is None:  # entries out of range are filled, perhaps with NaN
            return ~(run(table.mask.astype(jnp.float32), indices.value) == 0)
        dropped = tuple(numbers.collapsed_slice_dims)
        whole = all(
            n == size or i in dropped
            for i, (n, size) in enumerate(zip(table.value.shape, sizes, strict=True))
        )
        if not whole or numbers.operand_batching_dims:
            return None
        some = jnp.any(table.nonzero, axis=dropped)  # a column of zeros gives zeros
        shape = _aval(eqn).shape
        return lax.broadcast_in_dim(some, shape, tuple(numbers.offset_dims))

    def product(self, eqn: jaxprs.Eqn, parts: list[Part]) -> bool:
        """Whether an equation is a dot or convolution; notes its terms if it is followed."""
        name = eqn.primitive.name
        if name not in (jaxprs.DOT, jaxprs.CONV):
            return False
        product = self.products[self.met]
        if product is not None:
            self.found.append(self.terms(product, self.labels[self.met], parts))
        self.met += 1
        return True

    def terms(self, product: Product, labels: list[list[Axis]], parts: list[Part]) -> Array:
        pairs = product.summed
        sides = []
        for side in (0, 1):
            own = [pair[side] for pair in pairs]
            if product.conv and side == 1:
                own = [product.features[1], product.features[2]]
            sides.append(self.some(parts[side], labels[side], own, product.conv and side == 1))
        if not product.conv:
            return sides[0] & sides[1]
        features = sides[0].reshape(product.groups, -1)
        kernel = sides[1].reshape(sides[1].shape[0], product.groups, -1).any(axis=2).T
        return (features & kernel).any(axis=0)

    def some(self, part: Part, labels: list[Axis], own: list[int], outs: bool) -> Array:
        """Whether any kept entry may be other than 0, by the axes in `own`, in that order."""
        nonzero = part.nonzero
        for i, axis in enumerate(labels):
            if i not in own or (outs and i == own[1]):
                keep = ~self.removed[axis].any(axis=1)
                shape = [-1 if j == i else 1 for j in range(nonzero.ndim)]
                nonzero = nonzero & keep.reshape(shape)
        others = tuple(i for i in range(nonzero.ndim) if i not in own)
        found = jnp.any(nonzero, axis=others)
        return jnp.transpose(found, [sorted(own).index(i) for i in own])


def _aval(eqn: jaxprs.Eqn) -> Any:
    return eqn.outvars[0].aval
