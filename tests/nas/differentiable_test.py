"""Differentiable search: gradients by hand, relaxations, latency, collapse, what is found."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SetupError
from effjax.nas import bilevel, relaxations
from effjax.nas.differentiable import expected

OPS = ("none", "skip", "double")
BATCH = {"x": jnp.array([1.0, 2.0, 3.0, -1.0]), "y": jnp.array([0.5, 1.0, -1.0, 2.0])}
EVEN, ODD = ((BATCH["x"][i::2], BATCH["y"][i::2]) for i in (0, 1))


def apply(params, model_state, batch, key, train):
    """y = w (p_skip x + p_double 2 x), on one edge."""
    p = batch.get("edges", jnp.full((1, 3), 1 / 3))[0]
    return params["w"] * (p[1] + 2 * p[2]) * batch["x"], model_state


def loss(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


MODEL = ej.Model(lambda key, batch: ({"w": jnp.float32(0.7)}, {}), apply)
LOGITS = jnp.array([[0.1, 0.4, -0.2]])


def quick(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def search(**given):
    return ej.nas.darts({"edges": 1}, OPS, **given)


def started(transform, tx=optax.sgd(1.0), logits=LOGITS):
    chain = ej.chain(search=transform)
    vars = ej.Vars({"w": jnp.float32(0.7)}, {"search": {"logits": {"edges": logits}}})
    key = jax.random.key(0)
    state = ej.TrainState(jnp.int32(0), key, vars, tx.init(vars), {}, {"search": {}})
    return state, quick(ej.make_step(apply, chain, loss, tx)), chain


def by_hand(w, logits, data):
    """The loss of one half, for finite differences: float64 NumPy."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    x, y = (np.asarray(a, np.float64) for a in data)
    return np.mean((w * (p[1] + 2 * p[2]) * x - y) ** 2)


def slope(f, x, h=1e-5):
    x = np.asarray(x, np.float64)
    moves = np.eye(x.size).reshape(x.size, *x.shape) * h
    return np.array([(f(x + m) - f(x - m)) / (2 * h) for m in moves]).reshape(x.shape)


W, A = 0.7, np.asarray(LOGITS[0], np.float64)


def test_first_order_each_half_trains_its_own():
    state, step, _ = started(search())
    after, metrics = step(state, BATCH)
    by_weights = slope(lambda w: by_hand(w, A, EVEN), np.float64(W))
    by_logits = slope(lambda a: by_hand(W, a, ODD), A)
    assert float(after.vars.model["w"]) == pytest.approx(W - float(by_weights), abs=1e-4)
    moved = after.vars.extra["search"]["logits"]["edges"][0]
    np.testing.assert_allclose(moved, A - by_logits, atol=1e-4)
    whole = (by_hand(W, A, EVEN) + by_hand(W, A, ODD)) / 2
    assert float(metrics["task"]) == pytest.approx(whole, rel=1e-5)


def test_second_order_looks_one_step_ahead():
    state, step, _ = started(search(order=2, rate=0.1, loss=loss))
    after, _ = step(state, BATCH)

    def ahead(a):
        return by_hand(W - 0.1 * float(slope(lambda w: by_hand(w, a, EVEN), np.float64(W))), a, ODD)

    moved = after.vars.extra["search"]["logits"]["edges"][0]
    np.testing.assert_allclose(moved, A - slope(ahead, A, 1e-3), atol=1e-3)
    first = A - slope(lambda a: by_hand(W, a, ODD), A)
    assert np.abs(moved - first).max() > 0.01
    by_weights = slope(lambda w: by_hand(w, A, EVEN), np.float64(W))
    assert float(after.vars.model["w"]) == pytest.approx(W - float(by_weights), abs=1e-4)


def test_halves_and_back():
    batch = {"a": jnp.arange(6), "b": jnp.arange(12).reshape(6, 2)}
    even, odd = bilevel.halves(batch)
    assert even["a"].tolist() == [0, 2, 4]
    assert odd["b"][0].tolist() == [2, 3]
    back = bilevel.joined({**even, "c": jnp.ones(3)}, {**odd, "c": jnp.zeros(3)},
                          {**batch, "c": jnp.ones(3)})  # fmt: skip
    assert all(np.array_equal(back[n], batch[n]) for n in batch)
    assert back["c"].tolist() == [1, 1, 1]
    value, grad = jax.value_and_grad(lambda x: bilevel.scaled(x, 2.0) ** 2)(0.3)
    assert value == jnp.float32(0.3) ** 2
    assert grad == pytest.approx(1.2)
    with pytest.raises(SetupError, match="same even number"):
        bilevel.halves({"a": jnp.arange(5)})


