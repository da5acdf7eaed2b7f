"""Tables: rows, seeds and regret by hand; the clock, the budget, and resumed searches."""

import numpy as np
import pytest

from effjax.errors import SetupError
from effjax.nas import (
    ASHA,
    Choice,
    Evolution,
    Integer,
    Oracle,
    RandomSearch,
    Search,
    Space,
    Table,
    nasbench201,
    trace,
)
from effjax.nas.tabular import EDGES, Step, at

SPACE = Space({"op": Choice(("conv", "pool")), "n": Integer(1, 2)})
VALUES = np.array([[90.0, 92.0], [80.0, np.nan], [50.0, 60.0], [91.5, 91.5]])
TABLE = Table(SPACE, VALUES, np.array([60.0, 10.0, 20.0, 30.0]), {"size": np.arange(4.0)})


def test_rows_means_and_regret_by_hand():
    assert [TABLE.row(g) for g in TABLE.genes] == [0, 1, 2, 3]
    assert [TABLE.mean(g) for g in TABLE.genes] == [91, 80, 55, 91.5]
    assert [TABLE.regret(g) for g in TABLE.genes] == [0.5, 11.5, 36.5, 0]
    assert TABLE.seeds(TABLE.genes[1]) == 1
    with pytest.raises(SetupError, match="no configuration"):
        TABLE.row(np.array([2, 0]))


def test_the_cell_of_nasbench201():
    space = nasbench201()
    assert space.size == 15_625
    assert len(EDGES) == len(space.names) == 6


def test_trainings_take_time_and_draw_seeds_without_replacement():
    oracle = Oracle(TABLE, 190, seed=1)
    first, second = oracle.train(TABLE.genes[0]), oracle.train(TABLE.genes[0])
    assert (first.clock, second.clock) == (60, 120)
    assert {first.value, second.value} == {90, 92}
    assert oracle.train(TABLE.genes[1]).value == 80
    assert oracle.train(TABLE.genes[1]).value == 80
    assert oracle.train(TABLE.genes[0]) is None  # would end at 200
    assert oracle.clock == 190
    firsts = [Oracle(TABLE, 200, seed=s).train(TABLE.genes[0]).value for s in range(20)]
    assert set(firsts) == {90, 92}


def test_a_trace_ends_with_the_budget_and_regrets_by_means():
    search = Search(SPACE, RandomSearch(SPACE), seed=3)
    steps = list(trace(search, Oracle(TABLE, 400)))
    assert steps[-1].clock <= 400
    assert len(search.trials) == len(steps) + 1  # the last one did not end in time
    assert np.allclose(np.diff([0, *(s.clock for s in steps)]), _seconds(search)[:-1])
    assert steps[-1].regret == TABLE.regret(search.best.genes)
    assert {s.regret for s in steps} <= {0.5, 11.5, 36.5, 0}


def _seconds(search):
    return [TABLE.seconds[TABLE.row(t.genes)] for t in search.trials]


def test_seeds_are_the_fidelity():
    search = Search(SPACE, RandomSearch(SPACE), stopper=ASHA(1, 2))
    steps = list(trace(search, Oracle(TABLE, 2000), seeds=2))
    assert search.stopped
    spent = [
        seconds * len(search.reports.get(t.number, []))
        for t, seconds in zip(search.trials, _seconds(search), strict=True)
    ]
    assert steps[-1].clock == pytest.approx(sum(spent[: len(steps)]))
    whole = [n for n, r in search.reports.items() if len(r) == 2 and n in search.values]
    for number in whole:
        row = TABLE.row(search.trials[number].genes)
        if number == next(n for n in whole if TABLE.row(search.trials[n].genes) == row):
            assert search.values[number] == pytest.approx(TABLE.means[row])


def test_a_search_that_resumes_goes_on_on_the_same_clock(tmp_path):
    path = tmp_path / "trials.jsonl"

    def search(where=None):
        return Search(SPACE, Evolution(SPACE, 4, 2), where)

    whole = list(trace(search(), Oracle(TABLE, 900)))
    begun = []
    for step in trace(search(path), Oracle(TABLE, 900)):
        begun.append(step)
        if len(begun) == 7:
            break
    rest = list(trace(search(path), Oracle(TABLE, 900)))
    assert begun + rest == whole


def test_traces_are_step_functions():
    steps = [Step(2.0, 5.0), Step(4.0, 1.0)]
    found = at(np.array([1.0, 2.0, 3.9, 4.0, 9.0]), steps, before=7.0)
    assert found.tolist() == [7, 5, 5, 1, 1]


@pytest.mark.parametrize(
    ("values", "seconds", "says"),
    [
        (VALUES[:3], np.ones(4), r"\[4, seeds\]"),
        (VALUES, np.ones(3), "one number"),
        (VALUES * np.nan, np.ones(4), "has a value"),
        (VALUES, np.zeros(4), "more than 0 seconds"),
    ],
)
def test_wrong_tables(values, seconds, says):
    with pytest.raises(SetupError, match=says):
        Table(SPACE, values, seconds)
