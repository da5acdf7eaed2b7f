"""The comparison of distillation methods, at a size that a test has time for."""

import pytest

from experiments import distill_methods as compared
from experiments.distill_methods import JOINT, SEQUENTIAL, Config
from experiments.harness.errors import ConfigError
from experiments.harness.runs import read_json

SIZES = {"channels": (4, 6, 8), "hidden": 16, "larger": 2, "batch": 64}
TINY = Config(
    seeds=1, epochs=1, dataset="digits", methods=("KD", "DKD", "FitNet", "CRD"), save=False, **SIZES
)


@pytest.mark.slow
def test_all_arms_are_trained_and_the_best_two_compressed(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    found = compared.run(TINY)
    [folder] = tmp_path.glob("distill_methods/*")
    rows = {row["name"]: row for row in read_json(folder / "summary.json")["rows"]}
    assert set(TINY.methods) < set(rows)
    logits, inner = read_json(folder / "summary.json")["best"]
    assert f"{logits} + {inner}" in rows
    for kind, chosen in ((compared.LOGITS, logits), (compared.INNER, inner)):
        asked = [rows[m]["validation"] for m in TINY.methods if m in kind]
        assert rows[chosen]["validation"] == max(asked)
    # The same masks' size both ways, and int8: what is stored is a fraction of the dense student.
    for name in (JOINT, SEQUENTIAL):
        assert rows[name]["nonzeros"] < 0.6 * rows[logits]["nonzeros"]
        assert rows[name]["bytes"] < 0.4 * rows[logits]["bytes"]
    assert abs(rows[JOINT]["nonzeros"] - rows[SEQUENTIAL]["nonzeros"]) < 20
    assert (folder / "report" / "distill_methods.png").exists()
    logs = sorted(folder.glob("*/metrics.jsonl"))
    before = [p.read_bytes() for p in logs]
    assert compared.run(TINY) == found
    assert [p.read_bytes() for p in logs] == before


@pytest.mark.parametrize("method", [m for m in compared.METHODS if m not in ("DKD", "CRD")])
def test_every_method_has_terms_with_weights(method):
    terms = compared.matches(method, 4.0)
    assert terms
    assert all(match.alpha > 0 for match in terms.values())


@pytest.mark.parametrize("methods", [("KD",), ("CRD", "RKD"), ("KD", "magic")])
def test_methods_that_cannot_be_combined(methods):
    with pytest.raises(ConfigError, match="method"):
        Config(methods=methods)
