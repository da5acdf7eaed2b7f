"""Sites: where weights meet data.

A model is traced to a jaxpr, and the taint analysis tells which values are weights (computed from
params leaves and not from data) and which are data. A **site** is a `dot_general`
or a `conv_general_dilated` with a weight on one side and data on the other, or a `gather` from a
weight at data's indices. It is named by the params path of its weight; a weight mixed from several
leaves (a mask, weight norm, a low-rank update) takes the name of the largest.

No list of layout operations and no patching is needed, and it does not matter which library wrote
the model. What quantization, integer execution, costs and tables need to know of a model is here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax import jaxprs, operations
from effjax.core import Apply, PyTree, abstract_key
from effjax.errors import SiteError
from effjax.select import leaves
from effjax.taint import DATA, NEUTRAL, Flow, Taint, follow, leave


class Site(NamedTuple):
    """One operation in which a weight meets data, or, in a product of activations, data meets data.

    path: the params path of the weight; where the same leaf is met again, "path#1", "path#2", in
      the order of execution. Products of activations are named "@" and their name scope. The
      branches of a `cond` share names.
    leaf: the params path without "#1"; "" for a product of activations.
    op: "dot_general", "conv_general_dilated" or "gather".
    weight: which operand is the weight, 0 or 1; None in a product of activations.
    shapes: of the two operands (for a gather, the table and the indices) and of the output.
    macs: multiply-accumulates of one forward pass over the example batch, padding included and the
      zeros that a transposed convolution inserts left out. Scans count all their iterations, a
      `while` loop one, a `shard_map` all its shards.
    dtypes: of the two operands and of the output, as names ("float32").
    groups: feature groups of a convolution, 1 elsewhere.
    leaves: all params leaves that the weight is computed from.
    contracting: for each operand the axes that are summed over.
    channels: for each operand the axes whose entries may have a scale of their own: the rows or
      columns of a matrix, the output features of a kernel, the rows of a table.
    stack: lengths of the scans that slice the weight (layers), outermost first; what is kept for
      the site has these leading axes.
    scope: jax's name scope at the operation.
    rule: the function with a custom derivative (or batching) rule that the site lies in, or "".
    """

    path: str
    leaf: str
    op: str
    weight: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str, str]
    macs: int
    groups: int
    leaves: tuple[str, ...]
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    channels: tuple[tuple[int, ...], tuple[int, ...]]
    stack: tuple[int, ...]
    scope: str
    rule: str

    @property
    def lhs(self) -> tuple[int, ...]:
        """Shape of the first operand."""
        return self.shapes[0]

    @property
    def rhs(self) -> tuple[int, ...]:
        """Shape of the second operand."""
        return self.shapes[1]

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the output."""
        return self.shapes[2]

    @property
    def scales(self) -> int:
        """How many scales the weight has with one for each channel, over all stacked layers."""
        if self.weight is None:
            return 0
        shape = self.shapes[self.weight]
        return math.prod(self.stack) * math.prod(shape[axis] for axis in self.channels[self.weight])


def find_sites(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    *,
    activations: bool = False,
    train: bool = False,
) -> tuple[Site, ...]:
    """The sites of a model, in the order of execution.

    Args:
      apply: `(params, model_state, batch, key, train) -> (outputs, model_state)`; see `from_linen`.
      params: arrays or ShapeDtypeStructs, as everything here.
      model_state: what Flax mutates; neither weight nor data.
      batch: the data.
      activations: also list the products of data with data (attention's).
      train: trace the model as in training.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"] + params["bias"], model_state
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> [site] = ej.find_sites(apply, params, {}, {"x": jnp.ones((8, 4))})
      >>> site.path, site.op, site.macs
      ('kernel', 'dot_general', 64)
    """
    found = analyze_model(apply, params, model_state, batch, train=train).sites
    return tuple(site for site in found if activations or site.weight is not None)


class Step(NamedTuple):
    """What an evaluation must know of one equation: its site, or the plans of its functions."""

    site: Site | None = None
    stacked: frozenset[int] = frozenset()  # depths of the scans whose layers the site is one of
    inner: tuple["Plan", ...] = ()


