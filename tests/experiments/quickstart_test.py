"""The quickstart end to end on a few steps: every arm, every file, and going on after a stop."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import effjax as ej
from effjax.select import leaves
from experiments import quickstart
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.runs import open_run

TINY = quickstart.Config(seeds=1, epochs=2, batch=200, latency_samples=2, learning_rate=1e-2)
STEPS = 2 * (1150 // 200)
ARMS = [
    "teacher",
    "student",
    "+ distillation",
    "+ pruning 80%",
    "+ int8",
    "+ width search",
    "all four",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(tmp_path_factory.mktemp("runs")))
        results = quickstart.run(TINY)
        yield results, open_run("quickstart", TINY)


def test_every_arm_is_trained_measured_and_reported(finished):
    results, run = finished
    summary = run.summary()
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ARMS
    assert all(0.2 < row["accuracy"] <= 1 for row in rows.values())
    assert all(row["latency"] > 0 for row in rows.values())
    assert summary["provenance"]["hardware"]["cores"] >= 1
    student, pruned, four = rows["student"], rows["+ pruning 80%"], rows["all four"]
    # Kernels: 144 + 2304 + 256 * 64 + 640; exactly 80% of each is removed.
    kernels = (144, 2304, 16384, 640)
    removed = sum(round(0.8 * n) for n in kernels)
    zeros = pruned["parameters"] - pruned["nonzeros"]
    assert removed <= zeros <= removed + 200  # biases may be zero as well
    assert student["parameters"] == pruned["parameters"] == sum(kernels) + 16 * 6 + 64 + 10
    assert four["bytes"] < pruned["bytes"] < student["bytes"]
    assert rows["+ int8"]["bytes"] < 0.3 * student["bytes"]
    assert rows["+ width search"]["macs"] <= student["macs"]
    assert results["report"].endswith("index.html")


def test_tables_figures_and_page_are_written(finished):
    _, run = finished
    folder = run.path / "report"
    names = {path.name for path in folder.iterdir()}
    assert {"table.md", "table.tex", "table.csv", "index.html"} <= names
    assert {
        f"{n}.{s}" for n in ("pareto", "pareto_macs", "curves") for s in ("png", "svg")
    } <= names
    page = (folder / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(name in page for name in ARMS)
    assert "jax 0." in (folder / "table.md").read_text()
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_all_four_are_one_step_that_a_stopped_run_takes_again(finished, capfd):
    """Cut back to a checkpoint within an arm, the run computes the same bits."""
    _, run = finished
    arm = quickstart.make_arms(TINY, STEPS)[-1]
    assert [name for name, _ in arm.transform.members] == ["nas", "prune", "quant", "kd"]
    digits = quickstart.load(TINY)
    teacher = quickstart.make_arms(TINY, STEPS)[0].train(run, 0, digits, None)
    frozen = ej.distill.Teacher(teacher.vars.model, teacher.model_state)
    done = arm.train(run, 0, digits, frozen)  # restored, not trained
    part = run.path / arm.part(0)
    metrics = (part / "metrics.jsonl").read_bytes()
    shutil.rmtree(part / "checkpoints" / str(STEPS))
    again = arm.train(run, 0, digits, frozen)
    assert f"going on from step {STEPS // 2} of {STEPS}" in capfd.readouterr().err
    for (name, a), b in zip(leaves(done).items(), jax.tree.leaves(again), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (part / "metrics.jsonl").read_bytes() == metrics

    masks = again.transform["prune"]["mask"]
    for path, mask in masks.items():
        assert int(np.sum(~np.asarray(mask))) == round(0.8 * mask.size), path
        assert not np.any(np.asarray(leaves(again.vars.model)[path])[~np.asarray(mask)])


def test_the_shipped_network_computes_what_the_masked_one_computes(finished):
    _, run = finished
    arm = next(a for a in quickstart.make_arms(TINY, STEPS) if a.name == "+ width search")
    digits = quickstart.load(TINY)
    state = arm.train(run, 0, digits, None)
    space = ej.nas.width_space(
        state.vars.model, quickstart.cnn.width_groups(arm.spec), quickstart.WIDTHS
    )
    narrow = ej.nas.subnet(state, space.smallest)
    spec = quickstart.cnn.narrowed(arm.spec, space.channels(space.smallest).tolist())
    shipped = arm.ship(narrow, spec)
    assert (spec.stages, spec.hidden) == ((8,), 32)
    small, _ = quickstart.cnn.model(spec).apply(
        shipped.params, shipped.model_state, digits.test, jax.random.key(0), False
    )
    ctx = ej.Ctx(state.step, state.key, train=False)
    whole = ej.forward(
        arm.model.apply,
        arm.transform,
        narrow.vars,
        narrow.model_state,
        narrow.transform,
        digits.test,
        ctx,
    ).outputs
    np.testing.assert_allclose(small, whole, rtol=1e-4, atol=1e-4)


def test_the_splits_are_apart_and_padding_does_not_count():
    digits = quickstart.load(TINY)
    images = [
        np.asarray(b["image"])[np.asarray(b["valid"])] for b in (digits.validation, digits.test)
    ]
    assert [len(x) for x in images] == [287, 360]
    assert digits.batches(0).examples == 1150
    assert digits.validation["image"].shape == digits.test["image"].shape


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"bits": 1}, "bits is 1"),
        ({"batch": 2000}, "batch is 2000"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        quickstart.Config(**change)


def test_a_folder_of_another_config_is_refused(finished):
    _, run = finished
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["config"]["epochs"] == TINY.epochs
    with pytest.raises(RunError, match="begun with another config"):
        open_run("quickstart", quickstart.Config(epochs=3), id=run.path.name)
