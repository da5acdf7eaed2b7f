"""chain: what flows where, in which order, under which names, with which keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import STAGES, Transform

PARAMS = {"w": jnp.array([1.0, 2.0])}
BATCH = {"x": jnp.ones(2)}


def apply(params, model_state, batch, key, train):
    return params["w"] * batch["x"], model_state


MODEL = ej.Model(lambda key, batch: (PARAMS, {}), apply)


def ctx(frozen=None, key=0, train=True):
    return ej.Ctx(jnp.zeros((), jnp.int32), jax.random.key(key), frozen, train)


def affine(scale, shift):
    """Multiplies, then adds, in every place where a transform can act."""

    def move(tree):
        return jax.tree.map(lambda x: scale * x + shift, tree)

    def wrap(forward, extra, state, ctx):
        def moved(params, model_state, batch, key, train):
            outputs, model_state, aux = forward(move(params), model_state, batch, key, train)
            return move(outputs), model_state, {**aux, "shift": jnp.float32(shift)}

        return moved

    return Transform(
        init=lambda key, params, setup: ({"e": jnp.float32(scale)}, {"s": jnp.float32(shift)}),
        batch=lambda batch, state, ctx: move(batch),
        view=lambda params, extra, state, ctx: move(params),
        wrap=wrap,
        loss=lambda outputs, batch, aux, extra, state, ctx: {"sum": extra["e"] + aux["shift"]},
        update=lambda vars, opt, state, grads, aux, ctx: (
            ej.Vars(move(vars.model), {"e": vars.extra["e"] + grads.extra["e"]}),
            [*opt, scale],
            {"s": state["s"] + aux["shift"]},
        ),
        export=lambda params, extra, state: move(params),
        report=lambda vars, state, aux, ctx: {"s": state["s"], "e": vars.extra["e"]},
        describe=lambda params, extra, state: {"w": {f"scale{scale}": shift, "last": scale}},
    )


def setup(frozen=None):
    return ej.Setup(apply, {}, BATCH, frozen)


def plain(params, model_state, batch, key, train):
    return (*apply(params, model_state, batch, key, train), {})


def test_each_hook_flows_from_left_to_right():
    both = ej.chain(a=affine(2, 1), b=affine(10, 3))
    extra, state = both.init(jax.random.key(0), PARAMS, setup())
    assert extra == {"a": {"e": 2}, "b": {"e": 10}}
    assert state == {"a": {"s": 1}, "b": {"s": 3}}
    # 10 (2 x + 1) + 3 in every place but the wraps: there `a` is the outermost, so on the way in
    # its params are moved first, and on the way out its outputs last.
    assert both.batch(BATCH, state, ctx())["x"].tolist() == [33, 33]
    assert both.view(PARAMS, extra, state, ctx())["w"].tolist() == [33, 53]
    assert both.export(PARAMS, extra, state)["w"].tolist() == [33, 53]
    wrapped = both.wrap(plain, extra, state, ctx())
    outputs, _, aux = wrapped(PARAMS, {}, BATCH, jax.random.key(0), True)
    assert outputs.tolist() == [2 * (10 * 33 + 3) + 1, 2 * (10 * 53 + 3) + 1]
    assert aux == {"a": {"shift": 1}, "b": {"shift": 3}}
    losses = both.loss(outputs, BATCH, aux, extra, state, ctx())
    assert losses == {"a/sum": 3, "b/sum": 13}
    vars = ej.Vars(PARAMS, extra)
    grads = ej.Vars(PARAMS, {"a": {"e": 100}, "b": {"e": 200}})
    vars, opt, state = both.update(vars, [], state, grads, aux, ctx())
    assert vars.model["w"].tolist() == [33, 53]
    assert vars.extra == {"a": {"e": 102}, "b": {"e": 210}}
    assert opt == [2, 10]
    assert state == {"a": {"s": 2}, "b": {"s": 6}}
    report = both.report(vars, state, aux, ctx())
    assert report == {"a/s": 2, "a/e": 102, "b/s": 6, "b/e": 210}
    # Facts are joined; of equal ones the later member's counts.
    assert both.describe(PARAMS, extra, state) == {"w": {"scale2": 1, "scale10": 3, "last": 10}}


def test_the_empty_chain_is_the_identity():
    none = ej.chain()
    assert none.init(jax.random.key(0), PARAMS, setup()) == ({}, {})
    assert none.view(PARAMS, {}, {}, ctx()) is PARAMS
    assert none.batch(BATCH, {}, ctx()) is BATCH
    assert none.wrap(plain, {}, {}, ctx()) is plain
    assert none.loss(None, BATCH, {}, {}, {}, ctx()) == {}
    vars = ej.Vars(PARAMS, {})
    assert none.update(vars, 1, {}, vars, {}, ctx()) == (vars, 1, {})
    assert none.export(PARAMS, {}, {}) is PARAMS
    assert none.report(vars, {}, {}, ctx()) == {}
    assert none.describe(PARAMS, {}, {}) == {}
    assert ej.chain(none, none) == none
    # As a member it has a name and does nothing, so that an ablation keeps its frozen inputs.
    left_out = ej.chain(kd=none)
    assert left_out.init(jax.random.key(0), PARAMS, setup({"kd": 1})) == ({"kd": {}}, {"kd": {}})
    assert left_out.view(PARAMS, {"kd": {}}, {"kd": {}}, ctx()) is PARAMS
    assert left_out.wrap(plain, {"kd": {}}, {"kd": {}}, ctx()) is plain


def run(transform, steps=3, frozen=None):
    tx = optax.adam(0.1)
    state = ej.init_state(jax.random.key(4), MODEL, transform, tx, BATCH, frozen)
    step = jax.jit(
        ej.make_step(apply, transform, lambda out, batch: jnp.sum((out - batch["x"]) ** 2), tx)
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, BATCH, frozen)
        history.append(metrics)
    return state, history


def noisy(scale):
    """A transform whose every hook draws from its own key."""

    def wrap(forward, extra, state, ctx):
        def noised(params, model_state, batch, key, train):
            out, model_state, aux = forward(params, model_state, batch, key, train)
            noise = scale * jax.random.normal(ctx.key, out.shape)
            return out + noise, model_state, {**aux, "noise": noise.sum()}

        return noised

    def view(params, extra, state, ctx):
        return jax.tree.map(lambda w: w * (1 + extra["gain"]), params)

    def update(vars, opt, state, grads, aux, ctx):
        return vars, opt, {"seen": state["seen"] + aux["noise"]}

    return Transform(
        init=lambda key, params, setup: (
            {"gain": scale * jax.random.normal(key)},
            {"seen": jnp.zeros(())},
        ),
        batch=lambda batch, state, ctx: {
            "x": batch["x"] + scale * jax.random.normal(ctx.key, batch["x"].shape)
        },
        view=view,
        wrap=wrap,
        update=update,
        loss=lambda out, batch, aux, extra, state, ctx: {"gain": extra["gain"] ** 2},
        report=lambda vars, state, aux, ctx: dict(state),
    )


def test_chain_associates_bit_for_bit():
    a, b, c = noisy(0.1), noisy(0.2), noisy(0.3)
    flat = ej.chain(a=a, b=b, c=c)
    expected = run(flat)
    for grouped in (
        ej.chain(ej.chain(a=a, b=b), c=c),
        ej.chain(ej.chain(a=a), ej.chain(b=b, c=c)),
        ej.chain(ej.chain(ej.chain(a=a), b=b), ej.chain(), c=c),
    ):
        assert [name for name, _ in grouped.members] == ["a", "b", "c"]
        found = run(grouped)
        same = jax.tree.map(jnp.array_equal, found, expected)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert all(map(bool, jax.tree.leaves(same)))


def test_chains_by_keyword_are_spliced_under_their_name():
    inner = ej.chain(a=affine(2, 1), b=affine(3, 0))
    outer = ej.chain(first=affine(5, 0), both=inner)
    assert [name for name, _ in outer.members] == ["first", "both/a", "both/b"]
    _, history = run(ej.chain(both=ej.chain(noise=noisy(0.1))))
    assert "both/noise/gain" in history[0]


def test_keys_depend_on_the_name_and_not_on_the_neighbours():
    draw = Transform(
        init=lambda key, params, setup: ({}, {"key": jax.random.uniform(key)}),
        report=lambda vars, state, aux, ctx: {"draw": jax.random.uniform(ctx.key)},
    )
    alone, history = run(ej.chain(a=draw))
    among, others = run(ej.chain(z=draw, b=draw, a=draw))
    assert alone.transform["a"] == among.transform["a"]
    assert [m["a/draw"] for m in history] == [m["a/draw"] for m in others]
    draws = [float(m[f"{n}/draw"]) for m in others for n in "abz"]
    assert len(set(draws)) == len(draws) == 9
    assert len({float(own["key"]) for own in among.transform.values()}) == 3


def test_each_member_sees_its_own_frozen_inputs():
    def shows(what):
        return Transform(
            init=lambda key, params, setup: ({}, {"at_init": jnp.zeros(setup.frozen["v"].shape)}),
            report=lambda vars, state, aux, ctx: {what: ctx.frozen["v"]},
        )

    blind = Transform(report=lambda vars, state, aux, ctx: {"none": jnp.bool_(ctx.frozen is None)})
    frozen = {"a": {"v": jnp.float32(1)}, "b": {"v": jnp.float32(2)}}
    _, history = run(ej.chain(a=shows("x"), b=shows("x"), c=blind), frozen=frozen)
    assert (history[0]["a/x"], history[0]["b/x"]) == (1, 2)
    assert bool(history[0]["c/none"])
    with pytest.raises(ej.errors.SetupError, match=r"entries for \['d'\].*\['a', 'b', 'c'\]"):
        run(ej.chain(a=shows("x"), b=shows("x"), c=blind), frozen={**frozen, "d": 1})
    with pytest.raises(ej.errors.SetupError, match="frozen is a tuple"):
        run(ej.chain(a=shows("x")), frozen=(1, 2))


def test_aux_is_scoped_and_a_wrap_that_drops_it_is_an_error():
    seen = {}

    def tap(name):
        def wrap(forward, extra, state, ctx):
            def tapped(params, model_state, batch, key, train):
                out, model_state, aux = forward(params, model_state, batch, key, train)
                return out, model_state, {**aux, "mine": jnp.float32(len(name))}

            return tapped

        def loss(outputs, batch, aux, extra, state, ctx):
            seen[name] = set(aux)
            return {"mine": aux["mine"]}

        return Transform(wrap=wrap, loss=loss)

    silent = Transform(loss=lambda out, batch, aux, *rest: seen.update(silent=set(aux)) or {})
    _, history = run(ej.chain(one=tap("one"), silent=silent, three=tap("three")), steps=1)
    assert seen == {"one": {"mine"}, "three": {"mine"}, "silent": set()}
    assert (history[0]["one/mine"], history[0]["three/mine"]) == (3, 5)

    def drops(forward, extra, state, ctx):
        return lambda *args: (*forward(*args)[:2], {"new": jnp.zeros(())})

    with pytest.raises(ej.errors.ChainError, match=r"wrap of 'bad' dropped.*\*\*aux"):
        run(ej.chain(bad=Transform(wrap=drops), tap=tap("tap")), steps=1)


def test_members_do_not_see_the_state_of_others():
    shapes = {}

    def watch(name):
        def update(vars, opt, state, grads, aux, ctx):
            shapes[name] = (set(vars.extra), set(grads.extra), set(state))
            return vars, opt, state

        def init(key, params, setup):
            return {f"e{name}": jnp.zeros(())}, {f"s{name}": jnp.zeros(())}

        return Transform(init=init, update=update)

    run(ej.chain(a=watch("a"), b=watch("b")), steps=1)
    assert shapes == {n: ({f"e{n}"}, {f"e{n}"}, {f"s{n}"}) for n in "ab"}


@pytest.mark.parametrize("first", STAGES)
@pytest.mark.parametrize("second", STAGES)
def test_orders_of_techniques(first, second):
    members = {"x": Transform(kind=first), "aug": Transform(), "y": Transform(kind=second)}
    if STAGES[first] <= STAGES[second]:
        assert ej.chain(**members).members == tuple(members.items())
        return
    with pytest.raises(ej.errors.ChainError) as error:
        ej.chain(**members)
    assert f"'x' ({first}) comes before 'y' ({second})" in str(error.value)
    assert "chain(y=..., x=...)" in str(error.value)
    assert ej.chain(allow_order=True, **members).members == tuple(members.items())


def test_the_order_is_checked_across_splices():
    quantized = ej.chain(quant=Transform(kind="quantize"))
    with pytest.raises(ej.errors.ChainError, match=r"chain\(prune=..., quant=...\)"):
        ej.chain(quantized, prune=Transform(kind="prune"))
    with pytest.raises(ej.errors.ChainError, match="'q/quant'"):
        ej.chain(q=quantized, prune=Transform(kind="prune"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ej.chain(Transform()), "positional argument 0.*Name it"),
        (lambda: ej.chain("prune"), "'prune' as positional argument 0"),
        (lambda: ej.chain(prune=ej.prune.magnitude), "prune=.*function.*call it"),
        (lambda: ej.chain(kd=None), "NoneType, not an effjax.Transform"),
        (lambda: ej.chain(ej.chain(a=Transform()), a=Transform()), r"named \['a'\]"),
    ],
)
def test_what_is_no_chain_is_an_error(make, says):
    with pytest.raises(ej.errors.ChainError, match=f"(?s){says}"):
        make()


def test_setup_traces_the_model_without_computing():
    calls = []

    def counted(params, model_state, batch, key, train):
        calls.append((train, isinstance(params["w"], jax.core.Tracer)))
        return apply(params, model_state, batch, key, train)

    found = ej.Setup(counted, {}, BATCH).trace(PARAMS, train=False)
    assert found == (jax.ShapeDtypeStruct((2,), jnp.float32), {})
    assert calls == [(False, True)]


def test_a_member_may_change_the_weights_that_a_later_one_updates():
    def halve(vars, opt, state, grads, aux, ctx):
        return vars._replace(model=jax.tree.map(lambda w: w / 2, vars.model)), opt, state

    both = ej.chain(a=Transform(update=halve), b=Transform(update=halve))
    tx = optax.sgd(0.0)
    state = ej.init_state(jax.random.key(0), MODEL, both, tx, BATCH)
    state, _ = ej.make_step(apply, both, lambda out, batch: out.sum(), tx)(state, BATCH)
    np.testing.assert_array_equal(state.vars.model["w"], PARAMS["w"] / 4)
