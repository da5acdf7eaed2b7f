"""Packed files: bit for bit back, in the bytes that were promised, or a clear error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.cost.layouts import pack_bits, unpack_bits
from effjax.errors import PackedError, SelectorError, SetupError


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[0], (16, 8))
    return {
        "dense": {"kernel": kernel, "bias": jnp.full(8, -0.0).at[0].set(jnp.nan)},
        "half": jax.random.normal(keys[1], (5, 3)).astype(jnp.bfloat16),
        "few": jnp.array([0.0, 1.0, -2.0] * 9),
        "count": jnp.arange(3),
        "none": jnp.zeros((0, 3)),
        "flag": jnp.array(True),
    }


def same_bits(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def test_floats_of_any_dtype_return_bit_for_bit(tmp_path):
    state = {"mean": jnp.ones(4)}
    path = tmp_path / "m.safetensors"
    ej.save_packed(path, params(), {"few": {"clusters": 3}}, model_state=state, metadata={"a": 1})
    found = ej.load_packed(path)
    assert same_bits(found.params, params())
    assert same_bits(found.model_state, state)
    assert found.metadata == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_array_is_a_model(tmp_path):
    ej.save_packed(tmp_path / "m", jnp.arange(3.0))
    assert ej.load_packed(tmp_path / "m").params.tolist() == [0, 1, 2]


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounded_leaves_return_bit_for_bit(tmp_path, bits):
    bound = max(2 ** (bits - 1) - 1, 1)
    codes = np.random.default_rng(bits).integers(-bound, bound + 1, (32, 4))
    codes = np.where(codes == 0, bound, codes) if bits == 1 else codes
    x = jnp.asarray(codes.astype(np.float32) * np.float32([0.1, 0.37, 3e-4, 0.9]))
    ej.save_packed(tmp_path / "m", {"k": x}, {"k": {"weight_bits": bits, "scales": 4}})
    assert np.array_equal(ej.load_packed(tmp_path / "m").params["k"], x)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.data())
def test_bit_packing_is_inverted_and_has_no_gaps(width, data):
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70))
    packed = pack_bits(np.array(codes, np.uint8), width)
    assert packed.size == -(-len(codes) * width // 8)
    assert unpack_bits(packed, width, len(codes)).tolist() == codes
    whole = sum(c << (i * width) for i, c in enumerate(codes))
    assert int.from_bytes(packed.tobytes(), "little") == whole


def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    ej.save_packed(path, params())
    return path, path.read_bytes()


@pytest.mark.parametrize("part", [0, 4, 12, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, part):
    path, raw = saved(tmp_path)
    path.write_bytes(raw[: part if isinstance(part, int) else int(part * len(raw))])
    with pytest.raises(PackedError, match="cut off"):
        ej.load_packed(path)


def test_any_flipped_byte_is_noticed(tmp_path):
    path, raw = saved(tmp_path)
    for place in range(0, len(raw), 37):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(PackedError):
            ej.load_packed(path)


def test_a_foreign_file_and_an_unknown_version_are_named(tmp_path, monkeypatch):
    head = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "f").write_bytes(len(head).to_bytes(8, "little") + head + b"a")
    with pytest.raises(PackedError, match="none that ej"):
        ej.load_packed(tmp_path / "f")
    monkeypatch.setattr("effjax.cost.container.VERSION", 99)
    path, _ = saved(tmp_path)
    with pytest.raises(PackedError, match="packed format 99"):
        ej.load_packed(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, raw = saved(tmp_path)
    monkeypatch.setattr("os.fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ej.save_packed(path, {"other": jnp.ones(3)})
    assert path.read_bytes() == raw
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(SelectorError, match="other"):
        ej.save_packed(tmp_path / "m", params(), {"other": {}})
    with pytest.raises(SetupError, match="12 bits"):
        ej.save_packed(tmp_path / "m", params(), {"few": {"weight_bits": 12}})
    with pytest.raises(SetupError, match="different values"):
        ej.save_packed(tmp_path / "m", params(), {"few": {"clusters": 2}})
    with pytest.raises(PackedError, match="not JSON"):
        ej.save_packed(tmp_path / "m", params(), metadata={"a": object()})
    ej.save_packed(tmp_path / "m", params())
    with pytest.raises(PackedError, match="another model"):
        ej.load_packed(tmp_path / "m", like={"k": jnp.ones(3)})
