"""Lottery tickets end to end on digits: what is pruned, compared, written, and not done twice."""

import json

import jax
import numpy as np
import pytest

from effjax.select import leaves
from experiments import lottery_ticket as lottery
from experiments import sparse_report
from experiments.harness.data import load
from experiments.harness.errors import ConfigError
from experiments.harness.runs import open_run

TINY = lottery.Config(seeds=2, rounds=2, iterations=40, every=10, batch=50, dataset="digits")
KERNELS = {"dense_0/kernel": 64 * 300, "dense_1/kernel": 300 * 100, "head/kernel": 1000}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lottery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(folder / "runs"))
        patch.setattr(sparse_report, "RESULTS", folder / "results")
        patch.setattr(sparse_report, "IMAGES", folder / "images")
        shown = lottery.run(TINY)
        yield shown, folder, open_run(lottery.NAME, TINY)


def kept(round_: int) -> float:
    rates = {"dense_0/kernel": 0.2, "dense_1/kernel": 0.2, "head/kernel": 0.1}
    left = sum(n - round((1 - (1 - rates[p]) ** round_) * n) for p, n in KERNELS.items())
    return left / sum(KERNELS.values())


def test_every_round_has_the_ticket_and_its_rivals_with_as_many_weights(finished):
    _, folder, _ = finished
    rows = json.loads((folder / "results" / "lottery_ticket.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 3 + 3)
    for row in rows:
        assert row["remaining"] == pytest.approx(kept(row["round"]), abs=1e-6)
        assert row["iteration"] in (10, 20, 30, 40)
        assert 0.5 < row["early test/accuracy"] <= 1
        assert row["early validation/loss"] <= row["final validation/loss"]
        if row["iteration"] == 40:
            assert row["early test/accuracy"] == row["final test/accuracy"]


def test_what_is_compared_is_paired_by_seed(finished):
    _, folder, _ = finished
    found = json.loads((folder / "results" / "lottery_ticket.json").read_text())
    for seed in (0, 1):
        arms = {r["arm"]: r for r in found["rows"] if (r["seed"], r["round"]) == (seed, 2)}
        ticket, anew = arms[lottery.TICKET], arms[lottery.ANEW]
        sooner = found["measured"]["times sooner"]["seeds"][seed]
        better = found["measured"]["points more accurate"]["seeds"][seed]
        assert sooner == pytest.approx(anew["iteration"] / ticket["iteration"])
        gap = 100 * (ticket["early test/accuracy"] - anew["early test/accuracy"])
        assert better == pytest.approx(gap)


def test_tables_and_figures_are_written(finished):
    shown, folder, run = finished
    assert "times sooner" in shown
    text = (folder / "results" / "lottery_ticket.md").read_text()
    assert "| times sooner | 2.50 |" in text
    assert "toprule" in (folder / "results" / "lottery_ticket_rounds.tex").read_text()
    assert (folder / "images" / "lottery_ticket.png").read_bytes().startswith(b"\x89PNG")
    assert (run.path / "report" / "lottery_ticket.pdf").exists()
    assert run.summary()["provenance"]["hardware"]["cores"] >= 1


def test_the_same_command_again_trains_nothing(finished):
    shown, _, run = finished
    before = {p: p.read_bytes() for p in run.path.glob("*/metrics.jsonl")}
    assert len(before) == 14
    assert lottery.run(TINY) == shown
    assert {p: p.read_bytes() for p in run.path.glob("*/metrics.jsonl")} == before


def test_the_ticket_starts_from_the_first_weights_and_rivals_do_not(finished):
    trainer = lottery.Trainer(TINY, load("digits", validation=0.2))
    first = leaves(trainer.start(lottery.key_of(0, lottery.TICKET, 0)))
    anew = leaves(trainer.start(lottery.key_of(0, lottery.ANEW, 1)))
    assert set(trainer.full) == set(KERNELS)
    for path, size in KERNELS.items():
        assert first[path].size == size
        fans = sum(first[path].shape)
        assert np.std(first[path]) == pytest.approx((2 / fans) ** 0.5, rel=0.1)  # Glorot
        assert not np.array_equal(first[path], anew[path])


def test_scattered_masks_keep_as_many_in_each_layer():
    masks = {"a": jax.numpy.arange(12).reshape(3, 4) < 5, "b": jax.numpy.arange(9) < 9}
    found = lottery.scattered(jax.random.key(0), masks)
    assert {p: int(m.sum()) for p, m in found.items()} == {"a": 5, "b": 9}
    assert not np.array_equal(found["a"], masks["a"])


def test_configurations_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match=r"rate is 1\.0"):
        lottery.Config(rate=1.0)
