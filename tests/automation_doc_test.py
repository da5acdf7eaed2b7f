"""The page on searches: its code runs from top to bottom, and its names exist."""

import pathlib
import re

import effjax as ej

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "automation.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 13
    names: dict = {"__name__": "page"}
    best = []
    for block in blocks:
        exec(compile(block, "docs/automation.md", "exec"), names)
        best.append(names.get("best", {}))
    assert best[1]["width"] == 64
    assert 0 <= names["error"].mean < float("inf")
    assert len(names["events"]) == 4
    assert len(names["front"]) >= 2
    assert len({float(score) for score in names["scores"]}) == 3
    assert names["genes"].shape == (1,)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 1 + 2 * 60


def test_the_names_exist():
    strategies = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    assert len(strategies) == 12
    assert all(hasattr(ej.nas, name) for name in strategies)
