"""The command line: what it lists, how it overrides, and what it says to a mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness.catalog import entries, find
from experiments.harness.errors import ExperimentError

ROOT = Path(__file__).resolve().parents[2]

TOY = '''"""A toy: adds numbers.

Paper: none. Expected: the sum.
Cost: 1 second.
Command: python -m experiments {name} --rate 0.5
"""
import dataclasses
import os
import signal
import time
from experiments.harness.config import check
from experiments.harness.runs import open_run


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    steps: int = 10
    seed: int = 0
    fail: str = ""

    def __post_init__(self):
        check(self, rate=(0.0, 1.0), steps=(1, 100))


def run(config):
    folder = open_run("{name}", config)
    if config.fail == "effjax":
        import effjax as ej
        ej.chain(prune=3)
    if config.fail == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    results = {{"sum": config.rate + config.steps, "name": "toy", "list": [1]}}
    folder.finish(results)
    return results
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the experiments package with toys in it."""
    root = tmp_path_factory.mktemp("place")
    package = root / "experiments"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(ROOT / "experiments" / "__main__.py", package)
    shutil.copytree(ROOT / "experiments" / "harness", package / "harness")
    (package / "toy.py").write_text(TOY.format(name="toy"))
    (package / "bench").mkdir()
    (package / "bench" / "__init__.py").write_text("")
    (package / "bench" / "prune.py").write_text(TOY.format(name="bench.prune"))
    (package / "bench" / "helper.py").write_text("def run(config): ...\n")
    (package / "needy.py").write_text(
        '"""Needs more."""\nimport not_there\nclass Config: ...\ndef run(config): ...\n'
    )
    return root


@pytest.fixture
def experiments(place, tmp_path):
    """Runs `python -m experiments ...`; gives (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        environment = {**os.environ, "EFFJAX_RUNS": str(tmp_path / "runs"), "COLUMNS": "100"}
        environment["PYTHONPATH"] = str(place)
        command = [sys.executable, "-m", "experiments", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=place, env=environment, timeout=120
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_the_list_has_name_title_and_cost_and_imports_nothing_heavy(place, experiments):
    code, out, err = experiments("list")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["name", "what", "cost"]
    assert [line[0] for line in lines[1:]] == ["bench.prune", "needy", "toy"]
    assert lines[3] == ["toy", "A", "toy:", "adds", "numbers.", "1", "second."]
    code = (
        "import sys; sys.argv = ['x', 'list']\n"
        "from experiments.harness.cli import main; main()\n"
        "print(sorted({'jax', 'numpy', 'tyro', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_an_experiment_runs_with_typed_overrides(experiments, tmp_path):
    code, out, err = experiments("toy", "--rate", "0.5", "--steps", "3", "--id", "mine")
    assert (code, err) == (0, "")
    assert out == "sum: 3.5\nname: toy\n"
    run = tmp_path / "runs" / "toy" / "mine"
    assert json.loads((run / "config.json").read_text())["config"]["rate"] == 0.5
    assert json.loads((run / "summary.json").read_text())["sum"] == 3.5
    code, out, _ = experiments("bench.prune")
    assert (code, out) == (0, "sum: 10.1\nname: toy\n")
    code, _, err = experiments("toy", "--rate", "0.6", "--id", "mine")
    assert code == 1
    assert "was begun with another config (rate: 0.5 -> 0.6, steps: 3 -> 10)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qickstart"], "there is no experiment 'qickstart'"),
        (["toi"], "Did you mean toy?"),
        (["prune"], "Did you mean bench.prune?"),
        (["list", "toy"], "`list` takes nothing after it"),
        (["toy", "--rte", "1"], "--rate"),
        (["toy", "--steps", "many"], "many"),
        (["toy", "--rate", "2"], "rate is 2.0; it must be between 0.0 and 1.0"),
        ([], "usage: python -m experiments list"),
    ],
)
def test_a_mistake_is_answered_with_code_2_and_a_hint(experiments, arguments, said):
    code, out, err = experiments(*arguments)
    assert code == 2
    assert said in out + err
    assert "Traceback" not in err


def test_help_shows_the_docstring_and_the_fields(experiments):
    code, out, _ = experiments("toy", "--help")
    assert code == 0
    for said in ("A toy: adds numbers.", "--rate", "0.1", "--id"):
        assert said in out
    assert experiments("--help")[0] == 0


def test_failures_are_told_without_a_traceback(experiments):
    code, _, err = experiments("toy", "--fail", "effjax")
    assert code == 1
    assert "error: chain(prune=...) got a int" in err
    assert "Traceback" not in err
    code, _, err = experiments("needy")
    assert code == 1
    assert "needs the package 'not_there': pip install -e '.[experiments]'" in err


def test_a_report_puts_finished_runs_side_by_side(experiments, tmp_path):
    for seed, steps, rate in ((0, 1, 0.5), (1, 3, 0.5), (0, 7, 0.25)):
        arguments = ["--seed", str(seed), "--steps", str(steps), "--rate", str(rate)]
        assert experiments("toy", *arguments)[0] == 0
    runs = tmp_path / "runs" / "toy"
    code, out, _ = experiments("report", str(runs), "--out", str(tmp_path / "out"))
    assert code == 0
    names = ["toy, rate=0.5, steps=1", "toy, rate=0.5, steps=3", "toy, rate=0.25, steps=7"]
    for name, total in zip(names, ("1.5", "3.5", "7.25"), strict=True):
        assert f"| {name} | {total} |" in out
    for file in ("table.md", "table.tex", "table.csv", "index.html"):
        assert "7.25" in (tmp_path / "out" / file).read_text()
    # The same config with two seeds is one line with a mean.
    experiments("toy", "--seed", "1", "--steps", "7", "--rate", "0.25", "--id", "again")
    chosen = [str(p.parent) for p in runs.glob("*/summary.json") if '"steps": 7' in p.read_text()]
    assert len(chosen) == 2
    code, out, _ = experiments("report", *chosen, "--columns", "sum")
    assert out == "| run | sum |\n| :-- | --: |\n| toy | 7.25 |\n"


def test_a_report_says_what_it_cannot_read(experiments, tmp_path):
    code, _, err = experiments("report", str(tmp_path))
    assert code == 1
    assert "is no run's folder, nor one that has runs" in err
    experiments("toy", "--fail", "effjax", "--id", "half")
    code, _, err = experiments("report", str(tmp_path / "runs" / "toy" / "half"))
    assert code == 1
    assert "is not finished: it has no summary.json" in err
    experiments("toy", "--id", "done")
    code, _, err = experiments(
        "report", str(tmp_path / "runs" / "toy" / "done"), "--columns", "som"
    )
    assert code == 1
    assert "no row has 'som'" in err
    assert "Traceback" not in err


def test_a_signal_between_trainings_exits_with_its_code(experiments):
    code, _, err = experiments("toy", "--fail", "signal")
    assert code == 128 + signal.SIGTERM
    assert "stopped by signal 15. Give the same command again" in err


def test_a_catalog_says_when_a_file_is_not_python(tmp_path):
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(ExperimentError, match=r"broken.py is not Python"):
        entries(tmp_path)
    assert entries(tmp_path / "nowhere") == []
    with pytest.raises(ExperimentError, match="no experiment 'x'"):
        find("x", tmp_path / "nowhere")


def test_every_experiment_of_the_project_has_a_title_and_a_cost():
    for entry in entries():
        assert entry.title != "(no docstring)", entry.name
        assert entry.cost, entry.name
