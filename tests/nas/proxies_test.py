"""Proxies against NumPy on a small network, finite differences, and one program for candidates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SelectorError, SetupError
from effjax.nas import proxies
from tests import nets

RNG = np.random.default_rng(3)
SIZES = (5, 6, 4, 3)
WEIGHTS = [RNG.normal(size=s) for s in itertools.pairwise(SIZES)]
X, LABEL = RNG.normal(size=(8, 5)), RNG.integers(0, 3, 8)
PARAMS = {f"layer{i}": {"kernel": jnp.asarray(w, jnp.float32)} for i, w in enumerate(WEIGHTS)}
BATCH = {"image": jnp.asarray(X, jnp.float32), "label": jnp.asarray(LABEL)}
GATES = jnp.ones(3)
QUICK = {"xla_backend_optimization_level": 0}


def quick(f, **fixed):
    """A proxy, compiled in a hurry."""

    def call(apply, params, state, batch, *rest):
        run = jax.jit(
            lambda *arrays: f(apply, *arrays, *rest, **fixed),
            compiler_options=QUICK,
        )
        return np.asarray(run(params, state, batch))

    return call


def apply(params, model_state, batch, key, train):
    """A perceptron of three layers; batch["gates"] multiply what each layer gives."""
    x, gates = batch["image"], batch.get("gates", GATES)
    for i in range(3):
        x = gates[i] * (x @ params[f"layer{i}"]["kernel"])
        x = jax.nn.relu(x) if i < 2 else x
    return x, model_state


def loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def forward(weights, x):
    """Inputs and outputs of each layer, in float64."""
    ins, outs = [x], []
    for i, w in enumerate(weights):
        outs.append(ins[-1] @ w)
        ins.append(np.maximum(outs[-1], 0) if i < len(weights) - 1 else outs[-1])
    return ins, outs


def backward(weights, ins, outs, top):
    """Gradients by each layer's outputs."""
    grads = [top]
    for i in (2, 1):
        grads.insert(0, grads[0] @ weights[i].T * (outs[i - 1] > 0))
    return grads


