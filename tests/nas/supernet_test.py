"""Supernets: views equal to networks cut by hand, exact costs, extraction, the space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import effjax as ej
from effjax import nas
from effjax.errors import EffjaxError, SetupError
from effjax.select import leaves, map_named
from experiments.models import elastic as models

SPEC = models.Spec(4, (6,), ((4, 6),), ((5, 5),), classes=3)
BATCH = {
    "image": np.random.default_rng(0).normal(size=(2, 12, 12, 1)).astype(np.float32),
    "label": np.array([0, 2], np.int32),
}
LIBRARIES = ["linen", pytest.param("nnx", marks=pytest.mark.slow)]


def trained_like(model, batch=BATCH):
    """Weights and statistics away from their initial zeros and ones."""
    rng = np.random.default_rng(3)

    def noisy(name, leaf):
        if leaf.ndim > 1:
            fan_in = leaf.size / leaf.shape[-1]
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)
        return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(2), batch)
    return tuple(map_named(noisy, tree) for tree in shapes)


@functools.cache
def supernet(library="linen", **more):
    model = models.model(SPEC, library)
    return nas.Supernet(model, BATCH, models.dimensions(SPEC) | more)


def build(library, spec=SPEC):
    return lambda config, channels: models.model(models.chosen(spec, config, channels), library)


def outputs(model, params, state, batch=BATCH, train=False):
    return jax.jit(lambda p, s: model.apply(p, s, batch, jax.random.key(0), train)[0])(
        params, state
    )


SMALL = {
    "stem": 0.5,
    "stage_0": 0.5,
    "depth_0": 1,
    "inner_0_0": 0.75,
    "kernel_0_0": 3,
}


def by_hand(tree, spec):
    """The first channels and the middle taps of each leaf, cut by its shape in the small model."""
    shapes = leaves(spec)

    def cut(path, whole):
        index = []
        for i, (n, k) in enumerate(zip(whole.shape, shapes[path].shape, strict=True)):
            first = (n - k) // 2 if i < whole.ndim - 2 else 0
            index.append(slice(first, first + k))
        return whole[tuple(index)]

    return {path: cut(path, x) for path, x in leaves(tree).items() if path in shapes}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_view_computes_what_the_network_cut_by_hand_computes(library):
    net = supernet(library)
    params, state = trained_like(net.model)
    arch = net.architecture(SMALL)
    assert net.channels(arch) == {
        "stem/conv/kernel": 2,
        "down_0/conv/kernel": 3,
        "block_0_0/conv_0/kernel": 3,
        "block_0_1/conv_0/kernel": 3,
    }
    # 4 * 0.5, 6 * 0.5, 4 * 0.75; the skipped block's inner width is at its smallest, 6 * 0.5.
    small = models.model(models.Spec(2, (3,), ((3,),), ((3,),), classes=3), library)
    shapes = jax.eval_shape(small.init, jax.random.key(0), BATCH)
    view = jax.jit(net.view)(params, jnp.asarray(arch))
    found = nas.extract_subnet(net, arch, build(library), params, state, BATCH)
    assert found.config == SMALL
    assert found.quantizer is None
    assert found.masks == {}
    assert found.difference < 1e-5
    for prefix, tree, whole in (("p", found.params, params), ("s", found.model_state, state)):
        wanted = by_hand(whole, shapes[prefix == "s"])
        assert {p: x.shape for p, x in leaves(tree).items()} == {
            p: x.shape for p, x in wanted.items()
        }
        for path, x in leaves(tree).items():
            np.testing.assert_array_equal(x, wanted[path], err_msg=path)
    np.testing.assert_allclose(
        outputs(small, found.params, found.model_state),
        outputs(net.model, view, state),
        rtol=2e-5,
        atol=2e-5,
    )
    # What is not kept is zero: as many entries are left as the network has.
    left = sum(int((np.asarray(x) != 0).sum()) for x in leaves(view).values())
    assert left == sum(x.size for x in leaves(found.params).values())


@pytest.mark.slow
def test_the_networks_train_alike():
    """In training mode too, with batch statistics: the gradients of what is kept are equal."""
    net = supernet()
    params, state = trained_like(net.model)
    arch = net.architecture(SMALL)
    found = nas.extract_subnet(net, arch, build("linen"), params, state, BATCH)

    def loss(params, model, view):
        seen = net.view(params, jnp.asarray(arch)) if view else params
        return jnp.sum(
            model.apply(seen, state if view else found.model_state, BATCH, jax.random.key(0), True)[
                0
            ]
            ** 2
        )

    whole = leaves(jax.jit(lambda p: jax.grad(loss)(p, net.model, True))(params))
    small = jax.jit(lambda p: jax.grad(loss)(p, found.model, False))(found.params)
    cut = by_hand(params, small)
    for path, grad in leaves(small).items():
        own = by_hand({path: whole[path]}, {path: cut[path]})[path]
        np.testing.assert_allclose(own, grad, rtol=2e-3, atol=2e-4, err_msg=path)
        assert np.count_nonzero(whole[path]) <= grad.size
    assert not np.any(whole["block_0_1/conv_0/kernel"])


def test_a_skipped_block_is_the_identity_bit_for_bit():
    """relu(x + 0) of an x that a ReLU made; the block after it does not exist."""
    net = supernet()
    params, state = trained_like(net.model)
    arch = net.architecture({"depth_0": 1})
    shallow = models.model(models.Spec(4, (6,), ((4,),), ((5,),), classes=3))
    view = jax.jit(net.view)(params, jnp.asarray(arch))
    kept = {p: x for p, x in params.items() if p != "block_0_1"}
    stats = {"batch_stats": {p: x for p, x in state["batch_stats"].items() if p != "block_0_1"}}
    np.testing.assert_array_equal(outputs(net.model, view, state), outputs(shallow, kept, stats))


def test_costs_are_those_of_the_extracted_networks():
    more = {
        "bits": nas.Bits("^block.*kernel$", (2, 8), activations=4),
        "sparsity": nas.Sparsity("^block_0_0/conv_1/kernel$", (0.0, 0.4)),
    }
    net = supernet(**more)
    params, state = trained_like(net.model)
    costs = nas.Costs(net)
    traced = jax.jit(costs)
    for config in (SMALL | {"bits": 8, "sparsity": 0.4}, {"depth_0": 0, "stem": 0.75}):
        arch = net.architecture(config)
        found = nas.extract_subnet(net, arch, build("linen"), params, state, BATCH)
        own = costs(arch)
        sites = ej.find_sites(found.model.apply, found.params, found.model_state, BATCH)
        assert own.macs == sum(site.macs for site in sites)
        facts = {}
        if found.quantizer is not None:
            setup = ej.Setup(found.model.apply, found.model_state, BATCH)
            q = found.quantizer.init(jax.random.key(0), found.params, setup)[1]
            facts = found.quantizer.describe(found.params, {}, q)
        size = ej.footprint(found.params, sites, facts, model_state=found.model_state)
        assert own.parameters == size.totals.parameters
        assert own.nonzeros == size.totals.nonzeros
        assert own.effective_macs == size.totals.effective_macs
        assert own.bitops == size.totals.bitops
        # Of 8 bits: with fewer, rounding makes zeros that a footprint finds in the weights.
        formats = ("dense", "bitmask")
        stored = [min(leaf.sizes[name] for name in formats) for leaf in size.leaves]
        assert own.bytes == sum(stored)
        for name, value in traced(jnp.asarray(arch))._asdict().items():
            np.testing.assert_allclose(value, getattr(own, name), rtol=1e-6, err_msg=name)
    assert traced._cache_size() <= 1


def test_costs_by_hand():
    model = ej.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), inputs="x")
    net = nas.Supernet(
        model,
        {"x": jnp.ones((1, 4))},
        {
            "hidden": nas.Width("layers_0/kernel", (0.5, 1.0)),
            "zeros": nas.Sparsity("layers_2/kernel", (0.0, 0.6)),
            "bits": nas.Bits("layers_2/kernel", (3, 8), activations="same"),
        },
    )
    half = nas.Costs(net)(net.architecture({"hidden": 0.5, "zeros": 0.6, "bits": 3}))
    # 4x4 + 4x3 MACs; floor(0.6 * 12) = 7 zeros, of 12 MACs 5 are left, of 3 bits both.
    assert (half.macs, half.effective_macs, half.bitops) == (28, 21, 16 * 32 * 32 + 5 * 9)
    # Params: 16 + 4 biases, 12 + 3. Bytes: 80; 12 bits dense = 5, as a bitmask 2 + 2; 3 scales.
    assert (half.parameters, half.nonzeros) == (35, 28)
    assert half.bytes == 20 * 4 + min(5, 2 + 2) + 3 * 4 + 3 * 4


def test_sparsity_counts_the_weights_that_are_kept():
    net = supernet(zeros=nas.Sparsity("kernel$", (0.0, 0.5)))
    params, _ = trained_like(net.model)
    arch = net.architecture(SMALL | {"zeros": 0.5})
    dense = leaves(jax.jit(net.view)(params, jnp.asarray(net.architecture(SMALL))))
    sparse = leaves(jax.jit(net.view)(params, jnp.asarray(arch)))
    for path, x in dense.items():
        if not path.endswith("kernel") or not np.any(x):
            continue
        alive, left = np.count_nonzero(x), np.asarray(sparse[path]) != 0
        assert left.sum() == alive - alive // 2
        out = np.abs(x)[~left & (np.asarray(x) != 0)]
        assert out.max() <= np.abs(x)[left].min()


@pytest.mark.slow
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_bits_are_those_of_qat(library):
    more = {"bits": nas.Bits("^(down_0|block_0_0).*kernel$", (2, 4, 8), activations=8)}
    net = supernet(library, **more)
    params, state = trained_like(net.model)
    arch = net.architecture(SMALL | {"bits": 4})
    found = nas.extract_subnet(net, arch, build(library), params, state, BATCH)
    assert found.difference < 1e-4
    plain = ej.quantize.qat(4, 8, select="^(down_0|block_0_0).*kernel$")
    setup = ej.Setup(found.model.apply, found.model_state, BATCH)
    ctx = ej.Ctx(jnp.int32(0), jax.random.key(0), train=False)

    def forward(params, model_state, batch, key, train):
        return (*found.model.apply(params, model_state, batch, key, train), {})

    def run(transform):
        own = transform.init(jax.random.key(0), found.params, setup)[1]
        wrapped = transform.wrap(forward, {}, own, ctx)
        return jax.jit(lambda p: wrapped(p, found.model_state, BATCH, jax.random.key(0), False)[0])(
            found.params
        )

    np.testing.assert_array_equal(run(found.quantizer), run(plain))
    assert np.abs(run(plain) - outputs(found.model, found.params, found.model_state)).max() > 1e-3


def test_matrices_transform_the_taps_of_smaller_kernels():
    model = ej.from_linen(nn.Conv(2, (5, 5), use_bias=False))
    net = nas.Supernet(model, BATCH, {"size": nas.Kernel("^kernel$", (1, 3, 5), matrices=True)})
    params, _ = trained_like(model)
    matrices = {
        "kernel": {
            "1": jnp.full((1, 1), 2.0),
            "3": jnp.asarray(np.random.default_rng(0).normal(size=(9, 9)), jnp.float32),
        }
    }
    assert jax.tree.map(np.shape, net.matrices()) == jax.tree.map(np.shape, matrices)
    w = np.asarray(params["kernel"])
    three = np.einsum("ij,jab->iab", matrices["kernel"]["3"], w[1:4, 1:4].reshape(9, 1, 2)).reshape(
        3, 3, 1, 2
    )
    wanted = {
        5: w,
        3: np.pad(three, [(1, 1), (1, 1), (0, 0), (0, 0)]),
        1: np.pad(2 * three[1:2, 1:2], [(2, 2), (2, 2), (0, 0), (0, 0)]),
    }
    view = jax.jit(net.view)
    for size, kernel in wanted.items():
        arch = jnp.asarray(net.architecture({"size": size}))
        found = view(params, arch, matrices)["kernel"]
        np.testing.assert_allclose(found, kernel, rtol=1e-5, atol=1e-6)
        plain = view(params, arch, net.matrices())["kernel"]
        np.testing.assert_array_equal(plain, view(params, arch)["kernel"])


@pytest.mark.slow
def test_a_resolution_is_run_at():
    model = models.model(models.Spec(2, (2,), ((),), ((),), classes=3))
    net = nas.Supernet(model, BATCH, {"size": nas.Resolution((8, 12))})
    params, state = trained_like(model)
    costs = nas.Costs(net)
    found = {}
    for size in (8, 12):
        arch = net.architecture({"size": size})
        cut = nas.extract_subnet(net, arch, lambda config, channels: model, params, state, BATCH)
        images = jax.image.resize(BATCH["image"], (2, size, size, 1), "linear")
        batch = {**BATCH, "image": images}
        found[size] = outputs(model, cut.params, cut.model_state, batch)
        sites = ej.find_sites(model.apply, params, state, batch)
        assert costs(arch).macs == sum(site.macs for site in sites)
        np.testing.assert_allclose(jax.jit(costs)(jnp.asarray(arch)).macs, costs(arch).macs)
        transform = ej.chain(nas=nas.fixed(net, arch))
        own = transform.init(jax.random.key(0), params, ej.Setup(model.apply, state, BATCH))[1]
        seen = ej.step.forward(
            model.apply,
            transform,
            ej.Vars(params, {"nas": {}}),
            state,
            own,
            BATCH,
            ej.Ctx(jnp.int32(0), jax.random.key(0), train=False),
        ).outputs
        np.testing.assert_allclose(seen, found[size], rtol=1e-5, atol=1e-5)
    assert np.abs(found[8] - found[12]).max() > 1e-3


def test_architectures_are_a_space():
    net = supernet()
    assert net.size == 3 * 3 * (1 + 6 * (1 + 6))
    arch = net.architecture(SMALL)
    assert net.decode(arch) == SMALL
    assert net.encode(net.decode(arch)).tolist() == arch.tolist()
    assert net.architecture().tolist() == net.largest.tolist() == [2, 2, 2, 2, 1, 2, 1]
    assert net.smallest.tolist() == [0] * 7
    low = jnp.array([1, 2, 0, 2, 1, 2, 1])
    drawn = np.asarray(net.draw(jax.random.key(0), 200, low))
    assert set(drawn[:, 0]) == {1, 2}
    assert set(drawn[:, 1]) == {2}
    assert bool(jnp.all(net.valid(drawn)))
    deep = drawn[drawn[:, 2] == 2]
    assert set(deep[:, 5]) == {2}
    assert set(drawn[drawn[:, 2] < 2][:, 5]) == {0}


SMALLER = models.model(models.Spec(4, (6,), ((4,),), ((5,),), classes=3))
CONV = "^block_0_0/conv_0/kernel$"


@pytest.mark.parametrize(
    ("dimensions", "says"),
    [
        ({"a": nas.Width("^head/kernel$")}, "have to stay: it reaches the model's outputs"),
        ({"a": nas.Width("^stem/norm/scale$")}, "makes no channels"),
        ({"a": nas.Width("^stem/conv/kernel$", (0.5, 1.5))}, r"\[1.5\] of a are no fractions"),
        ({"a": nas.Width("^stem/conv/kernel$", (0.5, 0.5))}, "give each once"),
        (
            {"a": nas.Width("^down_0/conv/kernel$"), "b": nas.Width("^block_0_0/conv_1/kernel$")},
            "a and b both narrow down_0/conv/kernel",
        ),
        ({"a": nas.Kernel(CONV, (2, 5))}, r"\[2\] of a are no sizes with one middle"),
        ({"a": nas.Kernel(CONV, (1, 3))}, "build the model with kernels of that size"),
        ({"a": nas.Kernel(CONV), "b": nas.Kernel(CONV)}, "a and b both choose the size"),
        ({"a": nas.Depth(["^block_0_0/"], (0, 2))}, r"\[2\] of a are no numbers of blocks"),
        ({"a": nas.Depth(["^missing/"], (0, 1))}, "'\\^missing/' matches no leaf"),
        ({"a": nas.Sparsity(CONV, (0.0, 1.0))}, r"\[1.0\] of a are no fractions of zeros"),
        ({"a": nas.Sparsity("scale$")}, "matches no leaf of two axes"),
        ({"a": nas.Bits(CONV, (2, 9))}, "a choice of a has 9 bits"),
        ({"a": nas.Bits(CONV), "b": nas.Bits("kernel$")}, "are both the Bits of"),
        ({"a": nas.Resolution((0, 12))}, r"\[0\] of a are no sizes of images"),
        ({"a": nas.Resolution((12,)), "b": nas.Resolution((8,))}, "are all a Resolution"),
        ({"a": nas.Choice((1, 2))}, "an elastic dimension is a Width"),
    ],
)
def test_wrong_dimensions_are_errors(dimensions, says):
    with pytest.raises(EffjaxError, match=says):
        nas.Supernet(SMALLER, BATCH, dimensions)


def test_wrong_builds_are_errors():
    net = supernet()
    params, state = trained_like(net.model)
    arch = net.architecture(SMALL)
    wrong = {
        "in the model built for": lambda config, channels: net.model,
        "lacks": lambda config, channels: models.model(
            models.Spec(2, (3,), ((),), ((),), classes=3)
        ),
    }
    for says, own in wrong.items():
        with pytest.raises(SetupError, match=says):
            nas.extract_subnet(net, arch, own, params, state, BATCH)
    sigmoid = net.model._replace(apply=lambda *args: (jnp.tanh(net.model.apply(*args)[0]), {}))
    with pytest.raises(SetupError, match="outputs differ"):
        nas.extract_subnet(net, net.architecture(), lambda *_: sigmoid, params, state, BATCH)
    with pytest.raises(SetupError, match=r"kernel_0_0 = 7 is not one of \(3, 5\)"):
        net.architecture({"kernel_0_0": 7})
    with pytest.raises(SetupError, match="are no dimensions"):
        net.architecture({"other": 7})
