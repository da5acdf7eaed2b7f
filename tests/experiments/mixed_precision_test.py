"""Mixed precision, at a size that a test has time for."""

import numpy as np
import pytest

from experiments import mixed_precision
from experiments.harness.errors import ConfigError
from experiments.harness.runs import read_json
from experiments.mixed_precision import FLOAT, METHODS, UNIFORM, Config

TINY = Config(
    seeds=1,
    averages=(3,),
    widths=(2, 3, 8),
    epochs=2,
    further=1,
    batch=32,
    probes=2,
    measured=2,
    channels=(4, 8),
    hidden=16,
    dataset="digits",
    save=False,
)


@pytest.mark.slow
def test_every_choice_is_within_the_average_and_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    found = mixed_precision.run(TINY)
    [folder] = tmp_path.glob("mixed_precision/*")
    rows = {r["method"]: r for r in read_json(folder / "summary.json")["rows"]}
    assert set(rows) == {FLOAT, *METHODS}
    assert set(rows[UNIFORM]["bits"].values()) == {3}
    for method in METHODS:
        own = rows[method]
        assert own["average"] <= 3
        assert own["accuracy"] > 0.15
        assert set(own["bits"].values()) <= set(TINY.widths)
    assert len(set(rows["random"]["bits"].values())) > 1
    points = 100 * (rows["HAWQ"]["accuracy"] - rows[UNIFORM]["accuracy"])
    np.testing.assert_allclose(found["3 bits on average"]["HAWQ"]["points"], points)
    assert (folder / "report" / "mixed_precision.png").exists()


def test_averages_are_compared_with_a_width():
    with pytest.raises(ConfigError, match="averages"):
        Config(averages=(7,))
