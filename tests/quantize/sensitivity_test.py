"""Tests of the sensitivities that mixed precision is chosen by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import SelectorError, SetupError, SiteError
from effjax.quantize import (
    Trace,
    by_leaf,
    drop_one,
    hawq,
    hessian_traces,
    objective_of,
    qat,
    rounding_errors,
)
from effjax.select import leaves
from tests import nets
from tests.programs import PROGRAMS, normal

KEY = jax.random.key(0)


def small(params, x):
    hidden = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"]


PARAMS = {
    "one": {"kernel": normal(3, 4), "bias": normal(4)},
    "two": {"kernel": normal(4, 2)},
}


def squares(params, batch):
    return jnp.mean((small(params, batch["x"]) - batch["y"]) ** 2)


BATCHES = [{"x": normal(8, 3), "y": normal(8, 2)} for _ in range(2)]


def exact_traces(path):
    """The trace of a leaf's block of the Hessian itself, over the batches."""

    def own(leaf, batch):
        return squares(ej.select.replace(PARAMS, {path: leaf}), batch)

    leaf = leaves(PARAMS)[path]
    blocks = [jax.hessian(own)(leaf, batch).reshape(leaf.size, -1) for batch in BATCHES]
    return np.mean([np.trace(block) for block in blocks])


def test_traces_are_those_of_the_hessian():
    found = hessian_traces(squares, PARAMS, BATCHES, KEY, pattern="", probes=2048, together=256)
    assert set(found) == {"one/kernel", "one/bias", "two/kernel"}
    for path, trace in found.items():
        assert trace.size == leaves(PARAMS)[path].size
        assert abs(trace.mean - exact_traces(path)) < 4 * trace.error
        # Tight enough to tell a leaf's trace from half of it.
        assert trace.error < 0.1 * abs(exact_traces(path))


def test_of_a_separable_quadratic_one_probe_is_exact():
    curvature = jnp.arange(1.0, 7.0).reshape(2, 3)

    def f(params, batch):
        return 0.5 * jnp.sum(curvature * params["kernel"] ** 2) + jnp.sum(params["other"] ** 4)

    params = {"kernel": normal(2, 3), "other": jnp.zeros(2)}
    found = hessian_traces(f, params, [{}], KEY, probes=2, together=1)
    assert found == {"kernel": Trace(21.0, 0.0, 6)}
    assert found["kernel"].mean == curvature.sum()


def test_traces_of_a_cnn_in_evaluation():
    model = nets.linen()
    params, state = model.init(KEY, nets.BATCH)
    f = objective_of(model.apply, nets.loss, state)
    found = hessian_traces(f, params, [nets.BATCH], KEY, probes=4, together=4)
    assert set(found) == {"conv1/kernel", "conv2/kernel", "head/kernel"}
    # The last layer's loss is convex in it: its trace is positive in every probe.
    assert found["head/kernel"].mean > 0


def test_the_number_of_probes_and_batches_is_checked():
    for probes, together in ((3, 2), (0, 1), (1, 0)):
        with pytest.raises(SetupError, match="probes run"):
            hessian_traces(squares, PARAMS, BATCHES, KEY, probes=probes, together=together)
    with pytest.raises(SetupError, match="no batches"):
        hessian_traces(squares, PARAMS, [], KEY)
    with pytest.raises(SelectorError):
        hessian_traces(squares, PARAMS, BATCHES, KEY, pattern="weights")


def errors_of(f, params, x, widths, **kwargs):
    return rounding_errors(ej.from_function(f, lambda x: x), params, {}, x, widths, **kwargs)


def test_errors_by_hand():
    kernel = jnp.array([[3.0, 0.4], [-1.6, 0.7]])
    found = errors_of(lambda p, x: x @ p["kernel"], {"kernel": kernel}, normal(2, 2), (1, 2, 3, 32))
    own = found["kernel"]
    # 2 bits: columns on 0 and ± their largest; one bit: ± their mean magnitude.
    np.testing.assert_allclose(own[2], 1.4**2 + 0.3**2, rtol=1e-6)
    np.testing.assert_allclose(own[1], 2 * 0.7**2 + 2 * 0.15**2, rtol=1e-6)
    np.testing.assert_allclose(own[3], 0.4**2 + (0.4 - 0.7 * 2 / 3) ** 2, rtol=1e-5)
    assert own[32] == 0
    whole = errors_of(
        lambda p, x: x @ p["kernel"], {"kernel": kernel}, normal(2, 2), (2,), per_channel=False
    )
    np.testing.assert_allclose(whole["kernel"][2], 0.4**2 + 1.4**2 + 0.7**2, rtol=1e-6)


