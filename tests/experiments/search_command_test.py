"""Searches by many workers on one storage: every trial ends exactly once, whoever is killed."""

import csv
import dataclasses
import gc
import os
import random
import signal
import sys
import time
import uuid
from collections import Counter
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy

from effjax.errors import SetupError
from effjax.nas import Choice, Integer, Space
from experiments.harness import search
from experiments.harness.config import check
from experiments.harness.errors import Interrupted, RunError, UsageError
from experiments.harness.runs import open_run
from experiments.harness.storage import open_study, shown
from experiments.harness.studies import RETRIES, Refused, Trials
from tests.experiments import killing

WORKER = [sys.executable, str(killing.ROOT / "tests" / "experiments" / "searching.py")]
SPACE = Space({"a": Integer(0, 9), "b": Choice(("x", "y"))})


SERVER = os.environ.get("EFFJAX_TEST_SERVER", "")  # postgresql://... or mysql://..., no database
SERVED = pytest.param(
    "server",
    marks=[
        pytest.mark.skipif(not SERVER, reason="no database server"),
        # optuna's connections are closed when they are collected.
        pytest.mark.filterwarnings("ignore::ResourceWarning"),
    ],
)


def storage_of(kind, tmp_path):
    """The URL of an empty storage."""
    if kind == "server":
        name = f"effjax_{uuid.uuid4().hex}"
        address = sqlalchemy.make_url(SERVER)
        maker = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
        with maker.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        maker.dispose()
        return address.set(database=name).render_as_string(hide_password=False)
    return f"sqlite:///{tmp_path / 't.db'}" if kind == "sqlite" else f"{tmp_path}/t.log"


@pytest.fixture
def url(request, tmp_path):
    yield storage_of(getattr(request, "param", "journal"), tmp_path)
    gc.collect()


every = pytest.mark.parametrize("url", ["sqlite", "journal", SERVED], indirect=True)


def opened(url, record=None, seed=0):
    sampler = optuna.samplers.RandomSampler(seed=seed)
    return open_study(url, "mine", record or {"space": "s"}, ["maximize"], sampler)


def worker(url, trials=3, grace=0.05, space=SPACE, seed=0):
    return Trials(opened(url, seed=seed), url, space, trials, grace)


def value(config):
    return [float(config["a"])]


def complete(results):
    return [trial for trial in results if trial.state.name == "COMPLETE"]


@every
def test_the_search_has_so_many_trials_and_more_where_more_are_asked_for(url):
    worker(url).work(value)
    found = worker(url).results()
    assert len(complete(found)) == 3
    assert [t.values[0] for t in found] == [t.params["a"] for t in found]
    worker(url).work(pytest.fail)  # nothing is left
    worker(url, trials=5).work(value)
    assert [t.number for t in worker(url, trials=5).results()] == [0, 1, 2, 3, 4]


@every
def test_a_dead_workers_trial_is_tried_again_with_its_values(url):
    lost = opened(url).ask()
    lost.suggest_int("a", 0, 9)
    worker(url).work(value)
    found = worker(url).results()
    assert len(found) == len(complete(found)) == 3
    [again] = [t for t in found if t.user_attrs.get("retry_of") == lost.number]
    assert again.params["a"] == lost.params["a"]


def test_a_worker_that_beats_is_left_alone(url):
    other = worker(url, trials=1, grace=0.4)
    trial = other._ask()
    seen = worker(url, trials=1, grace=0.4)
    with other._beating(trial):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            seen._bury()
            time.sleep(0.05)
        assert other._slots()[0][0].state.name == "RUNNING"
    other._tell(trial, [1.0])
    assert len(complete(seen.results())) == 1


def test_of_two_retries_of_one_trial_the_earlier_counts(url):
    first, second = worker(url, trials=1), worker(url, trials=1)
    lost = first.study.ask()
    first._fail(lost.number)
    slots = [first._slots()[0], second._slots()[0]]  # both have seen that it is lost
    first._queue(slots[0])
    second._queue(slots[1])
    later = first.study.get_trials()[2]
    assert first._ask().number == 1
    assert second._ask() is None  # it was given trial 2
    assert second.study.get_trials()[later.number].user_attrs["void"]


