"""The sparsity curve end to end on digits: one program a method, sparsities, the order's check."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import effjax as ej
from experiments import sparse_report
from experiments import sparsity_curve as curve
from experiments.harness.data import load
from experiments.harness.errors import ConfigError
from experiments.harness.runs import open_run

TINY = curve.Config(
    seeds=2,
    methods=("magnitude", "static"),
    sparsities=(0.5, 0.8),
    groups=(4,),
    epochs=1,
    batch=100,
    moves=3,
    dataset="digits",
)


@pytest.mark.slow
def test_everything_is_trained_and_written(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sparse_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sparse_report, "IMAGES", tmp_path / "images")
    shown = curve.run(TINY)
    assert shown["order at 80%"].startswith("Kendall's tau ")
    found = json.loads((tmp_path / "results" / "sparsity_curve.json").read_text())
    runs = {(r["method"], r["asked"], r["seed"]): r for r in found["rows"]}
    assert len(runs) == len(found["rows"]) == 2 * (1 + 2 + 2 + 1)
    for (method, asked, _), row in runs.items():
        assert row["sparsity"] == pytest.approx(asked, abs=1e-3), method
        assert 0 < row["accuracy"] <= 1
    text = (tmp_path / "results" / "sparsity_curve.md").read_text()
    assert "| magnitude | 75.53 |" in text
    assert "1:4 | 75.0 |" in (tmp_path / "results" / "sparsity_curve_n_m.md").read_text()
    assert (tmp_path / "images" / "sparsity_curve.png").read_bytes().startswith(b"\x89PNG")


def test_one_program_serves_all_sparsities_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    traced = []

    def build(sparsity):
        traced.append(sparsity)
        return ej.chain(prune=ej.prune.static(sparsity, budget="uniform"))

    trainer = curve.Trainer("static", build, TINY, load("digits", validation=0.2))
    run = open_run(curve.NAME, TINY)
    first = trainer.train(run.part("a"), 0.5, 0)
    before = len(traced)
    second = trainer.train(run.part("b"), 0.9, 1)
    assert len(traced) == before
    assert (first["sparsity"], second["sparsity"]) == pytest.approx((0.5, 0.9), abs=1e-3)


def test_the_order_is_compared_pair_by_pair():
    right = {"magnitude": 0.8, "RigL": 0.9, "static": 0.6, "random": 0.61}
    rows = [
        {"method": name, "asked": 0.8, "seed": seed, "accuracy": x + 0.001 * seed * (1 + i)}
        for i, (name, x) in enumerate(right.items())
        for seed in (0, 1, 2)
    ]
    found = curve.order(rows, 0.8)
    # As published: magnitude, RigL, static, random. RigL comes first here, random before static.
    assert (found["agree"], found["pairs"]) == (4, 6)
    assert found["tau"] == pytest.approx(1 / 3)
    assert found["ranking"] == ["RigL", "magnitude", "random", "static"]
    assert found["contrary"] == ["RigL > magnitude", "random > static"]


def test_every_method_can_be_made_for_a_traced_sparsity():
    config = dataclasses.replace(TINY, methods=curve.METHODS, groups=(2, 4, 8))
    made = curve.methods(config, steps=100)
    assert list(made) == ["dense", *curve.METHODS, "1:2", "1:4", "1:8"]
    kinds = {
        name: [t.kind for _, t in build(jnp.float32(0.8)).members] for name, build in made.items()
    }
    assert kinds.pop("dense") == []
    assert kinds.pop("STE") == ["mask"]
    assert set(map(tuple, kinds.values())) == {("prune",)}


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match=r"no methods ..magic..; there are"):
        curve.Config(methods=("magic",))
