"""Tests of the scores of whole models, against NumPy, finite differences and dense Hessians."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import effjax as ej
from effjax.errors import SelectorError, SetupError, SiteError
from effjax.prune import budgets, oneshot
from effjax.prune.patterns import n_m, unstructured
from effjax.select import leaves
from tests import nets

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(4, 5), "bias": normal(5)},
    "b": {"kernel": normal(5, 3), "bias": normal(3)},
}
BATCHES = [{"x": normal(6, 4), "y": normal(6, 3)} for _ in range(3)]
PATHS = ("a/kernel", "b/kernel")


def mlp(params, model_state, batch, key, train):
    h = jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"])
    return h @ params["b"]["kernel"] + params["b"]["bias"], model_state


def loss(outputs, batch):
    return jnp.mean(jnp.sum(jnp.cos(outputs) + jnp.square(outputs - batch["y"]), -1))


def flat(params):
    return jnp.concatenate([leaves(params)[path].ravel() for path in PATHS])


def objective(w, batch):
    a, b = w[:20].reshape(4, 5), w[20:].reshape(5, 3)
    params = {"a": {**PARAMS["a"], "kernel": a}, "b": {**PARAMS["b"], "kernel": b}}
    return loss(mlp(params, {}, batch, None, False)[0], batch)


def together(w):
    return sum(objective(w, batch) for batch in BATCHES) / len(BATCHES)


W = flat(PARAMS)


def scored(f, *args, **kwargs):
    found = f(mlp, loss, PARAMS, {}, BATCHES, *args, **kwargs)
    assert {path: s.shape for path, s in found.items()} == {
        p: leaves(PARAMS)[p].shape for p in PATHS
    }
    assert all(s.dtype == jnp.float32 for s in found.values())
    return np.concatenate([found[path].ravel() for path in PATHS])


def test_snip_by_finite_differences():
    found = scored(oneshot.snip)
    differences = []
    for i in range(35):
        change = jnp.zeros(35).at[i].set(1e-2 * W[i])
        differences.append(abs(together(W + change) - together(W - change)) / 2e-2)
    wanted = np.asarray(differences) / np.sum(differences)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)


def test_grasp_by_the_dense_hessian():
    hessian, grad = jax.hessian(together)(W), jax.grad(together)(W)
    np.testing.assert_allclose(scored(oneshot.grasp), W * (hessian @ grad), rtol=1e-3, atol=1e-4)


def test_taylor_averages_squares_over_batches():
    grads = [jax.grad(objective)(W, batch) for batch in BATCHES]
    wanted = np.mean([np.square(W * g) for g in grads], 0)
    np.testing.assert_allclose(scored(oneshot.taylor), wanted, rtol=1e-4, atol=1e-6)


def test_fisher_averages_squares_over_examples():
    ones = [{k: v[i : i + 1] for k, v in batch.items()} for batch in BATCHES for i in range(6)]
    wanted = np.mean([np.square(W * jax.grad(objective)(W, one)) / 2 for one in ones], 0)
    np.testing.assert_allclose(scored(oneshot.fisher), wanted, rtol=1e-4, atol=1e-6)


def test_obd_is_the_diagonal_of_the_gauss_newton_matrix():
    def outputs(w, batch):
        a, b = w[:20].reshape(4, 5), w[20:].reshape(5, 3)
        params = {"a": {**PARAMS["a"], "kernel": a}, "b": {**PARAMS["b"], "kernel": b}}
        return mlp(params, {}, batch, None, False)[0]

    diagonal = np.zeros(35)
    for batch in BATCHES:
        jacobian, out = jax.jacobian(outputs)(W, batch), outputs(W, batch)
        # Of cos(o) + (o - y)², summed over outputs: diagonal and positive.
        curvature = 2 - np.cos(out)
        diagonal += np.einsum("eow,eo->w", np.square(jacobian), curvature) / 18
    np.testing.assert_allclose(scored(oneshot.obd), diagonal * W**2 / 2, rtol=1e-3, atol=1e-5)


def test_obd_by_probes_approaches_the_hessian():
    wanted = W**2 * np.diag(jax.hessian(together)(W)) / 2
    rough, fine = scored(oneshot.obd, probes=1), scored(oneshot.obd, probes=3000)
    assert np.abs(fine - wanted).max() < 0.05 * np.abs(wanted).max()
    assert np.abs(rough - wanted).max() > np.abs(fine - wanted).max()
    with pytest.raises(SetupError, match="probes=0"):
        scored(oneshot.obd, probes=0)


def test_wanda_of_dense_layers():
    inputs = np.concatenate([batch["x"] for batch in BATCHES])
    hidden = np.tanh(inputs @ np.asarray(PARAMS["a"]["kernel"]) + PARAMS["a"]["bias"])
    found = oneshot.wanda(mlp, PARAMS, {}, BATCHES, per_output=False)
    for path, x in zip(PATHS, (inputs, hidden), strict=True):
        # A mean over batches, so that their number does not matter.
        norm = np.sqrt(np.sum(np.square(x), 0) / len(BATCHES))
        w = np.asarray(leaves(PARAMS)[path])
        np.testing.assert_allclose(found[path], np.abs(w) * norm[:, None], rtol=1e-5)


def test_wanda_prunes_every_output_alike():
    raw = oneshot.wanda(mlp, PARAMS, {}, BATCHES, per_output=False)
    ranked = oneshot.wanda(mlp, PARAMS, {}, BATCHES)
    mask = unstructured().choose(ranked, lambda units: {"a/kernel": 10, "b/kernel": 6})
    for path, kept in (("a/kernel", 2), ("b/kernel", 2)):
        for out in range(raw[path].shape[1]):
            best = np.argsort(-raw[path][:, out], kind="stable")[:kept]
            np.testing.assert_array_equal(np.flatnonzero(mask[path][:, out]), np.sort(best))
    a = {"a/kernel": ranked["a/kernel"]}, {"a/kernel": raw["a/kernel"]}
    by_rank, by_score = (n_m(2, 4).choose(s)["a/kernel"] for s in a)
    np.testing.assert_array_equal(by_rank, by_score)


LAYOUTS = {
    "transposed": (lambda w, x: x @ w.T, (5, 4), lambda w: w.T, (4, 5), 1),
    "reshaped": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), lambda w: w.reshape(4, 6), (4, 6), 1),
    "used twice": (
        lambda w, x: jnp.concatenate([x @ w, 2 * x @ w]),
        (4, 5),
        lambda w: w,
        (4, 5),
        np.sqrt(5),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_wanda_follows_layout(name):
    f, shape, matrix, _, factor = LAYOUTS[name]
    params, batch = {"kernel": normal(*shape)}, {"x": normal(8, 4)}
    apply = ej.from_function(lambda p, x: f(p["kernel"], x), "x")

    raw = oneshot.wanda(apply, params, {}, [batch], per_output=False)["kernel"]
    ranked = oneshot.wanda(apply, params, {}, [batch])["kernel"]

    norm = factor * np.linalg.norm(batch["x"], axis=0)[:, None]
    wanted = np.abs(matrix(np.asarray(params["kernel"]))) * norm
    np.testing.assert_allclose(matrix(np.asarray(raw)), wanted, rtol=1e-5)
    order = np.argsort(np.argsort(wanted, 0), 0)
    np.testing.assert_allclose(matrix(np.asarray(ranked)), (order + 1) / 4, rtol=1e-6)


def test_wanda_of_stacked_layers_compares_within_each():
    params, x = {"kernel": normal(3, 4, 4)}, normal(8, 4)

    def apply(params, model_state, batch, key, train):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, params["kernel"])[0], {}

    raw = np.asarray(oneshot.wanda(apply, params, {}, [x], per_output=False)["kernel"])
    ranked = np.asarray(oneshot.wanda(apply, params, {}, [x])["kernel"])

    h = np.asarray(x)
    for layer, w in enumerate(np.asarray(params["kernel"])):
        wanted = np.abs(w) * np.linalg.norm(h, axis=0)[:, None]
        np.testing.assert_allclose(raw[layer], wanted, rtol=1e-5)
        order = np.argsort(np.argsort(wanted, 0), 0)
        np.testing.assert_allclose(ranked[layer], (order + 1) / 4, rtol=1e-6)
        h = np.tanh(h @ w)


def test_wanda_of_a_grouped_strided_convolution():
    kernel, image = normal(3, 2, 2, 6), normal(2, 5, 6, 4)  # two groups of 2 channels
    options = {
        "window_strides": (2, 1),
        "padding": ((1, 0), (0, 1)),
        "rhs_dilation": (1, 2),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 2,
    }
    apply = ej.from_function(
        lambda p, x: lax.conv_general_dilated(x, p["kernel"], **options), "image"
    )
    batch = {"image": image}
    found = oneshot.wanda(apply, {"kernel": kernel}, {}, [batch], per_output=False)["kernel"]

    padded = np.pad(np.asarray(image), ((0, 0), (1, 0), (0, 1), (0, 0)))
    rows, columns = (6 - 3) // 2 + 1, 7 - 2
    squares = np.zeros((3, 2, 2, 6))
    for i in range(3):
        for j in range(2):
            seen = padded[:, i : i + 2 * rows : 2][:, :rows, 2 * j : 2 * j + columns]
            energy = np.sum(np.square(seen), (0, 1, 2)).reshape(2, 2)  # [group, channel]
            squares[i, j] = np.repeat(energy.T, 3, axis=1)
    np.testing.assert_allclose(found, np.abs(kernel) * np.sqrt(squares), rtol=1e-5)


def test_synflow_of_one_round_by_paths():
    x = {"x": jnp.zeros((7, 4))}
    found = oneshot.synflow(mlp_linear, PARAMS, {}, x, 0.5, rounds=1)
    a, b = (np.abs(leaves(PARAMS)[path]) for path in PATHS)
    bias = np.abs(PARAMS["a"]["bias"])
    np.testing.assert_allclose(found["a/kernel"], a * b.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found["b/kernel"], b * (a.sum(0) + bias)[:, None], rtol=1e-5)


def mlp_linear(params, model_state, batch, key, train):
    h = batch["x"] @ params["a"]["kernel"] + params["a"]["bias"]
    return jax.nn.relu(h) @ params["b"]["kernel"] + params["b"]["bias"], model_state


def test_synflow_iterates_as_its_authors_do():
    found = oneshot.synflow(mlp_linear, PARAMS, {}, BATCHES[0], 0.8, rounds=5)
    a, b = (np.abs(leaves(PARAMS)[path]).astype(np.float64) for path in PATHS)
    bias, mask = np.abs(PARAMS["a"]["bias"]), np.ones(35)
    for k in range(5):
        left, right = a * mask[:20].reshape(4, 5), b * mask[20:].reshape(5, 3)
        score = [left * right.sum(1), right * (left.sum(0) + bias)[:, None]]
        score = np.concatenate([s.ravel() for s in score])
        kept = 35 - round(35 * (1 - 0.2 ** ((k + 1) / 5)))
        mask = np.zeros(35)
        mask[np.argsort(-score, kind="stable")[:kept]] = 1
    np.testing.assert_allclose(np.concatenate([found[p].ravel() for p in PATHS]), score, rtol=1e-5)
    masks = unstructured().choose(found, lambda units: budgets.keep(35, 0.8))
    np.testing.assert_array_equal(np.concatenate([masks[p].ravel() for p in PATHS]), mask)


def test_synflow_never_reads_data_or_signs():
    model = nets.linen()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    found = oneshot.synflow(model.apply, params, state, nets.BATCH, 0.9, rounds=3)
    negative = jax.tree.map(jnp.negative, params)
    other = {**nets.BATCH, "image": -5 * nets.BATCH["image"]}
    again = oneshot.synflow(model.apply, negative, state, other, 0.9, rounds=3)
    for path, score in found.items():
        np.testing.assert_array_equal(score, again[path])
        assert 0 < np.mean(score > 0) <= 1


def test_linen_and_nnx_score_alike():
    linen, nnx_ = nets.linen(dropout=0.0), nets.nnx_(dropout=0.0)
    params, stats = nnx_.init(jax.random.key(0), nets.BATCH)
    same, state = nets.from_nnx_state(params, stats)
    batches = [nets.BATCH]
    kwargs = {"select": r"kernel$"}
    for f in (oneshot.snip, oneshot.grasp, oneshot.taylor, oneshot.fisher, oneshot.obd):
        a = f(nnx_.apply, nets.loss, params, stats, batches, **kwargs)
        b = f(linen.apply, nets.loss, same, state, batches, **kwargs)
        for path in ("conv1/kernel", "conv2/kernel", "head/kernel"):
            scale = np.abs(a[path]).max()
            np.testing.assert_allclose(a[path], b[path], rtol=1e-3, atol=1e-4 * scale)
    a = oneshot.wanda(nnx_.apply, params, stats, batches, per_output=False)
    b = oneshot.wanda(linen.apply, same, state, batches, per_output=False)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-5)


def test_bfloat16_params():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batches = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch) for batch in BATCHES]
    for f in (oneshot.snip, oneshot.taylor, oneshot.grasp, oneshot.obd):
        found = f(mlp, loss, half, {}, batches)
        wanted = f(mlp, loss, PARAMS, {}, BATCHES)
        for path in PATHS:
            assert found[path].dtype == jnp.float32
            correlation = np.corrcoef(found[path].ravel(), wanted[path].ravel())[0, 1]
            assert correlation > 0.98
    found = oneshot.wanda(mlp, half, {}, batches, per_output=False)
    wanted = oneshot.wanda(mlp, PARAMS, {}, BATCHES, per_output=False)
    for path in PATHS:
        np.testing.assert_allclose(found[path], wanted[path], rtol=0.05, atol=0.02)


def test_batches_are_traced_once():
    traces = []

    def counted(*args):
        traces.append(1)
        return mlp(*args)

    oneshot.snip(counted, loss, PARAMS, {}, BATCHES[:1])
    once = len(traces)
    traces.clear()
    oneshot.snip(counted, loss, PARAMS, {}, iter(BATCHES * 4))
    assert len(traces) == once


def test_batches_that_cannot_be_meant():
    with pytest.raises(SetupError, match=r"no calibration batches.*generator"):
        oneshot.snip(mlp, loss, PARAMS, {}, [])
    with pytest.raises(SetupError, match="no calibration batches"):
        oneshot.wanda(mlp, PARAMS, {}, iter([]))
    short = {k: v[:5] for k, v in BATCHES[0].items()}
    with pytest.raises(SetupError, match=r"batch 3 has x: float32\[5, 4\].*first has.*\[6, 4\]"):
        oneshot.taylor(mlp, loss, PARAMS, {}, [*BATCHES[:2], short])
    with pytest.raises(SetupError, match=r"goes over the batches twice.*list"):
        oneshot.grasp(mlp, loss, PARAMS, {}, iter(BATCHES))
    uneven = [{**batch, "x0": jnp.float32(1)} for batch in BATCHES]
    with pytest.raises(SetupError, match="single examples"):
        oneshot.fisher(mlp, loss, PARAMS, {}, uneven)


def test_params_that_cannot_be_scored():
    with pytest.raises(SelectorError, match="matches no leaf"):
        oneshot.snip(mlp, loss, PARAMS, {}, BATCHES, select="nothing")
    broken = {**PARAMS, "a": {**PARAMS["a"], "kernel": jnp.full((4, 5), jnp.nan)}}
    with pytest.raises(SetupError, match="scores of a/kernel are NaN or infinite"):
        oneshot.taylor(mlp, loss, broken, {}, BATCHES)
    apart = {**PARAMS, "c": {"kernel": normal(2, 2)}}
    with pytest.raises(SetupError, match=r"all scores of c/kernel are 0.*does not depend"):
        oneshot.snip(mlp, loss, apart, {}, BATCHES)
    with pytest.raises(SiteError, match="c/kernel"):
        oneshot.wanda(mlp, apart, {}, BATCHES)
    whole = {**PARAMS, "a": {**PARAMS["a"], "kernel": jnp.ones((4, 5), jnp.int32)}}
    with pytest.raises(SetupError, match="a/kernel, which is int32"):
        oneshot.snip(mlp, loss, whole, {}, BATCHES)
    with pytest.raises(SiteError, match=r"b/bias.*add"):
        oneshot.wanda(mlp, PARAMS, {}, BATCHES, select="bias")
    with pytest.raises(SetupError, match="rounds=0"):
        oneshot.synflow(mlp, PARAMS, {}, BATCHES[0], 0.5, rounds=0)


def test_wanda_of_a_weight_that_is_mixed_with_a_larger_one_is_an_error():
    params = {"kernel": normal(4, 5), "low": {"kernel": normal(1, 5)}}
    apply = ej.from_function(lambda p, x: x @ (p["kernel"] + p["low"]["kernel"]), "x")
    with pytest.raises(SiteError, match=r"low/kernel.*mixed with larger leaves"):
        oneshot.wanda(apply, params, {}, BATCHES)


def test_a_linen_attention_projection_has_one_group_for_each_head_and_feature():
    module = nn.DenseGeneral((2, 3))
    model = ej.from_linen(module, inputs="x")
    params, _ = model.init(jax.random.key(0), BATCHES[0])
    ranked = oneshot.wanda(model.apply, params, {}, BATCHES)["kernel"]  # [4, 2, 3]
    wanted = np.broadcast_to(np.arange(1, 5)[:, None, None] / 4, (4, 2, 3))
    np.testing.assert_allclose(np.sort(ranked, 0), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "f", [oneshot.snip, oneshot.grasp, oneshot.wanda], ids=lambda f: f.__name__
)
def test_scores_prune_a_training_run(f):
    model = nets.raw()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    objective = () if f is oneshot.wanda else (nets.loss,)
    found = f(model.apply, *objective, params, state, [nets.BATCH])
    budget = "uniform" if f is oneshot.wanda else "global"
    transform = ej.chain(prune=ej.prune.static(0.75, scores=found, budget=budget))

    tx, key = optax.adam(1e-2), jax.random.key(1)
    train = ej.init_state(key, model, transform, tx, nets.BATCH, params=params, model_state=state)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    for _ in range(2):
        train, metrics = step(train, nets.BATCH)

    assert float(metrics["prune/sparsity"]) == 0.75
    scores = np.concatenate([s.ravel() for s in found.values()])
    weights = np.concatenate([leaves(train.vars.model)[path].ravel() for path in found])
    if f is oneshot.wanda:
        for path, kept in (("hidden/kernel", 16), ("head/kernel", 8)):
            by_output = (leaves(train.vars.model)[path] != 0).sum(0)
            np.testing.assert_array_equal(by_output, kept)
    else:
        assert scores[weights != 0].min() >= scores[weights == 0].max()


def test_obd_of_softmax_regression_is_the_hessians():
    # A linear model's Gauss-Newton matrix is its Hessian, with outputs that depend on one another.
    params, batch = {"kernel": normal(4, 3)}, {"x": normal(6, 4), "label": jnp.arange(6) % 3}
    apply = ej.from_function(lambda p, x: x @ p["kernel"], "x")
    found = oneshot.obd(apply, nets.loss, params, {}, [batch])["kernel"]

    def flat_loss(w):
        return nets.loss(batch["x"] @ w.reshape(4, 3), batch)

    w = params["kernel"].ravel()
    wanted = np.diag(jax.hessian(flat_loss)(w)) * w**2 / 2
    np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-3, atol=1e-5)


def test_synflow_makes_batchnorm_positive():
    module = nn.Sequential([nn.Dense(3, use_bias=False), nn.BatchNorm(use_running_average=True)])
    model = ej.from_linen(module, inputs="x")
    norm = {"scale": jnp.array([-2.0, 1.0, 3.0]), "bias": jnp.array([-1.0, 0.0, 5.0])}
    params = {"layers_0": {"kernel": normal(4, 3)}, "layers_1": norm}
    stats = {"layers_1": {"mean": jnp.array([-0.5, 0.1, 0.2]), "var": jnp.array([4.0, 1.0, 0.25])}}
    found = oneshot.synflow(model.apply, params, {"batch_stats": stats}, BATCHES[0], 0.5, rounds=1)
    gain = np.array([2.0, 1.0, 3.0]) / np.sqrt(np.array([4.0, 1.0, 0.25]) + 1e-5)
    wanted = np.abs(params["layers_0"]["kernel"]) * gain
    np.testing.assert_allclose(found["layers_0/kernel"], wanted, rtol=1e-5)


def test_synflow_of_a_deep_network_in_double_precision():
    def deep(params, model_state, batch, key, train):
        return lax.scan(lambda h, w: (h @ w, None), batch["x"], params["kernel"])[0], {}

    kernel, x = 10 * RNG.normal(size=(40, 4, 4)), np.ones((2, 4))
    with pytest.raises(SetupError, match="NaN or infinite"):
        oneshot.synflow(
            deep, {"kernel": jnp.asarray(kernel, jnp.float32)}, {}, {"x": x}, 0.5, rounds=2
        )
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(kernel)}
        found = oneshot.synflow(deep, params, {}, {"x": x}, 0.5, rounds=2)["kernel"]
    assert found.dtype == jnp.float32
    # Flow is conserved: what enters each layer is the same, up to what rounds to nothing.
    sums = np.asarray(found).sum((1, 2))
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    assert 0.5 <= float(found.max()) < 1


def test_synflow_for_several_sparsities_at_once():
    def run(sparsity):
        return oneshot.synflow(mlp_linear, PARAMS, {}, BATCHES[0], sparsity, rounds=4)

    many = jax.vmap(run)(jnp.array([0.5, 0.9]))
    for i, sparsity in enumerate((0.5, 0.9)):
        one = run(sparsity)
        for path in PATHS:
            np.testing.assert_allclose(many[path][i], one[path], rtol=1e-6)
