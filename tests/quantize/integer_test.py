"""Tests of integer execution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import SelectorError, SetupError, SiteError
from effjax.quantize import Bits, kernels, numerics, qat
from effjax.quantize.integer import integer
from tests import nets
from tests.programs import PROGRAMS, X, normal

KEY = jax.random.key(0)
TX = optax.sgd(0.05)
STEP = 2.0**-24


def apply_of(f):
    return lambda params, model_state, x, key, train: (f(params, x), model_state)


def fresh(f, transform, params, x):
    """A state at step 0 of f under the transform, its static ranges calibrated on x."""
    model = ej.Model(lambda key, batch: (params, {}), apply_of(f))
    state = ej.init_state(KEY, model, transform, optax.sgd(0.0), x)
    mean = lambda outputs, batch: sum(jnp.sum(o) for o in jax.tree.leaves(outputs))  # noqa: E731
    step = jax.jit(ej.make_step(model.apply, transform, mean, optax.sgd(0.0)))
    return model.apply, step(state, x)[0]


def qat_view(apply, transform, state, batch):
    """What evaluation under the transform computes."""
    ctx = ej.Ctx(state.step, state.key, train=False)
    args = (apply, transform, state.vars, state.model_state, state.transform, batch, ctx)
    return jax.jit(lambda: ej.step.forward(*args).outputs)()


def run(small, state, batch):
    call = jax.jit(small.apply, static_argnums=4)
    return call(small.weights, state.model_state, batch, None, False)[0]


def trained(model, transform, batch, loss=nets.loss, steps=3):
    state = ej.init_state(KEY, model, transform, TX, batch)
    step = jax.jit(ej.make_step(model.apply, transform, loss, TX))
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def on_grid(x, bits, channels=()):
    g = numerics.grid(bits)
    scale = numerics.scale_of(numerics.absmax(x, channels), g)
    return numerics.round_to(x, scale, g), scale


# One site


def conv(stride=1, padding="SAME", spread=1, groups=1, spec=("NHWC", "HWIO", "NHWC")):
    def f(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            padding,
            rhs_dilation=(spread, spread),
            dimension_numbers=spec,
            feature_group_count=groups,
        )

    return f


IMAGE = normal(2, 7, 6, 4)
ONE = {
    "dense": (lambda p, x: x @ p["kernel"], normal(4, 3), X, 4),
    "one row": (lambda p, x: x @ p["kernel"], normal(4, 3), X[:1], 4),
    "many rows": (lambda p, x: x @ p["kernel"], normal(4, 3), normal(9, 5, 4), 4),
    "heads": (lambda p, x: jnp.tensordot(x, p["kernel"], 2), normal(2, 4, 3, 5), normal(6, 2, 4),
              8),
    "einsum": (*PROGRAMS["einsum"][:1], normal(4, 2, 3), X, 4),
    "transposed": (*PROGRAMS["transposed operands"][:1], normal(4, 4), X, 4),
    "batched": (lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["kernel"]), normal(3, 4, 5),
                normal(3, 8, 4), 4),
    "conv": (conv(), normal(3, 3, 4, 5), IMAGE, 36),
    "many channels": (conv(), normal(3, 3, 20, 5), normal(2, 7, 6, 20), 180),
    "1x1": (conv(2), normal(1, 1, 4, 5), IMAGE, 4),
    "strided": (conv(2, ((1, 0), (2, -1))), normal(3, 2, 4, 5), IMAGE, 24),
    "dilated": (conv(spread=2), normal(2, 3, 4, 5), IMAGE, 24),
    "channels first": (conv(2, spec=("NCHW", "OIHW", "NCHW")), normal(5, 7, 3, 3), IMAGE, 63),
    "depthwise": (conv(2, groups=4), normal(3, 3, 1, 4), IMAGE, 9),
    "multiplier": (conv(groups=4), normal(3, 3, 1, 8), IMAGE, 9),
    "grouped": (conv(groups=2), normal(3, 3, 2, 6), IMAGE, 18),
    "transposed conv": (*PROGRAMS["transposed conv"][:1], normal(3, 3, 4, 5), IMAGE, 36),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_a_site_is_the_exact_sum_and_within_the_bound_of_qat(name):
    f, w, x, terms = ONE[name]
    ranges = "dynamic" if name in ("dense", "batched", "depthwise") else "static"
    transform = qat(6, 7, ranges=ranges)
    apply, state = fresh(f, transform, {"kernel": w}, x)
    for backend in ("cpu", "tpu"):  # how each is written; both run here
        small = integer(apply, transform, state, x, grouped="integer", backend=backend)
        assert small.runs == {"kernel": "integer"}
        assert small.weights["codes"]["kernel"].dtype == jnp.int8
        assert small.weights["params"] == {}
        outputs = run(small, state, x)
        [site] = ej.find_sites(apply, {"kernel": w}, {}, x)
        # Sums of integers below 2^24 are exact in float32, in any order.
        operand = w.T if name == "transposed" else w
        channels = site.channels[site.weight]
        if name == "transposed":
            channels = (1 - channels[0],)
            operand = w
        codes, s_w = on_grid(operand, 6, channels)
        inputs, s_x = on_grid(x, 7)
        sums = jax.jit(f)({"kernel": codes}, inputs)
        ones = jax.jit(f)({"kernel": jnp.ones_like(w)}, jnp.ones_like(x))
        scales = jax.jit(f)({"kernel": jnp.broadcast_to(s_w, w.shape)}, jnp.ones_like(x))
        scales = scales / jnp.maximum(ones, 1)  # nothing but padding has no products
        np.testing.assert_allclose(outputs, sums * scales * s_x.reshape(()), rtol=2e-6, atol=1e-6)
        # The bound that the docstring states, in exact integers and one float each.
        reference = qat_view(apply, transform, state, x)
        sizes = jax.jit(f)({"kernel": jnp.abs(codes * s_w)}, jnp.abs(inputs * s_x))
        bound = (terms + 5) * STEP * np.asarray(sizes, np.float64)
        assert np.all(np.abs(np.float64(outputs) - np.float64(reference)) <= 1.001 * bound)
        # On a grid of 8 bits as next site's input: one unit at most.
        step = float(jnp.abs(reference).max()) / 127
        assert bound.max() < step
        units = np.round(np.asarray(outputs) / step) - np.round(np.asarray(reference) / step)
        assert np.abs(units).max() <= 1


def test_by_hand():
    w = jnp.array([[3.0, 0.0], [-1.6, 0.7], [0.4, 0.2]])
    x = jnp.array([[7.0, -2.4, 0.6]])
    transform = qat(3, 4, ranges="static")
    apply, state = fresh(lambda p, x: x @ p["kernel"], transform, {"kernel": w}, x)
    small = integer(apply, transform, state, x)
    # A matrix, in a program for CPU: [kept, summed over].
    codes = kernels.unpack(small.weights["codes"]["kernel"], (2, 3), 3)
    assert codes.tolist() == [[3, -2, 0], [0, 3, 1]]
    other = integer(apply, transform, state, x, backend="tpu").weights["codes"]["kernel"]
    assert kernels.unpack(other, (3, 2), 3).tolist() == codes.T.tolist()
    np.testing.assert_allclose(small.weights["scales"]["kernel"], [[1.0, 0.7 / 3]], rtol=1e-6)
    assert small.weights["inputs"] == {"kernel": 1.0}
    # 7·3 + 2·2 and -2·3 + 1·1, times the scales
    np.testing.assert_allclose(run(small, state, x), [[25.0, -5 * 0.7 / 3]], rtol=1e-6)


def test_with_scales_that_are_powers_of_two_it_is_qat_bit_for_bit():
    def f(params, x):
        h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        return h @ params["b"]["kernel"]

    rng = np.random.default_rng(0)

    def on(shape, exponent):
        codes = rng.integers(-127, 128, size=shape)
        codes[0] = 127
        return jnp.asarray(codes * 2.0**exponent, jnp.float32)

    params = {
        "a": {"kernel": on((32, 16), -9), "bias": on((16,), -8)},
        "b": {"kernel": on((16, 8), -7)},
    }
    x = on((64, 32), -5)
    transform = qat(ranges="static")
    apply, state = fresh(f, transform, params, x)
    ranges = {"a/kernel": jnp.float32(127 * 2.0**-5), "b/kernel": jnp.float32(127 * 2.0**-2)}
    state = state._replace(transform={**state.transform, "ranges": ranges})
    small = integer(apply, transform, state, x)
    np.testing.assert_array_equal(run(small, state, x), qat_view(apply, transform, state, x))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if "shard" not in n])
def test_every_program(name):
    f, params, x, sites, _ = PROGRAMS[name]
    if name in ("condition", "cond", "switch"):
        x = jnp.abs(x)
    transform = qat()
    if name in ("embedding", "attention"):
        rows, products = name == "embedding", name == "attention"
        transform = qat(select="kernel|embedding", embeddings=rows, products=products)
    apply = apply_of(f)
    model = ej.Model(lambda key, batch: (params, {}), apply)
    state = ej.init_state(KEY, model, transform, TX, x)
    if name == "cond":
        # The second branch holds "b/kernel", and does not run.
        with pytest.raises(SiteError, match="does not run for this batch"):
            integer(apply, transform, state, x)
        x = x.at[0, 0].set(-1.0)
    if name == "condition":
        with pytest.raises(SiteError, match="in the condition of a loop"):
            integer(apply, transform, state, x)
        return
    small = integer(apply, transform, state, x)
    assert set(small.runs) == set(sites)
    outputs, wanted = run(small, state, x), qat_view(apply, transform, state, x)
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() <= np.abs(b).max() / 127


# Whole models


class Block(nn.Module):
    """A transformer encoder block, without dropout."""

    features: int = 16

    @nn.compact
    def __call__(self, x, train):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, deterministic=not train)(h)
        h = nn.gelu(nn.Dense(4 * self.features, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.features, name="down")(h)


class Depthwise(nn.Module):
    """Depthwise-separable convolutions."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
        return nn.Dense(8, name="head")(x.mean(axis=(1, 2)))


