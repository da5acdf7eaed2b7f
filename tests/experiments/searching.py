"""One worker of a search, for the test that kills workers.

    python searching.py LOG --over a=0..9 b=0..9 --maximize value --trials 20 ...

A trial takes a moment and computes nothing; one that ends adds its folder's name to LOG.
"""

import dataclasses
import os
import sys
import time

from experiments.harness.errors import ExperimentError, Interrupted
from experiments.harness.progress import say
from experiments.harness.runs import default_id, open_run
from experiments.harness.search import main

LOG = ""


@dataclasses.dataclass(frozen=True)
class Config:
    a: int = 0
    b: int = 0
    seconds: float = 0.1
    seed: int = 0


def run(config: Config) -> None:
    """A training that only waits."""
    folder = open_run("wait", config)
    time.sleep(config.seconds)
    folder.finish({"value": config.a - (config.b - 3) ** 2})
    handle = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{default_id(config)}\n".encode())
    os.close(handle)


if __name__ == "__main__":
    LOG = sys.argv[1]
    try:
        raise SystemExit(main("wait", sys.modules["__main__"], sys.argv[2:]))
    except Interrupted as stop:
        say(stop.message)
        raise
    except ExperimentError as error:
        raise SystemExit(str(error)) from None