def test_relaxations():
    logits, key, warm = jnp.array([[2.0, 0.0, -1.0, 1.0]]), jax.random.key(0), jnp.float32(0.5)
    soft = np.exp(np.array([4.0, 0, -2, 2]))
    np.testing.assert_allclose(
        relaxations.softmax(logits, key, warm)[0], soft / soft.sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        relaxations.sigmoid(logits, key, warm)[0], 1 / (1 + 1 / soft), rtol=1e-5
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    p = np.asarray(jax.nn.softmax(logits[0]))
    for name in ("gumbel", "one_path", "two_paths"):
        relax = relaxations.RELAXATIONS[name]
        temperature = jnp.float32(1e-3 if name == "gumbel" else 1.0)
        drawn = quick(jax.vmap(lambda k, r=relax, t=temperature: r(logits, k, t)[0]))(keys)
        np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-5)
        frequency = np.asarray(drawn).mean(0)
        if name == "two_paths":
            # Of a pair drawn without replacement, one by the pair's own odds: by enumeration.
            pair = {
                (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
                for i in range(4) for j in range(i)
            }  # fmt: skip
            p_two = np.zeros(4)
            for (i, j), chance in pair.items():
                p_two[i] += chance * p[i] / (p[i] + p[j])
                p_two[j] += chance * p[j] / (p[i] + p[j])
            np.testing.assert_allclose(frequency, p_two, atol=0.035)
        else:
            np.testing.assert_allclose(frequency, p, atol=0.035)


def test_hard_paths_have_soft_gradients():
    logits, key, warm = jnp.array([[2.0, 0.0, -1.0, 1.0]]), jax.random.key(3), jnp.float32(1.0)
    values = jnp.array([1.0, -2.0, 3.0, 0.5])

    def of(relax):
        return quick(jax.grad(lambda x: jnp.vdot(relax(x, key, warm)[0], values)))(logits)[0]

    np.testing.assert_allclose(of(relaxations.one_path), of(relaxations.gumbel), atol=1e-6)
    two = np.asarray(of(relaxations.two_paths))
    assert (two != 0).sum() == 2
    assert two.sum() == pytest.approx(0, abs=1e-6)
    i, j = np.flatnonzero(two)
    odds = np.exp([float(logits[0, i]), float(logits[0, j])])
    p = odds / odds.sum()
    wanted = p[0] * p[1] * float(values[i] - values[j])
    assert two[i] == pytest.approx(wanted, rel=1e-4)


def test_the_auxiliary_skip_connection_fades():
    state, step, chain = started(search(auxiliary=lambda step: 1.0 - step / 2))
    p = np.asarray(jax.nn.softmax(LOGITS[0]))

    def task(w):
        return np.mean((W * w * np.asarray(BATCH["x"]) - np.asarray(BATCH["y"])) ** 2)

    _, metrics = step(state, BATCH)
    assert float(metrics["task"]) == pytest.approx(task(1 + p[1] + 2 * p[2]), rel=1e-5)
    _, metrics = step(state._replace(step=jnp.int32(2)), BATCH)
    assert float(metrics["task"]) == pytest.approx(task(p[1] + 2 * p[2]), rel=1e-5)
    # In evaluation it is not there.
    scores = quick(ej.make_eval(apply, chain, lambda out, batch: {"out": out}))
    assert float(scores(state, BATCH)["out"].value) == pytest.approx(
        W * (p[1] + 2 * p[2]) * float(BATCH["x"].mean()), rel=1e-5
    )


def test_evaluation_of_the_chosen_operations():
    state, _, chain = started(search(evaluate="chosen"))
    scores = quick(ej.make_eval(apply, chain, lambda out, batch: {"out": out}))
    found = float(scores(state, BATCH)["out"].value)
    assert found == pytest.approx(W * float(BATCH["x"].mean()), rel=1e-5)


def test_latency_and_the_zero_one_loss():
    costs = {"edges": np.array([[1.0, 3.0, 8.0]])}
    p = np.asarray(jax.nn.softmax(LOGITS[0]), np.float64)
    took = 2 + p @ [1, 3, 8]
    latency = ej.nas.Latency(costs, base=2.0, strength=0.5)
    assert float(expected({"edges": LOGITS}, latency)) == pytest.approx(took, rel=1e-6)
    state, step, _ = started(search(latency=latency, zero_one=3.0))
    _, metrics = step(state, BATCH)
    assert float(metrics["search/latency"]) == pytest.approx(0.5 * took, rel=1e-5)
    squares = np.square(1 / (1 + np.exp(-A)) - 0.5).mean()
    assert float(metrics["search/zero_one"]) == pytest.approx(-3 * squares, rel=1e-4)
    product = latency._replace(form="product", power=2.0)
    state, step, _ = started(search(latency=product, loss=loss))
    _, metrics = step(state, BATCH)
    wanted = float(metrics["task"]) * 0.5 * np.log(took) ** 2
    assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)


