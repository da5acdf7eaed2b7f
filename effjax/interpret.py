"""Evaluation of a model with the operation at its sites exchanged.

`intercept` traces a function, finds its sites, and runs it again equation by equation; where a
handler was chosen for a site, the handler's result stands for the operation's. Nothing else
changes: what no handler asks for is rerun as it is, bit for bit.

    def handler(op: Operation):
        x, kernel = op.operands
        return op.run(x, jnp.round(kernel)), jnp.max(jnp.abs(x))

    outputs, measured = intercept(forward, lambda site: handler)(params, model_state, batch, key)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from effjax import jaxprs
from effjax.core import PyTree
from effjax.errors import SiteError
from effjax.sites import Analysis, Plan, Site, Step, analyze, check_ruled


class Operation(NamedTuple):
    """The operation at a site, as a handler meets it.

    site: which one.
    operands: its arrays; `operands[site.weight]` is the weight. (A gather's second are indices.)
    run: `run(*operands, **changed) -> Array`, the operation at these or other operands. Keywords
      replace parameters of the primitive: `run(a8, b8, preferred_element_type=jnp.int32)`.
    given: this site's entry of what the caller passed, the layer's own slice inside a scan; None
      where there is no entry.
    shared: what the caller passed for all sites.
    axes: manual mesh axes around it, inside `shard_map`; operands are then one shard.
    """

    site: Site
    operands: tuple[Array, ...]
    run: Callable[..., Array]
    given: PyTree
    shared: PyTree
    axes: tuple[str, ...]


# What stands for the operation (same shape and dtype), and what was measured: a tree of arrays.
Handler = Callable[[Operation], tuple[Array, PyTree]]
Measured = dict[str, PyTree]
Check = Callable[[Analysis], None]


def intercept(
    forward: Callable[..., PyTree],
    choose: Callable[[Site], Handler | None],
    *,
    given: Mapping[str, PyTree] | None = None,
    shared: PyTree = None,
    merge: Callable[[Array, Array], Array] = jnp.maximum,
    check: Check | None = None,
) -> Callable[[PyTree, PyTree, PyTree, Array], tuple[PyTree, Measured]]:
    """A function evaluated with handlers at its sites.

    Args:
      forward: `(params, model_state, batch, key) -> outputs`, any tree of arrays. It may close over
        traced arrays; these are neither weights nor data.
      choose: the handler of a site, or None to leave it alone.
      given: what handlers may read, by site path; where a site is one of a scan's layers, every
        array has the leading axes `site.stack`.
      shared: what all handlers may read. Arrays that a handler needs belong here rather than in its
        closure: a `shard_map` over explicit mesh axes takes no arrays that are closed over.
      merge: joins two measurements of one site where a loop or several shards give more than one,
        elementwise; zeros must be its unit. `jnp.maximum` suits ranges, `jnp.add` sums.
      check: called with the analysis, to raise what is wrong with it.

    Returns:
      `(params, model_state, batch, key) -> (outputs, measured)`, where `measured` holds what each
      handler measured by site path, layers stacked along the leading axes `site.stack`.

    Raises:
      SiteError: a chosen site lies in a function with a rule of its own (`custom_jvp`,
        `custom_vjp`), which would not see the change; or a handler returned another shape or dtype.
    """

    def evaluate(
        params: PyTree, model_state: PyTree, batch: PyTree, key: Array
    ) -> tuple[PyTree, Measured]:
        args = (params, model_state, batch, key)
        closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*args)
        analysis = analyze(closed.jaxpr, params, model_state, batch)
        if check is not None:
            check(analysis)
        run = _Run(choose, given or {}, shared, merge)
        body = jaxprs.Body(closed.jaxpr, closed.consts)
        outputs, measured = run.body(body, jax.tree.leaves(args), analysis.plan, _Place())
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs), measured

    return evaluate


class _Place(NamedTuple):
    """Where an evaluation stands: how many scans deep, and inside which manual mesh axes."""

    depth: int = 0
    axes: tuple[str, ...] = ()


class _Run(NamedTuple):
    """One evaluation."""

    choose: Callable[[Site], Handler | None]
    given: Mapping[str, PyTree]
    shared: PyTree
    merge: Callable[[Array, Array], Array]

    def body(
        self, body: jaxprs.Body, args: Sequence[Any], plan: Plan, place: _Place
    ) -> tuple[list[Any], Measured]:
        """The outputs of a jaxpr, and what was measured in it."""
        jaxpr = body.jaxpr
        env = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        last = jaxprs.last_uses(jaxpr)
        measured: Measured = {}
        untouched: list[jaxprs.Eqn] = []

        def read(atom: Any) -> Any:
            return atom.val if jaxprs.is_literal(atom) else env[atom]

        def catch_up(index: int) -> None:
            wanted = [v for e in untouched for v in e.outvars if last.get(v, -1) >= index]
            if wanted or any(e.effects for e in untouched):
                jaxprs.rerun(jaxpr, untouched, wanted, env)
            untouched.clear()

        for index, (eqn, step) in enumerate(zip(jaxpr.eqns, plan.steps, strict=True)):
            if not self.chosen([step]):
                untouched.append(eqn)
                continue
            catch_up(index)
            operands = [read(v) for v in eqn.invars]
            outs: Sequence[Any]
            if step.site is not None:
                outs, found = self.site(jaxpr, eqn, operands, step.site, place)
            else:
                outs, found = self.enter(eqn, operands, step, place)
            env.update(zip(eqn.outvars, outs, strict=True))
            measured.update(found)
        catch_up(len(jaxpr.eqns))
        return [read(v) for v in jaxpr.outvars], measured

    def chosen(self, steps: Iterable[Step]) -> list[Step]:
        """The sites at or inside these steps that have a handler."""
        found = [s for step in steps for s in Plan((step,)).all()]
        return [s for s in found if s.site is not None and self.choose(s.site) is not None]

    def site(
        self, jaxpr: jaxprs.Jaxpr, eqn: jaxprs.Eqn, operands: list[Any], site: Site, place: _Place
    ) -> tuple[list[Any], Measured]:
        handler = self.choose(site)
        assert handler is not None  # `chosen` asked
        check_ruled(site)
        run = jaxprs.operation(jaxpr, eqn)
        given = self.given.get(site.path)
        out, measured = handler(
            Operation(site, tuple(operands), run, given, self.shared, place.axes)
        )
        aval: Any = eqn.outvars[0].aval
        if (out.shape, out.dtype) != (aval.shape, aval.dtype):
            raise SiteError(
                f"the handler of {site.path} returned {out.dtype}{list(out.shape)} for a "
                f"{site.op} that gives {aval.dtype}{list(aval.shape)}. Cast and shape its result "
                "like the operation's."
            )
        return [out], {site.path: measured}

    def enter(
        self, eqn: jaxprs.Eqn, operands: list[Any], step: Step, place: _Place
    ) -> tuple[Sequence[Any], Measured]:
        """Rebuilds an equation that holds chosen sites with jax's public function for it."""
        found = jaxprs.parts(eqn)
        if isinstance(found, jaxprs.Call):
            args = _constrain(operands, found.in_shardings)
            results, measured = self.body(found.body, args, step.inner[0], place)
            return _constrain(results, found.out_shardings), measured
        if isinstance(found, jaxprs.Ruled):
            return self.body(found.body, operands, step.inner[0], place)  # raises at the site
        if isinstance(found, jaxprs.Remat):

            def recomputed(*xs: Any) -> tuple[list[Any], Measured]:
                return self.body(found.body, xs, step.inner[0], place)

            return jax.checkpoint(recomputed, **found.options)(*operands)
        if isinstance(found, jaxprs.Scan):
            return self.scan(found, operands, step.inner[0], place)
        if isinstance(found, jaxprs.While):
            return self.loop(found, operands, step.inner, place)
        if isinstance(found, jaxprs.Cond):
            return self.switch(found, operands, step.inner, place)
        assert isinstance(found, jaxprs.ShardMap)
        return self.shards(found, operands, step.inner[0], place)

    def scan(
        self, scan: jaxprs.Scan, operands: list[Any], plan: Plan, place: _Place
    ) -> tuple[Sequence[Any], Measured]:
        """Layers' measurements are stacked, those of steps in time merged."""
        last = scan.consts + scan.carry
        consts, carry, xs = operands[: scan.consts], operands[scan.consts : last], operands[last:]
        steps = self.chosen(plan.steps)
        layers = {s.site.path for s in steps if s.site is not None and place.depth in s.stacked}
        sliced = {path: self.given[path] for path in layers if path in self.given}

        def iteration(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
            xs, own = slices
            run = self._replace(given={**self.given, **own})
            inner = place._replace(depth=place.depth + 1)
            outs, measured = run.body(scan.body, [*consts, *carry, *xs], plan, inner)
            return outs[: scan.carry], (outs[scan.carry :], measured)

        last_carry, (ys, measured) = lax.scan(
            iteration, carry, (xs, sliced), length=scan.length, **scan.options
        )
        merged = {
            path: tree if path in layers else self.fold(tree) for path, tree in measured.items()
        }
        return [*last_carry, *ys], merged

    def loop(
        self, loop: jaxprs.While, operands: list[Any], plans: Sequence[Plan], place: _Place
    ) -> tuple[Sequence[Any], Measured]:
        first, last = loop.condition_consts, loop.condition_consts + loop.body_consts
        consts = operands[:first], operands[first:last]
        bodies = loop.condition, loop.body

        def call(which: int, carry: Sequence[Any]) -> tuple[list[Any], Measured]:
            return self.body(bodies[which], [*consts[which], *carry], plans[which], place)

        carry = operands[last:]
        shapes = jax.eval_shape(lambda carry: call(1, carry)[1], carry)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def iteration(state: Any) -> Any:
            carry, measured = state
            outs, found = call(1, carry)
            return outs, jax.tree.map(self.merge, measured, found)

        # What the condition measures is not kept: it runs outside the loop's state.
        return lax.while_loop(lambda state: call(0, state[0])[0][0], iteration, (carry, zeros))

    def switch(
        self, cond: jaxprs.Cond, operands: list[Any], plans: Sequence[Plan], place: _Place
    ) -> tuple[Sequence[Any], Measured]:
        """A site in a branch that does not run measures zeros."""
        index, *rest = operands

        def call(which: int, xs: Sequence[Any]) -> tuple[list[Any], Measured]:
            return self.body(cond.branches[which], xs, plans[which], place)

        shapes: Measured = {}
        for which in range(len(cond.branches)):
            shapes |= jax.eval_shape(lambda *xs, which=which: call(which, xs)[1], *rest)

        def branch(which: int) -> Callable[..., Any]:
            def run(*xs: Any) -> tuple[list[Any], Measured]:
                outs, measured = call(which, xs)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                return outs, zeros | measured

            return run

        return lax.switch(index, [branch(which) for which in range(len(cond.branches))], *rest)

    def shards(
        self, shard_map: jaxprs.ShardMap, operands: list[Any], plan: Plan, place: _Place
    ) -> tuple[Sequence[Any], Measured]:
        """The measurements of all shards are merged."""
        axes = tuple(sorted(shard_map.axes))
        inner = place._replace(axes=(*place.axes, *axes))

        chosen = [s.site.path for s in self.chosen(plan.steps) if s.site is not None]
        own = {path: self.given[path] for path in chosen if path in self.given}

        def everywhere(x: Array) -> Array:
            # A sum of one-hot rows rather than an all-gather, whose result jax takes to vary.
            x = jnp.asarray(x)
            rows = jnp.zeros((shard_map.shards, *x.shape), x.dtype)
            return lax.psum(rows.at[lax.axis_index(axes)].set(x), axes)

        def shard(passed: Any, *xs: Any) -> tuple[list[Any], Measured]:
            given, shared = passed
            run = self._replace(given=given, shared=shared)
            outs, measured = run.body(shard_map.body, xs, plan, inner)
            return outs, self.fold(jax.tree.map(everywhere, measured))

        return jax.shard_map(
            shard,
            in_specs=(PartitionSpec(), *shard_map.in_specs),
            out_specs=(list(shard_map.out_specs), PartitionSpec()),
            **shard_map.options,
        )((own, self.shared), *operands)

    def fold(self, tree: PyTree) -> PyTree:
        """Merges along the leading axis, in halves."""

        def merged(x: Array) -> Array:
            while len(x) > 1:
                half = len(x) // 2
                x = jnp.concatenate([self.merge(x[:half], x[half : 2 * half]), x[2 * half :]])
            return x[0]

        return jax.tree.map(merged, tree)


def _constrain(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    return [
        x if sharding is None else lax.with_sharding_constraint(x, sharding)
        for x, sharding in zip(values, shardings, strict=True)
    ]
