"""Tests of one bit, ternary, DoReFa, quant-noise and soft-to-hard annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SetupError
from effjax.quantize import (
    Bits,
    binary,
    dorefa,
    formats,
    lowbit,
    numerics,
    qat,
    quant_noise,
    soft_to_hard,
    ternary,
)
from effjax.quantize.anneal import soft_staircase
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X, normal

KEY = jax.random.key(0)
EYE = jnp.eye(4)
PARAMS = {"kernel": SQUARE}


def linear(params, x):
    return x @ params["kernel"]


def init(f, transform, params, x):
    apply = lambda p, s, x, k, t: (f(p, x), s)  # noqa: E731
    return transform.init(KEY, params, ej.Setup(apply, {}, x))


def run(f, transform, params, x, step=0, train=True, key=KEY):
    extra, state = init(f, transform, params, x)

    def forward(params, model_state, x, key, train):
        return f(params, x), model_state, {}

    ctx = ej.Ctx(jnp.int32(step), key, train=train)
    return transform.wrap(forward, extra, state, ctx)(params, {}, x, KEY, train)[0]


# Arithmetic


def test_signs_by_hand():
    x = jnp.array([[1.0, -0.5], [-3.0, 0.0]])
    np.testing.assert_allclose(lowbit.signs(x), [[1.5, -1.5], [-1.5, 0.0]])
    np.testing.assert_allclose(lowbit.signs(x, (1,)), [[2.0, -0.5], [-2.0, 0.0]])
    grad = jax.grad(lambda x: lowbit.signs(x).sum())(x)
    np.testing.assert_array_equal(grad, [[1, 1], [0, 1]])
    grad = jax.grad(lambda x: lowbit.signs(x, clipped=False).sum())(x)
    np.testing.assert_array_equal(grad, np.ones((2, 2)))


def test_ternary_by_hand():
    x = jnp.array([2.0, -1.0, 0.5, -0.1])  # 0.7 mean = 0.63
    q, pull = jax.vjp(lowbit.ternary_values, x)
    np.testing.assert_allclose(q, [1.5, -1.5, 0.0, 0.0])
    np.testing.assert_array_equal(pull(jnp.ones(4))[0], np.ones(4))


@pytest.mark.parametrize("axes", [(), (1,)])
def test_they_are_the_stored_formats(axes):
    w = normal(6, 4)
    for f, kind in ((lowbit.signs, "int1"), (lowbit.ternary_values, "ternary")):
        stored = formats.decode(formats.encode(w, kind, per=axes))
        np.testing.assert_allclose(f(w, axes), stored, rtol=1e-6)


def test_zeros_have_no_scale_to_divide_by():
    for f in (lowbit.signs, lowbit.ternary_values):
        np.testing.assert_array_equal(f(jnp.zeros((2, 2)), (1,)), np.zeros((2, 2)))


def dorefa_by_hand(w, bits):
    t, n = np.tanh(w), 2**bits - 1
    return 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights(bits):
    w = np.asarray(SQUARE)
    transform = dorefa(bits, 32)
    np.testing.assert_allclose(run(linear, transform, PARAMS, EYE), dorefa_by_hand(w, bits), 1e-5)
    up = normal(4, 4)
    grad = jax.grad(lambda p: (run(linear, transform, p, EYE) * up).sum())(PARAMS)["kernel"]

    def smooth(w):
        t = jnp.tanh(w)
        return (t / jnp.abs(t).max() * up).sum()

    np.testing.assert_allclose(grad, jax.grad(smooth)(SQUARE), rtol=1e-4, atol=1e-5)


def test_dorefa_of_one_bit_and_of_zeros():
    w = SQUARE.at[0, 0].set(0.0)
    got = run(linear, dorefa(1, 32), {"kernel": w}, EYE)
    np.testing.assert_allclose(got, np.sign(w) * np.abs(w).sum() / 15, rtol=1e-5)
    assert run(linear, dorefa(4, 32), {"kernel": w}, EYE)[0, 0] == 0


def test_dorefa_activations_by_hand():
    x, params = jnp.array([[0.0, 0.3, 0.6, 1.7]]), {"kernel": EYE}
    outputs, pull = jax.vjp(lambda x: run(linear, dorefa(32, 2), params, x), x)
    np.testing.assert_allclose(outputs, [[0.0, 1 / 3, 2 / 3, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones((1, 4)))[0], [[1, 1, 1, 0]])
    got = run(linear, dorefa(32, 3), params, -x)  # negative: -3 ... 3 thirds
    np.testing.assert_allclose(got, [[0.0, -1 / 3, -2 / 3, -1.0]], rtol=1e-6)


def test_xnor_has_a_scale_for_each_example():
    x = jnp.array([[1.0, -3.0], [0.2, 0.2]])
    outputs, pull = jax.vjp(lambda x: run(linear, binary(32, 1), {"kernel": jnp.eye(2)}, x), x)
    np.testing.assert_allclose(outputs, [[2.0, -2.0], [0.2, 0.2]], rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones((2, 2)))[0], [[1, 0], [1, 1]])


def test_rules_mix_one_bit_ternary_and_grids():
    f, params, x, *_ = PROGRAMS["two"]
    grid = lambda w: numerics.fake_quant(  # noqa: E731
        w, numerics.scale_of(numerics.absmax(w, (1,)), numerics.grid(8)), numerics.grid(8)
    )
    a, b = params["a"]["kernel"], params["b"]["kernel"]
    for transform, first, bits in (
        (binary(rules=[("^b/", Bits(8, 32))]), lowbit.signs(a, (1,)), 1),
        (ternary(rules=[("^b/", Bits(8, 32))]), lowbit.ternary_values(a, (1,)), 2),
    ):
        wanted = jnp.tanh(jnp.tanh(x @ first) @ grid(b))
        np.testing.assert_allclose(run(f, transform, params, x), wanted, rtol=1e-5)
        facts = transform.describe(params, *init(f, transform, params, x))
        assert facts["a/kernel"]["weight_bits"] == bits
        assert facts["b/kernel"]["weight_bits"] == 8


def test_widths_may_be_traced():
    rows = jax.vmap(lambda b: run(linear, binary(b, 32), PARAMS, EYE))(jnp.array([1, 3, 16]))
    for row, bits in zip(rows, (1, 3, 16), strict=True):
        np.testing.assert_allclose(row, run(linear, binary(bits, 32), PARAMS, EYE), rtol=1e-6)


# Quant-noise


def test_noise_quantizes_the_share_it_is_told_in_whole_blocks():
    w = normal(16, 8)
    params, x = {"kernel": w}, jnp.eye(16)
    whole = run(linear, qat(3, 32), params, x)
    transform = quant_noise(3, rate=0.25, block=4)
    one = jax.jit(lambda key: run(linear, transform, params, x, key=key))
    draws = np.stack([one(jax.random.key(i)) for i in range(50)])
    quantized, kept = draws == np.asarray(whole), draws == np.asarray(w)
    assert np.all(quantized | kept)
    whole_blocks = quantized.reshape(50, 4, 4, 8).all(axis=2)
    assert np.all(whole_blocks | kept.reshape(50, 4, 4, 8).all(axis=2))
    assert abs(whole_blocks.mean() - 0.25) < 0.04
    assert len({d.tobytes() for d in draws}) > 45
    np.testing.assert_array_equal(run(linear, transform, params, x, train=False), whole)
    grad = jax.grad(lambda p: run(linear, transform, p, x).sum())(params)["kernel"]
    np.testing.assert_array_equal(grad, np.ones((16, 8)))


@pytest.mark.parametrize(("rate", "other"), [(1.0, qat(3, 32)), (0.0, qat(32, 32))])
def test_all_or_nothing(rate, other):
    got = run(linear, quant_noise(3, rate=rate), PARAMS, X)
    np.testing.assert_array_equal(got, run(linear, other, PARAMS, X))


def test_layers_of_a_scan_draw_for_themselves():
    params = PROGRAMS["scan of layers"].params
    same = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params)

    def one(params, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, params["kernel"])[1]

    rows = run(one, quant_noise(2, rate=0.5), same, EYE)
    assert np.any(rows[0] != rows[1])


# Soft to hard


def test_the_staircase_by_hand():
    grid, s = numerics.grid(3), jnp.ones((1,))
    x = jnp.array([0.0, 1.0, -2.0, 0.5, 0.75, -0.25])
    k = np.log(2 / 0.2 - 1)
    step = 0.5 * np.tanh(k * 0.25) / np.tanh(k * 0.5)
    got = soft_staircase(x, s, grid, jnp.float32(0.2))
    np.testing.assert_allclose(got, [0, 1, -2, 0.5, 0.5 + step, -0.5 + step], rtol=1e-5)
    np.testing.assert_allclose(np.tanh(k / 2), 0.8, rtol=1e-6)
    # Towards softness 1 it is the identity, towards 0 rounding; zero is exact throughout.
    np.testing.assert_allclose(soft_staircase(x, s, grid, jnp.float32(0.99)), x, atol=1e-3)
    hard = soft_staircase(jnp.array([0.7, -0.2]), s, grid, jnp.float32(1e-6))
    np.testing.assert_allclose(hard, [1.0, 0.0], atol=0.03)
    assert got[0] == 0


def test_annealing_sharpens_and_ends_in_rounding():
    transform = soft_to_hard(2, 32, begin=2, end=10, initial=0.9, final=0.01)
    hard = run(linear, qat(2, 32), PARAMS, EYE)
    away = [
        float(jnp.abs(run(linear, transform, PARAMS, EYE, step) - hard).max())
        for step in (0, 2, 6, 9, 10, 11)
    ]
    assert away[0] == away[1] > away[2] > away[3] > away[4] == away[5] == 0
    np.testing.assert_array_equal(run(linear, transform, PARAMS, EYE, 0, train=False), hard)
    grad = jax.grad(lambda p: run(linear, transform, p, EYE, 6).sum())(PARAMS)["kernel"]
    scale = jnp.abs(SQUARE).max(axis=0)
    softness = jnp.float32(np.sqrt(0.9 * 0.01))
    soft = lambda w: soft_staircase(w, scale[None], numerics.grid(2), softness).sum()  # noqa: E731
    np.testing.assert_allclose(grad, jax.grad(soft)(SQUARE), rtol=1e-3, atol=1e-4)


# Whole steps


@pytest.mark.parametrize(
    "transform",
    [binary(1, 1, rules=[("head", Bits(8, 8))]), dorefa(1, 2, gradients=6), soft_to_hard(2, end=6)],
    ids=["xnor", "dorefa", "soft_to_hard"],
)
def test_a_cnn_trains(transform):
    model, tx, chained = nets.linen(), optax.adam(1e-2), ej.chain(q=transform)
    state = ej.init_state(KEY, model, chained, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chained, nets.loss, tx))
    losses = []
    for _ in range(12):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert step._cache_size() <= 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: binary(0), SetupError, r"weights of binary\(\) has 0 bits.*1 to 8"),
        (lambda: ternary(1), SetupError, r"activations of ternary\(\) has 1 bits.*2 to 8"),
        (lambda: dorefa(4, 4, gradients=1), SetupError, "gradients of dorefa"),
        (lambda: quant_noise(1), SetupError, r"weights of quant_noise\(\) has 1 bits"),
        (lambda: quant_noise(4, rate=1.5), ScheduleError, "rate of quant-noise is 1.5"),
        (lambda: quant_noise(4, block=0), SetupError, "block is 0"),
        (lambda: soft_to_hard(4, begin=5, end=2), ScheduleError, "soft-to-hard"),
        (lambda: soft_to_hard(4, initial=0.1, final=0.2), ScheduleError, "softness"),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_block_that_does_not_divide():
    with pytest.raises(SetupError, match="a block of 3 does not divide axis 0 of kernel"):
        init(linear, quant_noise(4, block=3), PARAMS, X)


def test_integer_leaves_are_no_weights_to_round():
    params = {"kernel": jnp.ones((4, 4), jnp.int32)}
    with pytest.raises(ej.errors.SetupError, match="kernel, which is int32"):
        init(lambda p, x: x @ p["kernel"], binary(), params, jnp.ones((2, 4), jnp.int32))