class Stack(nn.Module):
    """Blocks under scan and remat."""

    @nn.compact
    def __call__(self, x, train):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.relu(nn.Dense(16, name="dense")(x)), None

        layer = nn.remat(Layer)
        scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


TOKENS = {"image": np.asarray(normal(4, 6, 16)), "label": np.zeros(4, np.int32)}
MODELS = {
    "cnn, Linen": (nets.linen, nets.BATCH, {}),
    "cnn, NNX": (nets.nnx_, nets.BATCH, {}),
    "mlp": (nets.raw, nets.BATCH, {}),
    "depthwise": (lambda: ej.from_linen(Depthwise()), nets.BATCH, {}),
    "transformer": (lambda: ej.from_linen(Block()), TOKENS, {"products": True}),
    "scan of remat": (lambda: ej.from_linen(Stack()), TOKENS, {}),
}


def squares(outputs, batch):
    return jnp.mean((outputs - 1.0) ** 2)


@pytest.mark.parametrize(
    ("name", "ranges"), [*((name, "static") for name in MODELS), ("cnn, Linen", "dynamic")]
)
def test_models_are_qat_within_a_unit_of_their_output(name, ranges):
    make, batch, options = MODELS[name]
    model, transform = make(), qat(ranges=ranges, **options)
    loss = squares if batch is TOKENS else nets.loss
    state = trained(model, transform, batch, loss)
    small = integer(model.apply, transform, state, batch, select=".")
    assert set(small.runs.values()) == {"integer"}
    outputs, wanted = run(small, state, batch), qat_view(model.apply, transform, state, batch)
    unit = float(jnp.abs(wanted).max()) / 127
    assert np.abs(outputs - wanted).max() <= unit
    # Most differ by rounding alone.
    assert np.mean(np.abs(outputs - wanted) <= unit / 20) > 0.9
    # One example at a time, mapped; static ranges make it the same function.
    if ranges == "static":
        single = jax.vmap(
            lambda x: small.apply(
                small.weights, state.model_state, {**batch, "image": x[None]}, None, False
            )[0][0]
        )
        assert np.abs(jax.jit(single)(batch["image"]) - outputs).max() <= unit


