"""The README's code: python blocks run, both sides of every diff train, diffs are five lines."""

import pathlib
import re

import pytest

from experiments.harness.runs import open_run

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    """The fenced blocks of a language, by the heading they stand under."""
    found, heading = {}, ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```(\w+)\n(.*?)^```", README, re.M | re.S):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.setdefault(heading, []).append(match[3])
    return found


PYTHON = {name: "\n".join(code) for name, code in blocks("python").items()}
DIFFS = {name: code for name, (code,) in blocks("diff").items()}
SETUP = PYTHON["Bring your own loop"]


@pytest.fixture
def finished_quickstart(tmp_path, monkeypatch):
    """A working directory where `python -m experiments quickstart` has been run for two seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFJAX_RUNS", raising=False)
    for seed in (0, 1):
        sizes = {"dense": (0.98, 40_000), "compressed": (0.97, 4_000)}
        rows = [
            {"name": name, "seed": seed, "accuracy": accuracy - seed / 100, "bytes": size}
            for name, (accuracy, size) in sizes.items()
        ]
        open_run("quickstart", {"seed": seed}).finish({"rows": rows, "baseline": "dense"})


@pytest.mark.parametrize("heading", PYTHON)
@pytest.mark.usefixtures("finished_quickstart")
def test_python_blocks_run(heading):
    exec(compile(PYTHON[heading], f"README: {heading}", "exec"), {"__name__": "readme"})


def side(diff, sign):
    lines = [line for line in diff.splitlines() if not line or line[0] in f" {sign}"]
    return "\n".join(line[1:] for line in lines)


@pytest.mark.parametrize("heading", DIFFS)
@pytest.mark.parametrize("sign", "-+")
def test_both_sides_of_each_diff_train(heading, sign):
    namespace = {"__name__": "readme"}
    exec(compile(SETUP, "README: Bring your own loop", "exec"), namespace)
    exec(compile(side(DIFFS[heading], sign), f"README: {heading}", "exec"), namespace)
    assert namespace["losses"][-1] < namespace["losses"][0]


@pytest.mark.parametrize("heading", DIFFS)
def test_adopting_effjax_changes_at_most_five_lines(heading):
    added = [line for line in DIFFS[heading].splitlines() if line.startswith("+")]
    assert 0 < len(added) <= 5


def test_there_are_diffs_for_linen_nnx_raw_jax_and_a_mesh():
    assert len(DIFFS) == 4
