"""The practitioner's guide: the survey's network sizes, and a tiny run on digits end to end."""

import json

import numpy as np
import pytest

from experiments import guide_report, sparse_report
from experiments import practitioners_guide as guide
from experiments.harness.errors import ConfigError
from experiments.harness.runs import open_run
from experiments.models import cnn

# Width: millions of multiply-accumulates, as published.
MACS = {0.05: 10.6, 0.1: 11.0, 0.25: 13.0, 0.5: 18.8, 0.75: 27.7, 1.0: 39.7, 1.4: 65.4}
TINY = guide.Config(
    seeds=2, scale=0.003, widths=(0.25, 0.1), batch=40, latency_samples=2, dataset="digits"
)
KINDS = (*guide_report.PAPER, guide_report.ALL)


@pytest.mark.parametrize("width", guide.WIDTHS)
def test_the_family_takes_the_published_macs(width):
    macs = sum(site.macs for site in guide.find_sites(cnn.Spec(width=width), "linen"))
    assert round(macs / 1e6, 1) == MACS[width]


def test_what_is_published_is_there_for_every_arm():
    found = guide_report.published()
    assert len(found) == 3 * 7 - 1  # the teacher is not distilled
    assert found["distilled, 0.25"] == {
        "float": 84.51,
        "int8": 84.18,
        "float_kb": 392.49,
        "int8_kb": 111.00,
    }
    assert guide_report.strategies(guide.WIDTHS) == {
        "Shrink-and-Improve": (1.0, 0.25),
        "Grow-Improve-and-Shrink": (0.25, 0.5),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(folder / "runs"))
        patch.setattr(sparse_report, "RESULTS", folder / "results")
        patch.setattr(sparse_report, "IMAGES", folder / "images")
        patch.setattr(guide_report, "KINDS", KINDS)
        shown = guide.run(TINY)
        results = json.loads((folder / "results" / "practitioners_guide.json").read_text())
        yield folder, shown, results


@pytest.mark.slow
def test_every_arm_is_trained_measured_and_written(finished):
    folder, shown, results = finished
    rows = results["rows"]
    wanted = ["plain, 0.25", "augmented, 0.25", *(f"{kind}, 0.1" for kind in KINDS)]
    wanted.append(f"{guide_report.ALL}, 0.25")
    assert list(dict.fromkeys(row["name"] for row in rows)) == wanted
    assert len(rows) == 2 * len(wanted)
    for row in rows:
        assert 0 < row["int8"] <= 1
        assert ("float" in row) == (row["kind"] != guide_report.ALL)
        sparse = row["kind"] == guide_report.ALL
        assert (row["nonzeros"] < 0.5 * row["parameters"]) == sparse
        assert (row["effective_macs"] < row["macs"]) == sparse
        if not sparse:
            assert 3 < row["float_bytes"] / row["int8_bytes"] < 4
    assert results["truncated"]
    assert results["images"] == round(1150 * 0.003**0.5)
    assert set(results["latency"]["batch 32"]) == {"0.1", "0.25"}
    assert shown["points of the paper's arms dominated by 'all in one step'"].endswith(" of 10")
    text = (folder / "results" / "practitioners_guide.md").read_text()
    assert "TRUNCATED: 5 epochs of 63 images" in text
    assert "78.93" in text
    assert (folder / "images" / "practitioners_guide.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_trains_nothing_again(finished, monkeypatch):
    folder, shown, _ = finished
    monkeypatch.setenv("EFFJAX_RUNS", str(folder / "runs"))
    monkeypatch.setattr(sparse_report, "RESULTS", folder / "results")
    monkeypatch.setattr(sparse_report, "IMAGES", folder / "images")
    monkeypatch.setattr(guide_report, "KINDS", KINDS)
    run = open_run(guide.NAME, TINY)
    before = {p: p.read_bytes() for p in run.path.glob("*/metrics.jsonl")}
    assert len(before) == 14
    assert guide.run(TINY) == shown
    assert before == {p: p.read_bytes() for p in run.path.glob("*/metrics.jsonl")}


def point(kind, width, kb, accuracy, form="int8"):
    return {"kind": kind, "width": width, form: accuracy, f"{form}_bytes": 1000 * kb}


def test_findings_by_hand():
    plain, distilled = guide_report.PLAIN, guide_report.DISTILLED
    rows = []
    for seed in range(2):
        for width, kb in ((0.1, 40), (0.25, 100), (0.5, 400)):
            for i, kind in enumerate(guide_report.PAPER):
                if (kind, width) != (distilled, 0.5):
                    row = point(kind, width, kb, 0.5 + 0.1 * i + 0.02 * seed)
                    rows.append(row | point(kind, width, 4 * kb, 0.5 + 0.1 * i, "float"))
        rows.append(point(guide_report.ALL, 0.25, 30, 0.65))
    found = guide_report.findings(rows, (0.1, 0.25, 0.5))
    shrink = found["strategies"]["Shrink-and-Improve"]
    assert (shrink["from"]["kind"], shrink["from"]["width"]) == (plain, 0.5)
    assert shrink["times smaller"] == pytest.approx(1600 / 40)
    assert shrink["points"] == pytest.approx(21.0)
    assert not shrink["dominated"]
    grow = found["strategies"]["Grow-Improve-and-Shrink"]
    assert (grow["from"]["width"], grow["to"]["width"]) == (0.1, 0.25)
    assert found["gains"]["0.1"]["augmented"]["points"] == pytest.approx(10.0)
    assert found["gains"]["0.1"]["augmented"]["published"] == pytest.approx(78.22 - 75.93)
    # 0.65 at 30 KB is better than all but the distilled ones, at 70% and 71%.
    assert found["dominated"]["points"] == 16
    assert found["dominated"]["dominated"] == 12
    assert {p["kind"] for p in found["dominated"]["others"]} == {distilled}


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"widths": (0.1, 0.0)}, {"sparsity": 1.0}])
def test_a_config_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        guide.Config(**wrong)


def test_the_learning_rate_is_that_of_the_width():
    plan = guide.Plan(0.01, (0.1, 1.4), 2, guide.make_plan(TINY).images, 40)
    rates = {}
    for width in (0.5, 0.75, 1.4):
        tx = guide.optimizer(guide_report.PLAIN, width, plan)
        params = {"w": np.ones(2, np.float32)}
        state = tx.init(params)
        steps = []
        for _ in range(plan.steps):
            updates, state = tx.update(params, state, params)
            steps.append(float(-updates["w"][0]))
        rates[width] = max(steps)
    assert rates[0.5] == pytest.approx(5e-3, rel=1e-2)
    assert rates[0.75] == pytest.approx(1e-3, rel=1e-2)
    assert rates[1.4] == pytest.approx(5e-4, rel=1e-2)
