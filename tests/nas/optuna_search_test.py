"""optuna's strategies and stoppers: exact repeats, rungs by hand, conditions and constraints."""

import sys

import jax.numpy as jnp
import pytest

from effjax.errors import SetupError
from effjax.nas import (
    ASHA,
    NSGA2,
    TPE,
    Choice,
    Hyperband,
    Integer,
    RandomSearch,
    Repeat,
    Search,
    Space,
    When,
)

NESTED = Space(
    {
        "kind": Choice(("none", "q", "p")),
        "bits": When("kind", ("q", "p"), Integer(2, 9)),
        "cell": Repeat(2, {"op": Choice(("c", "m")), "k": When("op", ("c",), Choice((3, 5)))}),
    },
    lambda genes: genes[1] != 1,
)
SPACE = Space({"a": Integer(0, 9), "b": Integer(0, 9)})


@pytest.mark.parametrize("make", [TPE, NSGA2])
def test_what_is_asked_for_is_valid_and_repeats(make, tmp_path):
    def go_on(search, count):
        for _ in range(count):
            trial = search.ask()
            assert bool(NESTED.valid(jnp.asarray(trial.genes)))
            value = float(trial.genes.sum())
            search.tell(trial, value if make is TPE else (value, -value))
        return search

    def new():
        return TPE(NESTED, 5) if make is TPE else NSGA2(NESTED, 2, 6)

    path = tmp_path / "trials.jsonl"
    whole = go_on(Search(NESTED, new()), 24)
    go_on(Search(NESTED, new(), path), 15)
    again = go_on(Search(NESTED, new(), path), 9)
    assert again.values == whole.values
    assert [t.genes.tolist() for t in again.trials] == [t.genes.tolist() for t in whole.trials]


def test_nsga2_finds_the_front_of_two_objectives():
    search = Search(SPACE, NSGA2(SPACE, 2, 10))
    for _ in range(150):
        trial = search.ask()
        a, b = trial.genes.tolist()
        search.tell(trial, (a - b, -a - b))
    # Of all (a, b) those with b = 0 are the front: a - b and -a - b grow as b falls.
    assert {int(t.genes[1]) for t in search.front} == {0}
    assert len({int(t.genes[0]) for t in search.front}) >= 8
    with pytest.raises(SetupError, match="has the value"):
        search.tell(search.ask(), 1.0)
    fresh = Search(SPACE, NSGA2(SPACE))
    with pytest.raises(SetupError, match="made for 2 objectives"):
        fresh.tell(fresh.ask(), 1.0)


def test_asha_by_hand():
    search = Search(SPACE, RandomSearch(SPACE), stopper=ASHA(1, 2))
    trials = [search.ask() for _ in range(4)]
    # Rung 1 with half going on: the first always does, then who is among the better half.
    stops = [search.report(t, 1, v) for t, v in zip(trials, (5.0, 4.0, 6.0, 5.5), strict=True)]
    assert stops == [False, True, False, False]
    assert not search.report(trials[0], 2, 7.0)
    assert search.report(trials[2], 2, 6.5)
    assert not search.report(trials[3], 2, 8.0)
    for trial, value in zip(trials, (7.0, 4.0, 6.5, 8.0), strict=True):
        search.tell(trial, value)
    assert search.stopped == {1, 2}
    assert search.best.number == 3


def test_hyperband_has_brackets_that_stop_later():
    search = Search(SPACE, RandomSearch(SPACE), stopper=Hyperband(9, 1, 3))
    at = []
    for _ in range(60):
        trial = search.ask()
        value = float(trial.genes.sum())
        steps = next((s for s in range(1, 10) if search.report(trial, s, value)), 10)
        search.tell(trial, value)
        at.append(steps)
    assert set(at) == {1, 3, 9, 10}  # rungs at 1, 3 and 9, or the end


def test_settings_that_cannot_be_meant(monkeypatch):
    for make, says in (
        (lambda: ASHA(0), "first=0"),
        (lambda: Hyperband(2, 3), "before the first rung"),
        (lambda: NSGA2(SPACE, 0), "objectives=0"),
    ):
        with pytest.raises(SetupError, match=says):
            make()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SetupError, match=r"pip install 'effjax\[nas\]'"):
        TPE(SPACE)
