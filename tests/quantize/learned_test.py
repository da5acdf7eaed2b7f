"""Tests of learned steps, offsets and bounds: LSQ, LSQ+ and PACT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.quantize import Bits, levels, lsq, lsq_plus, pact
from tests import nets
from tests.programs import PROGRAMS, normal

KEY = jax.random.key(0)


def numpy_lsq(x, s, low, high, g):
    """Forward value, dq/dx and dq/ds by the paper's formulas."""
    v = x / s
    q = np.clip(np.round(v), low, high) * s
    dx = ((v >= low) & (v <= high)).astype(np.float32)
    ds = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v)) * g
    return q, dx, ds


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_lsq_against_numpy(bits, kind):
    x, s, g = normal(64) * 2, jnp.array([0.37]), 0.25
    own = getattr(levels, kind)(bits)
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "signed" else (0, 2**bits - 1)
    assert (float(own.low), float(own.high)) == bounds
    f = lambda x, s: levels.learned_step(x, s, own, g)  # noqa: E731
    wanted = numpy_lsq(np.asarray(x), 0.37, *bounds, g)
    np.testing.assert_allclose(f(x, s), wanted[0], rtol=1e-6)
    up = normal(64)
    dx, ds = jax.vjp(f, x, s)[1](up)
    np.testing.assert_allclose(dx, up * wanted[1], rtol=1e-6)
    np.testing.assert_allclose(ds[0], np.sum(up * wanted[2]), rtol=1e-4)


def test_lsq_by_hand():
    # Steps of 0.5 at 3 bits: -4 ... 3.
    x = jnp.array([-3.0, -0.6, 0.0, 0.3, 9.0])
    own = levels.signed(3)
    q, pull = jax.vjp(lambda x, s: levels.learned_step(x, s, own, 2.0), x, jnp.array([0.5]))
    np.testing.assert_allclose(q, [-2.0, -0.5, 0.0, 0.5, 1.5])
    slopes = [float(pull(e)[1][0]) for e in jnp.eye(5)]
    # 2 · (-4; -1 + 1.2; 0; 1 - 0.6; 3)
    np.testing.assert_allclose(slopes, [-8.0, 0.4, 0.0, 0.8, 6.0], rtol=1e-5)
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], [0, 1, 1, 1, 0])


def test_one_bit_is_the_sign_times_the_step():
    x, s = jnp.array([-3.0, -0.2, 0.0, 0.4]), jnp.array([0.5])
    q, pull = jax.vjp(lambda x, s: levels.learned_step(x, s, levels.signed(1), 1.0), x, s)
    np.testing.assert_allclose(q, [-0.5, -0.5, 0.0, 0.5])
    np.testing.assert_array_equal(pull(jnp.ones(4))[0], [0, 1, 1, 1])
    slopes = [float(pull(e)[1][0]) for e in jnp.eye(4)]
    np.testing.assert_allclose(slopes, [-1.0, -1 + 0.4, 0.0, 1 - 0.8], rtol=1e-5)


def test_offsets_by_hand():
    # Offset -0.9 is -2 steps of 0.5 (to even: -1.8 rounds to -2): codes 0 ... 3 are -1 ... 0.5.
    x = jnp.array([-2.0, -0.6, 0.0, 0.3, 9.0])
    own, s, b = levels.unsigned(2), jnp.array([0.5]), jnp.array([-0.9])
    f = lambda x, s, b: levels.learned_offset(x, s, b, own, 1.0)  # noqa: E731
    q, pull = jax.vjp(f, x, s, b)
    np.testing.assert_allclose(q, [-1.0, -0.5, 0.0, 0.5, 0.5])
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], [0, 1, 1, 1, 0])
    steps, offsets = zip(
        *[(float(a[0]), float(b[0])) for a, b in (pull(e)[1:] for e in jnp.eye(5))], strict=True
    )
    np.testing.assert_allclose(steps, [0.0, 0.2, 0.0, 0.4, 3.0], atol=1e-6)
    assert offsets == (1, 0, 0, 0, 1)


def test_bounds_by_hand():
    x = jnp.array([-1.0, 0.0, 0.9, 2.9, 3.0, 7.0])
    own, a = levels.unsigned(2), jnp.array([3.0])
    q, pull = jax.vjp(lambda x, a: levels.learned_bound(x, a, own), x, a)
    np.testing.assert_allclose(q, [0, 0, 1, 3, 3, 3], rtol=1e-6)
    dx, da = pull(jnp.arange(1.0, 7.0))
    np.testing.assert_array_equal(dx, [0, 2, 3, 4, 0, 0])
    assert da == 5 + 6
    own = levels.choose(jnp.array([True]), 2, narrow=True)
    q, pull = jax.vjp(lambda x, a: levels.learned_bound(x, a, own), -x, a)
    np.testing.assert_allclose(q, [0, 0, 0, -3, -3, -3], rtol=1e-6)
    assert pull(jnp.ones(6))[1] == -1


