"""The supernet against training alone, at a size that a test has time for."""

import json

import pytest

from experiments import supernet
from experiments.harness.errors import ConfigError
from experiments.models import elastic


def test_what_cannot_be_meant_is_an_error():
    with pytest.raises(ConfigError, match="fractions of the largest"):
        supernet.Config(budgets=(0.5, 2.0))
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[2, 1\] blocks"):
        elastic.Spec(kernels=((5, 5), (5,)))


def test_the_statistics_by_hand():
    def row(arm, seed, accuracy):
        return {"kind": "shape", "arm": arm, "budget": 0.5, "seed": seed, "accuracy": accuracy}

    rows = [row(supernet.SUPERNET, 0, 0.9), row(supernet.SUPERNET, 1, 0.8)]
    rows += [row(supernet.ALONE, 1, 0.7), row(supernet.ALONE, 0, 0.9)]
    found = supernet.against(rows, "shape", supernet.SUPERNET, supernet.ALONE)
    assert found["0.5"]["points"] == pytest.approx((0 + 10) / 2)
    trials = [
        {"strategy": name, "seed": 0, "cost": cost, "validation": value}
        for name, cost, value in (("a", 1, 0.5), ("a", 10, 1.0), ("b", 10, 0.5), ("b", 100, 1.0))
    ]
    # The box: log cost over two decades, accuracy 0.5 to 1; a's (10, 1) covers half of it.
    assert supernet.volumes(trials) == {"a": [pytest.approx(50)], "b": [pytest.approx(0)]}


def test_fronts_are_compared_along_the_costs_that_both_found():
    def point(arm, seed, cost, validation, accuracy):
        own = {"kind": "shape", "arm": arm, "seed": seed, "cost": cost}
        return {**own, "validation": validation, "accuracy": accuracy}

    points = [point(supernet.SUPERNET, 0, *x) for x in ((1, 0.5, 0.4), (4, 0.9, 0.8), (8, 0.7, 1))]
    assert supernet.improving(points) == points[:2]
    points += [point(supernet.RANDOM, 0, *x) for x in ((16, 0.6, 0.7), (2, 0.55, 0.5))]
    points += [point(supernet.TUNED, 0, 2, 0.8, 0.9)]
    found = supernet.along(points, "shape", places=4)
    assert found == {
        "cost": [2, 4, 8, 16],
        supernet.SUPERNET: [[40, 80, 80, 80]],
        supernet.TUNED: [[90, 90, 90, 90]],
        supernet.RANDOM: [[50, 50, 50, 70]],
    }


def test_random_networks_differ_and_each_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    config = supernet.Config(dataset="digits", pixels=8, stem=4, stages=(4, 8), save=False)
    study = supernet.Study(config)
    bench = supernet.Bench(config, "joint", study.here, study.images)
    drawn = bench.drawn(seed=0)
    assert set(drawn) == set(config.budgets)
    every = [arch for archs in drawn.values() for arch in archs]
    assert len({arch.tobytes() for arch in every}) == len(every) == 6
    for budget, archs in drawn.items():
        assert all(bench.costs(arch).bytes <= bench.within(budget) for arch in archs)
    labels = {study.part(bench, "alone-0.2-0", arch, 0).label for arch in every}
    assert len(labels) == len(every)


@pytest.mark.slow
def test_a_small_run_resumes_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    small = {"seeds": 1, "dataset": "digits", "steps": 4, "further": 3, "trials": 6, "drawn": 1}
    small |= {"judged": 100, "calibration": 1, "budgets": (0.6, 0.9), "save": False}
    small |= {"tuning": 2}
    config = supernet.Config(**small)
    found = supernet.run(config)
    assert set(found) == {
        f"{kind}, points of {own} against {other}"
        for kind in supernet.COSTS
        for own in (supernet.SUPERNET, supernet.TUNED)
        for other in (supernet.ALONE, supernet.RANDOM)
    }
    [path] = tmp_path.glob("supernet/*/summary.json")
    first = json.loads(path.read_text())
    assert max(first["compiled"].values()) == 1
    assert all(p["difference"] < 1e-2 for p in first["points"])
    for name in ("NSGA-II", "random"):
        lines = (path.parent / f"joint-{name}-seed0.jsonl").read_text().splitlines()
        assert sum("value" in json.loads(line) for line in lines) == 6
    assert {f["arm"] for f in first["fronts"]} == set(supernet.SEARCHED)
    steps = {(r["kind"], r["arm"]): r["steps"] for r in first["rows"]}
    # Equal cost: of shapes 4 steps of 4 networks and 2 tunings of 2 steps, by 2 networks.
    assert steps["shape", supernet.RANDOM] == (4 * 4 + 2 * 2) // 2
    assert steps["joint", supernet.RANDOM] == (4 * 7 + 2 * 2) // 2
    assert steps["shape", supernet.TUNED] == 2
    assert supernet.run(config) == found
    assert json.loads(path.read_text())["rows"] == first["rows"]
