"""Tests of what `qat` does on request: asymmetric ranges, tokens, tiles, stochastic rounding, a
quantized backward pass, frozen ranges, one bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import formats, levels, numerics, qat
from effjax.quantize.backward import round_gradient
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X, dense, normal

KEY = jax.random.key(0)


def linear(params, x):
    return x @ params["kernel"]


def init(f, transform, params, x):
    apply = lambda p, s, x, k, t: (f(p, x), s)  # noqa: E731
    return transform.init(KEY, params, ej.Setup(apply, {}, x))[1]


def run(f, transform, params, x, state=None, step=0, train=True, key=KEY):
    state = init(f, transform, params, x) if state is None else state

    def forward(params, model_state, x, key, train):
        return f(params, x), model_state, {}

    ctx = ej.Ctx(jnp.int32(step), key, train=train)
    outputs, _, aux = transform.wrap(forward, {}, state, ctx)(params, {}, x, KEY, train)
    return outputs, aux


EYE = {"kernel": jnp.eye(4)}


def test_asymmetric_by_hand():
    # 2 bits from -1 to 2: steps of 1, codes -1 ... 2.
    x = jnp.array([[-1.0, 0.0, 0.4, 2.0]])
    outputs, aux = run(linear, qat(32, 2, symmetric=False), EYE, x)
    np.testing.assert_allclose(outputs, [[-1.0, 0.0, 0.0, 2.0]])
    assert (aux["ranges"]["kernel"], aux["lows"]["kernel"]) == (2.0, 1.0)
    # What is never negative has all codes: 0 ... 3.
    outputs, _ = run(linear, qat(32, 2, symmetric=False), EYE, jnp.array([[0.0, 1.1, 2.2, 3.0]]))
    np.testing.assert_allclose(outputs, [[0.0, 1.0, 2.0, 3.0]])


def test_asymmetric_is_the_stored_format():
    x = normal(8, 4) + 0.7
    outputs, _ = run(linear, qat(32, 5, symmetric=False), EYE, x)
    stored = formats.decode(formats.encode(x, "int5", symmetric=False))
    np.testing.assert_allclose(outputs, stored, rtol=1e-5, atol=1e-6)


def test_asymmetric_static_ranges_average_both_ends_and_clip():
    transform = qat(32, 4, symmetric=False, ranges="static", decay=0.5)
    state = init(linear, transform, EYE, X)
    for factor in (1.0, 3.0):
        _, aux = run(linear, transform, EYE, factor * X, state)
        _, _, state = transform.update(None, None, state, None, aux, None)
    for kind, end in (("ranges", X.max()), ("lows", -X.min())):
        np.testing.assert_allclose(state[kind]["kernel"], (0.5 * end + 3 * end) / 1.5, rtol=1e-6)
    grad = jax.grad(lambda x: run(linear, transform, EYE, x, state, 3, False)[0].sum())(9 * X)
    low, high = -float(state["lows"]["kernel"]), float(state["ranges"]["kernel"])
    step = (high - low) / 15
    inside = (round(low / step) * step <= 9 * X) & ((round(low / step) + 15) * step >= 9 * X)
    np.testing.assert_array_equal(grad, inside.astype(np.float32))
    assert 0 < inside.mean() < 1


@pytest.mark.parametrize(("clipped", "wanted"), [(False, 1.0), (True, 0.0), (None, 0.0)])
def test_clipped_gradients_are_a_choice(clipped, wanted):
    transform = qat(32, 4, ranges="static", clipped=clipped)
    state = init(linear, transform, EYE, X)
    state = {**state, "ranges": {"kernel": jnp.float32(1)}, "count": {"kernel": jnp.int32(1)}}
    grad = jax.grad(lambda x: run(linear, transform, EYE, x, state, 0, False)[0].sum())
    np.testing.assert_array_equal(
        grad(jnp.array([[0.5, 2.0, -3.0, 1.0]])), [[1, wanted, wanted, 1]]
    )


def test_a_scale_for_each_token():
    x = X * jnp.logspace(-2, 2, 8)[:, None]
    outputs, aux = run(linear, qat(32, 4, per_token=True), EYE, x)
    g = numerics.grid(4)
    wanted = numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x, (0,)), g), g)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-6)
    assert aux["ranges"]["kernel"] == jnp.abs(x).max()
    lopsided = qat(32, 2, per_token=True, symmetric=False)
    rows = jnp.array([[-1.0, 0.0, 0.4, 2.0], [0.0, 11.0, 22.0, 30.0]])
    wanted = [[-1.0, 0.0, 0.0, 2.0], [0.0, 10.0, 20.0, 30.0]]
    np.testing.assert_allclose(run(linear, lopsided, EYE, rows)[0], wanted, rtol=1e-6)


def test_tiles_of_channels():
    w = normal(8, 3)
    params = {"kernel": w}
    transform = qat(3, 32, tile=2)
    state = init(linear, transform, params, jnp.eye(8))
    assert state["scales"]["kernel"] == 12
    stored = formats.decode(formats.encode(w, "int3", per="channel", tiles={0: 2}))
    outputs, _ = run(linear, transform, params, jnp.eye(8), state)
    np.testing.assert_allclose(outputs, stored, rtol=1e-6)
    whole = qat(3, 32, tile=4, per_channel=False)
    stored = formats.decode(formats.encode(w, "int3", tiles={0: 4}))
    np.testing.assert_allclose(run(linear, whole, params, jnp.eye(8))[0], stored, rtol=1e-6)


def test_tiles_of_a_convolution_run_along_its_input_features():
    w = normal(3, 3, 4, 2)
    got = numerics.tiled_absmax(w, (3,), 2, 2)
    wanted = np.abs(w).reshape(9, 2, 2, 2).max(axis=(0, 2))
    np.testing.assert_array_equal(got[0, 0], np.repeat(wanted, 2, axis=0))


def test_stochastic_rounding_is_right_on_average_and_nearest_in_evaluation():
    transform = qat(4, 4, rounding="stochastic")
    params = {"kernel": SQUARE}
    state = init(linear, transform, params, jnp.eye(4))
    one = jax.jit(lambda key: run(linear, transform, params, jnp.eye(4), state, key=key)[0])
    draws = jnp.stack([one(jax.random.key(i)) for i in range(300)])
    steps = jnp.abs(SQUARE).max(axis=0) / 7
    assert np.all(np.abs(draws.mean(axis=0) - SQUARE) < 0.15 * steps)
    assert np.all(np.abs(draws - SQUARE) < 1.001 * steps)
    evaluated, _ = run(linear, transform, params, jnp.eye(4), state, train=False)
    plain, _ = run(linear, qat(4, 4), params, jnp.eye(4), train=False)
    np.testing.assert_array_equal(evaluated, plain)
    grad = jax.grad(lambda p: run(linear, transform, p, jnp.eye(4), state)[0].sum())(params)
    np.testing.assert_array_equal(grad["kernel"], np.ones((4, 4)))


def test_layers_of_a_scan_round_with_keys_of_their_own():
    f, params, x, *_ = PROGRAMS["nested scans"]
    transform = qat(4, 4, rounding="stochastic", ranges="static", gradients=8)
    state = init(f, transform, params, x)
    assert state["layer"]["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    grad = jax.jit(jax.grad(lambda p: run(f, transform, p, x, state)[0].sum()))(params)
    assert np.isfinite(grad["kernel"]).all()


def test_gradients_are_rounded_without_bias():
    up = normal(6, 4)

    @jax.jit
    def back(key):
        return jax.vjp(lambda y: round_gradient(y, 4, key, (0,)), jnp.zeros((6, 4)))[1](up)[0]

    draws = jnp.stack([back(jax.random.key(i)) for i in range(300)])
    steps = jnp.abs(up).max(axis=1, keepdims=True) / 7
    np.testing.assert_allclose(draws / steps, jnp.round(draws / steps), atol=1e-4)
    assert np.all(np.abs(draws.mean(axis=0) - up) < 0.15 * steps)
    y, pull = jax.vjp(lambda y: round_gradient(y, jnp.int32(16), KEY), up)
    np.testing.assert_array_equal(y, up)
    np.testing.assert_array_equal(pull(up)[0], up)


def test_the_backward_pass_of_a_site_sees_rounded_gradients_alone():
    params = {"kernel": SQUARE}
    transform = qat(32, 32, gradients=3)
    state = init(linear, transform, params, X)
    up = normal(8, 4)
    grad = jax.grad(lambda x: (run(linear, transform, params, x, state)[0] * up).sum())(X)
    rounded = grad @ jnp.linalg.inv(SQUARE.T)
    steps = jnp.abs(up).max(axis=1, keepdims=True) / 3
    np.testing.assert_allclose(rounded / steps, jnp.round(rounded / steps), atol=2e-3)
    assert np.any(np.abs(rounded - up) > 0.01)


@pytest.mark.parametrize(("kind", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_gradients_in_8_bit_floats_are_in_the_format_and_right_on_average(kind, largest):
    """The first is the format's largest number, so that the scale is 1."""
    small = largest * 2.0 ** -jnp.arange(1.0, 40.0) * 1.1  # below the smallest, too
    up = jnp.concatenate([jnp.array([largest, 0.0, -3.3, 0.7]), small])

    @jax.jit
    def back(key):
        return jax.vjp(lambda y: round_gradient(y, kind, key), jnp.zeros(up.shape))[1](up)[0]

    draws = jax.vmap(back)(jax.random.split(KEY, 500))
    dtype = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[kind]
    np.testing.assert_array_equal(draws.astype(dtype).astype(jnp.float32), draws)
    np.testing.assert_array_equal(draws[:, :2], jnp.broadcast_to(up[:2], (500, 2)))
    least = float(jnp.finfo(dtype).smallest_subnormal)
    apart = jnp.maximum(jnp.abs(up) * 2.0 ** -jnp.finfo(dtype).nmant, least)
    assert np.all(np.abs(draws - up) <= apart)  # one of the two neighbours
    assert np.all(np.abs(draws.mean(axis=0) - up) < 0.1 * apart)
    assert np.all(draws.std(axis=0)[2:6] > 0)


