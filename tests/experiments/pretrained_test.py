"""Quantization of a trained network, at a size that a test has time for."""

import json

import pytest

from experiments import pretrained


@pytest.mark.slow
def test_every_arm_is_reported_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    config = pretrained.Config(
        seeds=1,
        size=16,
        calibration=16,
        images=32,
        batch=16,
        steps=20,
        weights="random",
        dataset="digits",
        save=False,
    )
    found = pretrained.run(config)
    assert set(found) == {pretrained.RELU, *(arm.name for arm in pretrained.ARMS)}
    [rows] = tmp_path.glob("*/*/rows.json")
    kept = json.loads(rows.read_text())["rows"]
    logits = {row["name"]: row["logits"] for row in kept}
    assert logits["w8a8, per channel"] > 25
    assert logits["w4a8, per channel, GPTQ, bias correction"] > logits["w4a8, per channel"]
    rows.write_text(json.dumps({"rows": [*kept[:-1], {**kept[0], "agreement": 0.25}]}))
    assert pretrained.run(config)[pretrained.RELU] == f"{(kept[0]['agreement'] + 0.25) / 2:.1%}"
