"""Tests of SparseGPT: against NumPy, against magnitude and Wanda, and through models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import effjax as ej
from effjax.errors import ScheduleError, SetupError, SiteError
from effjax.prune import budgets, oneshot
from effjax.prune.patterns import n_m, unstructured
from effjax.prune.sparsegpt import sparsegpt
from effjax.prune.surgeon import prune_matrix
from effjax.select import leaves
from tests import nets

RNG = np.random.default_rng(0)


def correlated(examples, features):
    """Inputs of a few common factors and some noise."""
    factors = RNG.normal(size=(examples, 3)) @ RNG.normal(size=(3, features))
    scales = np.exp(RNG.normal(size=features))
    return ((factors + 0.5 * RNG.normal(size=(examples, features))) * scales).astype(np.float32)


def reference(w, x, sparsity=None, groups=None, damping=0.01, columns=128):
    """SparseGPT column by column in float64: w [out, in], x [examples, in]."""
    w, x = np.array(w, np.float64), np.asarray(x, np.float64)
    rows, inputs = w.shape
    h = x.T @ x
    h += damping * np.mean(np.diag(h)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.ones(w.shape, bool)
    pruned = 0
    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        if groups is None:
            score = w[:, start:end] ** 2 / np.diag(upper)[start:end] ** 2
            wanted = int(np.round(np.float32(sparsity) * np.float32(rows * end))) - pruned
            pruned += wanted
            drop = np.argsort(score, axis=None, kind="stable")[:wanted]
            block = np.ones(score.size, bool)
            block[drop] = False
            mask[:, start:end] = block.reshape(score.shape)
        for j in range(start, end):
            if groups is not None and j % groups[1] == 0:
                n, m = groups
                score = w[:, j : j + m] ** 2 / np.diag(upper)[j : j + m] ** 2
                order = np.argsort(-score, axis=1, kind="stable")
                mask[:, j : j + m] = False
                np.put_along_axis(mask[:, j : j + m], order[:, :n], True, axis=1)
            error = np.where(mask[:, j], 0, w[:, j]) / upper[j, j]
            w[:, j:] -= np.outer(error, upper[j, j:])
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize("columns", [128, 8, 5])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_matrix_is_the_references(sparsity, columns):
    x, w = correlated(60, 24), RNG.normal(size=(10, 24)).astype(np.float32)
    found, mask = prune_matrix(jnp.asarray(w), jnp.asarray(x.T @ x), sparsity, columns=columns)
    wanted, kept = reference(w, x, sparsity, columns=columns)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)
    assert int(mask.sum()) == int(budgets.keep(240, sparsity).value())


@pytest.mark.parametrize("columns", [128, 8, 6])
@pytest.mark.parametrize("groups", [(2, 4), (1, 4), (3, 8)])
def test_matrix_in_groups_is_the_references(groups, columns):
    x, w = correlated(60, 24), RNG.normal(size=(10, 24)).astype(np.float32)
    found, mask = prune_matrix(jnp.asarray(w), jnp.asarray(x.T @ x), n_m=groups, columns=columns)
    wanted, kept = reference(w, x, groups=groups)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(mask.reshape(10, -1, groups[1]).sum(-1), groups[0])


def test_traced_sparsity_and_scale_of_the_moments():
    x, w = correlated(60, 12), jnp.asarray(RNG.normal(size=(4, 12)), jnp.float32)
    h = jnp.asarray(x.T @ x)
    _, many = jax.vmap(lambda s: prune_matrix(w, h, s))(jnp.array([0.25, 0.5]))
    for mask, sparsity in zip(many, (0.25, 0.5), strict=True):
        np.testing.assert_array_equal(mask, prune_matrix(w, h, sparsity)[1])
        np.testing.assert_array_equal(mask, prune_matrix(w, h / 1024, sparsity)[1])


def test_without_correlation_it_is_wanda_in_each_row():
    # With a diagonal H nothing can be made up for: weights stay as they are.
    scale, w = np.array([1.0, 2.0, 4.0, 8.0]), jnp.array([[8.0, 3.0, 2.0, 0.5]])
    found, mask = prune_matrix(w, jnp.diag(jnp.asarray(scale**2)), 0.5, damping=1e-6)
    np.testing.assert_array_equal(mask, [[True, False, True, False]])  # of 8, 6, 8, 4
    np.testing.assert_allclose(found, [[8.0, 0.0, 2.0, 0.0]], rtol=1e-6)


def test_inputs_that_are_always_zero_go_first_and_break_nothing():
    # Of weights of one size the one that meets nothing scores least: damping alone, and every other
    # input adds to it.
    x, w = correlated(60, 8), RNG.choice([-1.0, 1.0], size=(4, 8)).astype(np.float32)
    x[:, 3] = 0
    found, mask = prune_matrix(jnp.asarray(w), jnp.asarray(x.T @ x), 0.25)
    assert not np.any(mask[:, 3])
    assert np.all(np.isfinite(found))
    found, mask = prune_matrix(jnp.array([[1.0, -4.0, 2.0, 3.0]]), jnp.zeros((4, 4)), 0.5)
    np.testing.assert_array_equal(found, [[0.0, -4.0, 0.0, 3.0]])


def test_depthwise_convolution_with_a_dead_channel():
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}
    apply = conv({**options, "dimension_numbers": ("NHWC", "HWIO", "NHWC")})
    image = jnp.asarray(correlated(50, 4).reshape(2, 5, 5, 4)).at[..., 2].set(0)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 1, 4)), jnp.float32)
    new, masks = sparsegpt(apply, {"kernel": kernel}, {}, [{"image": image}], 0.5)
    np.testing.assert_array_equal(masks["kernel"].sum((0, 1, 2)), 5)  # 9 - round(4.5)
    dead = masks["kernel"][..., 2]
    np.testing.assert_array_equal(new["kernel"][..., 2], jnp.where(dead, kernel[..., 2], 0))


def dense(params, model_state, batch, key, train):
    h = jnp.maximum(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"], 0)
    return h @ params["b"]["kernel"], model_state


X = [{"x": jnp.asarray(correlated(40, 16))} for _ in range(3)]
PARAMS = {
    "b": {"kernel": jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)},
    "a": {
        "kernel": jnp.asarray(RNG.normal(size=(16, 12)), jnp.float32),
        "bias": jnp.ones(12),
    },
}


@pytest.mark.parametrize("sequential", [True, False])
def test_model_layer_by_layer(sequential):
    new, masks = sparsegpt(dense, PARAMS, {}, X, 0.5, sequential=sequential)

    x = np.concatenate([batch["x"] for batch in X])
    a, kept = reference(PARAMS["a"]["kernel"].T, x, 0.5)
    np.testing.assert_array_equal(masks["a/kernel"], kept.T)
    np.testing.assert_allclose(new["a"]["kernel"], a.T, rtol=5e-3, atol=1e-3)
    before = np.asarray(new["a"]["kernel"]) if sequential else PARAMS["a"]["kernel"]
    h = np.maximum(x @ before + 1, 0)
    b, kept = reference(PARAMS["b"]["kernel"].T, h, 0.5)
    np.testing.assert_array_equal(masks["b/kernel"], kept.T)
    np.testing.assert_allclose(new["b"]["kernel"], b.T, rtol=5e-3, atol=1e-3)
    np.testing.assert_array_equal(new["a"]["bias"], PARAMS["a"]["bias"])
    assert list(masks) == ["a/kernel", "b/kernel"]
    for path, mask in masks.items():
        np.testing.assert_array_equal(leaves(new)[path] == 0, ~mask)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_change_less_than_by_magnitude_and_wanda(pattern):
    params, select = {"a": PARAMS["a"], "b": {"kernel": jnp.eye(12)}}, "a/kernel"
    w, x = params["a"]["kernel"], np.concatenate([batch["x"] for batch in X])
    amount = {"sparsity": 0.5} if pattern == "unstructured" else {"n_m": (2, 4)}
    new, masks = sparsegpt(dense, params, {}, X, **amount, select=select)
    wanda = oneshot.wanda(dense, params, {}, X, select=select)

    def by(score):
        chosen = unstructured() if pattern == "unstructured" else n_m(2, 4)
        return jnp.where(chosen.choose(score, lambda units: 96)[select], w, 0)

    def error(kernel):
        return np.sum(np.square(x @ np.asarray(kernel - w)))

    assert int(masks[select].sum()) == 96
    mine = error(new["a"]["kernel"])
    assert mine < 0.7 * error(by(wanda))
    assert mine < 0.5 * error(by({select: jnp.abs(w)}))


def conv(options):
    return ej.from_function(
        lambda p, x: lax.conv_general_dilated(x, p["kernel"], **options), "image"
    )


CONVOLUTIONS = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 1), "padding": ((1, 0), (0, 2))},
    "dilated": {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": ((2, 1), (2, 1)), "lhs_dilation": (2, 2)},
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_a_product_with_its_patches(name, groups):
    options = {**CONVOLUTIONS[name], "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    image = jnp.asarray(correlated(4 * 36, 4).reshape(4, 6, 6, 4))
    kernel = jnp.asarray(RNG.normal(size=(3, 2, 4 // groups, 6)), jnp.float32)
    apply = conv({**options, "feature_group_count": groups})
    new, masks = sparsegpt(apply, {"kernel": kernel}, {}, [{"image": image}], 0.5)

    for g in range(groups):
        features = slice(g * 4 // groups, (g + 1) * 4 // groups)
        outs = slice(g * 6 // groups, (g + 1) * 6 // groups)
        patches = lax.conv_general_dilated_patches(
            image[..., features],
            (3, 2),
            **CONVOLUTIONS[name],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # features in the order [channel, height, width]
        x = np.asarray(patches).reshape(-1, 4 // groups, 3, 2).transpose(0, 2, 3, 1)
        x = x.reshape(len(x), -1)
        w = np.asarray(kernel[..., outs]).reshape(x.shape[1], -1).T
        wanted, kept = reference(w, x, 0.5)
        shape = kernel[..., outs].shape
        np.testing.assert_array_equal(masks["kernel"][..., outs], kept.T.reshape(shape))
        np.testing.assert_allclose(
            new["kernel"][..., outs], wanted.T.reshape(shape), rtol=1e-2, atol=2e-3
        )


def test_groups_of_a_convolution_lie_along_its_input_features():
    apply = conv(
        {
            "window_strides": (1, 1),
            "padding": "SAME",
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        }
    )
    image = jnp.asarray(correlated(50, 4).reshape(2, 5, 5, 4))
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 2)), jnp.float32)
    new, masks = sparsegpt(apply, {"kernel": kernel}, {}, [{"image": image}], n_m=(1, 4))
    np.testing.assert_array_equal(masks["kernel"].sum(2), 1)
    np.testing.assert_array_equal(new["kernel"] != 0, masks["kernel"])


LAYOUTS = {
    "transposed": (lambda w, x: x @ w.T, (12, 16), lambda w: w),
    "heads": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w),
        (16, 3, 4),
        lambda w: w.reshape(16, 12).T,
    ),
    "twice": (lambda w, x: (x[:20] @ w, x[20:] @ w), (16, 12), lambda w: w.T),
    "loop": (
        lambda w, x: lax.map(lambda row: row @ w, x.reshape(4, 10, 16)),
        (16, 12),
        lambda w: w.T,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_followed_back_to_the_leaf(name):
    f, shape, matrix = LAYOUTS[name]
    w, x = jnp.asarray(RNG.normal(size=shape), jnp.float32), X[0]["x"]
    apply = ej.from_function(lambda p, x: f(p["kernel"], x), "x")
    new, masks = sparsegpt(apply, {"kernel": w}, {}, X[:1], 0.5)
    wanted, kept = reference(matrix(np.asarray(w)), x, 0.5)
    np.testing.assert_array_equal(matrix(np.asarray(masks["kernel"])), kept)
    np.testing.assert_allclose(matrix(np.asarray(new["kernel"])), wanted, rtol=5e-3, atol=1e-3)


def test_layers_of_a_scan_are_pruned_one_by_one():
    w, x = jnp.asarray(0.3 * RNG.normal(size=(3, 8, 8)), jnp.float32), correlated(40, 8)

    def apply(params, model_state, batch, key, train):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, params["kernel"])[0], {}

    new, masks = sparsegpt(apply, {"kernel": w}, {}, [jnp.asarray(x)], 0.5)
    h = x
    for layer in range(3):
        wanted, kept = reference(w[layer].T, h, 0.5)
        np.testing.assert_array_equal(masks["kernel"][layer], kept.T)
        np.testing.assert_allclose(new["kernel"][layer], wanted.T, rtol=1e-2, atol=2e-3)
        h = np.tanh(h @ np.asarray(w[layer]))


def test_linen_and_nnx_prune_alike():
    linen, nnx_ = nets.linen(), nets.nnx_()
    params, stats = nnx_.init(jax.random.key(0), nets.BATCH)
    same, state = nets.from_nnx_state(params, stats)
    options = {"sparsity": 0.5, "select": "conv2|head/kernel", "sequential": False}
    a, masks = sparsegpt(nnx_.apply, params, stats, [nets.BATCH], **options)
    b, others = sparsegpt(linen.apply, same, state, [nets.BATCH], **options)
    assert list(masks) == ["conv2/kernel", "head/kernel"]
    for path, mask in masks.items():
        assert np.mean(np.asarray(mask) == np.asarray(others[path])) > 0.99
        assert abs(float(mask.mean()) - 0.5) < 0.01
    np.testing.assert_array_equal(a["conv1"]["kernel"], params["conv1"]["kernel"])
    assert jax.tree.structure(b) == jax.tree.structure(same)


def test_bfloat16_params_keep_their_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batches = [{"x": batch["x"].astype(jnp.bfloat16)} for batch in X]
    new, masks = sparsegpt(dense, half, {}, batches, 0.5, select="a/kernel")
    kernel = new["a"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert int(masks["a/kernel"].sum()) == 96
    _, wanted = sparsegpt(dense, PARAMS, {}, X, 0.5, select="a/kernel")
    assert np.mean(np.asarray(masks["a/kernel"]) == np.asarray(wanted["a/kernel"])) > 0.95


def test_training_goes_on_with_the_masks():
    model = nets.raw()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    new, masks = sparsegpt(model.apply, params, state, [nets.BATCH], n_m=(2, 4))
    transform, tx = ej.chain(prune=ej.prune.static(masks=masks)), optax.adam(1e-2)
    train = ej.init_state(
        jax.random.key(1), model, transform, tx, nets.BATCH, params=new, model_state=state
    )
    train, metrics = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))(train, nets.BATCH)
    assert float(metrics["prune/sparsity"]) == 0.5
    for path, mask in masks.items():
        np.testing.assert_array_equal(leaves(train.vars.model)[path] != 0, mask)


def test_a_sparsity_for_each_leaf():
    _, masks = sparsegpt(dense, PARAMS, {}, X, {"a/kernel": 0.75, "b/kernel": 0.25})
    assert (int(masks["a/kernel"].sum()), int(masks["b/kernel"].sum())) == (48, 54)
    shapes = {"a/kernel": (16, 12), "b/kernel": (12, 6)}
    layers = {
        path: budgets.Layer(shape, units=shape[0] * shape[1]) for path, shape in shapes.items()
    }
    budget = budgets.erk(layers, {}, 0.6)
    _, masks = sparsegpt(dense, PARAMS, {}, X, budget)
    for path, mask in masks.items():
        assert int(mask.sum()) == int(budget[path].value())
    with pytest.raises(SetupError, match=r"sparsities for \['a/kernel'\].*Give one for each"):
        sparsegpt(dense, PARAMS, {}, X, {"a/kernel": 0.75})


def test_batches_are_traced_once():
    traces = []

    def counted(*args):
        traces.append(1)
        return dense(*args)

    sparsegpt(counted, PARAMS, {}, X[:1], 0.5, sequential=False)
    once = len(traces)
    traces.clear()
    sparsegpt(counted, PARAMS, {}, iter(X * 4), 0.5, sequential=False)
    assert len(traces) == once


def test_arguments_that_cannot_be_meant():
    with pytest.raises(SetupError, match="takes one of them"):
        sparsegpt(dense, PARAMS, {}, X)
    with pytest.raises(SetupError, match="takes one of them"):
        sparsegpt(dense, PARAMS, {}, X, 0.5, n_m=(2, 4))
    with pytest.raises(SetupError, match=r"last input axis of a/kernel is 16 long.*2:5"):
        sparsegpt(dense, PARAMS, {}, X, n_m=(2, 5))
    with pytest.raises(SetupError, match="0 < n <= m"):
        sparsegpt(dense, PARAMS, {}, X, n_m=(5, 4))
    with pytest.raises(ScheduleError, match="sparsity"):
        sparsegpt(dense, PARAMS, {}, X, 1.5)
    with pytest.raises(SetupError, match="damping=0"):
        sparsegpt(dense, PARAMS, {}, X, 0.5, damping=0)
    with pytest.raises(SetupError, match="once for each leaf"):
        sparsegpt(dense, PARAMS, {}, iter(X), 0.5)
    with pytest.raises(SetupError, match="no calibration batches"):
        sparsegpt(dense, PARAMS, {}, [], 0.5)


def test_data_that_says_nothing():
    with pytest.raises(SetupError, match=r"inputs of a/kernel.*all 0"):
        sparsegpt(dense, PARAMS, {}, [{"x": jnp.zeros((4, 16))}], 0.5)
    with pytest.raises(SetupError, match="inputs of a/kernel are not finite"):
        sparsegpt(dense, PARAMS, {}, [{"x": jnp.full((4, 16), jnp.nan)}], 0.5)
    broken = {**PARAMS, "b": {"kernel": PARAMS["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(SetupError, match="b/kernel gave weights that are not finite"):
        sparsegpt(dense, broken, {}, X, 0.5)


MISFITS = {
    "no site": (lambda w, x: x * w.sum(), (4, 4), "these weights are selected"),
    "experts": (lambda w, x: jnp.einsum("bi,bio->bo", x, w), (40, 16, 4), "batch of matrices"),
    "tied": (lambda w, x: jnp.tanh(x @ w) @ w.T, (16, 16), "several times in different layouts"),
    "masked": (lambda w, x: x @ jnp.tril(w), (16, 16), "does not meet data as it is"),
    "scaled": (lambda w, x: x @ (2 * w), (16, 4), "does not meet data as it is"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_are_no_plain_matrix(name):
    f, shape, said = MISFITS[name]
    params = {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)}
    apply = ej.from_function(lambda p, x: f(p["kernel"], x), "x")
    with pytest.raises(SiteError, match=said):
        sparsegpt(apply, params, {}, X[:1], 0.5)