@pytest.mark.parametrize(("bits", "stored"), [(8, 8), (6, 8), (4, 4), (3, 4), (2, 2)])
def test_its_bytes_are_those_of_its_integers_and_scales(bits, stored):
    model = nets.linen(features=32)
    transform = qat(bits, 8, ranges="static")
    state = trained(model, transform, nets.BATCH, steps=1)
    small = integer(model.apply, transform, state, nets.BATCH)
    kernels_ = [x for p, x in ej.select.leaves(state.vars.model).items() if p.endswith("kernel")]
    others = sum(x.nbytes for x in small.weights["params"].values())
    assert others == sum(x.nbytes for x in jax.tree.leaves(state.vars.model)) - sum(
        x.nbytes for x in kernels_
    )
    wanted = sum(x.size for x in kernels_) * stored / 8
    wanted += 4 * (sum(x.shape[-1] for x in kernels_) + len(kernels_)) + others
    assert abs(small.nbytes / wanted - 1) < 0.02
    if bits == stored:
        facts = transform.describe(state.vars.model, {}, state.transform)
        costs = ej.footprint(state.vars.model, facts=facts).leaves
        dense = sum(leaf.sizes["dense"] for leaf in costs)
        assert abs((small.nbytes - 4 * len(kernels_)) / dense - 1) < 0.02


