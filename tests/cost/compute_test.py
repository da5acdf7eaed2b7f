"""What XLA says of a model, and what stands in its footprint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import SetupError

WIDE = {"kernel": jnp.ones((64, 32)), "head": jnp.ones((32, 10))}
BATCH = {"x": jnp.ones((3, 64))}


def apply(params, model_state, batch, key, train):
    hidden = jax.nn.relu(batch["x"] @ params["kernel"])
    return hidden @ params["head"], model_state


def test_flops_and_memory_of_two_products_by_hand():
    one, many = ej.cost.compute(apply, WIDE, BATCH, samples=2)
    assert (one.batch_size, many.batch_size) == (1, 32)
    products, rectified = 2 * (64 * 32 + 32 * 10), 32
    assert many.flops == pytest.approx(32 * (products + rectified), rel=0.02)
    weights, inputs = 4 * (64 * 32 + 32 * 10), 4 * 32 * 64
    assert many.peak_bytes >= weights + inputs
    assert many.bytes_accessed >= weights + inputs
    assert many.throughput == pytest.approx(32 / many.latency.median)
    assert min(many.trace_seconds, many.compile_seconds) > 0


def test_a_footprint_with_a_model_finds_its_sites_and_times_it():
    found = ej.footprint(WIDE, apply=apply, batch=BATCH, batch_sizes=(2,))
    assert found.totals.macs == 64 * 32 + 32 * 10
    assert found.totals.bitops == found.totals.macs * 32 * 32
    assert [one.batch_size for one in found.compute] == [2]
    record = json.loads(json.dumps(found.to_dict()))
    assert record["compute"][0]["latency"]["batch_size"] == 2
    assert "examples/s; XLA: " in str(found)


def test_zstd_is_of_the_packed_file(tmp_path):
    import zstandard

    kernel = np.random.default_rng(0).normal(size=(64, 64)).round(1).astype(np.float32)
    found = ej.footprint({"kernel": kernel}, facts={"kernel": {"weight_bits": 8}}, zstd=True)
    ej.save_packed(tmp_path / "m", {"kernel": kernel}, {"kernel": {"weight_bits": 8}})
    data = (tmp_path / "m").read_bytes()
    assert len(data) == found.file_bytes
    # The file has a hash where the footprint has zeros: 64 hexadecimal digits are 32 bytes.
    size = len(zstandard.ZstdCompressor(level=19).compress(data))
    assert found.zstd_bytes < size < found.zstd_bytes + 80
    assert f"{found.zstd_bytes:,} with zstd" in str(found)
    assert ej.footprint({"kernel": kernel}).zstd_bytes is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"batch": {"x": jnp.float32(1)}}, "first axis"),
        ({"batch": {}}, "first axis"),
        ({"batch_sizes": (0, 4)}, r"\[0\]"),
    ],
)
def test_what_cannot_be_measured(given, match):
    with pytest.raises(SetupError, match=match):
        ej.cost.compute(apply, WIDE, **{"batch": BATCH, **given})


def test_a_batch_without_a_model_is_an_error():
    with pytest.raises(SetupError, match="needs both"):
        ej.footprint(WIDE, batch=BATCH)
