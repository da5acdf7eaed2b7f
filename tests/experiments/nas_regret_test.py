"""Regret on a table: rows, the comparison with random search, what is written; the real table."""

import json

import numpy as np
import pytest

from effjax.nas import Table, nasbench201
from experiments import nas_regret as regret
from experiments import sparse_report
from experiments.harness import tables
from experiments.harness.errors import ConfigError, DataError

TINY = regret.Config(
    seeds=2, trainings=20, tables=("cifar10",), strategies=("random", "evolution"), jobs=1
)


def toy(_):
    """Cells are better by their 3x3 convolutions."""
    space = nasbench201()
    genes = space.enumerate()
    value = 80.0 + 2 * (genes == 3).sum(axis=1)
    return Table(space, np.stack([value, value + 1], axis=1), np.full(len(genes), 50.0))


def test_everything_is_searched_and_written(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sparse_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sparse_report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(regret, "load_table", toy)
    shown = regret.run(TINY)
    assert "better than random, p = " in shown["cifar10, evolution"]
    found = json.loads((tmp_path / "results" / "nas_regret.json").read_text())
    assert len(found["rows"]) == 4
    assert all(row["trials"] == 20 for row in found["rows"])
    for name, (mean, reach) in found["curves"]["cifar10"].items():
        last = [row["regret"] for row in found["rows"] if row["name"] == name]
        assert mean[-1] == pytest.approx(np.mean(last), abs=1e-4)
        error = np.std(last, ddof=1) / np.sqrt(len(last))
        assert reach[-1] == pytest.approx(1.96 * error, abs=1e-4)
    assert "| evolution |" in (tmp_path / "results" / "nas_regret.md").read_text()
    assert (tmp_path / "images" / "nas_regret.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"no strategies \['magic'\]"):
        regret.Config(strategies=("magic",))
    with pytest.raises(ConfigError, match="Did you mean 'cifar10'"):
        tables.load_table("cifar_10")


def test_a_pickle_that_would_run_code_is_refused():
    with pytest.raises(DataError, match=r"posix\.system"):
        tables.parse(b"cposix\nsystem\n(S'true'\ntR.")


@pytest.mark.slow
def test_the_real_tables(monkeypatch):
    """The optima, and the parameters by hand: 3x3 convolutions have 243,040, 1x1 have 28,000."""
    for name, classes, best in (
        ("cifar10", 10, 91.607),
        ("cifar100", 100, 73.493),
        ("imagenet", 120, 46.733),
    ):
        table = tables.load_table(name)
        assert table.best == pytest.approx(best, abs=1e-3)
        convolutions = 243_040 * (table.genes == 3).sum(axis=1)
        convolutions += 28_000 * (table.genes == 2).sum(axis=1)
        wanted = 464 + 14_464 + 57_600 + 128 + 65 * classes + convolutions
        differs = np.abs(table.columns["parameters"] * 1e6 - wanted) > 1
        assert differs.sum() < 205