def test_scales_of_8_bit_float_gradients_are_each_examples():
    up = jnp.array([[448.0, 1.0], [4.48e-6, 1e-8]])
    back = jax.vjp(lambda y: round_gradient(y, "e4m3", KEY, (0,)), jnp.zeros((2, 2)))[1](up)[0]
    np.testing.assert_allclose(back[:, 0], up[:, 0], rtol=1e-6)
    np.testing.assert_allclose(back[:, 1], up[:, 1], rtol=0.15)


@pytest.mark.parametrize("gradients", ["e4m3", "e5m2"])
def test_the_backward_pass_in_8_bit_floats_trains(gradients):
    transform = ej.chain(q=qat(8, 8, gradients=gradients))
    model, tx = nets.linen(), optax.adam(1e-2)
    state = ej.init_state(KEY, model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    losses = []
    for _ in range(10):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]


def test_residuals_by_hand():
    """x is clipped at 1, where the gradient is 0 whatever is kept."""
    params = {"kernel": SQUARE}
    up = normal(8, 4)

    def gradients(residuals):
        transform = qat(2, 3, ranges="static", residuals=residuals)
        state = init(linear, transform, params, X)
        state |= {"ranges": {"kernel": jnp.float32(1.0)}, "count": {"kernel": jnp.int32(1)}}

        def objective(params, x):
            outputs, _ = run(linear, transform, params, x, state, train=False)
            return (outputs * up).sum(), outputs

        (dw, dx), outputs = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, X)
        return dw["kernel"], dx, outputs

    g, one = numerics.grid(3), jnp.ones((1, 1))
    q = numerics.fake_quant(X, numerics.scale_of(one, g), g)
    w = ej.quantize.lowbit.rounded(SQUARE, 2, (1,))
    inside = jnp.abs(X) <= 1.0
    assert not inside.all()
    rounded, plain = gradients("rounded"), gradients("float")
    np.testing.assert_array_equal(rounded[2], plain[2])  # the same values
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(rounded[0], q.T @ up, **close)
    np.testing.assert_allclose(plain[0], X.T @ up, **close)
    np.testing.assert_allclose(rounded[1], jnp.where(inside, up @ w.T, 0), **close)
    np.testing.assert_allclose(plain[1], jnp.where(inside, up @ SQUARE.T, 0), **close)


