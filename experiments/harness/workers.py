"""One process of a sweep: it does the runs that nobody has done and nobody is at."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

from effjax.errors import EffjaxError
from experiments.harness.claims import shared
from experiments.harness.errors import ExperimentError, RunError
from experiments.harness.progress import say
from experiments.harness.runs import runs_below
from experiments.harness.sweep_folder import Point, Sweep
from experiments.harness.together import plan, train_together


def work(sweep: Sweep, module: Any, together: int | None = None) -> dict[str, str]:
    """Does runs of a sweep until all are done, by this process or another.

    A run is claimed, looked at again, done, and given free; a process that waits for others takes
    over what a killed one leaves. A run that fails is noted, and the others go on.

    Args:
      module: the experiment's.
      together: at most how many runs become one program; see `together.plan`.

    Returns:
      {id: what went wrong} of the runs that failed since this began; what failed before is tried
      again.
    """
    if not shared():
        say("this system has no flock: a second process in this folder would repeat runs.")
    groups = plan(module, sweep.points, together)
    before = {point.id: sweep.failure(point) for point in sweep.points}

    def failed(point: Point) -> dict[str, Any] | None:
        found = sweep.failure(point)
        return None if found == before[point.id] else found

    def open_points(points: list[Point]) -> list[Point]:
        return [p for p in points if not sweep.finished(p) and not failed(p)]

    waiting = False
    while left := open_points(sweep.points):
        done = 0
        for group in groups:
            with _claimed(sweep, open_points(group)) as claimed:
                # Another process may have been quicker, and be done already.
                mine = open_points(claimed)
                done += len(mine)
                if mine:
                    _train(sweep, module, mine)
        if not done:
            if not waiting:
                say(f"waiting for {len(left)} runs that other processes are at")
            waiting = True
            time.sleep(0.5)
    return {p.id: record["error"] for p in sweep.points if (record := failed(p))}


@contextlib.contextmanager
def _claimed(sweep: Sweep, points: list[Point]) -> Iterator[list[Point]]:
    with contextlib.ExitStack() as stack:
        yield [p for p in points if stack.enter_context(sweep.claims.claim(p.id))]


def _train(sweep: Sweep, module: Any, points: list[Point]) -> None:
    with runs_below(sweep.path):
        if len(points) > 1:
            say(f"{len(points)} runs together, from {points[0].label} to {points[-1].label}")
            try:
                train_together(module, [p.config for p in points])
            except Exception as error:
                # One that diverges must not cost the others; memory may do for fewer.
                say(f"together they failed ({error}); now one after another")
        for point in points:
            _run(sweep, module, point)


def _run(sweep: Sweep, module: Any, point: Point) -> None:
    number = sweep.points.index(point) + 1
    say(f"[{number}/{len(sweep.points)}] {sweep.experiment}, {point.label}")
    try:
        # A damaged folder is an error here, and not a reason to train.
        if sweep.summary(point) is None:
            module.run(point.config)
        if sweep.summary(point) is None:
            raise RunError(
                f"{sweep.experiment} leaves no summary.json in {sweep.folder(point)}: an "
                "experiment that is swept opens its run with `open_run` and ends with `finish`."
            )
    except (ExperimentError, EffjaxError) as error:
        say(f"failed: {error}")
        sweep.note(point, str(error))
    except Exception as error:
        traceback.print_exc()
        sweep.note(point, f"{type(error).__name__}: {error}")
    else:
        sweep.note(point, None)