@pytest.mark.parametrize("f", ["step", "offset", "bound"])
def test_float_widths_are_the_identity_and_train_nothing(f):
    x, s = normal(8) * 9, jnp.array([0.5])
    calls = {
        "step": lambda x, s, bits: levels.learned_step(x, s, levels.signed(bits), 1.0),
        "offset": lambda x, s, bits: levels.learned_offset(x, s, s, levels.unsigned(bits), 1.0),
        "bound": lambda x, s, bits: levels.learned_bound(x, s, levels.unsigned(bits)),
    }
    q, pull = jax.vjp(lambda x, s: calls[f](x, s, jnp.int32(16)), x, s)
    np.testing.assert_array_equal(q, x)
    dx, ds = pull(jnp.ones(8))
    np.testing.assert_array_equal(dx, np.ones(8))
    assert ds == 0


# Whole transforms

PARAMS = {"a": {"kernel": normal(4, 6)}, "b": {"kernel": normal(6, 3)}}
DATA = {"x": normal(8, 4), "label": jnp.arange(8) % 3}


def model():
    def apply(params, model_state, batch, key, train):
        h = jax.nn.relu(batch["x"] @ params["a"]["kernel"])
        return h @ params["b"]["kernel"], model_state

    return ej.Model(lambda key, batch: (PARAMS, {}), apply)


def states(transform, steps=2, tx=None, own=None, batch=None):
    own, tx, batch = own or model(), tx or optax.sgd(0.05), batch or DATA
    found = [ej.init_state(KEY, own, transform, tx, batch)]
    step = jax.jit(ej.make_step(own.apply, transform, nets.loss, tx))
    for _ in range(steps):
        found.append(step(found[-1], batch)[0])
    return found, step(found[-1], batch)[1]


def test_the_first_step_fits_steps_and_signs():
    (before, after, later), metrics = states(lsq(4, 3))
    assert not any(jax.tree.leaves(before.vars.extra))
    step = after.vars.extra["step"]
    for name in "ab":
        wanted = 2 * np.abs(PARAMS[name]["kernel"]).mean() / np.sqrt(7)
        np.testing.assert_allclose(step["weights"][f"{name}/kernel"], wanted, rtol=3e-4)
    wanted = 2 * np.abs(DATA["x"]).mean() / np.sqrt(3)
    np.testing.assert_allclose(step["activations"]["a/kernel"], wanted, rtol=3e-4)
    signed = after.transform["fixed"]["signed"]["activations"]
    assert (bool(signed["a/kernel"]), bool(signed["b/kernel"])) == (True, False)
    assert all(after.transform["fitted"].values())
    # From then on they are trained.
    moved = jax.tree.map(lambda a, b: bool(a != b), step, later.vars.extra["step"])
    assert all(jax.tree.leaves(moved))
    assert metrics["uncalibrated"] == 0


def test_a_step_uses_what_it_fits_and_scales_gradients():
    transform = lsq(4, 32, select="^a/")
    first, after, _ = states(transform)[0]
    s = float(after.vars.extra["step"]["weights"]["a/kernel"])
    w = np.asarray(PARAMS["a"]["kernel"])
    q, dx, ds = numpy_lsq(w, np.float32(s), -8, 7, 1 / np.sqrt(24 * 7))

    def loss(vars, state):
        forward = ej.step.forward(
            model().apply, transform, vars, {}, state, DATA, ej.Ctx(jnp.int32(1), KEY)
        )
        return nets.loss(forward.outputs, DATA)

    def by_hand(w):
        h = jax.nn.relu(DATA["x"] @ w) @ PARAMS["b"]["kernel"]
        return nets.loss(h, DATA)

    vars = after.vars._replace(model=PARAMS)
    np.testing.assert_allclose(loss(vars, after.transform), by_hand(q), rtol=1e-5)
    np.testing.assert_allclose(loss(first.vars, first.transform), by_hand(q), rtol=1e-5)
    grads, up = jax.grad(loss)(vars, after.transform), jax.grad(by_hand)(jnp.asarray(q))
    np.testing.assert_allclose(grads.model["a"]["kernel"], up * dx, rtol=1e-4, atol=1e-6)
    got = grads.extra["step"]["weights"]["a/kernel"]
    np.testing.assert_allclose(got, np.sum(np.asarray(up) * ds), rtol=1e-3)


def test_lsq_plus_begins_at_the_range():
    _, after = states(lsq_plus(4, 3), steps=1)[0]
    x, extra = np.asarray(DATA["x"]), after.vars.extra
    np.testing.assert_allclose(extra["offset"]["activations"]["a/kernel"], x.min())
    np.testing.assert_allclose(
        extra["step"]["activations"]["a/kernel"], (x.max() - x.min()) / 7, rtol=1e-6
    )
    w = np.asarray(PARAMS["a"]["kernel"])
    reach = max(abs(w.mean() - 3 * w.std()), abs(w.mean() + 3 * w.std()))
    np.testing.assert_allclose(extra["step"]["weights"]["a/kernel"], reach / 8, rtol=3e-4)


