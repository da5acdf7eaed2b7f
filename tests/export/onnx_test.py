"""ONNX: every layer on integers, every quantizer's value as in JAX, or an error that says why."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import effjax as ej
from effjax.errors import ExportError
from effjax.export.marker import tapped
from effjax.export.onnx import INTEGER, integer_kernels, kernels, run, to_onnx
from effjax.export.verify import function, shapes
from effjax.quantize.marker import Quantizer, fake_quant
from tests import nets
from tests.export.frozen_programs import PROGRAMS, SIGNED, UNSIGNED, Layers, images

onnx = pytest.importorskip("onnx")

# What each layer, sum and pooling of the programs is in ONNX Runtime.
KERNELS = {
    "mlp": {"QGemm": 3},
    "cnn": {"QLinearConv": 4, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "depthwise": {"QLinearConv": 5, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "encoder": {"QGemm": 7, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1},
}


def aval(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ops(data):
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def agrees(fn, *arrays, rtol=1e-6):
    data = to_onnx(fn, *(aval(*x.shape, dtype=x.dtype) for x in arrays))
    found, wanted = run(data)(*arrays), jax.tree.leaves(jax.jit(fn)(*arrays))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    return data


@functools.cache
def exported(kind):
    """(images, file for any batch size, outputs, {quantizer: value}, the function with these)."""
    apply, shape = PROGRAMS[kind]()
    x, every = images(shape), tapped(apply)
    (n,) = jax.export.symbolic_shape("n")
    outputs, values = jax.tree.map(np.asarray, jax.jit(every)(x))
    return x, to_onnx(apply, aval(n, *shape)), outputs, values, every


@pytest.mark.parametrize("kind", PROGRAMS)
def test_every_layer_runs_on_integers_and_gives_what_jax_gives(kind):
    x, data, outputs, values, every = exported(kind)
    found = kernels(data)
    assert {op: n for op, n in found.items() if op in INTEGER} == KERNELS[kind]
    assert not {"Conv", "Gemm"} & set(found)
    assert ops(data).count("QuantizeLinear") == len(values)
    got, *layers = run(to_onnx(every, aval(*x.shape)))(x)
    for (name, wanted), layer in zip(sorted(values.items()), layers, strict=True):
        units = np.abs(layer - wanted) / (UNSIGNED if wanted.min() >= 0 else SIGNED)
        # The mean over space is rounded twice by ONNX Runtime: once its sum, then its quotient.
        assert units.max() < (1.01 if name == "mean:output" else 0.01), name
    np.testing.assert_allclose(got, outputs, atol=0.1)
    assert (got.argmax(-1) == outputs.argmax(-1)).all()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_one_file_serves_every_batch_size(kind):
    x, data, outputs, _, _ = exported(kind)
    for size in (1, 3):
        np.testing.assert_allclose(run(data)(x[:size])[0], outputs[:size], atol=0.1)


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # it asks the system for its version
@pytest.mark.filterwarnings("ignore:.*_at_fork:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", PROGRAMS)
def test_openvino_runs_the_same_file(kind):
    openvino = pytest.importorskip("openvino")
    x, data, outputs, _, _ = exported(kind)
    core = openvino.Core()
    found = core.compile_model(core.read_model(data), "CPU")(x)[0]
    # Without VNNI its products saturate at 16 bits: close, then, is all that it can be.
    assert np.corrcoef(found.ravel(), outputs.ravel())[0, 1] > 0.95


def test_what_is_stored():
    apply, shape = PROGRAMS["mlp"]((256, 256))
    data = to_onnx(apply, aval(4, *shape))
    integers = 20 * 256 + 256 * 256 + 256 * 10 + 4 * 522  # weights, biases
    assert len(data) < 1.1 * integers
    arrays = {
        a.name: onnx.numpy_helper.to_array(a) for a in onnx.load_from_string(data).graph.initializer
    }
    sizes = {
        k: [a.size for a in arrays.values() if a.dtype == k] for k in ("int8", "int32", "uint8")
    }
    assert sum(sizes["int8"]) == 20 * 256 + 256 * 256 + 256 * 10 + 522  # weights, their zero points
    assert sum(sizes["int32"]) == 522
    assert sizes["uint8"] == [1, 1]  # the zero points 128, of the input, and 0, after a ReLU


def test_sums_are_exact_on_this_cpu():
    x = np.full((1, 64), 1.0, np.float32)
    kernel = fake_quant(
        jnp.full((64, 16), 1.0), Quantizer("k:weight", np.float32(1 / 127), -127, 127)
    )

    def fn(x):
        return fake_quant(x, Quantizer("x", np.float32(1 / 255), 0, 255)) @ kernel

    (found,) = run(to_onnx(fn, aval(1, 64)))(x)  # 255 x 127, 64 times
    np.testing.assert_allclose(found, 64.0, rtol=1e-6)


def test_layers_are_named_by_where_they_stand():
    model = nets.linen()
    params, state = model.init(jax.random.key(0), nets.BATCH)
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases that are not zero
    small = ej.quantize.ptq(model, params, state, [nets.BATCH])
    frozen = ej.quantize.freeze(model.apply, small.transform, small.state, [nets.BATCH])
    graph = onnx.load_from_string(to_onnx(function(frozen), shapes(frozen, None))).graph
    named = {node.name.partition("/")[2]: node.op_type for node in graph.node if node.name}
    assert named == {"conv1": "Conv", "conv2": "Conv", "head": "Gemm"}
    assert all(len(node.input) == 3 for node in graph.node if node.name)
    tensors = {x for node in graph.node for x in node.output} - {"output"}
    assert max(len(x) for x in tensors) <= 4


def test_biases_are_integers_on_the_grid_of_the_sums():
    weight = np.float32([[1.0, 0.5], [-1.0, 0.25]])  # codes 4, 2, -4, 1 in steps of 1/4
    half, quarter = np.float32(0.5), np.full(2, 0.25, np.float32)

    def apply(x):
        x = fake_quant(x, Quantizer("x:input", half, -127, 127))
        w = fake_quant(jnp.asarray(weight), Quantizer("k:weight", quarter, -127, 127, 1))
        return x @ w + jnp.float32([0.375, -2.0])  # steps of 1/8: 3, -16

    data = to_onnx(apply, aval(1, 2))
    arrays = [onnx.numpy_helper.to_array(a) for a in onnx.load_from_string(data).graph.initializer]
    assert [3, -16] in [a.tolist() for a in arrays if a.dtype == np.int32]
    assert [[4, 2], [-4, 1]] in [a.tolist() for a in arrays if a.dtype == np.int8]
    x = np.float32([[1.1, -0.6]])  # 2 and -1 halves
    assert run(data)(x)[0].tolist() == [[1.0 + 0.5 + 0.375, 0.5 - 0.125 - 2.0]]


@pytest.mark.parametrize(("low", "high"), [(-7, 7), (0, 15), (-127, 127), (0, 255), (-30, 200)])
def test_narrow_and_shifted_ranges(low, high):
    x = np.linspace(-300, 300, 601, dtype=np.float32).reshape(1, -1)
    own = Quantizer("x:input", np.float32(1.0), low, high)
    found = run(to_onnx(lambda x: fake_quant(x, own), aval(*x.shape)))(x)[0]
    wanted = np.asarray(fake_quant(jnp.asarray(x), own))
    differ = found != wanted
    # An engine's integers have one more than a narrow grid; it is met by saturation alone.
    assert (found[differ] == -128).all()
    assert (wanted[differ] == -127).all()
    assert not differ.any() or low == -127


@pytest.mark.parametrize("clamp", [nn.relu6, lambda x: jnp.clip(x, -1.5, 2.0), nn.relu])
@pytest.mark.parametrize(("low", "high"), [(-127, 127), (0, 255)])
def test_clamps_before_a_rounding_are_clamps_of_the_integers(clamp, low, high):
    """So that the rounding follows the layer, whatever of the grid the clamp leaves."""
    own, scale = Layers(), np.float32(6 / 127)

    def apply(x):
        return own.rounded(clamp(own.dense(own.rounded(x, "input"), "a", 8)), "a", low, high, scale)

    x = np.clip(9 * images((16,)), -6, 6)  # beyond, engines have one integer more
    data = to_onnx(lambda x: own.dense(apply(x), "b", 4, scale), aval(*x.shape))
    assert integer_kernels(data) == {"QGemm": 2}
    assert not {"Relu", "Min", "Max"} & set(kernels(data))
    found, wanted = run(to_onnx(apply, aval(*x.shape)))(x)[0] / scale, jax.jit(apply)(x) / scale
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert len(np.unique(wanted.round())) > 5


def test_low_bit_activations_stay_on_integers():
    own = Layers()

    def apply(x):
        x = own.rounded(own.dense(own.rounded(x, "input"), "a", 8), "a", 0, 15, np.float32(0.2))
        return own.dense(x, "b", 4, np.float32(0.2))

    x = 3 * images((16,))
    data = to_onnx(apply, aval(*x.shape))
    assert integer_kernels(data) == {"QGemm": 2}
    assert kernels(data)["Clip"] == 1
    np.testing.assert_allclose(run(data)(x)[0], jax.jit(apply)(x), atol=1e-5)


X = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
ELEMENTS = {
    "abs": jnp.abs,
    "arithmetic": lambda x: (x + 2) * x - 3 / (x * x + 1),
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "compare": lambda x: jnp.where((x > 0) & ~(x >= 1) | (x < -1), x, -x),
    "equal": lambda x: jnp.where(jnp.sign(x) != 1, x, 0.5) + (jnp.floor(x) == jnp.ceil(x)),
    "erf": jax.scipy.special.erf,
    "exp2": jnp.exp2,
    "expm1": lambda x: jnp.expm1(x) + jnp.log1p(jnp.abs(x)),
    "gelu": nn.gelu,
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "hard_swish": nn.hard_swish,
    "int": lambda x: (x * 4).astype(jnp.int32) // 1 * 3,
    "leaky_relu": nn.leaky_relu,
    "log": lambda x: jnp.log(jnp.abs(x) + 1) + jnp.sqrt(jnp.abs(x)),
    "log_softmax": jax.nn.log_softmax,
    "maximum": lambda x: jnp.maximum(x, x[:, :1]) + jnp.minimum(x, 0.3),
    "power": lambda x: x**3 + x**5 + jnp.abs(x) ** 0.3 + 1 / x**2,
    "relu6": nn.relu6,
    "sigmoid": lambda x: nn.swish(x) + nn.tanh(x),
    "softmax": jax.nn.softmax,
    "softmax_axis": lambda x: jax.nn.softmax(x, axis=1),
    "trigonometry": lambda x: jnp.sin(x) + jnp.cos(x) + jax.lax.rsqrt(jnp.abs(x) + 1),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_operations_on_elements(name):
    agrees(ELEMENTS[name], X, rtol=2e-6)


LAYOUT = {
    "argmax": lambda x: (x.argmax(1), x.argmin(-1)),
    "broadcast": lambda x: x[:, None] + jnp.ones((3, 2, 4, 6)) * x.mean(0)[None, None],
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, x[:, ::2]], axis=1),
    "expand": lambda x: jnp.broadcast_to(x[:, None], (3, 5, 4, 6)).reshape(3, -1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3)), constant_values=1.5),
    "reductions": lambda x: (x.max(0), x.min((1, 2)), x.sum(-1), x.prod(1), x.mean((0, 2))),
    "repeated": lambda x: jnp.broadcast_to(x[:, :1], x.shape).sum(1),
    "reshape": lambda x: x.reshape(6, 12).T.reshape(2, 36),
    "slice": lambda x: x[1:, ::3, 2:5].transpose(2, 0, 1),
    "split": lambda x: tuple(jnp.split(x, 3, axis=2)),
    "stack": lambda x: jnp.stack([x, -x], axis=1),
    "take": lambda x: jnp.take(x, jnp.array([2, 0, 1]), axis=1),
    "windows": lambda x: nn.max_pool(x, (2,), (1,), "SAME") + nn.avg_pool(x, (3,), (1,), "SAME"),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_operations_on_layout(name):
    agrees(LAYOUT[name], X)


# With a batch of any size JAX writes these as gathers.
SLICES = {
    "every second": lambda x: x[:, ::2, 1::3],
    "one axis": lambda x: x[:, 1::2],
    "a part": lambda x: x[..., 2:5],
    "not a slice": lambda x: x[:, np.array([2, 0])],
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_of_batches_of_any_size(name):
    (n,) = jax.export.symbolic_shape("n")
    data = to_onnx(SLICES[name], jax.ShapeDtypeStruct((n, *X.shape[1:]), jnp.float32))
    np.testing.assert_array_equal(run(data)(X)[0], SLICES[name](X))
    assert set(kernels(data)) == {"Gather" if name == "not a slice" else "Slice"}


PRODUCTS = {
    "attention": lambda x: jnp.einsum("bqd,bkd->bqk", x, 2 * x),
    "left": lambda x: jnp.einsum("oi,bti->bto", jnp.arange(12.0).reshape(2, 6), x),
    "outer": lambda x: jnp.einsum("bti,bsj->btsij", x, x),
    "sums": lambda x: jnp.einsum("bti,tio->bo", x, jnp.arange(48.0).reshape(4, 6, 2)),
    "heads": lambda x: jnp.einsum("bti,iho->btho", x, jnp.arange(36.0).reshape(6, 2, 3)) + 1,
    "dot": lambda x: jnp.dot(x[0, 0], x[1, 1]),
    "convolution": lambda x: lax.conv_general_dilated(
        x,
        jnp.arange(24.0).reshape(2, 6, 2),
        (1,),
        [(1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
    ),
    "dilated": lambda x: nn.Conv(4, (2,), kernel_dilation=2, parent=None).apply(
        {"params": {"kernel": jnp.ones((2, 6, 4)), "bias": jnp.arange(4.0)}}, x
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    agrees(PRODUCTS[name], X, rtol=2e-5)


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_axes_moved_at_random(data):
    """Views of views, and operations between values whose stored orders differ."""
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    perms = [data.draw(st.permutations(range(3))) for _ in range(3)]
    axis = data.draw(st.integers(0, 2))

    def fn(x):
        a = x.transpose(perms[0])
        b = a + a.mean(axis=axis, keepdims=True)
        c = jnp.exp(b).transpose(np.argsort(perms[0])) * x
        d = (
            c.transpose(perms[1])[:, None]
            - c.transpose(perms[1]).max(axis=axis, keepdims=True)[:, None]
        )
        return (
            d.transpose(0, *(1 + np.array(perms[2]))).reshape(2, -1)
            if d.shape[0] == 2
            else d.sum(0)
        )

    agrees(fn, x, rtol=1e-5)


def test_several_operations_that_are_one():
    assert ops(agrees(jax.nn.softmax, X)) == ["Softmax"]
    assert ops(agrees(nn.gelu, X, rtol=2e-6)) == ["Gelu"]
    assert ops(agrees(lambda x: nn.gelu(x, approximate=False), X, rtol=2e-6)) == ["Gelu"]
    assert ops(agrees(lambda x: x.mean(-1), X)) == ["ReduceMean", "Squeeze"]
    variables = {"params": {"scale": jnp.linspace(1, 2, 6), "bias": jnp.linspace(-1, 1, 6)}}
    linen = lambda x: nn.LayerNorm(parent=None).apply(variables, x)  # noqa: E731
    assert ops(agrees(linen, X, rtol=1e-5)) == ["LayerNormalization"]
    norm = nnx.LayerNorm(6, rngs=nnx.Rngs(0))
    assert ops(agrees(norm, X, rtol=1e-5)) == ["LayerNormalization"]


def test_a_folded_batchnorm_leaves_nothing_behind():
    net = nn.Sequential([nn.Conv(4, (2,)), nn.BatchNorm(use_running_average=True), nn.relu])
    variables = net.init(jax.random.key(0), X)
    state = jax.tree.map(lambda v: v + 0.3, variables["batch_stats"])
    params, state = ej.quantize.fold_batchnorm(
        variables["params"], {"batch_stats": state}, {"layers_0": "layers_1"}
    )
    fn = lambda x: net.apply({"params": params, **state}, x)  # noqa: E731
    assert ops(agrees(fn, X, rtol=1e-5)) == ["Transpose", "Conv", "Relu", "Transpose"]


def test_embeddings_stay_integers():
    table = np.random.default_rng(0).integers(-127, 128, (50, 8)).astype(np.float32)
    own = Quantizer("table:weight", np.full(8, 0.01, np.float32), -127, 127, 1)

    def fn(tokens):
        return jnp.take(fake_quant(jnp.asarray(table * np.float32(0.01)), own), tokens, axis=0)

    tokens = np.int32([[0, 49, 3], [7, 7, 1]])
    data = agrees(fn, tokens)
    arrays = onnx.load_from_string(data).graph.initializer
    assert (50, 8) in [tuple(a.dims) for a in arrays if a.data_type == onnx.TensorProto.INT8]


def test_names_of_inputs_and_outputs():
    fn = lambda batch: {"sum": batch["a"] + batch["b"], "same": batch["a"]}  # noqa: E731
    graph = onnx.load_from_string(to_onnx(fn, {"a": aval(2), "b": aval(2)})).graph
    assert [x.name for x in graph.input] == ["a", "b"]
    assert [x.name for x in graph.output] == ["same", "sum"]


def test_an_operation_without_a_translation_is_named_with_its_layer():
    class Sorting(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Sorting(name="block1")(nn.Dense(4)(x))

    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ExportError, match=r"'sort' on \(float32\[2,4\]\) at Net/block1"):
        to_onnx(lambda x: net.apply(variables, x), aval(2, 3))


def test_what_the_forms_of_onnx_do_not_allow_is_said():
    n, m = jax.export.symbolic_shape("n, m")
    transposed = nn.ConvTranspose(2, (2,), strides=(2,), parent=None)
    weights = transposed.init(jax.random.key(0), X)
    with pytest.raises(ExportError, match="is transposed"):
        to_onnx(lambda x: transposed.apply(weights, x), aval(*X.shape))
    with pytest.raises(ExportError, match="Let only the batch size be symbolic"):
        to_onnx(lambda x: x.transpose(1, 0, 2).reshape(m, 2 * n, 2), aval(n, m, 4))
    with pytest.raises(ExportError, match="Pad adds at the ends only"):
        to_onnx(lambda x: lax.pad(x, 0.0, [(0, 0, 1)]), aval(4))


def test_random_numbers_are_refused_where_they_are_used():
    agrees(lambda x: (x, jax.random.key(0))[0], X)
    with pytest.raises(ExportError, match="random numbers are drawn"):
        to_onnx(lambda x: x * jax.random.uniform(jax.random.key(0), (3,)), aval(2, 3))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx.helper", None)
    with pytest.raises(ExportError, match=r"pip install 'effjax\[onnx\]'"):
        to_onnx(jnp.abs, aval(3))


def test_a_file_that_is_none_is_refused():
    with pytest.raises(ExportError, match="ONNX Runtime refuses the file"):
        run(b"not a model")
