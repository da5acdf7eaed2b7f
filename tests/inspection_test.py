"""Tests of the table of sites."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SetupError
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X


@pytest.fixture(scope="module")
def cnn():
    model = nets.linen()
    return model, *model.init(jax.random.key(0), nets.BATCH)


def test_a_float_model(cnn):
    model, params, model_state = cnn
    table = ej.inspect(model.apply, params, nets.BATCH, model_state)
    assert [row.path for row in table.rows] == ["conv1/kernel", "conv2/kernel", "head/kernel"]
    assert all((r.sparsity, r.weight_bits, r.act_bits) == (0.0, 32, 32) for r in table.rows)
    assert table["head/kernel"].macs == 24 * 16 * 8
    left = {path for path, _ in table.unreached}
    assert left == set(ej.select.leaves(params)) - {row.path for row in table.rows}


def test_what_is_printed(cnn):
    model, params, model_state = cnn
    batch = {"image": nets.BATCH["image"][:1]}
    transform = ej.chain(q=ej.quantize.qat(4, 8, rules=[("head", ej.quantize.Bits(8, 8))]))
    text = str(ej.inspect(model.apply, params, batch, model_state, transform=transform))
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert words[0] == "path op lhs rhs out MACs sparsity weight bits act bits"
    assert words[2:] == [
        "conv1/kernel conv 1x8x8x1 3x3x1x8 1x8x8x8 4,608 0.0% 4 8",
        "conv2/kernel conv 1x8x8x8 3x3x8x16 1x4x4x16 18,432 0.0% 4 8",
        "head/kernel dot 1x16 16x8 1x8 128 0.0% 8 8",
        "total 23,168",
        "params that meet data in no site: head/bias [8], norm1/bias [8], norm1/scale [8], "
        "norm2/bias [16], norm2/scale [16]",
    ]


def test_a_train_state_of_pruned_and_quantized_weights(cnn):
    model = cnn[0]
    transform = ej.chain(
        prune=ej.prune.magnitude(0.5, begin=0, end=1, every=1, select="kernel$"),
        quant=ej.quantize.qat(ranges="static"),
    )
    tx = optax.sgd(0.1)
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    for _ in range(3):
        state, _ = step(state, nets.BATCH)
    kwargs = {"transform": transform, "state": state}
    table = ej.inspect(model.apply, state.vars.model, nets.BATCH, **kwargs)
    assert all((row.weight_bits, row.act_bits) == (8, 8) for row in table.rows)
    assert all(abs(row.sparsity - 0.5) < 0.02 for row in table.rows)
    spelled = ej.inspect(
        model.apply,
        state.vars.model,
        nets.BATCH,
        state.model_state,
        transform=transform,
        extra=state.vars.extra,
        state=state.transform,
    )
    assert spelled == table


def test_before_calibration_static_activations_are_float(cnn):
    model, params, model_state = cnn
    transform = ej.quantize.qat(ranges="static")
    table = ej.inspect(model.apply, params, nets.BATCH, model_state, transform=transform)
    assert {(row.weight_bits, row.act_bits) for row in table.rows} == {(8, 32)}


def test_abstract_params(cnn):
    model = cnn[0]
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), nets.BATCH)
    table = ej.inspect(model.apply, params, nets.BATCH, model_state)
    assert [row.sparsity for row in table.rows] == [None] * 3
    with pytest.raises(SetupError, match="abstract params"):
        ej.inspect(model.apply, params, nets.BATCH, model_state, transform=ej.quantize.qat())


def test_a_plain_function_of_params_and_inputs():
    f, params, x, *_ = PROGRAMS["embedding"]
    table = ej.inspect(f, params, x, transform=ej.quantize.qat(embeddings=True))
    rows = {row.path: (row.weight_bits, row.act_bits) for row in table.rows}
    assert rows == {"embedding": (8, None), "kernel": (8, 8), "embedding#1": (8, 8)}


def test_products_show_the_bits_they_were_given():
    f, params, x, *_ = PROGRAMS["attention"]
    float_products = ej.inspect(f, params, x, transform=ej.quantize.qat())
    row = float_products["@dot_general"]
    assert (row.weight_bits, row.act_bits, row.sparsity) == (None, 32, None)
    table = ej.inspect(f, params, x, transform=ej.quantize.qat(products=True, activations=6))
    assert table["@dot_general#1"].act_bits == 6
    assert table["q/kernel"].act_bits == 6


def test_half_precision_and_layers():
    params = {"kernel": jnp.ones((3, 4, 4), jnp.bfloat16), "unused": jnp.ones(())}

    def f(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x.astype(jnp.bfloat16), params["kernel"])[0]

    table = ej.inspect(f, params, X)
    assert (table["kernel"].weight_bits, table["kernel"].act_bits) == (16, 16)
    assert "kernel x3" in str(table)
    assert "unused [scalar]" in str(table)


def test_zeros_are_counted():
    params = {"kernel": SQUARE.at[0].set(0.0)}
    [row] = ej.inspect(lambda p, x: x @ p["kernel"], params, X).rows
    assert row.sparsity == 0.25
    assert np.isclose(row.macs, 8 * 16)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda params: params, r"function of \(params\)"),
        ({"kernel": 1}, "got a dict"),
        (lambda a, b, c: a, r"function of \(a, b, c\)"),
    ],
)
def test_what_is_no_model(f, message):
    with pytest.raises(SetupError, match=message):
        ej.inspect(f, {"kernel": SQUARE}, X)


def test_a_path_that_is_no_site():
    with pytest.raises(KeyError, match="no site 'x'"):
        ej.inspect(lambda p, x: x @ p["kernel"], {"kernel": SQUARE}, X)["x"]
