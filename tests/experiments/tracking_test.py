"""Trackers: every step once, after kills as well; profiler traces on request."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest

from experiments.harness import cli
from experiments.harness.runs import open_run, read_metrics
from experiments.harness.tracking import WRITERS, Tracker, track_to, tracked

QUICK = ["--epochs", "1", "--bits", "32"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    return tmp_path


class Recorder:
    """A writer that remembers across openings, as a server does."""

    def __init__(self, last=-1):
        self.last, self.seen, self.closed = last, [], False

    def write(self, step, metrics):
        self.seen.append((step, metrics))

    def close(self):
        self.closed = True


def events(folder):
    """[(step, {name: value})] of TensorBoard's event files: records of length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def lines(run):
    """metrics.jsonl as TensorBoard has it."""
    records = read_metrics(run / "metrics.jsonl")
    return [(r["step"], n, pytest.approx(x)) for r in records for n, x in r.items() if n != "step"]


def test_a_step_is_handed_over_once_and_whole():
    writer, late = Recorder(), Recorder(last=1)
    tracker = Tracker([writer, late])
    tracker.append([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert writer.seen == [(1, {"loss": 2.0})]  # step 2 may have more to come
    tracker.append([{"step": 2, "accuracy": 0.5}, {"step": 3, "loss": None}])
    tracker.close()
    assert writer.seen[1] == (2, {"loss": 1.0, "accuracy": 0.5})
    assert str(writer.seen[2]) == "(3, {'loss': nan})"
    assert [step for step, _ in late.seen] == [2, 3]
    assert writer.closed


def test_tensorboard_has_what_metrics_jsonl_has(runs, capsys):
    command = ["train", *QUICK, "--id", "a", "--track", "tensorboard"]
    assert cli.main(command) == 0
    run = runs / "train" / "a"
    assert events(run / "tensorboard") == lines(run)
    # Again: the run is finished, and nothing is logged twice.
    assert cli.main(command) == 0
    assert events(run / "tensorboard") == lines(run)


def test_a_run_that_went_back_to_a_checkpoint_logs_no_step_twice(runs, monkeypatch):
    """A server keeps the steps after the checkpoint, which are computed again, bit for bit."""
    server = Recorder()
    monkeypatch.setitem(WRITERS, "server", ("json", "", lambda run: server))
    run = open_run("toy", {"seed": 0})
    records = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
    with track_to(["server"]), tracked(run) as tracker:
        run.metrics.append(records[:6])
        tracker.append(records[:6])
    server.last = server.seen[-1][0]
    text = (run.path / "metrics.jsonl").read_text()
    position = sum(len(line) + 1 for line in text.split("\n")[:4])
    run.metrics.rewind(position)
    with track_to(["server"]), tracked(run) as tracker:
        tracker.append(records[4:])
    assert server.seen == [(r["step"], {"loss": r["loss"]}) for r in records]


@pytest.mark.slow
def test_runs_side_by_side_are_each_tracked(runs):
    words = ["sweep", "train", "--over", "seed=0,1", "--together", "2", *QUICK]
    assert cli.main([*words, "--track", "tensorboard"]) == 0
    folders = sorted((runs / "sweeps").glob("*/train/*/"))
    assert len(folders) == 2
    for folder in folders:
        assert events(folder / "tensorboard") == lines(folder)


def test_unknown_and_missing_trackers(runs, monkeypatch, capsys):
    assert cli.main(["train", "--track", "abacus"]) == 2
    assert "tensorboard, wandb, mlflow" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert cli.main(["train", "--track", "tensorboard"]) == 2
    assert "pip install -e '.[tracking]'" in capsys.readouterr().err
    assert not list(runs.iterdir())


def test_wandb_goes_on_with_the_same_run(runs, monkeypatch):
    begun, logged = [], []

    def init(**given):
        begun.append(given)
        return SimpleNamespace(
            starting_step=len(logged) + 1 if logged else 0,
            log=lambda metrics, step: logged.append((step, metrics)),
            finish=lambda: None,
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = open_run("toy", {"seed": 3})
    run.metrics.append([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    for _ in range(2):
        with track_to(["wandb"]), tracked(run):
            pass
    assert logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert (
        begun[0]["id"]
        == begun[1]["id"]
        == json.loads((run.path / "tracking.json").read_text())["wandb"]
    )
    assert begun[0]["config"] == {"seed": 3}


def test_a_profile_of_some_steps(runs, capsys):
    assert cli.main(["train", *QUICK, "--id", "p", "--profile", "2"]) == 0
    assert list((runs / "train" / "p" / "profile").rglob("*.xplane.pb"))
    assert cli.main(["train", *QUICK, "--id", "plain"]) == 0
    assert not (runs / "train" / "plain" / "profile").exists()
    metrics = [(runs / "train" / i / "metrics.jsonl").read_bytes() for i in ("p", "plain")]
    assert metrics[0] == metrics[1]  # looking changes nothing
    assert cli.main(["train", "--profile", "0"]) == 2
    assert "1 or more" in capsys.readouterr().err