def test_beta_decay_lowers_logits_by_their_shares():
    state, step, _ = started(search(decay=lambda step: 2.0 + step))
    after, metrics = step(state, BATCH)
    e = np.exp(A)
    assert float(metrics["search/decay"]) == pytest.approx(2 * np.log(e.sum()), rel=1e-5)
    wanted = A - slope(lambda a: by_hand(W, a, ODD), A) - 2 * e / e.sum()
    np.testing.assert_allclose(after.vars.extra["search"]["logits"]["edges"][0], wanted, atol=1e-4)


def test_a_collapse_is_reported_and_warned_of():
    logits = jnp.array([[0.0, 2.0, 1.0]])
    state, step, _ = started(search(), optax.sgd(0.0), logits)
    _, metrics = step(state, BATCH)
    assert float(metrics["search/skip"]) == 1.0
    p = np.asarray(jax.nn.softmax(logits[0]))
    entropy = -(p * np.log(p)).sum() / np.log(3)
    assert float(metrics["search/entropy"]) == pytest.approx(entropy, rel=1e-4)
    with pytest.warns(ej.nas.CollapseWarning, match="'skip' for 100% of the edges"):
        genes = ej.nas.extract(state, OPS)
    assert genes["edges"].tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ej.nas.extract(state, OPS, exclude=("skip",))["edges"].tolist() == [2]
        own = state.vars.extra["search"]
        assert ej.nas.extract(own, OPS, threshold=1.0)["edges"].tolist() == [1]
    with pytest.raises(SetupError, match="named 'other'"):
        ej.nas.extract(state, OPS, name="other")
    with pytest.raises(SetupError, match="logits of 3 operations; 4 are given"):
        ej.nas.extract(state, (*OPS, "more"))
    with pytest.raises(SetupError, match="leaves no operation"):
        ej.nas.extract(state, OPS, exclude=OPS)
    with pytest.raises(SetupError, match=r"\['conv'\] are none"):
        ej.nas.extract(state, OPS, exclude=("conv",))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"edges": {}}, "an edge or more"),
        ({"operations": ("skip", "skip")}, "hold a name twice"),
        ({"relax": "hardmax"}, "relaxations are softmax, sigmoid"),
        ({"skip": "identity"}, "none of"),
        ({"skip": None, "auxiliary": 1.0}, "needs skip="),
        ({"order": 3}, "order is 3"),
        ({"order": 2}, "looks one step of training ahead"),
        ({"latency": ej.nas.Latency({"edges": np.ones((2, 3))})}, "have the shapes"),
        ({"latency": ej.nas.Latency({"edges": np.ones((1, 3))}, form="product")}, "give loss"),
        (
            {"latency": ej.nas.Latency({"edges": np.ones((1, 3))}, form="product"), "loss": loss},
            "in a smaller unit",
        ),
    ],
)
def test_wrong_arguments(given, says):
    with pytest.raises(SetupError, match=says):
        ej.nas.darts(**{"edges": {"edges": 1}, "operations": OPS, **given})


def test_what_does_not_fit_is_an_error_at_init():
    with pytest.raises(ScheduleError, match="above 0"):
        search(temperature=0.0)
    odd = {name: x[:3] for name, x in BATCH.items()}
    with pytest.raises(SetupError, match="even number"):
        ej.init_state(jax.random.key(0), MODEL, search(), optax.sgd(1.0), odd)
    deaf = ej.Model(MODEL.init, lambda p, s, b, k, t: (p["w"] * b["x"], s))
    with pytest.raises(SetupError, match=r"no notice of batch\['edges'\]"):
        ej.init_state(jax.random.key(0), deaf, search(), optax.sgd(1.0), BATCH)
    bare = ej.Model(lambda k, b: MODEL.init(k, b), lambda p, s, b, k, t: (p["w"] * b, s))
    with pytest.raises(SetupError, match="into a dict, as its entries"):
        ej.init_state(jax.random.key(0), bare, search(), optax.sgd(1.0), BATCH["x"])
