"""Physical removal: equal outputs, MACs by hand, and what has to stay, with the reason."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import effjax as ej
from effjax.errors import SelectorError, SetupError
from effjax.prune import channel_masks, compact, group_masks, group_scores, groups, masks
from effjax.select import leaves, map_named
from experiments.models import cnn, resnet, vit

KEY = jax.random.key(0)


def lively(shapes, seed=1):
    """Random leaves: scales and variances around 1, everything else around 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(("var", "scale")):
            return 1 + 0.5 * np.tanh(noise)
        return noise / np.sqrt(max(np.prod(leaf.shape[:-1]), 9)).astype(np.float32)

    return map_named(draw, shapes)


def zoo(family, spec, library, shape):
    model = family.model(spec, library)
    batch = {"image": np.random.default_rng(7).normal(size=shape).astype(np.float32)}
    params, state = jax.eval_shape(model.init, KEY, batch)
    return model, lively(params), lively(state, 2), batch


def outputs(apply, params, state, batch):
    return jax.jit(lambda p, s, b: apply(p, s, b, KEY, False)[0])(params, state, batch)


def one(batch):
    return jax.tree.map(lambda x: x[:1], batch)


def macs(apply, params, state, batch):
    return sum(site.macs for site in ej.find_sites(apply, params, state, batch))


def check_same(small, model, params, state, batch, chosen, smaller=None):
    """The smaller model's outputs are the masked model's, and they are not all alike."""
    apply, fewer = model.apply, (smaller or model).apply
    want = outputs(apply, masks.apply(params, chosen), state, batch)
    got = outputs(fewer, small.params, small.model_state, batch)
    assert np.std(np.asarray(want), axis=0).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert small.macs_after == macs(fewer, small.params, small.model_state, one(batch))


def halved(model, params, state, batch, select=lambda name: True, sparsity=0.5):
    found = groups(model, params, state, one(batch))
    chosen = {name: group for name, group in found.prunable.items() if select(name)}
    return group_masks(found, group_scores(chosen, params), sparsity)


def plain(f):
    """A model in plain JAX: `f(params, x)`."""
    return ej.Model(lambda key, batch: ({}, {}), ej.model.from_function(f, "x"))


def normal(shapes, seed=3):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s).astype(np.float32)) for n, s in shapes.items()}


