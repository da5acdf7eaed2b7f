"""A block-sparse model gives the dense one's outputs, and says what it left dense and why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import effjax as ej
from effjax.errors import SelectorError, SetupError
from effjax.prune.sparsify import sparsify as by_default

sparsify = functools.partial(by_default, work=0.5)  # these matrices have few blocks
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 64)).astype(np.float32)


def mask_of(shape, density, block=8, seed=0):
    grid = np.random.default_rng(seed).random([n // block for n in shape]) < density
    return jnp.asarray(np.kron(grid, np.ones((block, block))).astype(bool))


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def run(apply, params, batch):
    return jax.jit(lambda p, b: apply(p, {}, b, jax.random.key(0), False)[0])(params, batch)


def model_of(function):
    """A function of (params, x) as an `apply`."""
    return lambda params, model_state, batch, key, train: (
        function(params, batch["x"]),
        model_state,
    )


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64, name="a")(x))
        return nn.Dense(64, name="b", dtype=jnp.bfloat16)(x)


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


@pytest.mark.parametrize(
    "model", [ej.from_linen(LinenMLP(), inputs="x"), ej.from_nnx(NNXMLP, inputs="x")]
)
def test_flax_models_of_both_kinds(model):
    params, state = model.init(jax.random.key(0), {"x": X})
    masks = {"a/kernel": mask_of((64, 64), 0.2), "b/kernel": mask_of((64, 64), 0.2, seed=1)}
    found = sparsify(model.apply, params, masks, state, {"x": X}, block=8)
    assert set(found.blocks) == set(masks)
    assert found.left == {}
    assert set(found.params["dense"]) == {"a/bias", "b/bias"}
    for path, sparse in found.blocks.items():
        kept = masks[path].reshape(8, 8, 8, 8).any(axis=(1, 3)).sum()
        assert sparse.density == pytest.approx(int(kept) / 64)
    pruned = ej.prune.masks.apply(params, masks)
    key = jax.random.key(0)
    for batch in ({"x": X}, {"x": X[:1]}):  # another batch size
        wanted = jax.jit(lambda p, b: model.apply(p, state, b, key, False)[0])(pruned, batch)
        ours = jax.jit(lambda p, b: found.apply(p, state, b, key, False)[0])(found.params, batch)
        assert ours.dtype == wanted.dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), wanted.astype(jnp.float32), atol=1e-5, rtol=0.02
        )


FORMS = {
    "x @ w": lambda p, x: x @ p["w"],
    "x @ w.T": lambda p, x: x @ p["w"].T,
    "w @ x": lambda p, x: p["w"] @ x.T,
    "x.T contracted first": lambda p, x: jnp.einsum("ib,io->bo", x.T, p["w"]),
    "more axes": lambda p, x: jnp.einsum("bcj,jo->bco", x.reshape(3, 2, 64), p["w"]),
    "scaled, cast": lambda p, x: x @ (3.0 * p["w"]).astype(jnp.bfloat16),
    "remat": lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x),
    "the same weight twice": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
    "a loop over time": lambda p, x: jax.lax.scan(
        lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3
    )[0],
    "an unbounded loop": lambda p, x: jax.lax.fori_loop(
        0, jnp.int32(3), lambda i, h: jnp.tanh(h @ p["w"]), x
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_however_the_product_is_written(form):
    apply = model_of(FORMS[form])
    mask = mask_of((64, 64), 0.1)
    params = {"w": weights(64, 64)}
    found = sparsify(apply, params, {"w": mask}, {}, {"x": X}, block=8)
    assert found.left == {}
    assert found.params["dense"] == {}
    assert all(sparse.density < 0.2 for sparse in found.blocks.values())
    wanted = run(apply, {"w": jnp.where(mask, params["w"], 0)}, {"x": X})
    ours = run(found.apply, found.params, {"x": X})
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(wanted, np.float32), atol=2e-2, rtol=1e-4
    )
    # The dense product is gone from the program.
    text = jax.jit(found.apply, static_argnums=4).lower(
        found.params, {}, {"x": X}, jax.random.key(0), False
    )
    assert "nan" not in text.compile().as_text()


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def convolved(p, x):
    return jax.lax.conv_general_dilated(x.reshape(6, 1, 8, 8), p["w"], (1, 1), "SAME")


def branched(p, x):
    return jax.lax.cond(x[0, 0] > 1e9, lambda x: x @ p["w"], lambda x: x, x)


def growing(p, x):
    return jax.lax.scan(lambda c, _: ((c[0] @ c[1], -c[1]), None), (x, p["w"]), None, length=2)[0][
        0
    ]


@jax.custom_vjp
def ruled(x, w):
    return x @ w


ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

LEFT = {
    "one of a scan's layers": (stacked, (2, 64, 64)),
    "a convolution": (convolved, (4, 1, 3, 3)),
    "a branch that the example did not take": (branched, (64, 64)),
    "changes from one iteration": (growing, (64, 64)),
    "the custom_vjp": (lambda p, x: ruled(x, p["w"]), (64, 64)),
    "is no matrix": (lambda p, x: jnp.einsum("bj,jkl->bkl", x, p["w"]), (64, 2, 8)),
    "looks rows up": (lambda p, x: p["w"][x[:, 0].astype(int)], (64, 64)),
    "work=0.5 asks for at most 50%": (lambda p, x: x @ p["w"], (64, 64)),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_dense_is_named_with_the_reason(why):
    function, shape = LEFT[why]
    apply, params = model_of(function), {"w": 0.1 * weights(*shape)}
    found = sparsify(apply, params, {}, {}, {"x": X}, block=8)
    assert list(found.left) == ["w"]
    assert why in found.left["w"]
    assert found.blocks == {}
    assert list(found.params["dense"]) == ["w"]
    np.testing.assert_allclose(
        run(found.apply, found.params, {"x": X}), run(apply, params, {"x": X}), atol=1e-5
    )


def test_by_default_a_third_of_the_work_is_too_much():
    kept = np.zeros((8, 8), bool)
    kept[:3] = True
    params = {"w": jnp.asarray(np.kron(kept, np.ones((8, 8))), jnp.float32)}
    apply = model_of(FORMS["x @ w"])
    found = by_default(apply, params, {}, {}, {"x": X}, block=8)
    assert "work=0.3 asks for at most 30%" in found.left["w"]
    assert list(sparsify(apply, params, {}, {}, {"x": X}, block=8).blocks) == ["w"]


def test_a_tied_table_is_kept_for_its_lookup():
    apply = model_of(lambda p, x: p["w"][x[:, 0].astype(int) % 64] @ p["w"].T)
    masks = {"w": mask_of((64, 64), 0.2)}
    found = sparsify(apply, {"w": weights(64, 64)}, masks, {}, {"x": X}, block=8)
    assert list(found.left.values()) == ["it looks rows up"]
    assert len(found.blocks) == 1
    assert list(found.params["dense"]) == ["w"]


def test_misuse_is_an_error():
    params = {"w": jnp.eye(64)}
    with pytest.raises(SelectorError, match="there are masks for"):
        sparsify(model_of(FORMS["x @ w"]), params, {"v": params["w"]}, {}, {"x": X})
    leaks = model_of(lambda p, x: (x @ p["w"], p["w"]))
    with pytest.raises(SetupError, match=r"they are nan off .* returns a weight"):
        sparsify(leaks, params, {}, {}, {"x": X}, block=8)
