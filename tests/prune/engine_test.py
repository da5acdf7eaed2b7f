"""What every pruning algorithm gets from the engine, and the criteria beside magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import Ctx, Setup, Vars
from effjax.errors import SelectorError, SetupError
from effjax.prune import budgets
from tests import nets

CTX = Ctx(jnp.int32(0), jax.random.key(0))
W = jnp.array([[0.5, -2.0, 1.0, 0.25], [3.0, -0.1, 0.2, -1.0]])
G = jnp.array([[-4.0, 0.1, 0.5, 8.0], [0.2, 9.0, -6.0, 0.1]])
EACH = {"select": "kernel"}


def one_update(prune, weights=W, grads=G, state=None, extra=None, step=0):
    """What one update makes of one leaf without an optimizer: (vars, state)."""
    if state is None:
        extra, state = prune.init(jax.random.key(1), {"kernel": weights}, None)
    ctx = Ctx(jnp.int32(step), jax.random.key(step))
    vars = Vars({"kernel": weights}, extra)
    vars, _, state = prune.update(vars, (), state, Vars({"kernel": grads}, extra), {}, ctx)
    return vars, state


def mask_of(state):
    return np.asarray(state["mask"]["kernel"])


# Criteria.


def test_saliency_keeps_the_largest_products_of_weight_and_gradient():
    _, state = one_update(ej.prune.saliency(0.5, **EACH))
    # |g w| = [[2, .2, .5, 2], [.6, .9, 1.2, .1]]
    assert mask_of(state).tolist() == [[True, False, False, True], [False, True, True, False]]


def test_taylor_adds_up_squares_between_moves_and_then_starts_anew():
    prune = ej.prune.taylor(0.5, begin=1, end=3, every=2, initial=0.5, **EACH)
    _, state = one_update(prune)
    np.testing.assert_allclose(state["memory"]["kernel"], np.square(W * G), rtol=1e-6)
    assert mask_of(state).all()
    small = 0.1 * G
    _, state = one_update(prune, grads=small, state=state, extra={}, step=1)
    total = np.square(W * G) + np.square(W * small)
    assert mask_of(state).tolist() == (total >= np.sort(total.ravel())[4]).tolist()
    np.testing.assert_array_equal(state["memory"]["kernel"], 0.0)


def test_random_pruning_only_takes_more_and_takes_every_weight_alike():
    prune = ej.prune.random(0.75, 0, 3, **EACH)
    weights = jnp.ones((40, 50))
    before = np.ones(weights.shape, bool)
    state = extra = None
    for step in range(4):
        vars, state = one_update(prune, weights, weights, state, extra, step)
        extra, weights = vars.extra, vars.model["kernel"]
        assert not np.any(mask_of(state) & ~before)
        before = mask_of(state)
    assert before.sum() == 500
    assert abs(before[:20].sum() - 250) < 60  # five standard deviations
    _, other = one_update(prune._replace(), jnp.ones((40, 50)), jnp.ones((40, 50)), step=3)
    assert np.any(mask_of(other) != before)  # another key, other weights


def test_a_criterion_of_ones_own_with_a_memory():
    def score(scene):
        return {path: jnp.abs(w - scene.memory[path]) for path, w in scene.weights.items()}

    moved = ej.prune.Criterion(score, memory=dict, forgets=True)
    prune = ej.prune.custom(moved, 0.5, **EACH)
    extra, state = prune.init(jax.random.key(0), {"kernel": W}, None)
    step = jnp.array([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 4.0]])
    vars, state = one_update(prune, W + step, G, state, extra)
    assert mask_of(state).tolist() == (np.asarray(step) > 0).tolist()
    np.testing.assert_array_equal(state["memory"]["kernel"], vars.model["kernel"])


# Weights that live on behind their mask.


def test_ste_hides_the_smallest_weights_from_the_start_and_trains_them_all():
    prune = ej.prune.ste(0.5, **EACH)
    extra, state = prune.init(jax.random.key(0), {"kernel": W}, None)
    largest = np.abs(W) >= 1.0
    assert mask_of(state).tolist() == largest.tolist()
    seen, pull = jax.vjp(lambda p: prune.view(p, extra, state, CTX), {"kernel": W})
    np.testing.assert_array_equal(seen["kernel"], np.where(largest, W, 0))
    np.testing.assert_array_equal(pull({"kernel": G})[0]["kernel"], G)
    grown = W.at[0, 0].set(-2.5)
    vars, state = one_update(prune, grown, G, state, extra)
    np.testing.assert_array_equal(vars.model["kernel"], grown)  # nothing is lost behind the mask
    assert mask_of(state)[0].tolist() == [True, True, False, False] or mask_of(state)[0, 0]
    assert mask_of(state).sum() == 4
    np.testing.assert_array_equal(
        prune.export(vars.model, extra, state)["kernel"], np.where(mask_of(state), grown, 0)
    )


def test_ste_trains_an_n_m_network_in_any_optimizer():
    model, tx = nets.raw(), optax.adamw(1e-2)
    chain = ej.chain(prune=ej.prune.ste(pattern=ej.prune.n_m(2, 4), select="kernel$"))
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chain, nets.loss, tx))
    losses = []
    for _ in range(60):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["task"]))
        shipped = ej.export(chain, state)
        for layer in ("hidden", "head"):
            groups = np.asarray(shipped[layer]["kernel"]).reshape(
                -1, 4, 32 if layer == "hidden" else 8
            )
            assert np.all((groups != 0).sum(axis=1) == 2)
    assert losses[-1] < 0.5 * losses[0]
    assert np.count_nonzero(state.vars.model["head"]["kernel"]) == 256


def test_movement_scores_add_up_the_terms_of_the_paper():
    rate = 0.1
    prune = ej.prune.movement(0.5, begin=2, **EACH)
    model = ej.Model(
        lambda key, batch: ({"kernel": W}, {}),
        lambda params, state, batch, key, train: (batch["x"] @ params["kernel"], state),
    )
    chain, tx = ej.chain(prune=prune), optax.sgd(rate)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def loss(out, batch):
        return jnp.mean((out - batch["y"]) ** 2)

    state = ej.init_state(jax.random.key(0), model, chain, tx, batch)
    step = jax.jit(ej.make_step(model.apply, chain, loss, tx))
    w, total, mask = np.asarray(W), np.zeros((2, 4), np.float32), np.ones((2, 4), bool)
    for t in range(6):
        grad = 2 * x.T @ (x @ np.where(mask, w, 0) - y) / y.size
        total += rate * -grad * w
        w = w - rate * np.where(mask, grad, 0)
        state, _ = step(state, batch)
        if t == 2:
            mask = total >= np.sort(total.ravel())[4]
        own = state.vars.extra["prune"]["score"]["kernel"]
        np.testing.assert_allclose(own, total, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.vars.model["kernel"], w, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(state.transform["prune"]["mask"]["kernel"], mask)


# Patterns and budgets.


@pytest.mark.parametrize("budget", ["uniform", "erk", "global", "macs", "bytes"])
@pytest.mark.parametrize("pattern", [None, ej.prune.block((2, 2)), ej.prune.channel()])
def test_patterns_and_budgets_go_together(budget, pattern):
    model, tx = nets.raw(), optax.sgd(0.1)
    prune = ej.prune.magnitude(0.5, budget=budget, pattern=pattern, select="kernel$")
    chain = ej.chain(prune=prune)
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    state, metrics = jax.jit(ej.make_step(model.apply, chain, nets.loss, tx))(state, nets.BATCH)
    masks = {path: np.asarray(m) for path, m in state.transform["prune"]["mask"].items()}
    if pattern is not None:
        for path, mask in masks.items():
            units = np.asarray(pattern.pool(jnp.asarray(mask, jnp.float32)))
            assert set(np.unique(units)) <= {0.0, 1.0}, path
    pruned = sum(m.size - m.sum() for m in masks.values())
    total = sum(m.size for m in masks.values())
    assert float(metrics["prune/sparsity"]) == pytest.approx(pruned / total)
    assert pruned / total == pytest.approx(0.5, abs=0.05 if pattern is None else 0.2)
    if budget == "uniform":
        assert {p: m.mean() for p, m in masks.items()} == {"hidden/kernel": 0.5, "head/kernel": 0.5}


def test_n_m_prunes_once_or_while_it_trains():
    for times in ({"begin": 2}, {"begin": 2, "end": 6, "every": 2}):
        prune = ej.prune.magnitude(pattern=ej.prune.n_m(1, 4), select="kernel$", **times)
        model, tx, chain = nets.raw(), optax.adam(1e-2), ej.chain(prune=prune)
        state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
        step = jax.jit(ej.make_step(model.apply, chain, nets.loss, tx))
        for t in range(8):
            state, metrics = step(state, nets.BATCH)
            assert float(metrics["prune/sparsity"]) == (0.0 if t < 2 else 0.75)
        kernel = np.asarray(state.vars.model["hidden"]["kernel"]).reshape(16, 4, 32)
        assert np.all((kernel != 0).sum(axis=1) == 1)


def test_a_budget_of_its_own_per_layer_by_path():
    budget = budgets.by_path({"^hidden": 1.0, "^head": 0.5})
    model, tx = nets.raw(), optax.sgd(0.1)
    chain = ej.chain(prune=ej.prune.magnitude(0.8, budget=budget, select="kernel$"))
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    state, _ = jax.jit(ej.make_step(model.apply, chain, nets.loss, tx))(state, nets.BATCH)
    found = {p: round(1 - float(m.mean()), 3) for p, m in state.transform["prune"]["mask"].items()}
    assert found == {"hidden/kernel": 0.8, "head/kernel": 0.398}
    unused = ej.chain(prune=ej.prune.magnitude(0.8, budget=budgets.by_path({"^body": 1, "": 1})))
    with pytest.raises(SelectorError, match="body"):
        ej.init_state(jax.random.key(0), nets.linen(), unused, tx, nets.BATCH)


# What is pruned where nobody says.


@pytest.mark.parametrize("model", [nets.linen(), nets.nnx_()], ids=["linen", "nnx"])
def test_the_first_and_the_last_layer_stay_dense_unless_they_are_named(model):
    chain = ej.chain(prune=ej.prune.magnitude(0.5))
    state = ej.init_state(jax.random.key(0), model, chain, optax.sgd(0.1), nets.BATCH)
    assert list(state.transform["prune"]["mask"]) == ["conv2/kernel"]


def test_a_model_of_two_layers_has_nothing_between_its_ends():
    chain = ej.chain(prune=ej.prune.magnitude(0.5))
    with pytest.raises(SelectorError, match=r"first and its last operation.*select="):
        ej.init_state(jax.random.key(0), nets.raw(), chain, optax.sgd(0.1), nets.BATCH)
    with pytest.raises(SetupError, match="select="):
        ej.prune.magnitude(0.5).init(jax.random.key(0), {"kernel": W}, None)


def test_what_comes_back_comes_back_at_zero_with_new_moments():
    levels = jnp.array([0.75, 0.25, 0.25])
    prune = ej.prune.magnitude(lambda step: levels[step], every=1, end=2, **EACH)
    tx = optax.adam(0.1)
    extra, state = prune.init(jax.random.key(0), {"kernel": W}, None)
    opt = (tx.init({"kernel": W})[0]._replace(mu={"kernel": G}, nu={"kernel": G**2}),)
    vars, grads = Vars({"kernel": W}, extra), Vars({"kernel": G}, extra)
    vars, opt, state = prune.update(vars, opt, state, grads, {}, CTX)
    first = mask_of(state)
    assert first.sum() == 2
    # The optimizer moves everything; what was pruned is zeroed before it can come back.
    vars = vars._replace(model={"kernel": vars.model["kernel"] + 1.0})
    opt = (opt[0]._replace(mu={"kernel": G}, nu={"kernel": G**2}),)
    vars, opt, state = prune.update(vars, opt, state, grads, {}, CTX._replace(step=jnp.int32(1)))
    assert mask_of(state).sum() == 6
    back = mask_of(state) & ~first
    for tree in (vars.model, opt[0].mu, opt[0].nu):
        assert np.all(np.asarray(tree["kernel"])[back] == 0)
        assert np.all(np.asarray(tree["kernel"])[first & mask_of(state)] != 0)


def test_a_budget_of_macs_needs_the_model():
    setup = Setup(nets.raw().apply, {}, nets.BATCH)
    params, _ = nets.raw().init(jax.random.key(0), nets.BATCH)
    _, state = ej.prune.magnitude(0.5, budget="macs", select="kernel$").init(None, params, setup)
    assert {p: float(m) for p, m in state["macs"].items()} == {
        "head/kernel": 24 * 32 * 8,
        "hidden/kernel": 24 * 64 * 32,
    }