class Plan(NamedTuple):
    """One step for each equation of a jaxpr.

    A plan follows the execution, not the jaxpr: `jit` shares the jaxpr of a function that is called
    twice, and the two calls have plans of their own.
    """

    steps: tuple[Step, ...]

    def sites(self) -> Iterator[Site]:
        """All sites in the order of execution."""
        return (step.site for step in self.all() if step.site is not None)

    def all(self) -> Iterator[Step]:
        """The steps that are sites, in the order of execution."""
        for step in self.steps:
            if step.site is not None:
                yield step
            for plan in step.inner:
                yield from plan.all()


class Analysis(NamedTuple):
    """The plan of a traced model, and what became of each params leaf."""

    plan: Plan
    met: Mapping[str, set[str]]  # {params path: primitives other than sites where it met data}

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order of execution; branches that share a name give one."""
        return tuple({site.path: site for site in self.plan.sites()}.values())


def analyze_model(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree, *, train: bool
) -> Analysis:
    """Traces a model and analyzes it."""

    def traced(params: PyTree, model_state: PyTree, batch: PyTree, key: Any) -> Any:
        return apply(params, model_state, batch, key, train)

    closed = jax.make_jaxpr(traced)(params, model_state, batch, abstract_key())
    return analyze(closed.jaxpr, params, model_state, batch)


def analyze(jaxpr: jaxprs.Jaxpr, params: PyTree, model_state: PyTree, batch: PyTree) -> Analysis:
    """The plan of a jaxpr whose inputs are the leaves of (params, model_state, batch, key)."""
    walker = _Walker(leaves(params))
    inputs = [Taint(leaves=frozenset([i])) for i in range(len(walker.names))]
    inputs += [NEUTRAL] * len(jax.tree.leaves(model_state))
    inputs += [DATA] * len(jax.tree.leaves(batch))
    inputs += [NEUTRAL] * (len(jaxpr.invars) - len(inputs))
    plan, _ = walker.plan(jaxpr, inputs, _Where())
    return Analysis(plan, walker.met)


class _Where(NamedTuple):
    """Where in the program a jaxpr stands."""

    scans: tuple[tuple[int, bool], ...] = ()  # (length, does it slice weights), outermost first
    repeats: int = 1
    scope: str = ""
    rule: str = ""

    def named(self, eqn: jaxprs.Eqn) -> str:
        """The name scope of an equation."""
        return "/".join(part for part in (self.scope, str(eqn.source_info.name_stack)) if part)

    def inside(self, eqn: jaxprs.Eqn, inputs: Sequence[Taint]) -> "_Where":
        """Where a function inside an equation stands."""
        found = jaxprs.parts(eqn)
        inner = self._replace(scope=self.named(eqn))
        if isinstance(found, jaxprs.Ruled):
            return inner._replace(rule=self.rule or found.what)
        if isinstance(found, jaxprs.ShardMap):
            return inner._replace(repeats=self.repeats * found.shards)
        if isinstance(found, jaxprs.Scan):
            layers = any(len(self.scans) in t.stacked for t in inputs)
            scans = (*self.scans, (found.length, layers))
            return inner._replace(scans=scans, repeats=self.repeats * found.length)
        return inner


class _Walker:
    """Follows a program once in the order of execution, and names its sites."""

    def __init__(self, named: Mapping[str, Any]):
        self.names = tuple(named)
        self.sizes = [int(np.prod(np.shape(leaf))) for leaf in named.values()]
        self.flow = Flow()
        self.uses: dict[str, int] = {}  # how often each name was met
        self.met: dict[str, set[str]] = {name: set() for name in named}

    def plan(
        self, jaxpr: jaxprs.Jaxpr, inputs: Sequence[Taint], where: _Where
    ) -> tuple[Plan, list[Taint]]:
        """The plan of a jaxpr, and the taints of its outputs."""
        depth = len(where.scans)
        steps: list[Step] = []

        def step(eqn: jaxprs.Eqn, taints: list[Taint]) -> list[Taint]:
            site, stacked = self.site(eqn, taints, where)
            plans, outs = [], []
            exclusive = isinstance(jaxprs.parts(eqn), jaxprs.Cond)
            before, after = dict(self.uses), dict(self.uses)
            for body, body_taints, _ in self.flow.enter(eqn, taints, depth):
                if exclusive:  # one branch runs, so branches share names
                    self.uses = dict(before)
                inner, found = self.plan(body.jaxpr, body_taints, where.inside(eqn, body_taints))
                plans.append(inner)
                outs.append(found)
                after = {n: max(uses, after.get(n, 0)) for n, uses in (after | self.uses).items()}
            self.uses = after
            steps.append(Step(site, stacked, tuple(plans)))
            return leave(eqn, taints, outs, depth)

        outputs = follow(jaxpr, inputs, step)
        return Plan(tuple(steps)), outputs

    def site(
        self, eqn: jaxprs.Eqn, taints: list[Taint], where: _Where
    ) -> tuple[Site | None, frozenset[int]]:
        """The site that an equation is, if it is one, and the depths of the scans that slice it."""
        op = eqn.primitive.name
        weight = _weight_operand(op, taints)
        if weight is not None:
            indices = taints[weight].leaves
            stacked = taints[weight].stacked
            leaf = self.names[max(indices, key=lambda i: (self.sizes[i], -i))]
            name = leaf
        elif op in (jaxprs.DOT, jaxprs.CONV) and all(t.data for t in taints):
            indices = frozenset()
            stacked = frozenset(d for d, (_, layers) in enumerate(where.scans) if layers)
            leaf, name = "", "@" + (where.named(eqn) or op)
        else:
            if any(t.data for t in taints) and jaxprs.parts(eqn) is None:
                for i in frozenset().union(*(t.leaves for t in taints)):
                    self.met[self.names[i]].add(op)
            return None, frozenset()
        uses = self.uses.get(name, 0)
        self.uses[name] = uses + 1
        contracting, channels = operations.axes(eqn)
        site = Site(
            path=f"{name}#{uses}" if uses else name,
            leaf=leaf,
            op=op,
            weight=weight,
            shapes=operations.shapes(eqn),
            dtypes=operations.dtypes(eqn),
            macs=operations.macs(eqn) * where.repeats,
            groups=operations.groups(eqn),
            leaves=tuple(self.names[i] for i in sorted(indices)),
            contracting=contracting,
            channels=channels,
            stack=tuple(where.scans[d][0] for d in sorted(stacked)),
            scope=where.named(eqn),
            rule=where.rule,
        )
        return site, stacked


def _weight_operand(op: str, taints: list[Taint]) -> int | None:
    sides = {jaxprs.DOT: (0, 1), jaxprs.CONV: (0, 1), jaxprs.GATHER: (0,)}.get(op, ())
    return next((i for i in sides if taints[i].leaves and taints[1 - i].data), None)


def check_ruled(site: Site) -> None:
    """Raises if a site lies in a function whose own rule would not see what is done to it."""
    if site.rule:
        raise SiteError(
            f"{site.path} meets data ({site.op}) inside the {site.rule}. Its own rule would not "
            "see what is done there, so that forward and backward pass would disagree. Leave it "
            f"out with a selector that does not match {site.leaf or site.path!r}, or write the "
            "multiplication outside that function."
        )


def check_reached(
    found: Sequence[Site], wanted: Mapping[str, Any], met: Mapping[str, set[str]]
) -> None:
    """Raises unless each wanted params leaf takes part in one of the sites.

    A leaf that no site reaches would train untouched, and nobody would see it.

    Args:
      found: the sites that will be transformed.
      wanted: params leaves by path.
      met: see `Analysis`.
    """
    reached = {leaf for site in found for leaf in site.leaves}
    if missed := [path for path in wanted if path not in reached]:
        ends = [", ".join(sorted(met[path])) or "nothing" for path in missed]
        raise SiteError(
            "these weights are selected, but no dot_general or conv_general_dilated (nor, with "
            "embeddings, a gather) multiplies them with data: "
            + "; ".join(
                f"{path} (met data in: {end})" for path, end in zip(missed, ends, strict=True)
            )
            + ". They would silently train as they are. Likely causes: the leaf is no matrix (let "
            "`select` match kernels only); a mask that multiplies it comes with the batch (pass it "
            "with the params or the model_state); the inputs are closed over instead of passed in "
            "the batch; or the operation is another one. "
            f"The sites found are {[site.path for site in found]}."
        )