def test_pact_bounds_begin_at_the_maximum_or_as_told_and_decay():
    (_, after), metrics = states(pact(4, 4, decay=0.5), steps=1)
    alpha = after.vars.extra["alpha"]["activations"]
    np.testing.assert_array_equal(alpha["a/kernel"], np.abs(DATA["x"]).max())
    penalty = 0.25 * sum(float(a) ** 2 for a in alpha.values())
    np.testing.assert_allclose(metrics["alpha"], penalty, rtol=1e-6)
    alpha = states(pact(4, 4, alpha=10.0), steps=1)[0][1].vars.extra["alpha"]["activations"]
    assert set(map(float, alpha.values())) == {10.0}


def test_evaluation_before_the_first_step_leaves_activations_alone():
    transform = lsq(32, 2)
    state = states(transform, steps=0)[0][0]
    metrics = lambda outputs, batch: {"sum": outputs.sum(-1)}  # noqa: E731
    got = ej.make_eval(model().apply, transform, metrics)(state, DATA)["sum"]
    plain = ej.make_eval(model().apply, ej.chain(), metrics)(state, DATA)["sum"]
    assert got.total == plain.total
    assert transform.describe(PARAMS, state.vars.extra, state.transform) == {
        "a/kernel": {},
        "b/kernel": {},
    }


@pytest.mark.parametrize(("make", "own"), [(lsq, "linen"), (lsq_plus, "nnx_"), (pact, "linen")])
def test_a_cnn_trains_with_its_first_and_last_layer_at_8_bits(make, own):
    transform = ej.chain(q=make(2, 2, rules=[(r"^(conv1|head)/", Bits(8, 8))]))
    found, metrics = states(transform, 8, optax.adam(1e-2), getattr(nets, own)(), nets.BATCH)
    assert metrics["task"] < 2.05
    facts = transform.describe(found[-1].vars.model, found[-1].vars.extra, found[-1].transform)
    assert facts["conv2/kernel"]["weight_bits"] == facts["conv2/kernel"]["act_bits"] == 2
    assert facts["head/kernel"]["weight_bits"] == 8


def test_steps_have_a_label_of_their_own():
    state = states(lsq(4, 4), 0)[0][0]
    rules = [(r"^extra/.*step/", "steps"), ("", "weights")]
    labels = ej.select.label_tree(state.vars, rules)
    assert set(jax.tree.leaves(labels.extra)) == {"steps"}
    tx = optax.partition({"steps": optax.sgd(0.0), "weights": optax.sgd(0.1)}, labels)
    found, _ = states(lsq(4, 4), 3, tx)
    jax.tree.map(np.testing.assert_array_equal, found[1].vars.extra, found[3].vars.extra)
    assert np.any(found[1].vars.model["a"]["kernel"] != found[3].vars.model["a"]["kernel"])


def test_layers_of_a_scan_have_steps_of_their_own():
    f, params, x, *_ = PROGRAMS["nested scans"]
    own = ej.Model(lambda key, batch: (params, {}), lambda p, s, b, k, t: (f(p, b["x"]), s))
    batch = {"x": x, "label": jnp.zeros(len(x), jnp.int32)}
    found, _ = states(lsq(3, 3, per_channel=True), 2, own=own, batch=batch)
    step = found[-1].vars.extra["step"]
    assert step["weights"]["kernel"].shape == (2, 3, 4)
    assert np.unique(step["activations"]["kernel"]).size == 6


def test_one_program_serves_every_width():
    tx = optax.sgd(0.05)

    def final(bits):
        transform = lsq(bits, bits)
        state = ej.init_state(KEY, model(), transform, tx, DATA)
        step = ej.make_step(model().apply, transform, nets.loss, tx)
        return step(step(state, DATA)[0], DATA)[1]["loss"]

    widths = (1, 2, 4, 8, 16)
    losses = jax.jit(jax.vmap(final))(jnp.array(widths))
    for row, bits in zip(losses, widths, strict=True):
        np.testing.assert_allclose(row, jax.jit(final)(jnp.int32(bits)), rtol=1e-4)
    assert np.unique(losses).size == 5


def test_a_pruned_channel_neither_divides_by_zero_nor_moves():
    zeroed = {**PARAMS, "a": {"kernel": PARAMS["a"]["kernel"].at[:, 0].set(0.0)}}
    own = model()._replace(init=lambda key, batch: (zeroed, {}))
    _, after = states(lsq(4, 4, per_channel=True), 1, own=own)[0]
    step = after.vars.extra["step"]["weights"]["a/kernel"]
    assert np.all(step > 0)
    assert np.isfinite(jax.flatten_util.ravel_pytree(after.vars)[0]).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lsq(0, 4), SetupError, r"weights of lsq\(\) has 0 bits.*1 to 8"),
        (lambda: lsq(4, 9), SetupError, r"activations of lsq\(\) has 9 bits"),
        (lambda: lsq_plus(4, 4, rules=[("a", Bits(4, 12))]), SetupError, "rule 'a' has 12 bits"),
        (lambda: pact(decay=-1.0), ScheduleError, "decay of PACT"),
        (lambda: pact(alpha=0.0), SetupError, "alpha is 0.0"),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_rule_that_matches_nothing():
    with pytest.raises(SelectorError, match="tail"):
        states(lsq(rules=[("tail", Bits())]), 0)
