"""Strategies find the best, searches resume exactly, and files of other searches are refused."""

import numpy as np
import pytest

from effjax.errors import SetupError
from effjax.nas import (
    TPE,
    Evolution,
    Integer,
    LocalSearch,
    PredictorSearch,
    RandomSearch,
    Repeat,
    Search,
    Space,
)

SPACE = Space({"edge": Repeat(5, {"op": Integer(0, 4)})})
MAKE = {
    "random": lambda: RandomSearch(SPACE),
    "evolution": lambda: Evolution(SPACE, 10, 4),
    "local": lambda: LocalSearch(SPACE),
    "predictor": lambda: PredictorSearch(SPACE, 10, 40),
    "TPE": lambda: TPE(SPACE),
}


def go_on(search, count):
    for _ in range(count):
        trial = search.ask()
        search.tell(trial, float(trial.genes.sum()))
    return search


def test_climbers_beat_random_draws():
    best = {n: go_on(Search(SPACE, make()), 150).best.genes.sum() for n, make in MAKE.items()}
    assert best["local"] == best["predictor"] == best["TPE"] == 20
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


def test_a_local_search_asks_for_nothing_twice_but_where_it_starts():
    search = go_on(Search(SPACE, LocalSearch(SPACE)), 60)  # from (1..1) up to (4..4)
    best, rows = None, []
    for trial in search.trials:
        value = search.values[trial.number]
        rows.append(tuple(trial.genes.tolist()))
        best = value if best is None else max(best, value)
        if best == 20:
            break
    assert best == 20
    assert len(set(rows)) == len(rows)


def test_a_front_holds_what_nothing_covers():
    search = Search(SPACE, RandomSearch(SPACE))
    for value in ((1, 5), (2, 4), (1, 4), (3, 0), (3, 0)):
        search.tell(search.ask(), value)
    assert [t.number for t in search.front] == [0, 1, 3, 4]
    with pytest.raises(SetupError, match="no best one"):
        _ = search.best
    with pytest.raises(SetupError, match=r"has the value 1\.0, others"):
        search.tell(search.ask(), 1.0)


class Second:
    """Stops at step 2 what is below 10."""

    def report(self, number, step, value):
        return step >= 2 and value < 10

    def end(self, number):
        pass


class Never(Second):
    def report(self, number, step, value):
        return False


Never.__name__ = "Second"


def test_stopped_trials_are_stored_repeated_and_not_best(tmp_path):
    path = tmp_path / "trials.jsonl"
    search = Search(SPACE, RandomSearch(SPACE), path, stopper=Second())
    first, second = search.ask(), search.ask()
    assert not search.report(first, 1, 99.0)
    assert search.report(first, 2, 9.0)
    search.tell(first, 99.0)
    assert not search.report(second, 2, 11.0)
    search.tell(second, 11.0)
    again = Search(SPACE, RandomSearch(SPACE), path, stopper=Second())
    assert (again.stopped, again.reports) == ({0}, {0: [(1, 99.0), (2, 9.0)], 1: [(2, 11.0)]})
    assert again.best.number == 1
    with pytest.raises(SetupError, match="stopper now decides otherwise"):
        Search(SPACE, RandomSearch(SPACE), path, stopper=Never())
    with pytest.raises(SetupError, match="space that changed"):
        Search(SPACE, RandomSearch(SPACE), path)
    third = again.ask()
    again.report(third, 3, 1.0)
    with pytest.raises(SetupError, match="steps increase"):
        again.report(third, 4, 1.0)
