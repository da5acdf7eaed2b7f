"""Calibration: estimators by hand and against independent references, and ranges of a model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import entropy as scipy_entropy

import effjax as ej
from effjax.errors import SetupError
from effjax.quantize import calibrate, estimators, ptq, qat
from effjax.quantize.estimators import Levels, Seen

RNG = np.random.default_rng(0)


def seen(values, batches=4, symmetric=False, bins=2048):
    parts = np.array_split(values, batches)
    lows = np.array([min(p.min(), 0.0) for p in parts])
    highs = np.array([max(p.max(), 0.0) for p in parts])
    ends = (0, max(highs.max(), -lows.min())) if symmetric else (lows.min(), highs.max())
    counts, _ = np.histogram(np.abs(values) if symmetric else values, bins, ends)
    return Seen(lows, highs, counts.astype(np.float64))


NORMAL = RNG.normal(size=20_000)
TAILED = np.concatenate([RNG.exponential(size=20_000), [40.0]])


def test_minmax_and_moving_average_by_hand():
    own = Seen(np.array([-1.0, 0.0, -3.0]), np.array([2.0, 4.0, 2.0]), np.ones(4))
    assert estimators.minmax(own, Levels(8, False)) == (-3, 4)
    assert estimators.minmax(own, Levels(8, True)) == (-4, 4)
    low, high = estimators.moving_average(0.5)(own, Levels(8, False))  # weights 1/7, 2/7, 4/7
    assert low == pytest.approx(-13 / 7)
    assert high == pytest.approx(18 / 7)
    assert estimators.moving_average(0.5)(own, Levels(8, True))[1] == pytest.approx(22 / 7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_percentile_is_numpys_within_a_bin(symmetric):
    low, high = estimators.percentile(0.99)(seen(NORMAL, 4, symmetric), Levels(8, symmetric))
    if symmetric:
        wanted = np.quantile(np.abs(NORMAL), 0.99)
        assert (low, high) == (pytest.approx(-wanted, abs=5e-3), pytest.approx(wanted, abs=5e-3))
    else:
        assert low == pytest.approx(np.quantile(NORMAL, 0.005), abs=2e-2)
        assert high == pytest.approx(np.quantile(NORMAL, 0.995), abs=2e-2)


def test_the_whole_share_is_minmax():
    own = seen(NORMAL)
    found = estimators.percentile(1.0)(own, Levels(8, False))
    assert found == pytest.approx(estimators.minmax(own, Levels(8, False)))


def test_mse_of_a_normal_is_the_known_optimum():
    """The best uniform midtread quantizer of 4 bits clips a normal near 2.6 standard deviations."""
    _, high = estimators.mse(seen(NORMAL, 1, True), Levels(4, True))
    grid = np.linspace(1, 4, 301)
    errors = [np.mean((NORMAL - Levels(4, True).rounded(NORMAL, -h, h)) ** 2) for h in grid]
    assert high == pytest.approx(grid[np.argmin(errors)], abs=0.1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_no_worse_than_any_other(bits, symmetric):
    own, levels = seen(TAILED, 4, symmetric), Levels(bits, symmetric)

    def error(ends):
        return np.mean((TAILED - levels.rounded(TAILED, *ends)) ** 2)

    found = error(estimators.mse(own, levels))
    for name, other in estimators.ESTIMATORS.items():
        assert found <= 1.02 * error(other(own, levels)), name


def test_entropy_is_a_search_by_scipys_divergence():
    own, groups = seen(TAILED, 1, True, bins=64), 8
    counts = own.counts.copy()
    counts[0] = counts[1]
    best = {}
    for i in range(groups, 65):
        p = np.append(counts[: i - 1], counts[i - 1 :].sum())
        q = np.zeros(i)
        for part in np.split(np.arange(i), np.flatnonzero(np.diff(np.arange(i) * groups // i)) + 1):
            full = part[counts[part] > 0]
            if len(full):
                q[full] = counts[part].sum() / len(full)
        best[i] = scipy_entropy(p, q)
    wanted = own.edges(True)[min(best, key=best.get)]
    assert estimators.entropy(own, Levels(4, True)) == pytest.approx((-wanted, wanted))
    assert wanted < 40


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16, name="one")(x))
        return nn.Dense(3, name="two")(x)


MODEL = ej.from_linen(Net(), "x")
BATCHES = [{"x": RNG.normal(size=(32, 8)).astype(np.float32)} for _ in range(3)]


def start(transform):
    return ej.init_state(jax.random.key(0), MODEL, transform, optax.identity(), BATCHES[0])


def hidden(state, batch):
    own = state.vars.model["one"]
    return np.maximum(batch["x"] @ np.asarray(own["kernel"]) + np.asarray(own["bias"]), 0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_those_of_the_data(symmetric):
    transform = ej.chain(
        quant=qat(16, 8, ranges="static", symmetric=symmetric, rules=[("", (32, 8))])
    )
    state = calibrate(MODEL.apply, transform, start(transform), BATCHES, "minmax")
    own = state.transform["quant"]
    inputs = np.concatenate([b["x"] for b in BATCHES])
    middle = np.concatenate([hidden(state, b) for b in BATCHES])
    if symmetric:
        assert own["ranges"]["one/kernel"] == np.abs(inputs).max()
    else:
        assert own["ranges"]["one/kernel"] == inputs.max()
        assert own["lows"]["one/kernel"] == -inputs.min()
        assert own["lows"]["two/kernel"] == 0
    np.testing.assert_allclose(own["ranges"]["two/kernel"], middle.max(), rtol=1e-5)
    assert set(map(int, own["count"].values())) == {3}
    again = calibrate(MODEL.apply, transform, state, BATCHES[:1], "minmax").transform["quant"]
    assert again["ranges"]["one/kernel"] <= own["ranges"]["one/kernel"]  # the former are forgotten


def test_layers_of_a_scan_have_ranges_of_their_own():
    def apply(params, model_state, batch, key, train):
        def one(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(one, batch["x"], params["w"])[0], model_state

    w = RNG.normal(size=(3, 8, 8)).astype(np.float32)
    model = ej.Model(lambda key, batch: ({"w": jnp.asarray(w)}, {}), apply)
    transform = ej.chain(quant=qat(8, 8, select="w", ranges="static"))
    state = ej.init_state(jax.random.key(0), model, transform, optax.identity(), BATCHES[0])
    found = calibrate(apply, transform, state, BATCHES, "minmax").transform["quant"]
    ranges = np.asarray(found["ranges"]["w"])
    assert ranges.shape == (3,)
    assert ranges[0] == max(np.abs(b["x"]).max() for b in BATCHES)
    assert np.all(ranges[1:] <= 1)


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_ptq_of_eight_bits_is_near_the_float_model(estimator):
    params, model_state = MODEL.init(jax.random.key(0), BATCHES[0])
    small = ptq(MODEL, params, model_state, BATCHES, 8, 8, estimator=estimator)
    evaluate = ej.make_eval(MODEL.apply, small.transform, lambda y, b: {"y": y[:, 0]})
    plain = ej.make_eval(MODEL.apply, ej.chain(), lambda y, b: {"y": y[:, 0]})
    state = small.state._replace(transform={})
    for batch in BATCHES:
        wanted = float(plain(state, batch)["y"].value)
        assert float(evaluate(small.state, batch)["y"].value) == pytest.approx(wanted, abs=0.05)
    ej.quantize.integer(MODEL.apply, small.transform, small.state, BATCHES[0])
    jax.tree.map(np.testing.assert_array_equal, small.state.vars.model, params)


def test_errors():
    static = ej.chain(quant=qat(8, 8, ranges="static"))
    state = start(static)
    with pytest.raises(SetupError, match="no batches"):
        calibrate(MODEL.apply, static, state, [])
    with pytest.raises(SetupError, match="no batches"):
        ptq(MODEL, state.vars.model, {}, [])
    with pytest.raises(SetupError, match="there are"):
        calibrate(MODEL.apply, static, state, BATCHES, "median")
    with pytest.raises(SetupError, match="not finite"):
        calibrate(MODEL.apply, static, state, [{"x": np.full((2, 8), np.nan, np.float32)}])
    with pytest.raises(SetupError, match="is 0 for all"):
        calibrate(MODEL.apply, static, state, [{"x": np.zeros((2, 8), np.float32)}])
    dynamic = ej.chain(quant=qat(8, 8))
    with pytest.raises(SetupError, match="no static ranges"):
        calibrate(MODEL.apply, dynamic, start(dynamic), BATCHES)
    with pytest.raises(SetupError, match="share of values"):
        estimators.percentile(99.9)
    with pytest.raises(SetupError, match="decay"):
        estimators.moving_average(1.0)