def test_weights_are_arguments_and_may_be_donated():
    model, transform = nets.raw(), qat(4, 8, ranges="static")
    state = trained(model, transform, nets.BATCH)
    small = integer(model.apply, transform, state, nets.BATCH)
    images = jnp.asarray(nets.BATCH["image"])

    def predict(weights, images):
        return small.apply(weights, {}, {"image": images}, None, False)[0], images

    closed = jax.make_jaxpr(predict)(small.weights, images)
    assert sum(np.size(c) for c in closed.consts) <= 16
    wanted = predict(small.weights, images)[0]
    outputs, _ = jax.jit(predict, donate_argnums=1)(small.weights, images + 0)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-5, atol=1e-6)
    text = jax.jit(predict).lower(small.weights, images).as_text()
    # The weights, transposed, by the activations.
    assert "(tensor<32x64xi8>, tensor<24x64xi8>) -> tensor<32x24xi32>" in text


def test_masks_are_applied():
    model = nets.raw()
    transform = ej.chain(
        prune=ej.prune.magnitude(0.5, select="kernel$"), quant=qat(ranges="static")
    )
    state = trained(model, transform, nets.BATCH)
    small = integer(model.apply, transform, state, nets.BATCH)
    assert float(jnp.mean(small.weights["codes"]["hidden/kernel"] == 0)) >= 0.5
    outputs = run(small, state, nets.BATCH)
    wanted = qat_view(model.apply, transform, state, nets.BATCH)
    assert np.abs(outputs - wanted).max() <= np.abs(wanted).max() / 127


def test_partly_quantized_sites():
    f, params, x, *_ = PROGRAMS["two"]
    rules = [("^a/", Bits(4, 32)), ("^b/", Bits(32, 8))]
    transform = qat(rules=rules)
    apply, state = fresh(f, transform, params, x)
    small = integer(apply, transform, state, x)
    assert small.runs == {"a/kernel": "weights", "b/kernel": "inputs"}
    assert set(small.weights["params"]) == {"b/kernel"}
    view = qat_view(apply, transform, state, x)
    np.testing.assert_allclose(run(small, state, x), view, atol=1e-6)


def test_grouped_convolutions_stay_floats_where_that_is_faster():
    f, w, x, _ = ONE["grouped"]
    transform = qat(ranges="static")
    apply, state = fresh(f, transform, {"kernel": w}, x)
    runs = {
        b: integer(apply, transform, state, x, backend=b).runs["kernel"] for b in ("cpu", "gpu")
    }
    assert runs == {"cpu": "float", "gpu": "integer"}
    small = integer(apply, transform, state, x, backend="cpu")
    view = qat_view(apply, transform, state, x)
    np.testing.assert_allclose(run(small, state, x), view, rtol=1e-5, atol=1e-5)
    f, w, x, _ = ONE["depthwise"]
    apply, state = fresh(f, transform, {"kernel": w}, x)
    assert integer(apply, transform, state, x, backend="cpu").runs["kernel"] == "integer"
    small = integer(apply, transform, state, x, grouped="float")
    assert small.runs["kernel"] == "float"
    assert small.weights["params"] == {}


