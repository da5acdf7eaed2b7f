"""Run folders: found again by config, refused to another config, whole after a kill."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.harness.config import as_dict, check, config_hash, difference
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.provenance import described, provenance, write_json
from experiments.harness.runs import MetricsLog, open_run, read_metrics, run_id


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    widths: tuple[int, ...] = (8, 4)
    name: str | None = None
    seed: int = 0

    def __post_init__(self):
        check(self, rate=(0.0, 1.0), widths=(1, 64))


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "elsewhere"))
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("bad", [{"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}])
def test_bounds_hold_on_both_sides(bad):
    with pytest.raises(ConfigError, match=r"rate is .*; it must be between 0.0 and 1.0"):
        Config(**bad)
    assert Config(rate=0.0).rate == 0.0
    assert Config(rate=1.0).rate == 1.0


def test_bounds_hold_for_every_entry():
    with pytest.raises(ConfigError, match=r"widths is \(8, 65\)"):
        Config(widths=(8, 65))


def test_a_configs_hash_leaves_out_the_seed_and_nothing_else():
    base = config_hash(Config())
    assert base == config_hash(Config(seed=3)) == config_hash(as_dict(Config()))
    others = [Config(rate=0.2), Config(widths=(8,)), Config(name="x")]
    assert len({base, *map(config_hash, others)}) == 4
    assert len(base) == 12
    assert difference(Config(), Config(rate=0.2, seed=1)) == "rate: 0.1 -> 0.2, seed: 0 -> 1"


def test_a_config_that_is_not_json_is_an_error():
    assert as_dict({"a": np.float32(0.5), "b": np.arange(2)}) == {"a": 0.5, "b": [0, 1]}
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        as_dict({"a": object()})


def test_the_same_config_finds_the_same_folder(runs):
    run = open_run("bench.prune", Config(seed=2))
    assert run.path == runs / "bench.prune" / f"{config_hash(Config())}-seed2"
    assert open_run("bench.prune", Config(seed=2)).path == run.path
    assert open_run("bench.prune", Config(seed=3)).path != run.path
    record = json.loads((run.path / "config.json").read_text())
    assert record["experiment"] == "bench.prune"
    assert record["config"] == {"rate": 0.1, "widths": [8, 4], "name": None, "seed": 2}
    assert record["provenance"]["config_hash"] == run.config_hash


def test_another_configs_folder_is_refused_and_the_difference_named():
    open_run("x", Config(), id="mine")
    with pytest.raises(RunError, match=r"another config \(rate: 0.1 -> 0.3\).*--id"):
        open_run("x", Config(rate=0.3), id="mine")
    with pytest.raises(RunError, match=r"another config \(seed: 0 -> 1\)"), run_id("mine"):
        open_run("x", Config(seed=1))
    for bad in ("../up", "a/b", ".hidden", ""):
        with pytest.raises(RunError, match="cannot name"):
            open_run("x", Config(), id=bad or " ")


def test_code_or_machine_that_changed_meanwhile_is_said(capsys):
    run = open_run("x", Config())
    open_run("x", Config())
    assert capsys.readouterr().err == ""
    record = json.loads((run.path / "config.json").read_text())
    record["provenance"]["versions"]["jax"] = "0.0.1"
    record["provenance"]["commit"] = "f" * 40
    write_json(run.path / "config.json", record)
    assert open_run("x", Config()).path == run.path
    said = capsys.readouterr().err
    assert "was begun with other code or on another machine (commit: 'ffff" in said
    assert "jax: '0.0.1' -> " in said


def test_a_folder_in_use_by_another_process_is_refused():
    run = open_run("x", Config())
    code = (
        "from experiments.harness.runs import open_run\n"
        f"open_run('x', {as_dict(Config())!r}, id={run.path.name!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is in use by another process" in done.stderr


def test_summaries_parts_and_damaged_folders():
    run = open_run("x", Config())
    assert run.summary() is None
    run.finish({"accuracy": np.float32(0.5), "by_width": np.arange(3)})
    summary = run.summary()
    assert summary["accuracy"] == 0.5
    assert summary["by_width"] == [0, 1, 2]
    assert summary["config"]["rate"] == 0.1
    part = run.part("teacher")
    part.metrics.append([{"step": 1}])
    assert (run.path / "teacher" / "metrics.jsonl").exists()
    assert part.summary() is None
    with pytest.raises(RunError, match="cannot name a run's part"):
        run.part("../x")
    (run.path / "config.json").write_text("{half")
    with pytest.raises(RunError, match=r"config.json is not JSON"):
        open_run("x", Config())


def test_a_log_is_taken_back_to_a_position(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.position() == 0
    log.append([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1 / 3}])
    position = log.position()
    log.append([{"step": 3}])
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    assert [r["step"] for r in log.read()] == [1, 2, 3]
    assert log.rewind(position) == 0
    assert log.read() == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1 / 3}]
    os.truncate(log.path, position - 4)
    assert log.rewind(position) == 4
    with pytest.raises(ValueError, match="JSON"):
        log.append([{"loss": float("nan")}])


def test_a_broken_line_inside_a_log_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 of"):
        read_metrics(path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": np.float64(1.5), "b": np.array([1, 2])})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [1, 2]}
    with pytest.raises(TypeError, match="which JSON does not have"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu avx2 avx512f avx512_vnni", "EPYC with AVX-512 VNNI"),
        ("fpu avx2", "EPYC with AVX2"),
        ("fpu", "EPYC"),
    ],
)
def test_a_processor_is_described_by_its_name_and_instructions(flags, wanted):
    processors = "".join(
        f"processor\t: {i}\nmodel name\t: EPYC\nflags\t\t: {flags}\n\n" for i in "01"
    )
    assert described(processors) == wanted
    assert described("") == ""


def test_provenance_names_code_versions_and_hardware():
    found = provenance(Config())
    assert len(found["commit"].removesuffix("-dirty")) == 40
    assert {"python", "jax", "jaxlib", "flax", "optax", "qwix", "numpy"} <= set(found["versions"])
    assert found["hardware"]["platform"] in ("cpu", "gpu", "tpu")
    assert found["hardware"]["cores"] >= 1
    assert found["config_hash"] == config_hash(Config())
    assert found["date"].endswith("+00:00")