@every
def test_a_worker_that_was_halted_for_too_long_does_not_tell(url, capsys):
    slow, quick = worker(url, trials=1), worker(url, trials=1)
    trial = slow._ask()
    quick.work(value)
    slow._tell(trial, [100.0])
    assert "another worker" in capsys.readouterr().err
    [found] = quick.results()
    assert found.values[0] <= 9


def test_one_trial_too_many_is_given_back(url):
    one, other = worker(url, trials=1), worker(url, trials=1)
    assert one._ask() is not None
    assert other._ask() is None
    assert other._slots()[0][0].number == 0
    assert len(other._slots()) == 1


def test_a_trial_that_kills_every_worker_is_given_up(url):
    for _ in range(RETRIES + 1):
        dying = worker(url, trials=1)
        dying._bury()
        for attempts in dying._slots():
            dying._queue(attempts)
        dying._fail(dying._ask().number)
    last = worker(url, trials=1)
    last.work(pytest.fail)
    assert last.results() == []
    assert last.given_up() == [0]


def test_a_trial_that_fails_is_told_and_not_repeated(url, capsys):
    def fails(config):
        raise ValueError("the loss is NaN")

    worker(url, trials=2).work(fails)
    found = worker(url, trials=2).results()
    assert [t.user_attrs["error"] for t in found] == ["ValueError: the loss is NaN"] * 2
    assert "trial 1 failed: the loss is NaN" in capsys.readouterr().err


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM, "stopped"), KeyboardInterrupt()])
def test_a_worker_that_is_asked_to_stop_frees_its_trial_at_once(url, error):
    def stops(config):
        raise error

    with pytest.raises(type(error)):
        worker(url, grace=1e6).work(stops)
    worker(url, grace=1e6).work(value)
    assert len(complete(worker(url).results())) == 3


def test_a_constraint_is_kept_and_one_that_refuses_everything_is_an_error(url):
    rare = Space({"a": Integer(0, 99)}, lambda genes: genes[0] == 7)
    worker(url, trials=2, space=rare, grace=60.0).work(value)
    assert [t.values[0] for t in worker(url, trials=2).results()] == [7.0, 7.0]

    def refuses(config):
        raise Refused

    with pytest.raises(SetupError, match="in a row were refused"):
        worker(url, trials=3, space=rare, grace=60.0).work(refuses)
    assert len(complete(worker(url).results())) == 2  # nothing is lost


def test_a_space_that_changed_is_an_error_that_writes_nothing(url):
    worker(url).work(value)
    with pytest.raises(RunError, match="'s' -> 'other'"):
        opened(url, {"space": "other"})
    assert len(complete(worker(url).results())) == 3


def test_a_storage_that_cannot_be_reached(tmp_path):
    with pytest.raises(RunError, match="cannot be reached"):
        opened(f"sqlite:///{tmp_path}/nowhere/t.db")
    with pytest.raises(RunError, match="cannot be reached"):
        opened(f"{tmp_path}/nowhere/t.log")
    with pytest.raises(UsageError, match="is no storage"):
        opened("trials.db")
    with pytest.raises(RunError) as found:
        opened("no-such-base://me:secret@host/base")
    assert "secret" not in str(found.value)
    assert shown("postgresql://me:se:cret@host/base") == "postgresql://me:***@host/base"


def test_a_storage_that_goes_away_loses_nothing(url, monkeypatch):
    done = []

    def counted(config):
        done.append(config["a"])
        return value(config)

    def gone(*args, **kwargs):
        raise optuna.exceptions.StorageInternalError("the connection was closed")

    dying = worker(url)
    monkeypatch.setattr(dying.study, "tell", gone)
    with pytest.raises(RunError, match="connection was closed"):
        dying.work(counted)
    worker(url).work(counted)
    found = worker(url).results()
    assert len(complete(found)) == 3
    assert found[0].params["a"] == done[0] == done[1]  # what could not be told is tried again


@dataclasses.dataclass(frozen=True)
class Config:
    a: int = 0
    b: int = 0
    seed: int = 0

    def __post_init__(self):
        check(self, a=(0, 20))


