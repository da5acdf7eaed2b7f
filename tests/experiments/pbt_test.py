"""The PBT experiment: its arms on a small scale, and what is made of their rounds."""

import pytest

from experiments import pbt, pbt_task
from experiments.harness.errors import ConfigError, Interrupted
from experiments.harness.runs import open_run

SMALL = pbt.Config(
    seeds=1, processes=1, members=3, rounds=3, steps=20, validation=100, fraction=0.4,
    dataset="digits", save=False,
)  # fmt: skip


def test_the_winners_schedule_follows_its_ancestors():
    def at(*rates):
        return {"learning_rate": list(rates), "weight_decay": [0.0] * 3}

    rounds = [
        {"parent": [0, 2, 2], "before": at(1.0, 2.0, 3.0)},
        {"parent": [1, 1, 2], "before": at(4.0, 5.0, 6.0)},
        {"parent": [0, 1, 2], "before": at(7.0, 8.0, 9.0)},
    ]
    # 0 is a copy of 1, which was a copy of 2.
    assert pbt.schedule(rounds, 0)["learning_rate"] == [3.0, 5.0, 7.0]
    assert pbt.schedule(rounds, 2)["learning_rate"] == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("wrong", [{"fraction": 0.6}, {"processes": 9}, {"members": 1}])
def test_what_cannot_be_meant(wrong):
    with pytest.raises(ConfigError):
        pbt.Config(**wrong)


@pytest.mark.slow
def test_processes_decide_what_one_program_decides_and_a_killed_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    plan = pbt.plan(SMALL, 0)._replace(rounds=7)
    task = pbt_task.Task(plan)
    here = open_run("pbt", SMALL)
    whole = pbt_task.together(task, here.part("whole"), task.hypers(), True)
    assert whole["accuracy"] > 0.5
    moved = [sum(p != k for k, p in enumerate(r["parent"])) for r in whole["rounds"]]
    assert moved == [1] * 6 + [0]
    apart = pbt_task.apart(plan, tmp_path / "shared")
    assert apart["rounds"] == whole["rounds"]
    assert apart["accuracy"] == whole["accuracy"]
    validate, calls = task.validate, []

    def killed(state):
        calls.append(1)
        if len(calls) > 6 * plan.members:
            raise Interrupted(15, "stopped")
        return validate(state)

    monkeypatch.setattr(task, "validate", killed)
    with pytest.raises(Interrupted):
        pbt_task.together(task, here.part("killed"), task.hypers(), True)
    monkeypatch.setattr(task, "validate", validate)
    again = pbt_task.together(task, here.part("killed"), task.hypers(), True)
    assert again["rounds"] == whole["rounds"]
    assert again["accuracy"] == whole["accuracy"]


@pytest.mark.slow
def test_the_experiment_on_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    found = pbt.run(SMALL)
    assert found["processes"] == "3 of 3 rounds equal those of one program"
    monkeypatch.setattr(pbt, "together", None)  # all is done
    monkeypatch.setattr(pbt, "apart", None)
    assert pbt.run(SMALL) == found
