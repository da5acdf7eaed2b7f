"""One worker of a sweep of small runs, for the test that kills workers.

    python sweeping.py LOG --over rate=... seed=...

A run that is trained to its end adds its folder's name to LOG, in one write.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import small_run
from small_run import Config

from experiments.harness.errors import ExperimentError, Interrupted
from experiments.harness.progress import say
from experiments.harness.runs import default_id, runs_root
from experiments.harness.sweep import main

LOG = ""

__all__ = ["Config"]


def run(config: Config) -> None:
    """Trains a small run, and says so."""
    small_run.run(config)
    assert (runs_root() / "small" / default_id(config) / "summary.json").exists()
    handle = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{default_id(config)}\n".encode())
    os.close(handle)


if __name__ == "__main__":
    LOG = sys.argv[1]
    try:
        raise SystemExit(main("small", sys.modules["__main__"], sys.argv[2:]))
    except Interrupted as stop:
        say(stop.message)
        raise
    except ExperimentError as error:
        raise SystemExit(str(error)) from None
