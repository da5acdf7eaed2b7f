"""A run killed at any moment goes on as if it had not been."""

import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.killing import compare, final_leaves, finish, kill_and_finish, start

SMALL = Path(__file__).parent / "small_run.py"
COMMAND = [sys.executable, str(SMALL), "--steps", "240", "--checkpoint_every", "7"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    runs = tmp_path_factory.mktemp("whole")
    finish(COMMAND, runs)
    return runs


def test_sigkill_at_random_moments_changes_no_bit(whole, tmp_path):
    trained = kill_and_finish(COMMAND, tmp_path, 3, 1.5, random.Random(0))
    assert trained >= 1
    assert compare(whole, tmp_path) == 1
    assert "going on from step" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_twenty_sigkills_change_no_bit(whole, tmp_path):
    trained = kill_and_finish(COMMAND, tmp_path, 20, 0.4, random.Random())
    assert trained >= 5
    assert compare(whole, tmp_path) == 1


@pytest.mark.slow
def test_twenty_sigkills_of_the_quickstart_change_no_bit(tmp_path):
    command = [sys.executable, "-m", "experiments", "quickstart", "--epochs", "3", "--seeds", "1"]
    seconds = finish(command, tmp_path / "whole")
    trained = kill_and_finish(command, tmp_path / "killed", 20, seconds / 12, random.Random())
    assert trained >= 5
    assert compare(tmp_path / "whole", tmp_path / "killed") >= 6


def test_sigterm_saves_and_exits_with_143_and_says_how_to_go_on(whole, tmp_path):
    process = start(COMMAND, tmp_path)
    [run] = wait_for(lambda: list(tmp_path.glob("small/*/metrics.jsonl")))
    wait_for(lambda: run.read_bytes().count(b"\n") > 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    log = (tmp_path / "log").read_text()
    assert "stopped by signal 15, saved at step" in log
    assert "Give the same command again to go on from there" in log
    step = int(log.split("saved at step ")[1].split()[0])
    assert final_leaves(run.parent)[0] == step
    assert 0 < step < 240
    finish(COMMAND, tmp_path)
    assert f"going on from step {step} of 240" in (tmp_path / "log").read_text()
    assert compare(whole, tmp_path) == 1


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found