@pytest.mark.parametrize("name", ["scan of layers", "embedding", "rnn"])
def test_residuals_leave_the_values_of_every_kind_of_site(name):
    f, params, x, *_ = PROGRAMS[name]
    given = {"select": r"(kernel|embedding)$", "embeddings": True} if name == "embedding" else {}
    values = [run(f, qat(3, 4, residuals=r, **given), params, x)[0] for r in ("rounded", "float")]
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_frozen_ranges_stay():
    transform = qat(8, 8, ranges="static", freeze=2)
    params = {"kernel": SQUARE}
    state = init(dense, transform, params, X)
    found = []
    for step in range(4):
        x = (step + 1.0) * X
        outputs, aux = run(dense, transform, params, x, state, step)
        ctx = ej.Ctx(jnp.int32(step), KEY)
        _, _, state = transform.update(None, None, state, None, aux, ctx)
        found.append((float(state["ranges"]["kernel"]), int(state["count"]["kernel"])))
    assert found[1] == found[2] == found[3]
    assert found[0][0] < found[1][0]
    evaluated, _ = run(dense, transform, params, 4 * X, state, 9, False)
    np.testing.assert_allclose(outputs, evaluated, rtol=1e-6)


def test_one_bit_weights():
    params = {"kernel": jnp.array([[1.0, -0.5], [-3.0, 0.0]])}
    wanted = [[2.0, -0.5], [-2.0, 0.0]]
    for bits in (1, jnp.int32(1)):
        np.testing.assert_allclose(run(linear, qat(bits, 32), params, jnp.eye(2))[0], wanted)
    grad = jax.grad(lambda p: run(linear, qat(jnp.int32(1), 32), p, jnp.eye(2))[0].sum())(params)
    np.testing.assert_array_equal(grad["kernel"], np.ones((2, 2)))


