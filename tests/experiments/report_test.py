"""`python -m experiments report`: real runs merged into a folder, and errors for people."""

import csv
import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from effjax.errors import ReportError
from effjax.report import latex_problems
from experiments.harness.cli import main
from experiments.harness.errors import RunError
from experiments.harness.provenance import brief
from experiments.harness.reporting import make_study, report
from experiments.harness.runs import open_run
from experiments.harness.summaries import find_runs, read_runs


def load_small_run():
    path = Path(__file__).with_name("small_run.py")
    spec = importlib.util.spec_from_file_location("small_run_of_report_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Real trainings: one config with three seeds, another with two."""
    small, root = load_small_run(), tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(root))
        for rate, seeds in ((3e-3, 3), (1e-3, 2)):
            for seed in range(seeds):
                small.run(
                    small.Config(steps=12, checkpoint_every=12, eval_every=4, rate=rate, seed=seed)
                )
    return root


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty root of runs."""
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@dataclasses.dataclass(frozen=True)
class Config:
    bits: int = 8
    seed: int = 0


ACCURACY = {
    "key": "accuracy",
    "label": "accuracy (%)",
    "format": ".1f",
    "best": "max",
    "scale": 100,
}


def arms(seed, kb=(40, 10), **more):
    layers = {"head/kernel": {"sparsity": 0.5 + seed / 100, "bits": 8}}
    rows = [
        {"name": "dense", "seed": seed, "accuracy": 0.90 + seed / 100, "bytes": 1000 * kb[0]},
        {"name": "small", "seed": seed, "accuracy": 0.85 + seed / 100, "bytes": 1000 * kb[1]},
    ]
    rows[1]["layers"] = layers
    return {"rows": rows, "columns": [ACCURACY], "baseline": "dense", **more}


def finished(seed=0, bits=8, id=None, **kwargs):
    run = open_run("toy", Config(bits, seed), id=id)
    run.finish(arms(seed, **kwargs))
    return run.path


def test_real_runs_become_a_report_with_provenance_on_all_of_it(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("EFFJAX_RUNS", str(trained))
    out = tmp_path / "paper"
    quality, cost = "validation/accuracy", "loss"
    asked = ["--quality", quality, "--cost", cost, "--baseline", "small, rate=0.001"]
    assert main(["report", "small", *asked, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "| small, rate=0.003 |" in shown.out
    assert f"report: {out / 'index.html'}" in shown.err
    figures = {f"{stem}.{kind}" for stem in ("pareto", "curves") for kind in ("png", "svg", "pdf")}
    tables = {f"{t}.{kind}" for t in ("table", "fronts", "comparison") for kind in ("md", "tex")}
    others = {"index.html", "report.md", "report.tex", "table.csv", "rows.csv", "results.json"}
    assert {path.name for path in out.iterdir()} == figures | tables | others

    found = json.loads((out / "results.json").read_text())
    cells = {row["name"]: row[quality] for row in found["rows"]}
    assert {name: cell["n"] for name, cell in cells.items()} == {
        "small, rate=0.003": 3,
        "small, rate=0.001": 2,
    }
    # What the runs themselves say.
    summaries = [json.loads(p.read_text()) for p in trained.glob("small/*/summary.json")]
    mine = [s[quality] for s in summaries if s["config"]["rate"] == 3e-3]
    assert cells["small, rate=0.003"]["mean"] == pytest.approx(sum(mine) / 3)
    (against,) = found["comparisons"]
    assert (against["name"], against["seeds"]) == ("small, rate=0.003", [3, 2])
    assert against["interval"]["n"] == 2
    assert found["curves"]["small, rate=0.003"]["steps"] == [4, 8, 12]
    assert {len(c["values"]) for c in found["curves"].values()} == {2, 3}

    source = summaries[0]["provenance"]
    hashes = {s["provenance"]["config_hash"] for s in summaries}
    assert len(hashes) == 2
    wanted = [source["versions"]["jax"], source["date"][:10], *hashes]
    if source["commit"]:
        wanted.append(source["commit"][:10])
    for name in tables | others | {"pareto.svg", "pareto.png", "curves.svg"}:
        content = (out / name).read_bytes().decode("utf-8", "replace")
        assert [word for word in wanted if word not in content] == [], name
    for name in ("table.tex", "fronts.tex", "comparison.tex", "report.tex"):
        assert latex_problems((out / name).read_text()) == [], name
    page = (out / "index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_the_library_call_writes_the_same(trained, tmp_path):
    first = report(trained / "small", tmp_path / "a", quality="loss", cost="kd/kl")
    report([trained / "small"], tmp_path / "b", quality="loss", cost="kd/kl")
    assert first == tmp_path / "a" / "index.html"
    for name in ("table.tex", "pareto.svg", "pareto.pdf", "curves.png", "rows.csv"):
        one, other = (tmp_path / folder / name for folder in "ab")
        assert one.read_bytes() == other.read_bytes(), name


def test_arms_of_runs_are_averaged_over_seeds_and_compared_with_the_declared_baseline(
    runs, tmp_path
):
    for seed in range(3):
        finished(seed)
    out = tmp_path / "out"
    report(["toy"], out, cost="kb")
    found = json.loads((out / "results.json").read_text())
    assert (found["quality"], found["cost"]) == ("accuracy", "bytes")
    dense, small = found["rows"]
    assert dense["accuracy"] == pytest.approx({"mean": 91.0, "std": 1.0, "n": 3})
    assert (small["name"], small["bytes"]["mean"]) == ("small", 10.0)
    (against,) = found["comparisons"]
    assert found["baseline"] == "dense"
    assert against["difference"] == pytest.approx(-5)
    assert [f["on_front"] for f in found["fronts"]] == [1, 1, 2]
    assert (out / "layers.png").exists()
    latex = (out / "table.tex").read_text()
    assert r"\textbf{91.0 $\pm$ 1.0}" in latex
    assert r"\underline{86.0 $\pm$ 1.0}" in latex
    lines = (out / "rows.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(r["name"], r["seed"]) for r in rows] == [
        (n, s) for s in "012" for n in ("dense", "small")
    ]


def test_configs_are_told_apart_and_series_stay_together(runs, tmp_path):
    finished(0, bits=8)
    finished(0, bits=4, kb=(40, 5))
    study, found = make_study(["toy"])
    assert set(study.table.names) == {f"{n}, bits={b}" for n in ("dense", "small") for b in (4, 8)}
    assert set(study.series.values()) == {"dense", "small"}
    assert {front.name: front.points for front in study.fronts} == {
        "dense": 2,
        "small": 2,
        "all together": 4,
    }
    assert len(found) == 2
    open_run("other", Config(), id="x").finish({"accuracy": 0.5})
    study, _ = make_study(["toy", "other"])
    assert "other" in study.table.names
    assert "toy: dense, bits=4" in study.table.names
    assert any("Without 'bytes', and so not in the figure: other." in n for n in study.notes)
    assert study.comparisons[0] in ("toy: dense, bits=4", "toy: dense, bits=8")
    # A baseline without the quality is none.
    open_run("aside", Config()).finish({"rows": [{"name": "a", "bytes": 1}], "baseline": "a"})
    study, _ = make_study(["aside", "toy"])
    assert study.comparisons[0] in ("toy: dense, bits=4", "toy: dense, bits=8")


def test_an_error_is_better_when_it_is_small(runs):
    run = open_run("toy", Config())
    rows = [{"name": n, "test error": e, "bytes": b} for n, e, b in (("a", 0.1, 9), ("b", 0.2, 10))]
    run.finish({"rows": rows, "columns": [{"key": "test error", "label": "error"}]})
    study, _ = make_study(["toy"])
    assert (study.quality.key, study.quality.best, study.cost.best) == ("test error", "min", "min")
    assert [front.on_front for front in study.fronts] == [1, 0, 1]


def test_an_unfinished_run_is_named_with_the_command_that_finishes_it(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/experiments/__main__.py", "toy", "--seed", "1"])
    half = open_run("toy", Config(seed=1))
    half.part("dense-seed1").metrics.append([{"step": 7, "loss": 1.0}])
    finished(0)
    assert main(["report", "toy"]) == 1
    message = capsys.readouterr().err
    assert f"{half.path} is not finished: it has no summary.json" in message
    assert "last one at step 7" in message
    assert "python -m experiments toy --seed 1\n" in message
    assert "--skip-unfinished" in message
    assert main(["report", "toy", "--skip-unfinished"]) == 0
    shown = capsys.readouterr()
    assert "| dense | **90.0** | 40.0 |" in shown.out
    assert f"Left out: {half.path} is not finished" in shown.err
    with pytest.raises(RunError, match="No run is left"):
        make_study([half.path], skip_unfinished=True)


def test_a_torn_summary_is_named_and_nothing_is_written(runs, tmp_path):
    path = finished(0)
    whole = (path / "summary.json").read_text()
    (path / "summary.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"summary.json is not JSON"):
        report(["toy"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_id_with_two_contents_is_refused_and_a_copy_counts_once(runs, tmp_path):
    path = finished(0)
    copy = tmp_path / "elsewhere" / "toy" / path.name
    shutil.copytree(path, copy)
    study, found = make_study([path, copy])
    assert len(found) == 1
    assert f"{copy} is a copy of {path}, and counts once." in study.notes
    summary = json.loads((copy / "summary.json").read_text())
    summary["rows"][0]["accuracy"] = 0.1
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(
        RunError, match=r"two runs are toy/.* differ in what came out \(rows\)"
    ) as e:
        make_study([path, copy])
    assert str(path) in str(e.value)
    assert str(copy) in str(e.value)


def test_a_seed_in_two_runs_is_refused(runs):
    finished(0)
    finished(0, id="again")
    with pytest.raises(RunError, match=r"seed 0 of 'dense' is in two runs"):
        make_study(["toy"])


def test_a_result_that_no_run_has_is_answered_with_those_there_are(runs, capsys):
    finished(0)
    with pytest.raises(
        RunError, match=r"no run has the quality 'acuracy'. Did you mean 'accuracy'"
    ):
        make_study(["toy"], quality="acuracy")
    with pytest.raises(RunError, match=r"the cost 'joules'. There are: accuracy, bytes"):
        make_study(["toy"], cost="joules")
    with pytest.raises(RunError, match=r"no run recorded the metric 'x' in training"):
        make_study(["toy"], curve="x")
    assert [c.key for c in make_study(["toy"], columns=["KB"])[0].columns] == ["bytes"]
    study, _ = make_study(["toy"], baseline="dens")
    with pytest.raises(ReportError, match=r"no baseline 'dens'; there are \['dense', 'small'\]"):
        study.grids()
    assert main(["report"]) == 1
    assert "there are no runs to report on" in capsys.readouterr().err


def test_runs_are_found_by_folder_name_and_pattern(runs, monkeypatch, tmp_path):
    one, two = finished(0), finished(1)
    assert find_runs([one, "toy", str(runs), "toy/*", f"{runs}/t*"]) == [one, two]
    assert set(find_runs(["toy/*-seed1"])) == {two}
    assert set(find_runs([runs])) == {one, two}
    (one / "checkpoints").mkdir()
    (one / "checkpoints" / "config.json").write_text("{}")  # a run's own files are no run
    assert set(find_runs(["toy"])) == {one, two}
    with pytest.raises(RunError, match=r"nowhere is no run's folder.* runs of toy are found"):
        find_runs(["nowhere"])
    runs_read, notes = read_runs(find_runs(["toy"]))
    assert [run.label for run in runs_read] == [f"toy/{p.name}" for p in sorted([one, two])]
    assert notes == []


def test_rows_of_another_version_are_told_how_to_be_written_anew(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/experiments/__main__.py", "toy"])
    open_run("toy", Config()).finish({"rows": [{"arm": "ticket", "seed": 0}]})
    with pytest.raises(RunError, match=r"rows without a name[\s\S]*python -m experiments toy"):
        make_study(["toy"])
    open_run("toy", Config(), id="b").finish(arms(0, columns=[{"label": "no key"}]))
    with pytest.raises(RunError, match=r"declares a column"):
        make_study(["toy/b"])


def test_the_short_provenance_of_several_runs_names_each_once():
    hardware = {"platform": "cpu", "cpu": "A", "cores": 2, "device": "cpu"}
    base = {"commit": "a" * 40, "versions": {"jax": "1"}, "hardware": hardware}
    runs = [{**base, "date": f"2026-01-0{day}T00:00", "config_hash": f"h{day}"} for day in (2, 1)]
    runs[1] = {**runs[1], "commit": "b" * 40 + "-dirty"}
    assert brief(*runs) == {
        "effjax": "aaaaaaaaaa, bbbbbbbbbb-dirty",
        "jax": "1",
        "on": "A, 2 cores",
        "config": "h2, h1",
        "date": "2026-01-01 to 2026-01-02",
    }
    gpu = {**base, "hardware": {**hardware, "platform": "gpu", "device": "H100"}}
    assert brief(gpu)["on"] == "H100, A, 2 cores"
