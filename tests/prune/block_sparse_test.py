"""Block-sparse products equal dense ones, forward and backward, with any block and any filling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SetupError
from effjax.prune.block_sparse import BlockSparse, Structure


def blocky(shape, block, density, seed=0):
    """A matrix with random blocks of zeros, and its mask."""
    rng = np.random.default_rng(seed)
    grid = rng.random([-(-n // b) for n, b in zip(shape, block, strict=True)]) < density
    mask = np.kron(grid, np.ones(block, bool)).astype(bool)[: shape[0], : shape[1]]
    return rng.normal(size=shape).astype(np.float32), mask


def test_blocks_worked_by_hand():
    w = jnp.arange(24.0).reshape(4, 6) + 1
    mask = np.zeros((4, 6), bool)
    mask[0, 0] = mask[3, 1] = mask[2, 4] = True  # blocks (0, 0), (1, 0) and (1, 2)
    sparse = BlockSparse.from_dense(w, mask, block=(2, 2))
    assert sparse.structure == Structure((4, 6), (2, 2), ((0, 1), (), (1,)))
    assert sparse.structure.index.tolist() == [[0, 1], [2, 2], [1, 2]]
    assert sparse.values.tolist() == [
        [[1, 0], [0, 0], [0, 0], [0, 20]],
        [[0, 0]] * 4,
        [[17, 0], [0, 0], [0, 0], [0, 0]],
    ]
    assert (sparse.density, sparse.work, sparse.shape) == (0.5, 1.0, (4, 6))
    np.testing.assert_array_equal(sparse.to_dense(), np.where(mask, w, 0))
    x = jnp.array([1.0, 10.0, 100.0, 1000.0])
    assert sparse.matmul(x).tolist() == [1, 20000, 0, 0, 1700, 0]


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 99),
)
def test_any_matrix_and_block_equals_dense(shape, block, density, seed):
    w, mask = blocky(shape, block, density, seed)
    sparse = BlockSparse.from_dense(w, mask, block)
    dense = np.where(mask, w, 0)
    np.testing.assert_array_equal(sparse.to_dense(), dense)
    x = np.random.default_rng(seed).normal(size=(3, shape[0])).astype(np.float32)
    np.testing.assert_allclose(sparse.matmul(jnp.asarray(x)), x @ dense, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_axes_and_jit(dtype):
    w, mask = blocky((64, 48), (16, 8), 0.3)
    w, x = jnp.asarray(w, dtype), jax.random.normal(jax.random.key(0), (2, 5, 64), dtype)
    sparse = BlockSparse.from_dense(w, mask, (16, 8))
    assert sparse.values.dtype == dtype
    y = jax.jit(lambda s, x: s.matmul(x))(sparse, x)
    wanted = x @ jnp.where(mask, w, 0)
    assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_allclose(
        y.astype(jnp.float32),
        wanted.astype(jnp.float32),
        atol=1e-5 if dtype == jnp.float32 else 0.1,
    )
    assert sparse.matmul(x, jnp.float32).dtype == jnp.float32


def test_gradients_are_those_of_the_dense_product_and_none_reaches_the_filling():
    w, mask = blocky((24, 20), (4, 5), 0.4, seed=2)
    sparse = BlockSparse.from_dense(w, mask, (4, 5))
    counts = [len(c) for c in sparse.structure.columns]
    assert min(counts) < max(counts)  # there is filling
    x = jax.random.normal(jax.random.key(0), (7, 24))

    def loss(weights, x):
        y = weights.matmul(x) if isinstance(weights, BlockSparse) else x @ weights
        return jnp.sum(jnp.sin(y))

    ours, of_x = jax.grad(loss, argnums=(0, 1))(sparse, x)
    dense, dense_of_x = jax.grad(loss, argnums=(0, 1))(jnp.where(mask, w, 0), x)
    np.testing.assert_allclose(of_x, dense_of_x, atol=1e-5)
    np.testing.assert_allclose(ours.to_dense(), jnp.where(mask, dense, 0), atol=1e-5)
    filling = np.repeat(sparse.structure.index == sparse.structure.rows, 4, axis=1)
    assert filling.any()
    assert not np.asarray(ours.values)[filling].any()


def test_it_compiles_once_for_one_structure_and_does_a_fraction_of_the_work():
    w, _ = blocky((256, 256), (32, 32), 1.0)
    mask = np.kron(np.eye(8, dtype=bool), np.ones((32, 32), bool))
    sparse = BlockSparse.from_dense(w, mask, 32)
    assert sparse.work == sparse.density == 1 / 8
    f = jax.jit(lambda s, x: s.matmul(x))
    x = jnp.ones((16, 256))
    f(sparse, x)
    f(BlockSparse.from_dense(w * 2, mask, 32), x)
    assert f._cache_size() <= 1  # jax may drop entries, in a long process
    flops = f.lower(sparse, x).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(2 * 16 * 256 * 32, rel=0.01)


def test_misuse_is_an_error():
    w = jnp.ones((4, 6))
    with pytest.raises(SetupError, match=r"weights \[2, 4, 6\].*Reshape a kernel"):
        BlockSparse.from_dense(jnp.ones((2, 4, 6)))
    with pytest.raises(SetupError, match=r"a mask \[4, 5\]"):
        BlockSparse.from_dense(w, np.ones((4, 5), bool))
    with pytest.raises(SetupError, match="blocks of 0 x 0"):
        BlockSparse.from_dense(w, block=0)
    with pytest.raises(SetupError, match="outside of jit"):
        jax.jit(BlockSparse.from_dense)(w)
    with pytest.raises(SetupError, match=r"cannot multiply x \[3, 5\]"):
        BlockSparse.from_dense(w).matmul(jnp.ones((3, 5)))