def conv(x, kernel, groups=1, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


IMAGE = {"x": jax.random.normal(jax.random.key(5), (3, 6, 6, 2))}


# The models of the experiments, in Linen and NNX.


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_cnn_with_batchnorm_after_relu_flattened(library):
    spec = cnn.Spec(size=8, channels=1, classes=3, stages=(4, 8), hidden=16)
    model, params, state, batch = zoo(cnn, spec, library, (4, 8, 8, 1))
    chosen = halved(model, params, state, batch)
    small = compact(model, params, state, one(batch), chosen)
    smaller = cnn.narrowed(spec, (2, 4, 8))
    check_same(small, model, params, state, batch, chosen, cnn.model(smaller, library))
    # 9 taps at 64 pixels, then at 16 after one pool; 4 pixels of the last stage are flattened.
    assert small.macs_before == 9 * 64 * (4 + 16) + 9 * 16 * (32 + 64) + 32 * 16 + 16 * 3
    assert small.macs_after == 9 * 64 * (2 + 4) + 9 * 16 * (8 + 16) + 16 * 8 + 8 * 3


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize(("shortcut", "blocks"), [("A", 1), ("B", 1)])
def test_half_of_a_residual_network(library, shortcut, blocks):
    spec = resnet.Spec(stages=(4, 8, 12), blocks=blocks, shortcut=shortcut)
    model, params, state, batch = zoo(resnet, spec, library, (4, 8, 8, 3))
    chosen = halved(model, params, state, batch)
    small = compact(model, params, state, one(batch), chosen)
    smaller = resnet.compacted(spec, small.params, small.entries)
    assert smaller.stages == (2, 4, 6)
    assert smaller.widths == tuple(w // 2 for w in spec.widths)
    check_same(small, model, params, state, batch, chosen, resnet.model(smaller, library))
    if shortcut == "B":  # stem, stage 0, stage 1 with its projection, stage 2 with its, head
        stem, first = 64 * 9 * 3 * 2, 64 * 9 * 8
        second = 16 * (9 * 2 * 4 + 9 * 16 + 2 * 4)
        third = 4 * (9 * 4 * 6 + 9 * 36 + 4 * 6)
        assert small.macs_after == stem + first + second + third + 60


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_heads_and_hidden_units_of_a_transformer(library):
    spec = vit.Spec(features=8, heads=(4,), dim=3, hidden=(10,), size=8)
    model, params, state, batch = zoo(vit, spec, library, (4, 8, 8, 3))
    found = groups(model, params, state, one(batch))
    heads = found["block_0/attention/query/kernel[1]"]
    assert {(m.path.removeprefix("block_0/attention/"), m.axis) for m in heads.members} == {
        *((f"{name}/kernel", 1) for name in ("query", "key", "value")),
        *((f"{name}/bias", 0) for name in ("query", "key", "value")),
        ("out/kernel", 0),
    }
    assert "activations are multiplied" in found["block_0/attention/query/kernel"].pinned[0]
    assert "LayerNorm" in found["patches/kernel"].pinned[0]
    chosen = halved(model, params, state, batch, lambda n: not n.endswith("value/kernel"))
    small = compact(model, params, state, one(batch), chosen)
    smaller = vit.compacted(spec, small.params)
    assert (smaller.heads, smaller.hidden) == ((2,), (5,))
    check_same(small, model, params, state, batch, chosen, vit.model(smaller, library))

    named = leaves(params)
    value = {"block_0/attention/value/kernel": named["block_0/attention/value/kernel"] != 0}
    assert channel_masks(found, value).keys() == value.keys()
    dims = group_masks(found, {"block_0/attention/value/kernel": [1.0, 2.0, 3.0]}, 0.3)
    narrow = compact(model, params, state, one(batch), dims)
    with pytest.raises(ValueError, match="prune heads"):
        vit.compacted(spec, narrow.params)


def test_train_with_the_masks_then_compact_what_is_exported():
    """The user's way: groups, masks, training with static masks, removal without masks."""
    spec = cnn.Spec(size=8, channels=1, classes=3, stages=(4,), hidden=8, momentum=0.5)
    model = cnn.model(spec)
    batch = {"image": np.random.default_rng(7).normal(size=(8, 8, 8, 1)).astype(np.float32)}
    batch["label"] = np.arange(8) % 3
    params, model_state = jax.jit(model.init)(KEY, batch)
    found = groups(model, params, model_state, one(batch))
    chosen = group_masks(found, group_scores(found.prunable, params), 0.5)
    transform, tx = ej.chain(prune=ej.prune.static(masks=chosen)), optax.adam(0.01)

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    state = ej.init_state(KEY, model, transform, tx, batch)
    step = jax.jit(ej.make_step(model.apply, transform, loss, tx))
    for _ in range(3):
        state, _ = step(state, batch)
    shipped = ej.export(transform, state)
    small = compact(model, shipped, state.model_state, one(batch))
    smaller = cnn.model(cnn.narrowed(spec, (2, 4)))
    check_same(small, model, shipped, state.model_state, batch, {}, smaller)


# Operations, in plain JAX.


def test_depthwise_separable():
    def f(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        x = jax.nn.relu(conv(x, p["depth"], groups=p["stem"].shape[-1]) + p["bias"])
        x = jax.nn.relu(conv(x, p["point"]))
        x = conv(x, p["depth2"], groups=p["point"].shape[-1])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.mean((1, 2)) @ p["head"]

    shapes = {"stem": (3, 3, 2, 4), "depth": (3, 3, 1, 8), "bias": (8,), "point": (1, 1, 8, 6)}
    params = normal(shapes | {"depth2": (3, 3, 1, 6), "head": (6, 3)})
    model = plain(f)
    found = groups(model, params, {}, one(IMAGE))
    # A stem channel goes with both of its depthwise outputs.
    stem = {m.path: m.channels.tolist() for m in found["stem"].members}
    assert stem["depth"] == stem["bias"] == stem["point"] == [0, 0, 1, 1, 2, 2, 3, 3]
    chosen = halved(model, params, {}, IMAGE, lambda n: n in ("stem", "point"))
    small = compact(model, params, {}, one(IMAGE), chosen)
    assert jax.tree.map(jnp.shape, small.params) == {
        "stem": (3, 3, 2, 2),
        "depth": (3, 3, 1, 4),
        "bias": (4,),
        "point": (1, 1, 4, 3),
        "depth2": (3, 3, 1, 3),
        "head": (3, 3),
    }
    check_same(small, model, params, {}, IMAGE, chosen)
    assert small.macs_after == 36 * (9 * 2 * 2 + 9 * 4 + 4 * 3 + 9 * 3) + 9


@pytest.mark.parametrize("which", ["whole groups", "the same in each group"])
def test_grouped_convolution(which):
    def f(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        x = jax.nn.relu(conv(x, p["grouped"], groups=p["stem"].shape[-1] // p["grouped"].shape[2]))
        return x.mean((1, 2)) @ p["head"]

    params = normal({"stem": (1, 1, 2, 6), "grouped": (3, 3, 3, 6), "head": (6, 3)})
    model = plain(f)
    found = groups(model, params, {}, one(IMAGE))
    assert all(not group.pinned for name, group in found.items() if name not in ("head", "stem[2]"))
    by_size = {(g.size, any(m.path == "head" for m in g.members)): n for n, g in found.items()}
    chosen = group_masks(found, {by_size[2, True]: [2.0, 1.0]}, 0.5)
    if which != "whole groups":
        chosen = group_masks(found, {by_size[3, False]: [2.0, 1.0, 3.0]}, 0.3)
    small = compact(model, params, {}, one(IMAGE), chosen)
    want = {"stem": (1, 1, 2, 3), "grouped": (3, 3, 3, 3), "head": (3, 3)}
    if which != "whole groups":
        want = {"stem": (1, 1, 2, 4), "grouped": (3, 3, 2, 6), "head": (6, 3)}
    assert jax.tree.map(jnp.shape, small.params) == want
    check_same(small, model, params, {}, IMAGE, chosen)


def test_concatenation_keeps_offsets():
    """Dense connections: each layer's channels lie at an offset in all later ones."""

    def f(p, x):
        a = jax.nn.relu(conv(x, p["a"]))
        b = jnp.concatenate([a, jax.nn.relu(conv(a, p["b"]))], -1) * p["scale"]
        c = jnp.concatenate([b, jax.nn.relu(conv(b, p["c"]))], -1)
        return c.mean((1, 2)) @ p["head"]

    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 4, 2), "scale": (6,), "c": (3, 3, 6, 4)}
    params = normal({**shapes, "head": (10, 3)})
    model = plain(f)
    found = groups(model, params, {}, one(IMAGE))
    assert {n: g.size for n, g in found.prunable.items()} == {"a": 4, "b": 2, "c": 4}
    assert {m.path: m.channels.tolist() for m in found["b"].members}["c"] == [-1] * 4 + [0, 1]
    chosen = halved(model, params, {}, IMAGE)
    small = compact(model, params, {}, one(IMAGE), chosen)
    assert small.params["head"].shape == (5, 3)
    assert small.params["c"].shape == (3, 3, 3, 2)
    check_same(small, model, params, {}, IMAGE, chosen)


def attention(p, x, heads=None):
    """Fused queries, keys and values, heads cut out of one axis."""
    x = x.reshape(len(x), -1, x.shape[-1])
    heads, dim = heads or p["qkv"].shape[1] // 9, 3
    q, k, v = jnp.split(x @ p["qkv"] + p["bias"], 3, -1)
    q, k, v = (y.reshape(*y.shape[:2], heads, dim) for y in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(len(x), -1, heads * dim)
    return jax.nn.gelu(y @ p["out"]).mean(1) @ p["head"]


def test_heads_of_a_fused_projection():
    params = normal({"qkv": (2, 36), "bias": (36,), "out": (12, 5), "head": (5, 3)})
    model = plain(attention)
    found = groups(model, params, {}, one(IMAGE))
    [heads] = [n for n, g in found.prunable.items() if g.size == 4]
    members = {m.path: m.channels.tolist() for m in found[heads].members}
    assert members["out"] == [h for h in range(4) for _ in range(3)]
    assert members["qkv"] == members["out"] * 3
    part = params | {"qkv": params["qkv"].at[:, 1].set(0)}
    stuck = compact(model, part, {}, one(IMAGE)).groups[heads].stuck
    assert {why: heads.tolist() for why, heads in stuck.items()} == {
        "only some of the entries that go together are zero in qkv": [0]
    }
    chosen = group_masks(found, {heads: [3.0, 1.0, 2.0, 4.0]}, 0.5)
    small = compact(model, params, {}, one(IMAGE), chosen)
    assert small.groups[heads].channels.tolist() == [0, 3]
    assert small.params["qkv"].shape == (2, 18)
    check_same(small, model, params, {}, IMAGE, chosen)


def test_calls_casts_gates_lookups_and_mixed_weights():
    @jax.custom_jvp
    def swish(x):
        return x * jax.nn.sigmoid(x)

    swish.defjvp(lambda x, t: (swish(*x), t[0]))

    @jax.checkpoint
    def inner(p, x):
        a, b = jnp.split(x @ p["gated"], 2, axis=-1)
        return swish(a) * b.astype(jnp.float32)

    def f(p, x):
        x = jnp.take(p["table"], jnp.clip(jnp.abs(x[:, :, 0, 0]) * 3, 0, 4).astype(int), axis=0)
        x = inner(p, jax.jit(lambda x: x * p["scale"])(x))
        return jnp.transpose(x[:, ::-1], (0, 2, 1)).sum(-1) @ (p["down"] @ p["up"] * p["mask"])

    shapes = {"table": (5, 6), "scale": (6,), "gated": (6, 8), "down": (4, 2), "up": (2, 3)}
    params = normal({**shapes, "mask": (4, 3)})
    model = plain(f)
    found = groups(model, params, {}, one(IMAGE))
    assert {n: g.size for n, g in found.prunable.items()} == {
        "table": 6,
        "gated": 4,
        "up[0]": 2,
    }
    assert "looked up" in found["table[0]"].pinned[0]
    chosen = halved(model, params, {}, IMAGE)
    small = compact(model, params, {}, one(IMAGE), chosen)
    assert jax.tree.map(jnp.shape, small.params) == {
        "table": (5, 3),
        "scale": (3,),
        "gated": (3, 4),
        "down": (2, 1),
        "up": (1, 3),
        "mask": (2, 3),
    }
    check_same(small, model, params, {}, IMAGE, chosen)


# What may go and what has to stay.


def two_layers(p, x):
    x = x[:, 0, 0]
    return jax.nn.relu((x @ p["a"] - p["mean"]) * p["scale"] + p["b"]) @ p["c"]


TWO = {"a": (2, 4), "mean": (4,), "scale": (4,), "b": (4,), "c": (4, 3)}


def removed_from(params, f=two_layers):
    small = compact(plain(f), params, {}, one(IMAGE))
    check_same(small, plain(f), params, {}, IMAGE, {})
    return small


def test_a_constant_stays_unless_relu_clips_it_or_its_bias_is_masked():
    params = normal(TWO)
    zero = params["a"].at[:, 1:].set(0)
    constant = jnp.array([0.0, 1.0, -1.0, 0.0])  # b - mean * scale
    params |= {"a": zero, "b": constant + params["mean"] * params["scale"]}
    params["b"] = params["b"].at[3].set(0)
    params["scale"] = params["scale"].at[3].set(0)
    small = removed_from(params)
    assert small.groups["a"].channels.tolist() == [0, 1]
    [(why, stuck)] = small.groups["a"].stuck.items()
    assert stuck.tolist() == [1]
    assert "a constant" in why
    assert "channel_masks" in why
    assert "1 pruned but kept: a bias" in str(small)

    found = groups(plain(two_layers), params, {}, one(IMAGE))
    chosen = channel_masks(found, {"a": jnp.array([True, False, False, False])})
    assert {path: mask.shape for path, mask in chosen.items()} == TWO
    full = channel_masks(found, {"a": zero != 0})
    assert all((full[path] == chosen[path]).all() for path in chosen)
    small = compact(plain(two_layers), params, {}, one(IMAGE), chosen)
    assert small.params["a"].shape == (2, 1)
    assert not any(account.stuck for account in small.groups.values())
    check_same(small, plain(two_layers), params, {}, IMAGE, chosen)


def test_channels_that_nothing_consumes_go_and_so_does_what_only_they_need():
    def f(p, x):
        x = jax.nn.sigmoid(x[:, 0, 0] @ p["a"])
        return jax.nn.sigmoid(x @ p["b"]) @ p["c"]

    params = normal({"a": (2, 3), "b": (3, 4), "c": (4, 3)})
    params["c"] = params["c"].at[1].set(0)  # channel 1 of b is ignored
    params["b"] = params["b"].at[2, jnp.array([0, 2, 3])].set(0)  # channel 2 of a feeds only it
    small = removed_from(params, f)
    assert small.params["a"].shape == (2, 2)
    assert small.params["b"].shape == (2, 3)


def residual(p, x):
    x = jax.nn.relu(conv(x, p["a"]))
    x = x + conv(jax.nn.relu(conv(x, p["b"])), p["c"])
    return jax.nn.relu(x).mean((1, 2)) @ p["head"]


def test_a_residual_channel_goes_only_if_all_that_make_it_prune_it():
    shapes = {"a": (1, 1, 2, 4), "b": (3, 3, 4, 3), "c": (1, 1, 3, 4), "head": (4, 3)}
    params = normal(shapes)
    found = groups(plain(residual), params, {}, one(IMAGE))
    keep = jnp.array([True, False, True, False])
    alone = channel_masks(found, {"c": keep})
    assert alone.keys() == {"c"}
    small = compact(plain(residual), params, {}, one(IMAGE), alone)
    assert small.groups["a"].channels.tolist() == [0, 1, 2, 3]
    assert small.groups["a"].stuck.keys() == {"other kernels of the group keep them: a"}
    both = channel_masks(found, {"c": keep, "a": jnp.array([True, False, False, True])})
    assert both["head"].tolist() == [[kept] * 3 for kept in (True, False, True, True)]
    small = compact(plain(residual), params, {}, one(IMAGE), both)
    assert small.groups["a"].channels.tolist() == [0, 2, 3]
    check_same(small, plain(residual), params, {}, IMAGE, both)


def test_a_layer_is_never_emptied():
    params = normal(TWO)
    params |= {name: jnp.zeros_like(params[name]) for name in ("a", "mean", "b")}
    small = compact(plain(two_layers), params, {}, one(IMAGE))
    assert small.groups["a"].channels.tolist() == [0]
    assert small.groups["a"].stuck.keys() == {"a layer keeps at least one channel"}
    np.testing.assert_array_equal(two_layers(small.params, IMAGE["x"]), np.zeros((3, 3)))


def rms(p, x):
    x = x[:, 0, 0] @ p["a"]
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1) @ p["head"]


def group_norm(p, x):
    """Written out, and from Flax."""
    x = conv(x, p["a"])
    y = x.reshape(*x.shape[:3], 2, 2)
    y = y - y.mean((1, 2, 4), keepdims=True)
    return y.reshape(x.shape).mean((1, 2)) @ p["head"]


def flax_group_norm(p, x):
    x = nn.GroupNorm(num_groups=2, use_scale=False, use_bias=False).apply({}, conv(x, p["a"]))
    return x.mean((1, 2)) @ p["head"]


def scanned(p, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[:, 0, 0] @ p["a"], p["layers"])
    return x @ p["head"]


def fixed(p, x):
    return (x[:, 0, 0] @ p["a"] * jnp.arange(4.0)) @ p["head"]


def sorted_(p, x):
    return jnp.sort(x[:, 0, 0] @ p["a"], axis=-1) @ p["head"]


CONV, DENSE = {"a": (1, 1, 2, 4), "head": (4, 3)}, {"a": (2, 4), "head": (4, 3)}


@pytest.mark.parametrize(
    ("f", "shapes", "reason"),
    [
        (rms, DENSE, "reduce_sum runs over it"),
        (group_norm, CONV, "reduce_sum runs over it"),
        (flax_group_norm, CONV, "reduce_sum runs over it"),
        (scanned, {**DENSE, "layers": (2, 4, 4)}, "it enters scan, which is not followed"),
        (fixed, DENSE, "counted|constant array"),
        (sorted_, DENSE, "sort runs over it"),
    ],
)
def test_what_cannot_be_followed_stays_and_is_named(f, shapes, reason):
    params = normal(shapes)
    params["a"] = params["a"].at[..., 1].set(0)
    small = compact(plain(f), params, {}, one(IMAGE))
    assert jax.tree.map(jnp.shape, small.params) == shapes
    assert small.macs_after == small.macs_before
    found = groups(plain(f), params, {}, one(IMAGE))
    assert any(re.search(reason, why) for why in found["a"].pinned)
    assert any(re.search(reason, why) for why in small.groups["a"].stuck)
    with pytest.raises(SelectorError, match="must stay"):
        group_masks(found, {"a": np.ones(4)}, 0.5)


def test_groups_print_as_a_table():
    table = str(
        groups(
            plain(residual), normal(CONV | {"b": (3, 3, 4, 3), "c": (1, 1, 3, 4)}), {}, one(IMAGE)
        )
    )
    assert "a: 4 channels\n" in table
    assert "  b axis 2, 4 entries, in" in table
    assert "head: 3 channels, stay: it reaches the model's outputs" in table


def test_global_scope_ranks_all_channels_and_empties_no_group():
    params = normal({"a": (3, 3, 2, 4), "b": (3, 3, 4, 2), "c": (2, 3)})
    model = plain(lambda p, x: conv(conv(x, p["a"]), p["b"]).mean((1, 2)) @ p["c"])
    found = groups(model, params, {}, one(IMAGE))
    scores = {"a": [5.0, 6.0, 1.0, 7.0], "b": [2.0, 3.0]}
    chosen = group_masks(found, scores, 0.5, scope="global")
    assert chosen["c"][:, 0].tolist() == [False, True]
    assert chosen["b"][0, 0, :, 1].tolist() == [True, True, False, True]
    with pytest.raises(SetupError, match="one sparsity"):
        group_masks(found, scores, {"a": 0.5}, scope="global")
    with pytest.raises(SetupError, match=r"outside \[0, 1\)"):
        group_masks(found, scores, 1.0)
    with pytest.raises(SetupError, match="has 2 channels"):
        group_masks(found, {"b": [1.0]}, 0.5)
    with pytest.raises(SelectorError, match="no groups"):
        group_masks(found, {"x": [1.0]}, 0.5)
    with pytest.raises(SelectorError, match="makes no channels"):
        channel_masks(found, {"nothing": np.ones(4, bool)})
    with pytest.raises(SetupError, match="the mask of a has shape"):
        channel_masks(found, {"a": np.ones(3, bool)})


def test_scores_sum_over_all_members():
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([3.0, 0.0]), "c": jnp.ones((2, 3))}
    model = plain(lambda p, x: (x[:, 0, 0, :1] @ p["a"] + p["b"]) @ p["c"])
    found = groups(model, params, {}, one(IMAGE))
    assert group_scores(found.prunable, params)["a"].tolist() == [1 + 9 + 3, 4 + 0 + 3]


@settings(max_examples=6, deadline=None)
@given(
    widths=st.tuples(*[st.integers(1, 5)] * 3),
    kind=st.sampled_from(["plain", "residual", "concat", "depthwise"]),
    flat=st.booleans(),
    seed=st.integers(0, 99),
    sparsity=st.sampled_from([0.3, 0.5, 0.8]),
)
def test_random_small_cnns(widths, kind, flat, seed, sparsity):
    """Whatever is pruned of whatever CNN, the smaller one computes the same."""
    a, b, c = widths
    middle = a if kind == "residual" else b
    joined = a + b if kind == "concat" else middle
    shapes = {"a": (3, 3, 2, a), "bias": (a,), "b": (3, 3, a, middle), "scale": (joined,)}
    shapes |= {"depth": (3, 3, 1, joined), "c": (1, 1, joined, c)}
    shapes |= {"head": (c * (9 if flat else 1), 3)}
    params = normal(shapes, seed)

    def f(p, x):
        x = jax.nn.relu(conv(x, p["a"]) + p["bias"])
        y = jnp.tanh(conv(x, p["b"]))
        y = x + y if kind == "residual" else jnp.concatenate([x, y], -1) if kind == "concat" else y
        y = y * p["scale"]
        if kind == "depthwise":
            y = conv(y, p["depth"], groups=y.shape[-1])
        y = jax.nn.sigmoid(conv(y, p["c"], stride=2))
        return (y.reshape(len(y), -1) if flat else y.mean((1, 2))) @ p["head"]

    if kind != "depthwise":
        del params["depth"]
    model = plain(f)
    batch = {"x": jax.random.normal(jax.random.key(seed), (2, 6, 6, 2))}
    chosen = halved(model, params, {}, batch, sparsity=sparsity)
    small = compact(model, params, {}, one(batch), chosen)
    want = outputs(model.apply, masks.apply(params, chosen), {}, batch)
    got = outputs(model.apply, small.params, {}, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    left = {
        n: g.size - min(round(sparsity * g.size), g.size - 1)
        for n, g in groups(model, params, {}, one(batch)).prunable.items()
    }
    assert {n: len(small.groups[n].channels) for n in left} == left
    assert small.macs_after == macs(model.apply, small.params, {}, one(batch))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), density=st.sampled_from([0.2, 0.5, 0.8]))
def test_zeros_anywhere(seed, density):
    """Whole slices of zeros on any axis of any leaf: what is removed never mattered."""
    shapes = {"a": (3, 3, 2, 4), "b": (4,), "c": (3, 3, 4, 4), "d": (4,), "e": (36, 3), "f": (3, 3)}
    rng = np.random.default_rng(seed)
    params = {}
    for name, leaf in normal(shapes, seed).items():
        for axis, n in enumerate(leaf.shape):
            if n > 2 and rng.random() < 0.7:
                keep = rng.random(n) < density
                leaf = leaf * keep.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
        params[name] = leaf

    def f(p, x):
        x = jax.nn.relu(conv(x, p["a"]) + p["b"])
        x = jax.nn.relu(x + conv(x, p["c"]) - p["d"])
        return (
            jax.nn.relu(conv(x, p["c"] * 0 + p["c"], stride=2).reshape(len(x), -1) @ p["e"])
            @ p["f"]
        )

    model = plain(f)
    small = compact(model, params, {}, one(IMAGE))
    want = outputs(model.apply, params, {}, IMAGE)
    got = outputs(model.apply, small.params, {}, IMAGE)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_channel_that_stays_alone_keeps_what_it_is_made_of():
    """b's only channel is clipped to 0 by what a constant brings to it, so that must stay too."""

    def f(p, x):
        x = jax.nn.relu(x[:, 0, 0] @ p["a"] + p["one"])
        return jax.nn.relu(x @ p["b"] + p["three"]) @ p["c"] + p["d"]

    params = {"a": jnp.zeros((2, 2)), "one": jnp.ones(2), "b": jnp.full((2, 2), -2.0)}
    params |= {"three": jnp.full(2, 3.0), "c": jnp.ones((2, 3)), "d": jnp.arange(3.0)}
    small = compact(plain(f), params, {}, one(IMAGE))
    assert small.params["b"].shape == (2, 1)
    np.testing.assert_array_equal(f(small.params, IMAGE["x"]), f(params, IMAGE["x"]))


def test_moments_and_averages_are_cut_alike():
    params = normal({"a": (2, 4), "c": (4, 3)})
    model = plain(lambda p, x: jnp.tanh(x[:, 0, 0] @ p["a"]) @ p["c"])
    found = groups(model, params, {}, one(IMAGE))
    small = compact(model, params, {}, one(IMAGE), group_masks(found, {"a": [1, 4, 2, 3]}, 0.5))
    opt = optax.adam(0.1).init(params)
    moved = small.cut(opt, params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(
        jnp.shape, optax.adam(0.1).init(small.params)
    )
    np.testing.assert_array_equal(small.cut(params, params)["c"], params["c"][jnp.array([1, 3])])