def test_a_leaf_used_twice_has_the_bits_of_each_use():
    def f(params, x):
        return jnp.tanh(x @ params["kernel"]) @ params["kernel"]

    transform = qat(rules=[("#1$", Bits(8, 8))], weights=3, activations=8)
    apply, state = fresh(f, transform, {"kernel": normal(4, 4)}, X)
    small = integer(apply, transform, state, X)
    assert small.weights["codes"]["kernel"].nbytes == 8
    assert small.weights["codes"]["kernel#1"].nbytes == 16
    wanted = qat_view(apply, transform, state, X)
    np.testing.assert_allclose(run(small, state, X), wanted, atol=0.02)


def test_packing():
    rng = np.random.default_rng(0)
    for bits in range(2, 9):
        bound = 2 ** (bits - 1) - 1
        codes = jnp.asarray(rng.integers(-bound, bound + 1, size=(5, 3)), jnp.int8)
        stored = kernels.pack(codes, bits)
        assert stored.nbytes == -(-15 * kernels.width(bits) // 8)
        np.testing.assert_array_equal(kernels.unpack(stored, (5, 3), bits), codes)


# Errors


def test_errors():
    f, params, x, *_ = PROGRAMS["two"]
    apply = apply_of(f)
    model = ej.Model(lambda key, batch: (params, {}), apply)
    static = qat(ranges="static")
    state = ej.init_state(KEY, model, static, TX, x)
    with pytest.raises(SetupError, match="never calibrated"):
        integer(apply, static, state, x)
    plain = ej.chain()
    with pytest.raises(SetupError, match="found 0 quantizers"):
        integer(apply, plain, ej.init_state(KEY, model, plain, TX, x), x)
    mixed = qat(rules=[("^a/", Bits(8, 16))])
    state = ej.init_state(KEY, model, mixed, TX, x)
    with pytest.raises(SetupError, match=r"not be multiplied in integers: \{'a/kernel'"):
        integer(apply, mixed, state, x, select="kernel")
    integer(apply, mixed, state, x, select="^b/")
    with pytest.raises(SelectorError, match="matches none"):
        integer(apply, mixed, state, x, select="nowhere")
    with pytest.raises(SetupError, match="grouped is"):
        integer(apply, mixed, state, x, grouped="fast")
    small = integer(apply, mixed, state, x)
    with pytest.raises(SetupError, match="asked to train"):
        small.apply(small.weights, {}, x, KEY, True)
    wide = mixed._replace(describe=lambda *_: {"a/kernel": {"weight_bits": 12, "act_bits": 8}})
    with pytest.raises(SetupError, match="have 12 bits"):
        integer(apply, wide, state, x)
    tiled = {**state.transform, "scales": {"a/kernel": jnp.int32(8), "b/kernel": jnp.int32(4)}}
    with pytest.raises(SetupError, match="has 8 scales"):
        integer(apply, mixed, state._replace(transform=tiled), x)
    trained_ = state._replace(vars=state.vars._replace(extra={"step": jnp.ones(())}))
    with pytest.raises(SetupError, match="has trained ones"):
        integer(apply, mixed, trained_, x)


@pytest.mark.parametrize("make", [ej.quantize.dorefa, ej.quantize.lsq, ej.quantize.ternary])
def test_other_quantizers_are_no_integer_programs(make):
    f, params, x, *_ = PROGRAMS["two"]
    apply, transform = apply_of(f), make()
    model = ej.Model(lambda key, batch: (params, {}), apply)
    state = ej.init_state(KEY, model, transform, TX, x)
    with pytest.raises(SetupError):
        integer(apply, transform, state, x)


def test_operands_off_the_grid():
    f, params, x, *_ = PROGRAMS["two"]
    apply, transform = apply_of(f), qat(4, 8)
    model = ej.Model(lambda key, batch: (params, {}), apply)
    state = ej.init_state(KEY, model, transform, TX, x)
    other = transform._replace(wrap=qat(5, 8).wrap)
    with pytest.raises(SetupError, match="do not lie on the grids"):
        integer(apply, other, state, x)


def test_sums_that_may_exceed_int32():
    params = {"kernel": jnp.zeros((140_000, 1))}
    x = jnp.ones((1, 140_000))
    transform = qat()
    apply = apply_of(lambda p, x: x @ p["kernel"])
    model = ej.Model(lambda key, batch: (params, {}), apply)
    state = ej.init_state(KEY, model, transform, TX, x)
    with pytest.raises(SetupError, match="may exceed int32"):
        integer(apply, transform, state, x)
