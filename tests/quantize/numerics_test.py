"""Tests of grids, rounding and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import SetupError
from effjax.quantize import numerics
from tests.programs import normal


def quantized(x, bits, channels=()):
    g = numerics.grid(bits)
    return numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x, channels), g), g)


def reference(x, bits, axis=None):
    """The same in NumPy."""
    bound = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis=axis, keepdims=True).astype(np.float32) * np.float32(1 / bound)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.round(x / scale), -bound, bound) * scale


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        (2, [-7.0, -7.0, 0.0, 0.0, 0.0, 7.0]),
        (3, [-7.0, -14 / 3, 0.0, 0.0, 7 / 3, 14 / 3]),
        (4, [-7.0, -4.0, -1.0, 0.0, 2.0, 5.0]),
    ],
)
def test_by_hand(bits, wanted):
    x = jnp.array([-7.0, -4.4, -0.6, 0.0, 2.49, 5.3])
    np.testing.assert_allclose(quantized(x, bits), wanted, rtol=1e-6)


def test_grids():
    assert [int(numerics.grid(b).bound) for b in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]
    assert [bool(numerics.grid(b).identity) for b in (2, 8, 15, 16, 32)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_against_numpy(bits):
    x = normal(16, 8)
    np.testing.assert_array_equal(quantized(x, bits), reference(np.asarray(x), bits))
    per_column = quantized(x, bits, (1,))
    np.testing.assert_array_equal(per_column, reference(np.asarray(x), bits, axis=0))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-(2**24), 2**24), min_size=4, max_size=4),
    st.integers(2, 8),
    st.integers(-80, 80),
)
def test_properties(values, bits, power):
    x = np.asarray(values, np.float32) * np.float32(2.0**power)
    q = np.asarray(quantized(jnp.asarray(x), bits))
    bound, largest = 2 ** (bits - 1) - 1, np.abs(x).max()
    assert np.isfinite(q).all()
    assert np.all(q[x == 0] == 0)
    assert np.all(np.sign(q) * np.sign(x) >= 0)
    assert np.all(np.abs(q - x) <= largest / bound * 0.5000005)
    # The extreme of the range is a point of the grid.
    np.testing.assert_allclose(np.abs(q).max(), largest, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(quantized(jnp.asarray(-x), bits)), -q)


def codes(x, bits):
    """With and without clipping."""
    g = numerics.grid(bits)
    scale = numerics.scale_of(numerics.absmax(x), g)
    return numerics.round_to(x, scale, g, True), numerics.round_to(x, scale, g)


COMPILED = jax.jit(codes)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(-(2**24), 2**24), min_size=8, max_size=8),
    st.integers(2, 8),
    st.integers(-140, 100),
)
def test_nothing_lies_outside_the_range_of_the_largest_magnitude(values, bits, power):
    """So that clipping changes no bit, compiled or not."""
    x = jnp.asarray(np.asarray(values, np.float32) * np.float32(2.0**power))
    for run in (codes, COMPILED):
        np.testing.assert_array_equal(*run(x, bits))


def test_from_16_bits_on_nothing_changes():
    x = jnp.array([1e-30, -0.0, 3.14159, jnp.inf, -1e38])
    for bits in (16, 32, jnp.int32(16), jnp.int32(99)):
        np.testing.assert_array_equal(quantized(x, bits), x)
    g = numerics.grid(16)
    grad = jax.grad(lambda x: numerics.fake_quant(x, jnp.float32(1e-3), g, True).sum())(x[:3])
    np.testing.assert_array_equal(grad, jnp.ones(3))


def test_zeros_and_tiny_ranges():
    np.testing.assert_array_equal(quantized(jnp.zeros((3, 2)), 8, (1,)), jnp.zeros((3, 2)))
    columns = quantized(jnp.array([[0.0, 2.0], [0.0, -1.0]]), 2, (1,))
    np.testing.assert_array_equal(columns, [[0.0, 2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(quantized(jnp.full(2, 1e-38), 8), [0.0, 0.0])
    assert quantized(jnp.zeros((0, 2)), 8, (1,)).shape == (0, 2)


def test_traced_bits_eager_and_jit_agree_to_the_bit():
    x = normal(64, 33)
    for bits in range(2, 9):
        traced = jax.jit(quantized)(x, jnp.int32(bits))
        constant = jax.jit(lambda x, bits=bits: quantized(x, bits))(x)
        np.testing.assert_array_equal(traced, constant)
        np.testing.assert_array_equal(traced, quantized(x, bits))


def test_vmap_over_bits():
    x, widths = normal(5, 7), jnp.array([2, 3, 8, 16])
    rows = jax.vmap(lambda bits: quantized(x, bits))(widths)
    for row, bits in zip(rows, (2, 3, 8, 16), strict=True):
        np.testing.assert_array_equal(row, quantized(x, bits))


def test_the_derivative_is_straight_through():
    x, g, s = jnp.array([-2.0, -0.7, 0.0, 0.2, 0.71]), numerics.grid(4), jnp.float32(0.1)
    for clipped, wanted in ((False, [1, 1, 1, 1, 1]), (True, [0, 1, 1, 1, 0])):
        q, pull = jax.vjp(lambda x, s: numerics.fake_quant(x, s, g, clipped), x, s)  # noqa: B023
        np.testing.assert_allclose(q, [-0.7, -0.7, 0.0, 0.2, 0.7], rtol=1e-6)
        dx, ds = pull(jnp.arange(1.0, 6.0))
        np.testing.assert_array_equal(dx, np.arange(1.0, 6.0) * wanted)
        assert ds == 0
    # Where the incoming gradient is infinite, a clipped value still gets 0.
    infinite = jax.vjp(lambda x: numerics.fake_quant(x, s, g, True), x)[1](jnp.full(5, jnp.inf))[0]
    assert infinite[0] == 0


def test_second_derivatives_and_forward_mode():
    g, s = numerics.grid(4), jnp.float32(0.5)
    f = lambda x: numerics.fake_quant(x, s, g) ** 2  # noqa: E731
    assert jax.jvp(f, (1.1,), (1.0,))[1] == 2.0
    assert jax.grad(jax.grad(f))(1.1) == 2.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_from_the_float32_grid(dtype):
    x = normal(8, 8).astype(dtype)
    q = quantized(x, 4)
    assert q.dtype == dtype
    np.testing.assert_array_equal(q, quantized(x.astype(jnp.float32), 4).astype(dtype))


def test_qwix_dequantizes_our_integers_to_our_values():
    x = normal(8, 6)
    for channels in ((), (1,)):
        g = numerics.grid(8)
        scale = numerics.scale_of(numerics.absmax(x, channels), g)
        integers = numerics.round_to(x, scale, g).astype(jnp.int8)
        theirs = qwix.dequantize(qwix.QArray(integers, scale, None, jnp.int8))
        np.testing.assert_array_equal(theirs, numerics.fake_quant(x, scale, g))


@pytest.mark.parametrize("bits", [4, 8])
def test_our_rounding_on_qwix_scales_is_qwix(bits):
    x, g = normal(32, 32), numerics.grid(bits)
    theirs = qwix.quantize(x, getattr(jnp, f"int{bits}"), channelwise_axes=(1,))
    # qwix's ranges end in a tie and its grid has one integer more below; elsewhere they are equal.
    inside = jnp.abs(x) < theirs.scale * g.bound
    ours = numerics.fake_quant(x, theirs.scale, g)
    np.testing.assert_array_equal(ours[inside], qwix.dequantize(theirs)[inside])
    assert inside.mean() > 0.9


def test_integer_dot_of_qwix():
    x, w, g = normal(16, 32), normal(32, 8), numerics.grid(8)
    sx, sw = (
        numerics.scale_of(numerics.absmax(x), g),
        numerics.scale_of(numerics.absmax(w, (1,)), g),
    )
    arrays = [
        qwix.QArray(numerics.round_to(a, s, g).astype(jnp.int8), s, None, jnp.int8)
        for a, s in ((x, sx), (w, sw))
    ]
    theirs = qwix.dot_general(*arrays, (((1,), (0,)), ((), ())))
    ours = numerics.fake_quant(x, sx, g) @ numerics.fake_quant(w, sw, g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 9, 15, 0, -4, 4.5, True])
def test_bits_that_are_none(bits):
    with pytest.raises(SetupError, match=f"the weights has {bits} bits"):
        numerics.check_bits(bits, "the weights")


@pytest.mark.parametrize("bits", [2, 8, 16, 32, np.int64(4), jnp.int32(1)])
def test_bits_that_are_some(bits):
    numerics.check_bits(bits, "the weights")
