"""Tests of the differentiable search for bit widths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SetupError
from effjax.quantize import Bits, allocate, bit_costs, bit_search, by_leaf, lowbit, qat, within
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X, normal

KEY = jax.random.key(0)
WIDTHS = (2, 4, 8)


def linear(params, x):
    return x @ params["kernel"]


def init(f, transform, params, x):
    return transform.init(KEY, params, ej.Setup(ej.from_function(f, lambda x: x), {}, x))


def run(f, transform, params, x, extra, state, train=True, key=KEY, step=0):
    def forward(params, model_state, x, key, train):
        return f(params, x), model_state, {}

    ctx = ej.Ctx(jnp.int32(step), key, train=train)
    return transform.wrap(forward, extra, state, ctx)(params, {}, x, KEY, train)[0]


def test_training_sees_the_mixture_by_hand():
    transform = bit_search(3.0, WIDTHS, 32, draw="softmax", temperature=2.0)
    params = {"kernel": SQUARE}
    extra, state = init(linear, transform, params, X)
    np.testing.assert_array_equal(extra["logits"]["kernel"], jnp.zeros(3))
    logits = jnp.array([1.0, 0.0, -2.0])
    p = jax.nn.softmax(logits / 2)
    rounded = [lowbit.rounded(SQUARE, b, (1,)) for b in WIDTHS]

    def objective(params, extra):
        return (run(linear, transform, params, X, extra, state) ** 2).sum()

    extra = {"logits": {"kernel": logits}}
    wanted = X @ sum(share * q for share, q in zip(p, rounded, strict=True))
    np.testing.assert_allclose(run(linear, transform, params, X, extra, state), wanted, rtol=1e-5)
    dw, dl = jax.grad(objective, argnums=(0, 1))(params, extra)
    up = X.T @ (2 * wanted)  # the gradient of what the model sees passes to the weights
    np.testing.assert_allclose(dw["kernel"], up, rtol=1e-4, atol=1e-4)
    slopes = jnp.stack([(up * q).sum() for q in rounded])
    by_hand = p * (slopes - p @ slopes) / 2  # of the softmax
    np.testing.assert_allclose(dl["logits"]["kernel"], by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_evaluation_is_qat_at_the_most_probable_widths(symmetric):
    transform = bit_search(3.0, WIDTHS, 6, symmetric=symmetric)
    f, params, x, *_ = PROGRAMS["two"]
    extra, state = init(f, transform, params, x)
    extra = {"logits": {"a/kernel": jnp.array([0, 1.0, 0]), "b/kernel": jnp.array([1.0, 0, 0])}}
    chosen = {"a/kernel": 4, "b/kernel": 2}
    plain = qat(8, 6, rules=by_leaf(chosen, 6), symmetric=symmetric)
    own = init(f, plain, params, x)[1]
    np.testing.assert_array_equal(
        run(f, transform, params, x, extra, state, train=False),
        run(f, plain, params, x, {}, own, train=False),
    )
    facts = transform.describe(params, extra, state)
    assert {path: fact["weight_bits"] for path, fact in facts.items()} == chosen
    assert all(fact["act_bits"] == 6 for fact in facts.values())
    assert ("form" in state) == (not symmetric)


def test_a_layers_width_may_be_that_of_both_operands():
    transform = bit_search(3.0, WIDTHS, "same", draw="softmax")
    params = {"kernel": SQUARE}
    extra, state = init(linear, transform, params, X)
    extra = {"logits": {"kernel": jnp.array([0.5, 1.0, -1.0])}}
    p = jax.nn.softmax(extra["logits"]["kernel"])

    def mixture(x, axes):
        return sum(share * lowbit.rounded(x, b, axes) for share, b in zip(p, WIDTHS, strict=True))

    wanted = mixture(X, ()) @ mixture(SQUARE, (1,))
    np.testing.assert_allclose(run(linear, transform, params, X, extra, state), wanted, rtol=1e-4)
    evaluated = run(linear, transform, params, X, extra, state, train=False)
    np.testing.assert_allclose(
        evaluated, lowbit.rounded(X, 4) @ lowbit.rounded(SQUARE, 4, (1,)), rtol=1e-5
    )
    [fact] = transform.describe(params, extra, state).values()
    assert (fact["weight_bits"], fact["act_bits"]) == (4, 4)


def test_gumbel_draws_one_width_at_low_temperature_as_often_as_it_is_probable():
    transform = bit_search(3.0, WIDTHS, 32, temperature=1e-3)
    params = {"kernel": SQUARE}
    extra, state = init(linear, transform, params, jnp.eye(4))
    extra = {"logits": {"kernel": jnp.log(jnp.array([0.5, 0.3, 0.2]))}}
    seen = jax.vmap(lambda key: run(linear, transform, params, jnp.eye(4), extra, state, key=key))(
        jax.random.split(KEY, 500)
    )
    rounded = jnp.stack([lowbit.rounded(SQUARE, b, (1,)) for b in WIDTHS])
    apart = jnp.abs(seen[:, None] - rounded).max((2, 3))
    assert apart.min(1).max() < 0.02
    often = jnp.bincount(apart.argmin(1), length=3) / 500
    np.testing.assert_allclose(often, [0.5, 0.3, 0.2], atol=0.07)


def test_the_penalty_by_hand():
    def f(params, x):
        return x @ params["a"]["kernel"] @ params["b"]["kernel"]

    params = {"a": {"kernel": normal(4, 6)}, "b": {"kernel": normal(6, 2)}}
    extra, state = init(f, bit_search(3.0, (2, 8)), params, X)
    np.testing.assert_allclose(list(state["units"].values()), [24 / 36, 12 / 36])
    sure = {"logits": {"a/kernel": jnp.array([0.0, 99.0]), "b/kernel": jnp.array([99.0, 0.0])}}
    ctx = ej.Ctx(jnp.int32(0), KEY)
    for strength, budget, wanted in ((2.0, 3.0, 2 * (6 / 3 - 1)), (1.0, 7.0, 0.0)):
        transform = bit_search(budget, (2, 8), strength=strength)
        terms = transform.loss(None, None, {}, sure, state, ctx)
        np.testing.assert_allclose(terms["size"], wanted, rtol=1e-5)
    found = transform.report(ej.Vars(params, extra), state, {}, ctx)
    assert (float(found["bits"]), float(found["chosen"])) == (5.0, 2.0)
    by_macs = init(f, bit_search(3.0, (2, 8), unit="bitops"), params, X)[1]
    np.testing.assert_allclose(list(by_macs["units"].values()), [24 / 36, 12 / 36])


@pytest.mark.parametrize("name", ["scan of layers", "rnn", "in_remat"])
def test_layers_and_time_share_a_leafs_mixture(name):
    name = {"in_remat": "remat"}.get(name, name)
    f, params, x, *_ = PROGRAMS[name]
    transform = bit_search(3.0, WIDTHS, 32, draw="softmax")
    extra, state = init(f, transform, params, x)

    def objective(extra):
        outputs = jax.tree.leaves(run(f, transform, params, x, extra, state))
        return sum((out**2).sum() for out in outputs)

    grads = jax.grad(objective)(extra)["logits"]
    assert set(grads) == set(ej.select.leaves(params))
    assert len(grads) > 0
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in grads.values())


def test_rules_keep_sites_out_of_the_search():
    f, params, x, *_ = PROGRAMS["two"]
    transform = bit_search(3.0, WIDTHS, 8, rules=[("^a/", Bits(8, 32))])
    extra, state = init(f, transform, params, x)
    assert list(extra["logits"]) == ["b/kernel"] == list(state["units"])
    facts = transform.describe(params, extra, state)
    assert facts["a/kernel"]["weight_bits"] == 8
    assert "act_bits" not in facts["a/kernel"]
    with pytest.raises(SetupError, match="none is left to search"):
        init(f, bit_search(3.0, WIDTHS, rules=[("", Bits(8, 8))]), params, x)


def test_the_search_meets_its_budget_and_gives_bits_to_what_needs_them():
    """The first layer's weights lie on 8 bits; the second's on 2, which cost it nothing."""
    fine = normal(8, 8)
    coarse = jnp.sign(normal(8, 8))
    params = {"fine": {"kernel": fine}, "coarse": {"kernel": coarse}}

    def apply(params, model_state, x, key, train):
        return (x @ params["fine"]["kernel"]) @ params["coarse"]["kernel"], model_state

    model = ej.Model(lambda key, batch: (params, {}), apply)
    x = normal(64, 8)
    target = x @ fine @ coarse

    def loss(outputs, batch):
        return jnp.mean((outputs - target) ** 2)

    search = bit_search(5.0, (2, 8), 32, strength=30.0, temperature=0.5)
    transform = ej.chain(bits=search)
    rates = {"bits": optax.adam(0.1), "weights": optax.set_to_zero()}
    rules = [("^extra/.*logits/", "bits"), ("", "weights")]
    tx = optax.partition(rates, lambda vars: ej.select.label_tree(vars, rules))
    state = ej.init_state(KEY, model, transform, tx, x)
    step = jax.jit(ej.make_step(apply, transform, loss, tx))
    for _ in range(150):
        state, metrics = step(state, x)
    assert step._cache_size() == 1
    assert float(metrics["bits/bits"]) < 5.5
    assert float(metrics["bits/chosen"]) == 5.0
    costs = bit_costs(params, ej.find_sites(apply, params, {}, x), (2, 8))
    found = within(state.vars.extra["bits"], (2, 8), costs, 5.0 * 128)
    assert found.bits == {"fine/kernel": 8, "coarse/kernel": 2}


def test_what_is_within_a_budget_is_the_most_probable():
    likely = {"a": jnp.log(jnp.array([0.1, 0.9])), "b": jnp.log(jnp.array([0.4, 0.6]))}
    costs = {"a": {2: 20.0, 4: 40.0}, "b": {2: 20.0, 4: 40.0}}
    found = within({"logits": likely}, (2, 4), costs, 60)
    assert found.bits == {"a": 4, "b": 2}
    np.testing.assert_allclose(np.exp(-found.loss), 0.9 * 0.4, rtol=1e-5)
    assert allocate({p: dict.fromkeys(own, 0.0) for p, own in costs.items()}, costs, 60).cost == 40
    with pytest.raises(SetupError, match="2 logits for the 3 widths"):
        within({"logits": likely}, (2, 4, 8), costs, 60)


def test_traced_settings_share_one_program():
    model, tx = nets.raw(), optax.sgd(0.1)

    def final(budget, strength, bits):
        search = bit_search(budget, WIDTHS, bits, strength=strength, temperature=strength)
        transform = ej.chain(q=search)
        state = ej.init_state(KEY, model, transform, tx, nets.BATCH)
        step = ej.make_step(model.apply, transform, nets.loss, tx)
        return step(state, nets.BATCH)[1]["loss"]

    compiled = jax.jit(final)
    first = compiled(jnp.float32(3), jnp.float32(1), jnp.int32(8))
    other = compiled(jnp.float32(2.5), jnp.float32(2), jnp.int32(4))
    assert compiled._cache_size() == 1
    assert first != other
    np.testing.assert_allclose(first, final(3.0, 1.0, 8), rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"widths": (4,)}, SetupError, "two or more"),
        ({"widths": (4, 4)}, SetupError, "two or more"),
        ({"widths": (4, 9)}, SetupError, "9 bits"),
        ({"widths": (4, jnp.int32(2))}, SetupError, "Python numbers"),
        ({"budget": 1.5}, SetupError, "1.5 bits on average"),
        ({"unit": "kilos"}, SetupError, "'kilos'"),
        ({"draw": "lots"}, SetupError, "'lots'"),
        ({"temperature": 0.0}, ScheduleError, "temperature is 0.0"),
        ({"activations": 1}, SetupError, "1 bits"),
        ({"activations": "alike"}, SetupError, "'alike'"),
        ({"activations": "same", "widths": (1, 2)}, SetupError, "1 bits"),
    ],
)
def test_wrong_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        bit_search(**kwargs)
