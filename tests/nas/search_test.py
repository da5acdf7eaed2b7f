"""Strategies find the best, searches resume exactly, and files of other searches are refused."""

import numpy as np
import pytest

from effjax.errors import SetupError
from effjax.nas import Evolution, Integer, LocalSearch, RandomSearch, Repeat, Search, Space

SPACE = Space({"edge": Repeat(5, {"op": Integer(0, 4)})})
MAKE = {
    "random": lambda: RandomSearch(SPACE),
    "evolution": lambda: Evolution(SPACE, 10, 4),
    "local": lambda: LocalSearch(SPACE),
}


def go_on(search, count):
    for _ in range(count):
        trial = search.ask()
        search.tell(trial, float(trial.genes.sum()))
    return search


def test_climbers_beat_random_draws():
    best = {n: go_on(Search(SPACE, make()), 150).best.genes.sum() for n, make in MAKE.items()}
    assert best["local"] == 20
    assert best["evolution"] > best["random"]


@pytest.mark.parametrize("name", list(MAKE))
def test_a_killed_search_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    path = tmp_path / "trials.jsonl"
    whole = go_on(Search(SPACE, MAKE[name]()), 40)
    go_on(Search(SPACE, MAKE[name](), path), 25)
    path.write_text(path.read_text() + '{"trial": 25, "ge')
    again = go_on(Search(SPACE, MAKE[name](), path), 15)
    assert again.values == whole.values
    for a, b in zip(again.trials, whole.trials, strict=True):
        assert np.array_equal(a.genes, b.genes)


def test_a_trial_that_was_never_told_is_pending(tmp_path):
    path = tmp_path / "trials.jsonl"
    lost = Search(SPACE, MAKE["random"](), path).ask()
    again = Search(SPACE, MAKE["random"](), path)
    assert [t.genes.tolist() for t in again.pending] == [lost.genes.tolist()]
    again.tell(again.pending[0], 1.0)
    assert again.pending == []


def test_wrong_files_and_values(tmp_path):
    path = tmp_path / "trials.jsonl"
    search = go_on(Search(SPACE, MAKE["evolution"](), path), 15)
    before = path.read_text()
    other = Space({"edge": Repeat(5, {"op": Integer(0, 3)})})
    with pytest.raises(SetupError, match="space that changed"):
        Search(other, Evolution(other, 10, 4), path)
    with pytest.raises(SetupError, match="settings changed"):
        Search(SPACE, Evolution(SPACE, 12, 4), path)
    with pytest.raises(SetupError, match="told before"):
        search.tell(search.trials[0], 1.0)
    with pytest.raises(SetupError, match="finite"):
        search.tell(search.ask(), float("nan"))
    assert path.read_text().startswith(before)
    with pytest.raises(SetupError, match="no trial"):
        _ = Search(SPACE, MAKE["random"]()).best
    with pytest.raises(SetupError, match="tournament"):
        Evolution(SPACE, 3, 4)
