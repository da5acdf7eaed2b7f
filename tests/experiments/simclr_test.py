"""Pre-training without labels, at a size that a test has time for."""

import numpy as np
import pytest

from experiments import simclr
from experiments.harness.errors import ConfigError
from experiments.harness.runs import read_json
from experiments.simclr import KINDS, STARTS, Config

TINY = Config(
    seeds=1,
    labels=(7,),
    epochs=1,
    views=64,
    steps=40,
    batch=32,
    channels=(4, 6, 8),
    hidden=16,
    embedding=8,
    dataset="digits",
    save=False,
)


@pytest.mark.slow
def test_all_arms_are_trained_and_the_compressed_are_small(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    found = simclr.run(TINY)
    [folder] = tmp_path.glob("simclr/*")
    rows = read_json(folder / "summary.json")["rows"]
    arms = {(r["start"], r["kind"], r["labels"]): r for r in rows}
    assert set(arms) == {(s, k, n) for s in STARTS for k in KINDS for n in TINY.labels}
    for start in STARTS:
        for n in TINY.labels:
            dense, small = (arms[start, kind, n] for kind in KINDS)
            assert small["nonzeros"] < 0.6 * dense["nonzeros"]
            assert small["bytes"] < 0.5 * dense["bytes"]
    assert (folder / "report" / "simclr.png").exists()
    logs = sorted(folder.glob("*/metrics.jsonl"))
    assert len(logs) == 1 + len(rows)
    before = [p.read_bytes() for p in logs]
    assert simclr.run(TINY) == found
    assert [p.read_bytes() for p in logs] == before


def test_labels_are_chosen_equally_of_every_class():
    label = np.random.default_rng(0).integers(0, 10, 500)
    places = simclr.chosen(label, 7, seed=1)
    np.testing.assert_array_equal(np.bincount(label[places]), 7)
    assert len(set(places)) == 70
    assert set(places) != set(simclr.chosen(label, 7, seed=2))


def test_sizes_that_make_no_sense():
    with pytest.raises(ConfigError, match="labels"):
        Config(labels=(0,))
    with pytest.raises(ConfigError, match="views"):
        Config(views=1)
