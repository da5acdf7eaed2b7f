"""The command line: list the experiments, run one with overrides, report on finished runs."""

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from experiments.harness.catalog import entries, find
from experiments.harness.errors import ExperimentError, Interrupted, UsageError
from experiments.harness.progress import say

_USAGE = """usage: python -m experiments list
       python -m experiments NAME [--id ID] [--FIELD VALUE ...]
       python -m experiments NAME --help
       python -m experiments sweep NAME --over FIELD=a,b,c FIELD=0..4 [--FIELD VALUE ...]
       python -m experiments search NAME --over FIELD=a,b,c --maximize RESULT [--storage URL] ...
       python -m experiments export RUNS ... [--to onnx litert stablehlo] [--batch N]
       python -m experiments report RUNS ... [--quality a] [--cost b] [--out FOLDER]

Runs, sweeps and searches also take --track tensorboard wandb mlflow: metrics go there too; and
--profile N: a profiler trace of N steps, in the run's folder.

Runs go to runs/NAME/ID, or below $EFFJAX_RUNS. The same command again goes on with the same run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    0: done. 1: the run failed, and stderr says why. 2: the command cannot be meant. 130, 143:
    stopped by SIGINT or SIGTERM after saving; the same command again goes on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else 2
    try:
        if words[0] == "list":
            return _list(words[1:])
        if words[0] == "report":
            return _report(words[1:])
        if words[0] == "export":
            return _export(words[1:])
        if words[0] in ("sweep", "search"):
            return _many(words[0], words[1:])
        return _run(words[0], words[1:])
    except ExperimentError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as stop:
        say(stop.message)
        return 128 + stop.signum


def _list(rest: list[str]) -> int:
    if rest:
        raise UsageError(f"`list` takes nothing after it, but got {' '.join(rest)}.")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "what", "cost"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for entry in entries():
        table.add_row(entry.name, entry.title, entry.cost)
    Console().print(table)
    return 0


def _report(rest: list[str]) -> int:
    from effjax.errors import EffjaxError
    from experiments.harness.reporting import main as report

    try:
        return report(rest)
    except EffjaxError as error:
        raise ExperimentError(str(error)) from error


def _export(rest: list[str]) -> int:
    from experiments.harness.exporting import main as export

    with _stoppable("export"):
        return export(rest)


def _many(command: str, rest: list[str]) -> int:
    """`sweep` or `search`: many runs of one experiment."""
    if not rest or rest[0].startswith("-"):
        raise UsageError(
            f"`{command}` takes an experiment's name first: {command} train --over seed=0..4"
        )
    _find(rest[0])
    from experiments.harness.profiling import profile_steps
    from experiments.harness.tracking import track_to

    main = importlib.import_module(f"experiments.harness.{command}").main
    own, words = _common(rest[1:])
    with _stoppable(rest[0]), track_to(own.track), profile_steps(own.profile):
        return main(rest[0], _import(rest[0]), words)


def _run(name: str, rest: list[str]) -> int:
    _find(name)
    import tyro

    own, rest = _common(rest, "--id")
    module = _import(name)
    config = tyro.cli(
        module.Config,
        args=rest,
        prog=f"python -m experiments {name}",
        description=(module.__doc__ or "") + "\n"
        "--id ID names the run's folder; for --track and --profile see python -m experiments -h.",
    )
    from experiments.harness.profiling import profile_steps
    from experiments.harness.runs import run_id
    from experiments.harness.tracking import track_to

    with _stoppable(name), run_id(own.id), track_to(own.track), profile_steps(own.profile):
        results = module.run(config)
    _show(results)
    return 0


def _common(words: list[str], *more: str) -> tuple[argparse.Namespace, list[str]]:
    """What every command takes, and the words that are left."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--track", nargs="+", default=[])
    common.add_argument("--profile", type=int)
    for option in more:
        common.add_argument(option)
    return common.parse_known_args(words)


def _find(name: str) -> None:
    try:
        find(name)
    except ExperimentError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _stoppable(name: str) -> Iterator[None]:
    """Within this, signals and effjax's errors end the command as `main` says."""
    from effjax.errors import EffjaxError

    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except EffjaxError as error:
        raise ExperimentError(str(error)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT, f"{name}: stopped. {_AGAIN}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


_AGAIN = "Give the same command again to go on from the last checkpoint."


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Between two trainings: what is finished is saved already."""
    raise Interrupted(signum, f"stopped by signal {signum}. {_AGAIN}")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("experiments", "effjax"):
            raise
        raise ExperimentError(
            f"{name} needs the package {error.name!r}: pip install -e '.[experiments]'"
        ) from error


def _show(results: Any) -> None:
    """The numbers and words among the results, one a line."""
    shown = results if isinstance(results, dict) else {}
    for key, value in shown.items():
        if isinstance(value, (int, float, str)):
            print(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")