@pytest.mark.parametrize("name", ["scan of layers", "nested scans", "rnn", "two"])
def test_errors_of_layers_are_summed_and_of_time_are_not(name):
    f, params, x, *_ = PROGRAMS[name]
    found = errors_of(f, params, x, (3,))
    stack = {"scan of layers": 1, "nested scans": 2}.get(name, 0)
    for path, w in leaves(params).items():
        g = ej.quantize.numerics.grid(3)
        channels = (*range(stack), w.ndim - 1)
        scale = ej.quantize.numerics.scale_of(ej.quantize.numerics.absmax(w, channels), g)
        wanted = jnp.sum((ej.quantize.numerics.fake_quant(w, scale, g) - w) ** 2)
        np.testing.assert_allclose(found[path][3], wanted, rtol=1e-5)


def test_hawq_by_hand():
    traces = {"a": Trace(6.0, 0.1, 3), "b": Trace(-1.0, 2.0, 2)}
    found = hawq(traces, {"a": {2: 4.0, 4: 0.5}, "b": {2: 1.0}})
    assert found == {"a": {2: 4.0, 4: 0.5}, "b": {2: 0.0}}
    with pytest.raises(SetupError, match="no traces"):
        hawq(traces, {"c": {2: 1.0}})


def test_hawq_predicts_the_rise_of_the_loss():
    """At a minimum, the sum over leaves of a small perturbation's curvature."""
    kernel = normal(6, 5)
    x = normal(512, 6)
    y = x @ kernel
    params = {"kernel": kernel}

    def apply(params, model_state, batch, key, train):
        return batch["x"] @ params["kernel"], model_state

    def loss(outputs, batch):
        return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, -1))

    batch = {"x": x, "y": y}
    f = objective_of(apply, loss, {})
    traces = hessian_traces(f, params, [batch], KEY, probes=16)
    measured = hawq(traces, rounding_errors(apply, params, {}, batch, (3, 4, 6)))
    dropped = drop_one(apply, loss, params, {}, [batch], ["kernel"], (3, 4, 6))
    for bits in (3, 4, 6):
        np.testing.assert_allclose(measured["kernel"][bits], dropped["kernel"][bits], rtol=0.3)


def test_dropping_one_is_rounding_one_and_compiles_once():
    model = nets.linen()
    params, state = model.init(KEY, nets.BATCH)
    traced = []

    def apply(*args):
        traced.append(1)
        return model.apply(*args)

    paths = ("conv1/kernel", "head/kernel")
    batches = [nets.BATCH, jax.tree.map(lambda x: x[::-1], nets.BATCH)]
    found = drop_one(apply, nets.loss, params, state, batches, paths, (2, 4), rest=8)
    assert len(traced) <= 3  # one program: init looks at the model, then it is traced

    def at(bits):
        rules = by_leaf({"conv1/kernel": 8, "head/kernel": 8} | bits)
        transform = ej.chain(q=qat(32, 32, rules=rules))
        own = transform.init(KEY, params, ej.Setup(model.apply, state, nets.BATCH))[1]
        forward = transform.wrap(
            lambda *args: (*model.apply(*args), {}), {"q": {}}, own, ej.Ctx(0, KEY, train=False)
        )
        return nets.loss(forward(params, state, nets.BATCH, KEY, False)[0], nets.BATCH)

    for path in paths:
        for bits in (2, 4):
            rise = at({path: bits}) - at({})
            np.testing.assert_allclose(found[path][bits], rise, rtol=1e-2, atol=1e-5)
        assert abs(found[path][2]) > abs(found[path][4])


def test_what_there_is_to_drop_is_checked():
    model = nets.raw()
    params, state = model.init(KEY, nets.BATCH)
    args = (model.apply, nets.loss, params, state)
    with pytest.raises(SetupError, match="0 leaves and 1 batches"):
        drop_one(*args, [nets.BATCH], [], (2,))
    with pytest.raises(SetupError, match="1 leaves and 0 batches"):
        drop_one(*args, [], ["head/kernel"], (2,))
    with pytest.raises(SelectorError, match="match none of the quantized sites"):
        drop_one(*args, [nets.BATCH], ["head/bias"], (2,))
    with pytest.raises(SetupError, match="9 bits"):
        rounding_errors(model.apply, params, state, nets.BATCH, (9,))
    with pytest.raises(SiteError, match="no dot_general"):
        errors_of(lambda p, x: x + p["kernel"], {"kernel": normal(2, 2)}, normal(2, 2), (2,))
