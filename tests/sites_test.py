"""Tests of the taint analysis: which operations are found, under which names, and what is said of
them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import effjax as ej
from effjax.errors import ShardingError, SiteError
from effjax.sites import analyze_model, check_reached, find_sites
from tests import nets
from tests.programs import NHWC, PROGRAMS, SQUARE, X, normal


def sites_of(f, params, x, **kwargs):
    """The sites of f(params, x), by path."""

    def apply(params, model_state, x, key, train):
        return f(params, x), model_state

    return {site.path: site for site in find_sites(apply, params, {}, x, **kwargs)}


def site_of(f, params, x):
    [site] = sites_of(f, params, x).values()
    return site


@pytest.mark.parametrize("name", PROGRAMS)
def test_paths(name):
    f, params, x, wanted, _ = PROGRAMS[name]
    abstract = jax.eval_shape(lambda tree: tree, (params, x))

    found = sites_of(f, *abstract, activations=True)

    assert list(found) == wanted
    weights = [path for path in wanted if not path.startswith("@")]
    assert list(sites_of(f, *abstract)) == weights
    assert all(found[path].weight is not None for path in weights)


def test_linen_cnn():
    model = nets.linen()
    params, model_state = model.init(jax.random.key(0), nets.BATCH)
    for train in (False, True):
        found = find_sites(model.apply, params, model_state, nets.BATCH, train=train)
        assert [(s.path, s.op, s.macs) for s in found] == [
            ("conv1/kernel", "conv_general_dilated", 24 * 64 * 8 * 9),
            ("conv2/kernel", "conv_general_dilated", 24 * 16 * 16 * 8 * 9),
            ("head/kernel", "dot_general", 24 * 16 * 8),
        ]


def test_linen_and_nnx_have_the_same_sites():
    def found(model):
        params, state = model.init(jax.random.key(0), nets.BATCH)
        return [
            site._replace(scope="") for site in find_sites(model.apply, params, state, nets.BATCH)
        ]

    assert found(ej.from_nnx(nets.NNXCNN)) == found(nets.linen())


def test_nnx_attention_embedding_and_recurrence():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 4, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.rnn = nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.rnn(self.attend(self.embed(x)))

    model = ej.from_nnx(Net, inputs="x")
    batch = {"x": jnp.zeros((2, 5), jnp.int32)}
    params, state = model.init(jax.random.key(0), batch)
    found = {s.path: s for s in find_sites(model.apply, params, state, batch, activations=True)}
    weights = {path for path in found if not path.startswith("@")}
    matrices = {n for n in ej.select.leaves(params) if n.endswith(("kernel", "embedding"))}
    assert weights == matrices
    assert found["embed/embedding"].op == "gather"
    assert len(found) == len(weights) + 2
    # Eight 3- or 4-by-3 products for each of the batch's 10 positions, in however many matrices.
    recurrent = [s for path, s in found.items() if path.startswith("rnn")]
    assert sum(site.macs for site in recurrent) == 10 * (4 * 4 * 3 + 4 * 3 * 3)


def test_linen_scan_and_remat_over_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.Dense(8)(nn.LayerNorm()(x))
            return x + nn.Dense(4)(nn.gelu(h)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            kwargs = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            return nn.scan(nn.remat(Layer), **kwargs)(name="layers")(x, None)[0]

    model = ej.from_linen(Net(), inputs="x")
    batch = {"x": X}
    params, state = model.init(jax.random.key(0), batch)
    first, second = find_sites(model.apply, params, state, batch)
    assert (first.path, first.stack) == ("layers/Dense_0/kernel", (3,))
    assert (second.path, second.stack) == ("layers/Dense_1/kernel", (3,))
    assert first.macs == second.macs == 3 * 8 * 4 * 8
    assert (first.scales, second.scales) == (3 * 8, 3 * 4)


def test_stack_and_scales():
    f, params, x, *_ = PROGRAMS["nested scans"]
    site = site_of(f, params, x)
    assert site.stack == (2, 3)
    assert site.scales == 2 * 3 * 4
    f, params, x, *_ = PROGRAMS["rnn"]
    assert all(site.stack == () for site in sites_of(f, params, x).values())


def test_geometry_of_a_dot():
    site = site_of(lambda p, x: jnp.einsum("bi,ihd->bhd", x, p), normal(4, 2, 3), X)
    assert site.shapes == ((8, 4), (4, 2, 3), (8, 2, 3))
    assert (site.lhs, site.rhs, site.out) == site.shapes
    assert site.macs == 8 * 4 * 6
    assert site.contracting == ((1,), (0,))
    assert site.channels == ((0,), (1, 2))
    assert site.weight == 1
    assert site.scales == 6
    assert site.dtypes == ("float32",) * 3
    turned = site_of(lambda p, x: p.T @ x.T, normal(4, 5), X)
    assert (turned.weight, turned.contracting, turned.channels[0]) == (0, ((1,), (0,)), (0,))


def test_geometry_of_a_convolution():
    def f(kernel, x, **kwargs):
        return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=NHWC, **kwargs)

    image = normal(2, 6, 6, 4)
    site = site_of(f, normal(3, 3, 4, 5), image)
    assert (site.out, site.macs) == ((2, 3, 3, 5), 2 * 3 * 3 * 5 * 9 * 4)
    assert site.contracting == ((1, 2, 3), (0, 1, 2))
    assert site.channels == ((0,), (3,))
    assert site.groups == 1
    grouped = site_of(lambda w, x: f(w, x, feature_group_count=4), normal(3, 3, 1, 8), image)
    assert (grouped.groups, grouped.macs) == (4, 2 * 3 * 3 * 8 * 9)


def test_macs_of_a_transposed_convolution_leave_out_the_inserted_zeros():
    def f(kernel, x):
        return lax.conv_transpose(x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    # Each of the 5 inputs meets each of the 3 taps once, in each of 4 x 7 feature pairs.
    assert site_of(f, normal(3, 4, 7), normal(2, 5, 4)).macs == 2 * 5 * 3 * 4 * 7


def test_geometry_of_a_gather():
    site = site_of(lambda table, i: table[i], normal(10, 4), jnp.zeros((3,), jnp.int32))
    assert (site.op, site.macs, site.channels[0], site.scales) == ("gather", 0, (0,), 10)


def test_macs_of_scans_shards_and_loops():
    def macs(name):
        f, params, x, *_ = PROGRAMS[name]
        return sum(site.macs for site in sites_of(f, params, x).values())

    assert macs("scan of layers") == 3 * 8 * 16
    assert macs("nested scans") == 6 * 8 * 16
    assert macs("shard_map") == 2 * 8 * 16
    assert macs("while") == 8 * 16  # one iteration: how many there are is not known
    assert macs("cond") == 2 * 8 * 16


def test_a_mix_takes_the_name_of_its_largest_leaf_and_knows_them_all():
    f, params, x, *_ = PROGRAMS["lora"]
    site = site_of(f, params, x)
    assert (site.leaf, site.leaves) == ("kernel", ("down", "kernel", "up"))
    f, params, x, *_ = PROGRAMS["mask"]
    assert site_of(f, params, x).leaves == ("kernel", "mask")


def test_a_mask_in_the_model_state_is_neither_weight_nor_data():
    def apply(params, model_state, batch, key, train):
        noise = jax.random.bernoulli(key, 0.5, (4, 4))
        return batch @ (params["kernel"] * model_state["mask"] * noise), model_state

    [site] = find_sites(apply, {"kernel": SQUARE}, {"mask": SQUARE > 0}, X)
    assert (site.path, site.leaves) == ("kernel", ("kernel",))


def test_a_leaf_used_again_is_numbered_in_the_order_of_execution():
    shared = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def f(params, x):
        h = shared(params["a"], shared(params["a"], x))
        return shared(params["b"], shared(params["a"], h))

    assert list(sites_of(f, {"a": SQUARE, "b": SQUARE}, X)) == ["a", "a#1", "a#2", "b"]


def test_branches_share_names():
    def f(params, x):
        h = lax.cond(x[0, 0] > 0, lambda x: x @ params @ params, lambda x: x @ params, x)
        return h @ params

    assert list(sites_of(f, SQUARE, X)) == ["", "#1", "#2"]


def test_a_kernel_chosen_by_data_is_data():
    def f(params, x):
        w = lax.cond(x[0, 0] > 0, lambda: params["a"], lambda: params["b"])
        return x @ w

    params = {"a": SQUARE, "b": SQUARE}
    assert sites_of(f, params, X) == {}
    assert len(sites_of(f, params, X, activations=True)) == 1


def test_weights_that_meet_only_each_other_are_no_site():
    assert sites_of(lambda p, x: p["a"] @ p["b"] + x, {"a": SQUARE, "b": SQUARE}, SQUARE) == {}


def test_a_weight_in_the_carry_of_a_loop():
    def f(params, x):
        def step(carry, _):
            w, h = carry
            return (w * 0.5, h @ w), None

        return lax.scan(step, (params, x), length=3)[0][1]

    site = site_of(f, SQUARE, X)
    assert (site.path, site.stack, site.macs) == ("", (), 3 * 8 * 16)


def test_data_that_enters_a_carry_late_makes_it_data():
    def f(params, x):
        def step(carry, _):
            second = carry[1]
            return (second @ params, x), None

        return lax.scan(step, (jnp.zeros((8, 4)), jnp.zeros((8, 4))), length=3)[0][0]

    assert list(sites_of(f, SQUARE, X)) == [""]


def test_products_of_activations_are_named_by_scope():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, name="attend")(x)

    model = ej.from_linen(Net(), inputs="x")
    batch = {"x": normal(2, 5, 4)}
    params, state = model.init(jax.random.key(0), batch)
    found = find_sites(model.apply, params, state, batch, activations=True)
    scores, mixed = [s for s in found if s.weight is None]
    assert scores.path.startswith("@Net/attend/")
    assert mixed.path.startswith("@Net/attend/")
    assert scores.macs == mixed.macs == 2 * 2 * 5 * 5 * 2
    assert len(find_sites(model.apply, params, state, batch)) == len(found) - 2


def test_a_site_in_a_custom_rule_says_so():
    @jax.custom_vjp
    def multiply(w, x):
        return x @ w

    multiply.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    assert "custom_vjp function multiply" in site_of(multiply, SQUARE, X).rule


@pytest.mark.parametrize(
    ("f", "where"),
    [
        (lambda p, x: x * p["kernel"], "mul"),
        (lambda p, x: lax.ragged_dot(x, p["kernel"][None], jnp.array([4])), "ragged_dot_general"),
        (lambda p, x: x @ (p["kernel"] * (x > 0)), "mul"),
        (lambda p, x: x, "nothing"),
        (lambda p, x: SQUARE @ p["kernel"], "nothing"),
    ],
    ids=["elementwise", "ragged dot", "mask with the batch", "unused", "inputs closed over"],
)
def test_a_wanted_weight_that_reaches_no_site_is_an_error(f, where):
    def apply(params, model_state, batch, key, train):
        return f(params, batch), model_state

    params = {"kernel": SQUARE}
    found = analyze_model(apply, params, {}, SQUARE, train=True)
    with pytest.raises(SiteError, match=rf"kernel \(met data in: .*{where}.*\)"):
        check_reached(found.sites, params, found.met)


def test_the_layout_check_names_grouped_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), feature_group_count=8)(nn.Conv(8, (1, 1))(x))

    model = ej.from_linen(Net())
    params, state = jax.eval_shape(model.init, jax.random.key(0), nets.BATCH)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    layout = ej.Layout(mesh, batch=("data",))
    with pytest.raises(ShardingError, match=r"\['Conv_0/kernel'\]"):
        ej.sharding.check_grouped_convolutions(model.apply, params, state, nets.BATCH, layout)
