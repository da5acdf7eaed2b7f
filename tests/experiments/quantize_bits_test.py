"""Accuracy against bits, and joint compression, at a size that a test has time for."""

import pytest

from experiments import joint_compression, quantize_bits

SIZES = {"seeds": 1, "dataset": "digits", "channels": (8, 8, 8), "hidden": 16, "batch": 64}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_training_recovers_what_few_bits_lose(runs):
    config = quantize_bits.Config(bits=(8, 2), epochs=20, further=10, save=False, **SIZES)
    quantize_bits.run(config)
    text = next(runs.glob("*/*/report/quantize_bits.md")).read_text()
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()[2:8]}
    assert set(lines) >= {"float", *quantize_bits.METHODS}
    two = {m: float(lines[m][-1].strip(" *").split()[0]) for m in quantize_bits.METHODS}
    eight = {m: float(lines[m][-2].strip(" *").split()[0]) for m in quantize_bits.METHODS}
    assert eight["PTQ"] > two["PTQ"] + 10
    assert min(two["QAT"], two["LSQ"]) > two["PTQ"]


@pytest.mark.slow
def test_joint_compression_prunes_every_way_alike(runs):
    config = joint_compression.Config(bits=(4,), epochs=10, further=6, save=False, **SIZES)
    found = joint_compression.run(config)
    assert all(way in found["4 bits"] for way in joint_compression.WAYS)
    text = next(runs.glob("*/*/report/joint_compression.md")).read_text()
    sizes = {
        line.split("|")[1].strip(): float(line.split("|")[3].strip(" *").split()[0])
        for line in text.splitlines()[2:8]
    }
    small = [sizes[f"{way}, 4 bits"] for way in joint_compression.WAYS]
    assert max(small) < 1.1 * min(small)
    assert max(small) < sizes["float"] / 5