def _run(config):
    folder = open_run("mine", config)
    folder.finish({"value": config.a + config.b, "cost": config.b, "word": "x"})


def command(*words, run=_run):
    return search.main("mine", SimpleNamespace(Config=Config, run=run), words)


def test_the_command_searches_an_experiments_fields(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    words = ("--over", "a=0..2", "b=0..2", "--maximize", "value", "--trials", "12", "--seed", "4")
    assert command(*words) == 0
    [path] = (tmp_path / "searches").iterdir()
    rows = list(csv.DictReader((path / "table.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows] == list(range(12))
    assert all(int(row["a"]) + int(row["b"]) == float(row["value"]) for row in rows)
    distinct = {(row["a"], row["b"]) for row in rows}
    # A configuration that is proposed again is not trained again.
    assert len(list(path.glob("mine/*-seed4/summary.json"))) == len(distinct) <= 9
    assert "best:" in capsys.readouterr().out
    assert command(*words, run=None) == 0  # all is done: nothing is run


def test_several_objectives_have_a_front(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    words = ("--over", "a=0,1", "b=0,1", "--maximize", "value", "--minimize", "cost")
    assert command(*words, "--trials", "8") == 0
    shown = capsys.readouterr().out
    assert "front:" in shown
    assert "a=0, b=1" not in shown.partition("table:")[0]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--over", "a=0,1"], "--maximize"),
        (["--over", "a=0,1", "--maximize", "value", "--minimize", "value"], "twice"),
        (["--maximize", "value"], "--over"),
        (["--over", "a=", "--maximize", "value"], "empty"),
        (["--over", "a=0,1", "--maximize", "valeu", "--trials=1"], "the results; those are.*value"),
        (["--over", "a=0,1", "--maximize", "word", "--trials=1"], "no numbers"),
        (["--over", "a=0,1", "--maximize", "value", "--trials=0"], "at least 1"),
    ],
)
def test_a_command_that_cannot_be_meant(words, match, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    with pytest.raises(UsageError, match=match):
        command(*words)


def _killed(tmp_path, storage, trials, seconds, kills, rng):
    """Four workers, of which some are killed at random moments and started again."""
    log, runs = tmp_path / "done", tmp_path / "runs"
    words = ["--over", "a=0..99", "b=0..99", "--maximize", "value", "--strategy", "random"]
    words += ["--trials", str(trials), "--grace", "2", f"--seconds={seconds}", *storage]
    workers = [killing.start([*WORKER, str(log), *words], runs) for _ in range(4)]
    while not list(runs.glob("searches/*/wait/*")):
        time.sleep(0.01)
    for number in range(kills):
        time.sleep(rng.uniform(0, 2 * seconds))
        victim = rng.randrange(4)
        workers[victim].send_signal(signal.SIGKILL)
        assert workers[victim].wait() in (-signal.SIGKILL, 0)
        if number:  # the first one stays dead
            workers[victim] = killing.start([*WORKER, str(log), *words], runs)
    codes = [worker.wait(timeout=600) for worker in workers]
    assert set(codes) <= {0, -signal.SIGKILL}, (runs / "log").read_text()[-3000:]
    [path] = (runs / "searches").iterdir()
    rows = list(csv.DictReader((path / "table.csv").read_text().splitlines()))
    assert len(rows) == len({row["trial"] for row in rows}) == trials
    assert all(not row["error"] for row in rows)
    done = Counter(log.read_text().split())
    folders = {folder.parent.name for folder in path.glob("wait/*/summary.json")}
    assert max(done.values()) == 1  # none done twice
    assert len(folders) == len({(row["a"], row["b"]) for row in rows})  # none lost
    # A kill between the summary and the log's line leaves that line out.
    assert len(folders) - kills <= len(done) <= len(folders)


@pytest.mark.slow
def test_four_workers_of_which_one_is_killed(tmp_path):
    _killed(tmp_path, [], 12, 0.3, 1, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite", "journal", SERVED])
def test_four_workers_of_which_many_are_killed(tmp_path, storage):
    given = [] if storage == "sqlite" else ["--storage", storage_of(storage, tmp_path)]
    _killed(tmp_path, given, 60, 0.5, 8, random.Random(1))
