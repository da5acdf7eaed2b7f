"""Tests of number formats: hand-worked codes, a NumPy reference, and qwix as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from effjax.errors import SetupError
from effjax.quantize import formats
from tests.programs import normal

X = jnp.array([-1.0, 0.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("kind", "symmetric", "codes", "scale", "zero"),
    [
        ("int1", True, [-1, 0, 1, 1], 3.5 / 3, None),
        ("ternary", True, [-1, 0, 0, 1], 1.5, None),  # threshold 0.7 * 0.875
        ("int2", True, [0, 0, 0, 1], 2.0, None),  # ties go to even
        ("int3", True, [-2, 0, 1, 3], 2 / 3, None),
        ("int8", True, [-64, 0, 32, 127], 2 / 127, None),
        ("int2", False, [-2, -1, -1, 1], 1.0, -1),
        ("int3", False, [-4, -2, -1, 3], 3 / 7, -2),
    ],
)
def test_by_hand(kind, symmetric, codes, scale, zero):
    q = formats.encode(X, kind, symmetric=symmetric)
    np.testing.assert_array_equal(q.qvalue, codes)
    np.testing.assert_allclose(q.scale, [scale], rtol=1e-6)
    assert (None if q.zero_point is None else int(q.zero_point[0])) == zero
    wanted = (np.array(codes) - (zero or 0)) * scale
    np.testing.assert_allclose(formats.decode(q), wanted, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_tiles_against_numpy(bits, symmetric):
    x = normal(12, 6)
    q = formats.encode(x, f"int{bits}", per="channel", tiles={0: 4}, symmetric=symmetric)
    assert q.scale.shape == (3, 6)
    wanted = np.zeros((12, 6), np.float32)
    for i in range(3):
        for j in range(6):
            tile = np.asarray(x[4 * i : 4 * i + 4, j])
            half = 2 ** (bits - 1)
            if symmetric:
                s = np.abs(tile).max() / np.float32(half - 1)
                values = np.round(tile / s) * s
            else:
                low, high = min(tile.min(), 0), max(tile.max(), 0)
                s = (high - low) / np.float32(2 * half - 1)
                z = np.round(-half - low / s)
                values = (np.clip(np.round(tile / s) + z, -half, half - 1) - z) * s
            wanted[4 * i : 4 * i + 4, j] = values
    np.testing.assert_allclose(formats.decode(q), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("per", "shape"),
    [("tensor", (1, 1, 1)), ("channel", (1, 1, 5)), ("token", (2, 3, 1)), ((1,), (1, 3, 1))],
)
def test_groups(per, shape):
    x = normal(2, 3, 5)
    q = formats.encode(x, "int8", per=per)
    assert q.scale.shape == shape
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    np.testing.assert_allclose(q.scale * 127, np.abs(x).max(axes, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_zero_is_exact_and_values_are_near(kind):
    x = normal(64, 4).at[::3].set(0)
    q = formats.encode(x, kind, per="channel", tiles={0: 32})
    values = np.asarray(formats.decode(q))
    assert np.all(values[::3] == 0)
    assert np.all(values * x >= 0)
    noise = np.linalg.norm(values - x) / np.linalg.norm(x)
    worst = {"int1": 0.65, "ternary": 0.5, "int2": 0.8, "int3": 0.3, "int4": 0.13, "int5": 0.06}
    worst |= {"int6": 0.03, "int7": 0.015, "int8": 0.008, "nf4": 0.13, "mxfp4": 0.2}
    assert noise < worst.get(kind, 0.08)
    assert not np.any(
        np.asarray(formats.decode(formats.encode(jnp.zeros((32, 2)), kind, tiles={0: 32})))
    )


@pytest.mark.parametrize("kind", ["nf4", "mxfp8", "mxfp4", *formats.FLOATS])
def test_small_floats_are_qwix(kind):
    x, qtype = normal(64, 4), formats.FLOATS.get(kind, kind)
    theirs = qwix.dequantize(qwix.quantize(x, qtype, channelwise_axes=(1,), tiled_axes={0: 32}))
    ours = formats.decode(formats.encode(x, kind, per="channel", tiles={0: 32}))
    np.testing.assert_array_equal(ours, theirs)


def test_asymmetric_int8_is_qwix():
    x = normal(32, 8) + 0.5
    theirs = qwix.quantize(x, jnp.int8, channelwise_axes=(1,), calibration_method="minmax")
    ours = formats.encode(x, "int8", per="channel", symmetric=False)
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)
    # qwix rounds x / s + z at once, we x / s alone, so that ties may fall one code apart.
    off = np.abs(np.asarray(ours.qvalue, int) - np.asarray(theirs.qvalue, int))
    assert off.max() <= 1
    assert off.mean() < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_stochastic_rounding_is_unbiased_and_keeps_the_grid(symmetric):
    x = jnp.array([-3.0, -1.25, 0.0, 1.0, 2.7, 4.0 - (symmetric)])
    keys = jax.random.split(jax.random.key(0), 4000)
    kind = "int3"
    drawn = jax.vmap(lambda k: formats.decode(formats.encode(x, kind, symmetric=symmetric, key=k)))(
        keys
    )
    np.testing.assert_allclose(drawn.mean(0), x, atol=0.05)
    np.testing.assert_array_equal(drawn.std(0) > 0.1, [False, True, False, False, True, False])
    assert np.all(np.abs(drawn - x) < 1.0)


def test_half_precision_and_jit():
    x = normal(8, 4).astype(jnp.bfloat16)
    q = jax.jit(lambda x: formats.encode(x, "int4", per="channel"))(x)
    assert (q.qvalue.dtype, q.scale.dtype) == (jnp.int8, jnp.float32)
    plain = formats.decode(formats.encode(x.astype(jnp.float32), "int4", per="channel"))
    np.testing.assert_allclose(formats.decode(q), plain, rtol=1e-6)
    assert formats.decode(q, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "kind", "kwargs", "message"),
    [
        (X, "int9", {}, "9 bits are out of range"),
        (X, "int0", {}, "0 bits are out of range"),
        (X, "posit", {}, "posit"),
        (jnp.arange(4), "int8", {}, "array of int32"),
        (X, "int8", {"tiles": {0: 3}}, "tile of 3 does not divide axis 0"),
        (X, "int8", {"tiles": {0: 0}}, "tile of 0"),
        (X, "int8", {"per": (1,)}, r"axes \[1\]"),
        (X, "int8", {"per": "row"}, "per is 'row'"),
        (X, "nf4", {"symmetric": False}, "nf4 is symmetric"),
        (X, "int1", {"key": jax.random.key(0)}, "stochastic"),
        (X, "mxfp8", {}, "tiles of 32"),
    ],
)
def test_errors(x, kind, kwargs, message):
    with pytest.raises(SetupError, match=message):
        formats.encode(x, kind, **kwargs)
