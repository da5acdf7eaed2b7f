"""What effjax knows of jaxprs: the names of primitives and of their parameters.

They change between versions of jax (`pjit` became `jit`), so they are spelled here and nowhere
else, and each has an identity test. Everything else works on what these functions return.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend import core

Jaxpr = core.Jaxpr
Eqn = core.JaxprEqn

DOT = "dot_general"
CONV = "conv_general_dilated"
GATHER = "gather"

# Primitives that call a function on their operands, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
_REMAT = {"remat2": "jaxpr", "checkpoint": "jaxpr"}
# The same, with a rule of their own (for derivatives, batching or lowering) that a rewritten body
# would escape.
_RULED = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
}


class Body(NamedTuple):
    """A function inside an equation."""

    jaxpr: Jaxpr
    consts: Sequence[Any] = ()


class Call(NamedTuple):
    """`jit` and its like: the body's operands are the equation's."""

    body: Body
    in_shardings: tuple[Any, ...]  # None where nothing was asked for
    out_shardings: tuple[Any, ...]


class Remat(NamedTuple):
    """`jax.checkpoint`."""

    body: Body
    options: dict[str, Any]  # keyword arguments of jax.checkpoint


class Ruled(NamedTuple):
    """A function with a custom rule, which must be left as it is."""

    body: Body
    what: str  # for an error message


class Scan(NamedTuple):
    """`jax.lax.scan`: operands are consts, carry, xs; outputs are carry, ys."""

    body: Body
    consts: int
    carry: int
    length: int
    options: dict[str, Any]


class While(NamedTuple):
    """`jax.lax.while_loop`: operands are the condition's consts, the body's consts, carry."""

    condition: Body
    condition_consts: int
    body: Body
    body_consts: int


class Cond(NamedTuple):
    """`jax.lax.cond` and `switch`: operands are an index, then each branch's operands."""

    branches: tuple[Body, ...]


class ShardMap(NamedTuple):
    """`jax.shard_map`: the body sees one shard."""

    body: Body
    axes: frozenset[str]  # mesh axes that become manual here
    shards: int
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    options: dict[str, Any]


def parts(eqn: Eqn) -> Call | Remat | Ruled | Scan | While | Cond | ShardMap | None:
    """The functions inside an equation, or None for an operation that has none known here."""
    name, p = eqn.primitive.name, eqn.params
    if name in _CALLS:
        unasked_in, unasked_out = (None,) * len(eqn.invars), (None,) * len(eqn.outvars)
        ins, outs = p.get("in_shardings", unasked_in), p.get("out_shardings", unasked_out)
        return Call(_body(p[_CALLS[name]]), _asked(ins), _asked(outs))
    if name in _REMAT:
        options = {key: p[key] for key in ("prevent_cse", "policy")}
        return Remat(_body(p[_REMAT[name]]), options)
    if name in _RULED:
        body = _body(p[_RULED[name]])
        source = body.jaxpr.debug_info.func_src_info
        return Ruled(body, f"{name.removesuffix('_call')} function {source}")
    if name == "scan":
        options = {key: p[key] for key in ("reverse", "unroll")}
        return Scan(_body(p["jaxpr"]), p["num_consts"], p["num_carry"], p["length"], options)
    if name == "while":
        condition, body = _body(p["cond_jaxpr"]), _body(p["body_jaxpr"])
        return While(condition, p["cond_nconsts"], body, p["body_nconsts"])
    if name == "cond":
        return Cond(tuple(_body(branch) for branch in p["branches"]))
    if name == "shard_map":
        mesh = p["mesh"]
        axes = frozenset(p.get("newly_manual_axes", p.get("manual_axes", ())))
        shards = 1
        for axis in axes:
            shards *= mesh.shape[axis]
        options = {"mesh": mesh, "axis_names": axes, "check_vma": p["check_vma"]}
        specs = tuple(p["in_specs"]), tuple(p["out_specs"])
        return ShardMap(_body(p["jaxpr"]), axes, shards, *specs, options)
    return None


def _body(found: Any) -> Body:
    if isinstance(found, core.ClosedJaxpr):
        return Body(found.jaxpr, found.consts)
    return Body(found)


def _asked(shardings: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in shardings)


def is_literal(atom: Any) -> bool:
    """Whether an operand is written into the equation (its value is `atom.val`)."""
    return isinstance(atom, core.Literal)


def shape(atom: Any) -> tuple[Any, ...]:
    """The shape of an operand or a result; symbolic where the program is."""
    return tuple(atom.aval.shape)


def last_uses(jaxpr: Jaxpr) -> dict[Any, int]:
    """Which equation reads each variable last; outputs are read one past the end."""
    last = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last.update({v: index for v in eqn.invars if not is_literal(v)})
    last.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not is_literal(v)})
    return last


def needed(jaxpr: Jaxpr) -> dict[Any, int]:
    """The variables that the outputs depend on, and how often each is read on the way to them."""
    reads: dict[Any, int] = {}

    def read(atoms: Sequence[Any]) -> None:
        for v in atoms:
            if not is_literal(v):
                reads[v] = reads.get(v, 0) + 1

    read(jaxpr.outvars)
    for eqn in reversed(jaxpr.eqns):
        if any(v in reads for v in eqn.outvars):
            read(eqn.invars)
    return reads


def rerun(jaxpr: Jaxpr, eqns: Sequence[Eqn], outputs: Sequence[Any], env: dict[Any, Any]) -> None:
    """Runs some of a jaxpr's equations as they are and puts their `outputs` into `env`.

    They go through jax's own evaluation of a jaxpr, which keeps custom rules, name stacks and
    contexts.
    """
    made = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(
        v for eqn in eqns for v in eqn.invars if not is_literal(v) and v not in made
    )
    piece = _piece(jaxpr, eqns, list(read), list(outputs))
    env.update(zip(outputs, piece(*(env[v] for v in read)), strict=True))


def operation(jaxpr: Jaxpr, eqn: Eqn) -> Callable[..., Array]:
    """One equation with one output as a function of its operands.

    Keywords replace the primitive's parameters, as in `run(a, b, preferred_element_type=int32)`.
    """
    run = applied(jaxpr, eqn)
    return lambda *operands, **changed: run(*operands, **changed)[0]


def applied(jaxpr: Jaxpr, eqn: Eqn) -> Callable[..., list[Any]]:
    """As `operation`, of an equation with any number of outputs: a list of them."""

    def run(*operands: Any, **changed: Any) -> list[Any]:
        params = {**eqn.params, **changed}
        fresh: list[Any] = [core.Var(v.aval) for v in eqn.invars]
        outs: list[Any] = [core.Var(v.aval) for v in eqn.outvars]
        one = eqn.replace(invars=fresh, outvars=outs, params=params)
        return _piece(jaxpr, [one], fresh, outs)(*operands)

    return run


def _piece(jaxpr: Jaxpr, eqns: Sequence[Eqn], invars: list[Any], outvars: list[Any]) -> Any:
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    piece = jaxpr.replace(
        constvars=[], invars=invars, outvars=outvars, eqns=list(eqns), effects=effects
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(piece, ()))