def test_all_of_it_in_a_step_that_compiles_once():
    transform = ej.chain(
        q=qat(4, 4, symmetric=False, ranges="static", rounding="stochastic", gradients=8, freeze=3)
    )
    model, tx = nets.linen(), optax.adam(1e-2)
    state = ej.init_state(KEY, model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    losses = []
    for _ in range(10):
        state, metrics = step(state, nets.BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert step._cache_size() <= 1


def test_ranges_between_two_ends_give_no_gradient_to_them():
    own = levels.unsigned(3)
    x, low, high = jnp.array([-2.0, 0.1, 5.0]), jnp.array([-1.0]), jnp.array([3.0])
    pull = jax.vjp(lambda x, a, b: levels.between(x, a, b, own, True), x, low, high)[1]
    dx, da, db = pull(jnp.ones(3))
    np.testing.assert_array_equal(dx, [0, 1, 0])
    assert (float(da[0]), float(db[0])) == (0, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rounding": "up"}, "'up'.*'nearest' or 'stochastic'"),
        ({"per_token": True, "ranges": "static"}, "per_token"),
        ({"freeze": 3}, "freeze is 3"),
        ({"tile": 0}, "tile is 0"),
        ({"tile": 2, "weights": 1}, "one bit"),
        ({"gradients": 1}, "gradients of qat.* has 1 bits"),
        ({"gradients": "e3m4"}, "gradients of qat.*'e3m4'"),
        ({"residuals": "none"}, "residuals are 'none'"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(SetupError, match=message):
        qat(**kwargs)


def test_a_tile_that_does_not_divide():
    with pytest.raises(SetupError, match=r"a tile of 3 does not divide axis 0 of kernel.*\(4, 4\)"):
        init(linear, qat(tile=3), {"kernel": SQUARE}, X)


@pytest.mark.parametrize(
    "transform",
    [qat(symmetric=False), qat(per_token=True), ej.quantize.ternary(8), ej.quantize.dorefa(4, 32)],
    ids=["asymmetric", "per_token", "ternary", "dorefa"],
)
def test_an_integer_program_refuses_grids_that_it_would_misread(transform):
    model, tx = nets.raw(), optax.sgd(0.1)
    state = ej.init_state(KEY, model, transform, tx, nets.BATCH)
    with pytest.raises(SetupError, match="takes grids that are symmetric"):
        ej.quantize.integer(model.apply, transform, state, nets.BATCH)


QUANTIZERS = {
    "qat": ej.quantize.qat,
    "lsq": ej.quantize.lsq,
    "pact": ej.quantize.pact,
    "dorefa": ej.quantize.dorefa,
    "binary": ej.quantize.binary,
    "ternary": ej.quantize.ternary,
    "quant_noise": lambda: ej.quantize.quant_noise(4),
    "soft_to_hard": lambda: ej.quantize.soft_to_hard(end=3),
    "bit_search": lambda: ej.quantize.bit_search(3.0, (2, 4)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_selected_matrix_of_integers_is_refused_and_others_are_left_alone(name):
    def apply(params, model_state, batch, key, train):
        return batch @ params["kernel"].astype(jnp.float32) + params["offset"], model_state

    def state(params):
        model = ej.Model(lambda key, batch: (params, {}), apply)
        given = ej.chain(quant=QUANTIZERS[name]()), optax.identity(), jnp.ones((4, 3))
        return ej.init_state(KEY, model, *given, params=params, model_state={})

    with pytest.raises(SetupError, match="chooses kernel, which is int32"):
        state({"kernel": jnp.ones((3, 2), jnp.int32), "offset": jnp.int32(3)})
    kept = state({"kernel": jnp.ones((3, 2)), "offset": jnp.int32(3)})
    assert kept.vars.model["offset"].dtype == jnp.int32
