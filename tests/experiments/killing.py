"""Kills a command at random moments, starts it again until it is done, and compares what it left.

The command is any that trains with the harness, below $EFFJAX_RUNS.
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(command: Sequence[str], runs: Path) -> subprocess.Popen:
    """The command as a process of its own, with its output in `runs`/log."""
    runs.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "EFFJAX_RUNS": str(runs), "PYTHONPATH": path, "CI": "true"}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/effjax-test-cache"
    with open(runs / "log", "ab") as log:
        return subprocess.Popen(
            command, env=environment, cwd=runs, stdout=log, stderr=subprocess.STDOUT
        )


def finish(command: Sequence[str], runs: Path) -> float:
    """Runs the command to its end; returns the seconds it took."""
    began = time.monotonic()
    process = start(command, runs)
    assert process.wait(timeout=900) == 0, (runs / "log").read_text()[-3000:]
    return time.monotonic() - began


def kill_and_finish(
    command: Sequence[str], runs: Path, kills: int, seconds: float, rng: random.Random
) -> int:
    """SIGKILLs the command `kills` times, then lets it finish.

    Half of the kills come at any time after the start, the others within `seconds` after
    metrics.jsonl or a checkpoint has changed, so that they meet the training and the saving.

    Returns:
      How many kills met a process that had trained since it was started.
    """
    trained = 0
    for number in range(kills):
        process = start(command, runs)
        before = _marks(runs)
        if number % 2:
            time.sleep(rng.uniform(0.0, 2 * seconds))
        else:
            while _marks(runs) == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, seconds))
        process.send_signal(signal.SIGKILL)
        # 0 where it was done before the kill: then the next one starts from the end.
        assert process.wait() in (-signal.SIGKILL, 0), (runs / "log").read_text()[-3000:]
        trained += _marks(runs) != before
    finish(command, runs)
    return trained


def _marks(runs: Path) -> list[tuple[str, int]]:
    """What changes as a run gets on: its logs' sizes and its checkpoints' names."""
    marks = []
    # os.walk passes over folders that the run deletes meanwhile.
    for folder, folders, files in os.walk(runs):
        if "metrics.jsonl" in files:
            marks.append((folder, os.path.getsize(f"{folder}/metrics.jsonl")))
        if os.path.basename(folder) == "checkpoints":
            marks += [(f"{folder}/{name}", 0) for name in folders]
            folders.clear()
    return sorted(marks)


def compare(one: Path, other: Path) -> int:
    """Asserts that two runs folders hold the same metrics, byte for byte, and the same final
    weights, bit for bit (by the 64-bit digest that every leaf was saved with).

    Returns:
      How many trainings were compared.
    """
    metrics = sorted(p.relative_to(one) for p in one.rglob("metrics.jsonl"))
    assert metrics == sorted(p.relative_to(other) for p in other.rglob("metrics.jsonl"))
    assert metrics
    for path in metrics:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path
        assert final_leaves((one / path).parent) == final_leaves((other / path).parent), path
    return len(metrics)


def final_leaves(run: Path) -> tuple[int, list[dict]]:
    """The newest checkpoint's step, and the path, shape, dtype and digest of each of its leaves."""
    step = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    record = json.loads((run / "checkpoints" / str(step) / "record" / "metadata").read_text())
    assert record["leaves"]
    return step, record["leaves"]