def gradients(weights):
    """∂L/∂w of each layer, and by each layer's outputs."""
    ins, outs = forward(weights, X)
    p = np.exp(outs[-1] - outs[-1].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    by_outs = backward(weights, ins, outs, (p - np.eye(3)[LABEL]) / len(X))
    return [x.T @ g for x, g in zip(ins[:-1], by_outs, strict=True)], by_outs


def test_grad_norm_and_snip():
    grads, _ = gradients(WEIGHTS)
    found = quick(proxies.grad_norm)(apply, PARAMS, {}, BATCH, loss)
    assert found == pytest.approx(sum(np.linalg.norm(g) for g in grads), rel=1e-4)
    pairs = list(zip(WEIGHTS, grads, strict=True))
    found = quick(proxies.snip)(apply, PARAMS, {}, BATCH, loss)
    assert found == pytest.approx(sum(np.abs(w * g).sum() for w, g in pairs), rel=1e-4)
    last = quick(proxies.snip, select="layer2")(apply, PARAMS, {}, BATCH, loss)
    assert last == pytest.approx(np.abs(WEIGHTS[2] * grads[2]).sum(), rel=1e-4)
    with pytest.raises(SelectorError, match="matches no leaf"):
        proxies.snip(apply, PARAMS, {}, BATCH, loss, select="conv")


def test_grasp_by_differences_of_gradients():
    grads, _ = gradients(WEIGHTS)
    moved = [
        gradients([w + s * g for w, g in zip(WEIGHTS, grads, strict=True)])[0]
        for s in (1e-5, -1e-5)
    ]
    product = [(a - b) / 2e-5 for a, b in zip(*moved, strict=True)]
    wanted = -sum((w * p).sum() for w, p in zip(WEIGHTS, product, strict=True))
    assert quick(proxies.grasp)(apply, PARAMS, {}, BATCH, loss) == pytest.approx(wanted, rel=1e-3)


def test_synflow_by_products_of_absolute_weights():
    """Each layer's scores add up to R itself, so the sum is three times R."""
    a, b, c = (np.abs(w) for w in WEIGHTS)
    wanted = 3 * (np.ones((1, 5)) @ a @ b @ c).sum()
    found = quick(proxies.synflow)(apply, PARAMS, {}, BATCH)
    assert found == pytest.approx(np.log(wanted), rel=1e-5)
    halved = {**BATCH, "gates": jnp.array([0.5, 1.0, 1.0])}
    found = quick(proxies.synflow, keep="^gates$")(apply, PARAMS, {}, halved)
    assert found == pytest.approx(np.log(wanted / 2), rel=1e-5)
    off = {**BATCH, "gates": jnp.array([1.0, 0.0, 1.0])}
    assert quick(proxies.synflow, keep="^gates$")(apply, PARAMS, {}, off) == -np.inf


def test_fisher_by_activations_and_their_gradients():
    _, outs = forward(WEIGHTS, X)
    _, by_outs = gradients(WEIGHTS)
    wanted = sum(
        0.5 * len(w) * np.square(a * g).mean(axis=0).sum()
        for w, a, g in zip(WEIGHTS, outs, by_outs, strict=True)
    )
    assert quick(proxies.fisher)(apply, PARAMS, {}, BATCH, loss) == pytest.approx(wanted, rel=1e-4)


def test_fisher_sums_over_positions():
    """A convolution: the gradient times the activation, added up over the image's pixels."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    image = jax.random.normal(jax.random.key(1), (5, 6, 6, 2))

    def convolve(kernel, image):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def conv(params, state, batch, key, train):
        return convolve(params["kernel"], batch["image"]), state

    def cubes(outputs, batch):
        return jnp.mean(outputs**3)

    out = np.asarray(convolve(kernel, image), np.float64)
    gates = (out * 3 * out**2 / out.size).sum(axis=(1, 2))
    found = quick(proxies.fisher)(conv, {"kernel": kernel}, {}, {"image": image}, cubes)
    assert found == pytest.approx(0.5 * 18 * np.square(gates).mean(0).sum(), rel=1e-4)


def test_jacob_cov():
    few = {name: x[:3] for name, x in BATCH.items()}
    ins, outs = forward(WEIGHTS, X[:3])
    jacobian = backward(WEIGHTS, ins, outs, np.ones((3, 3)))[0] @ WEIGHTS[0].T
    values = np.linalg.eigvalsh(np.corrcoef(jacobian))
    wanted = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    assert quick(proxies.jacob_cov)(apply, PARAMS, {}, few) == pytest.approx(wanted, rel=1e-3)
    # In float32 the eigenvalue of 0 is rounded by about 1e-7, a hundredth of what is added to it.
    with jax.enable_x64(True):
        found = proxies.spread(jnp.asarray(RNG.permutation(np.eye(4))))
    assert found == pytest.approx(
        -np.sum([np.log(x + 1e-5) + 1 / (x + 1e-5) for x in (0, 4 / 3, 4 / 3, 4 / 3)]), rel=1e-6
    )
    assert np.isnan(proxies.spread(jnp.zeros((3, 4))))
    with pytest.raises(SetupError, match=r"has \{'label': 'int32'\}"):
        proxies.jacob_cov(apply, PARAMS, {}, {"label": BATCH["label"]})


def test_naswot_by_hamming_distances():
    ins, _ = forward(WEIGHTS, X)
    kernel = np.zeros((8, 8))
    for x in ins[1:3]:
        on = x > 0
        kernel += (on[:, None] == on[None]).sum(-1)
    found = quick(proxies.naswot, select=r"layer[12]")(apply, PARAMS, {}, BATCH)
    assert found == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-4)
    half = {"layer1": jnp.array(0.5), "layer2": jnp.array(1.0)}
    counted = 0.5 * (np.equal(ins[1][:, None] > 0, ins[1][None] > 0)).sum(-1)
    counted += (np.equal(ins[2][:, None] > 0, ins[2][None] > 0)).sum(-1)
    found = quick(proxies.naswot, select=r"layer[12]", active=half)(apply, PARAMS, {}, BATCH)
    assert found == pytest.approx(np.linalg.slogdet(counted)[1], rel=1e-4)
    with pytest.raises(SelectorError, match="match none"):
        proxies.naswot(apply, PARAMS, {}, BATCH, active={"conv": jnp.ones(())})


def test_zen():
    """The norm's variances by hand, with momentum and old statistics that must not count."""
    kernel = jax.random.normal(jax.random.key(0), (5, 4))

    def normed(params, state, batch, key, train):
        x = batch["image"] @ params["kernel"]
        var = jnp.var(x, axis=0)
        moved = {"norm": {"var": 0.7 * state["norm"]["var"] + 0.3 * var}}
        return (x - x.mean(0)) / jnp.sqrt(var), moved

    key, old = jax.random.key(5), {"norm": {"var": jnp.full(4, 9.0)}}
    found = quick(proxies.zen)(normed, {"kernel": kernel}, old, BATCH, key)
    keys = jax.random.split(key, 3)
    x, noise = (np.asarray(jax.random.normal(k, (8, 5)), np.float64) for k in keys[:2])

    def f(x):
        y = x @ np.asarray(kernel, np.float64)
        return (y - y.mean(0)) / y.std(0), y.var(0)

    (a, variance), (b, _) = f(x), f(x + 0.01 * noise)
    wanted = np.log(np.abs(a - b).sum() / 8) + 0.5 * np.log(variance.mean())
    assert found == pytest.approx(wanted, rel=1e-3)
    without = quick(proxies.zen, active={"norm": jnp.zeros(())})(
        normed, {"kernel": kernel}, old, BATCH, key
    )
    assert without == pytest.approx(np.log(np.abs(a - b).sum() / 8), rel=1e-3)
    nothing = {"kernel": jnp.zeros((5, 4))}
    assert quick(proxies.zen)(
        lambda p, s, b, k, t: (b["image"], normed(p, s, b, k, t)[1]), nothing, old, BATCH, key
    ) == pytest.approx(np.log(np.abs(0.01 * noise).sum() / 8), rel=1e-3)
    drawn = proxies.gaussian(key, {"a": {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(3)}})
    assert float(np.std(drawn["a"]["kernel"])) == pytest.approx(1, abs=0.04)
    assert not np.any(drawn["a"]["bias"])


def test_sizes():
    assert proxies.params(PARAMS) == 5 * 6 + 6 * 4 + 4 * 3
    assert proxies.macs(apply, PARAMS, {}, BATCH) == 5 * 6 + 6 * 4 + 4 * 3
    off = {"layer1": jnp.zeros(())}
    assert proxies.params(PARAMS, active=off) == 5 * 6 + 4 * 3
    assert proxies.macs(apply, PARAMS, {}, BATCH, active=off) == 5 * 6 + 4 * 3


def test_one_program_scores_candidates_alone_and_in_a_batch():
    traces = []

    def score(gates):
        traces.append(1)
        batch, state = {**BATCH, "gates": gates}, {}
        few = {"image": BATCH["image"][:3], "gates": gates}
        return jnp.stack(
            [
                f(apply, PARAMS, state, batch, loss)
                for f in (proxies.grad_norm, proxies.snip, proxies.grasp, proxies.fisher)
            ]
            + [proxies.jacob_cov(apply, PARAMS, state, few)]
        )

    candidates = jnp.asarray(RNG.uniform(0.5, 2, (3, 3)), jnp.float32)
    jitted = jax.jit(score, compiler_options=QUICK)
    each = jnp.stack([jitted(gates) for gates in candidates])
    assert len(traces) == 1
    together = jax.jit(jax.vmap(score), compiler_options=QUICK)(candidates)
    np.testing.assert_allclose(together, each, rtol=1e-3)
    doubled = {**PARAMS, "layer1": {"kernel": 2 * PARAMS["layer1"]["kernel"]}}
    scaled = quick(proxies.snip)(apply, doubled, {}, BATCH, loss)
    assert float(jitted(jnp.array([1.0, 2.0, 1.0]))[1]) == pytest.approx(scaled, rel=1e-4)


@pytest.mark.parametrize("library", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_flax_models(library):
    """BatchNorm, dropout and convolutions in both libraries: the numbers are finite."""
    model = {"linen": nets.linen, "nnx": nets.nnx_}[library]()
    shapes = jax.eval_shape(model.init, jax.random.key(0), nets.BATCH)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.5, 1, x.shape), x.dtype), shapes)

    def scores(params, state):
        given = (model.apply, params, state, nets.BATCH)
        found = [
            proxies.fisher(*given, nets.loss),
            proxies.synflow(*given),
            proxies.naswot(*given, select="conv2|head"),
        ]
        return jnp.stack(found)

    assert np.isfinite(jax.jit(scores, compiler_options=QUICK)(*drawn)).all()
    assert proxies.macs(model.apply, *shapes, nets.BATCH) == 8 * 8 * 9 * 8 + 4 * 4 * 72 * 16 + 128
    assert ej.nas.proxies is proxies
