"""Sweeps: grids, claims, going on after kills, two workers, and runs side by side."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter

import pytest

from experiments import train
from experiments.harness import cli
from experiments.harness.claims import Claims
from experiments.harness.errors import RunError, UsageError
from experiments.harness.grid import make_grid, parse_over
from experiments.harness.sweep_folder import open_sweep
from experiments.harness.together import plan
from tests.experiments import killing

WORKER = [sys.executable, str(killing.ROOT / "tests" / "experiments" / "sweeping.py")]


def grid(*over, fixed=()):
    return make_grid(train.Config, parse_over(over), list(fixed), "sweep")


def test_a_grid_is_every_combination_the_first_field_slowest():
    found = grid("sparsity=0.5,0.8", "seed=0..2", fixed=["--bits", "32"])
    assert found.points == [{"sparsity": s, "seed": i} for s in (0.5, 0.8) for i in (0, 1, 2)]
    assert [(c.sparsity, c.seed, c.bits) for c in found.configs[:2]] == [(0.5, 0, 32), (0.5, 1, 32)]
    assert found.base["bits"] == 32
    assert "seed" not in found.base


@pytest.mark.parametrize(
    ("over", "fixed", "error", "match"),
    [
        ([], [], UsageError, "--over"),
        (["seed"], [], UsageError, "field=value"),
        (["seed="], [], UsageError, "empty"),
        (["seed=1,,2"], [], UsageError, "empty"),
        (["seed=3..1"], [], UsageError, "backwards"),
        (["seed=0.."], [], UsageError, "no range"),
        (["seed=0", "seed=1"], [], UsageError, "twice"),
        (["seed=0,0"], [], UsageError, "same value twice"),
        (["sparsiti=0.5"], [], UsageError, "Did you mean sparsity"),
        (["seed=a"], [], UsageError, "cannot be parsed"),
        (["seed=0"], ["--seed", "1"], UsageError, "both"),
        (["sparsity=0.5,1.5"], [], UsageError, "1.5"),
    ],
)
def test_a_grid_that_cannot_be_meant(over, fixed, error, match):
    with pytest.raises(error, match=match):
        grid(*over, fixed=fixed)


def test_a_claim_is_held_by_one_and_ends_with_its_holder(tmp_path):
    claims = Claims(tmp_path)
    with claims.claim("a") as first, claims.claim("a") as second, claims.claim("b") as other:
        assert (first, second, other) == (True, False, True)
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from experiments.harness.claims import Claims\n"
        "with Claims(Path(sys.argv[2])).claim('a') as mine:\n"
        "    print(mine, flush=True); time.sleep(60)\n"
    )
    process = killing.start(
        [sys.executable, "-c", script, str(killing.ROOT), str(tmp_path)], tmp_path
    )
    while "True" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    with claims.claim("a") as mine:
        assert not mine
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claims.claim("a") as mine:
        assert mine


def test_another_sweep_in_the_folder_is_an_error_that_says_what_differs(tmp_path):
    open_sweep(tmp_path, "train", grid("seed=0,1"), "mine")
    open_sweep(tmp_path, "train", grid("seed=0,1"), "mine")
    with pytest.raises(RunError, match=r"--over seed.*\[0, 1\].*\[0, 1, 2\]"):
        open_sweep(tmp_path, "train", grid("seed=0..2"), "mine")
    with pytest.raises(RunError, match="bits"):
        open_sweep(tmp_path, "train", grid("seed=0,1", fixed=["--bits=4"]), "mine")


def test_a_copied_run_folder_is_noticed(tmp_path):
    sweep = open_sweep(tmp_path, "train", grid("seed=0"), "mine")
    folder = sweep.path / "train" / "copy"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"id": sweep.points[0].id, "config": {}}))
    with pytest.raises(RunError, match="two runs with one id"):
        open_sweep(tmp_path, "train", grid("seed=0"), "mine")


def test_half_written_files_are_no_finished_run(tmp_path):
    sweep = open_sweep(tmp_path, "train", grid("seed=0"), "mine")
    folder = sweep.folder(sweep.points[0])
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"accuracy": 0.')
    assert not sweep.finished(sweep.points[0])
    with pytest.raises(RunError, match="not JSON"):
        sweep.summary(sweep.points[0])
    (folder / "summary.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(RunError, match=r"no config\.json"):
        sweep.summary(sweep.points[0])


def test_points_of_one_program_agree_in_all_other_fields():
    points = open_points("sparsity=0.5,0.8", "epochs=1,2", "seed=0,1")
    groups = plan(train, points, 3)
    assert [len(group) for group in groups] == [3, 1, 3, 1]
    for group in groups:
        assert len({point.config.epochs for point in group}) == 1
    assert [len(group) for group in plan(train, points)] == [1] * 8  # the default on CPU
    with pytest.raises(UsageError, match="TOGETHER"):
        plan(os, points, 2)


def open_points(*over):
    from experiments.harness.sweep_folder import Point

    found = grid(*over)
    return [Point("", v, c) for v, c in zip(found.points, found.configs, strict=True)]


def rows(runs):
    """{swept values: results} of the one sweep in a runs folder."""
    [path] = (runs / "sweeps").iterdir()
    record = json.loads((path / "sweep.json").read_text())
    found = {}
    for run in record["runs"]:
        summary = json.loads((path / record["experiment"] / run["id"] / "summary.json").read_text())
        found[run["id"]] = {k: x for k, x in summary.items() if k != "provenance"}
    return found


@pytest.mark.slow
def test_side_by_side_or_one_by_one_and_nothing_twice(tmp_path, monkeypatch, capsys):
    words = ["sweep", "train", "--over", "sparsity=0,0.9", "bits=8,32", "--epochs", "1"]
    found = {}
    for name, more in (("alone", []), ("together", ["--together", "4"])):
        monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / name))
        assert cli.main([*words, *more]) == 0
        found[name] = rows(tmp_path / name)
        printed = capsys.readouterr()
        assert "python -m experiments report" in printed.out
        assert ("4 runs together" in printed.err) == bool(more)
    assert list(found["alone"]) == list(found["together"])
    for id, one in found["alone"].items():
        other = found["together"][id]
        assert one["config"] == other["config"]
        assert one["nonzeros"] == other["nonzeros"]
        assert one["bytes"] == other["bytes"]
        assert other["accuracy"] == pytest.approx(one["accuracy"], abs=0.03)
    [table] = (tmp_path / "alone" / "sweeps").glob("*/table.csv")
    assert len(table.read_text().splitlines()) == 5
    monkeypatch.setattr(train, "run", None)  # the same command again has nothing to do
    assert cli.main([*words, "--together", "4"]) == 0


def test_a_run_that_fails_is_told_and_the_others_are_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    words = ["sweep", "train", "--over", "batch=64,5000", "--epochs", "1"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said
    assert "batch=5000" in said
    [path] = (tmp_path / "sweeps").iterdir()
    assert len(list(path.glob("train/*/summary.json"))) == 1


def test_the_command_line_asks_for_an_experiment(capsys):
    assert cli.main(["sweep"]) == 2
    assert cli.main(["sweep", "trian", "--over", "seed=0"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_runs_five_kills_two_workers(tmp_path):
    """Every run once, with the results of a sweep that nobody disturbed."""
    grid = ["--over", "rate=1e-3,2e-3,5e-3,1e-2", "seed=0..4", "--steps=40"]
    rng, log = random.Random(0), tmp_path / "done"
    command = [*WORKER, str(log), *grid]
    quiet = tmp_path / "quiet"
    killing.finish([*WORKER, str(tmp_path / "quiet_done"), *grid], quiet)
    disturbed = tmp_path / "disturbed"
    workers = [killing.start(command, disturbed) for _ in range(2)]
    for _ in range(5):
        time.sleep(rng.uniform(3.0, 12.0))
        victim = rng.randrange(2)
        workers[victim].send_signal(signal.SIGKILL)
        assert workers[victim].wait() in (-signal.SIGKILL, 0)
        workers[victim] = killing.start(command, disturbed)
    for worker in workers:
        assert worker.wait(timeout=900) == 0, (disturbed / "log").read_text()[-3000:]
    done = Counter(log.read_text().split())
    assert len(rows(disturbed)) == 20
    assert max(done.values()) == 1
    # A kill between the summary and the log's line leaves that line out.
    assert 20 - 5 <= len(done) <= 20
    assert rows(quiet) == rows(disturbed)
    assert killing.compare(quiet, disturbed) == 20
