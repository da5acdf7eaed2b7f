"""Distillation on MNIST, at a size that a test has time for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from experiments import distill_mnist
from experiments.distill_mnist import ARMS, AVERAGED, ENSEMBLE, TEACHER, Config, bounded_norm
from experiments.harness.errors import ConfigError
from experiments.harness.provenance import brief
from experiments.models import mlp
from experiments.sparse_report import RESULTS


@pytest.mark.slow
def test_a_small_run_counts_errors_and_goes_on_without_training(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    sizes = {"teacher": (256, 256), "student": (32,), "epochs": 25, "batch": 32}
    rates = {"learning_rate": 3e-3, "teacher_rate": 3e-3, "temperatures": (10.0, 40.0)}
    config = Config(
        seeds=1, held_out_seeds=1, dataset="digits", shift=0, save=False, **sizes, **rates
    )
    found = distill_mnist.run(config)
    assert list(found) == list(ARMS)
    assert all(0 < errors < 90 for errors in found.values())  # of 360; guessing makes 324
    assert found[TEACHER] == found[AVERAGED] == found[ENSEMBLE]  # of one teacher, over one view
    logs = sorted(tmp_path.glob("*/*/*/metrics.jsonl"))
    assert len(logs) == 1 + 2 * 2 + 1 + 6  # held out: a teacher, two arms; a teacher, six arms
    before = [p.read_bytes() for p in logs]
    assert distill_mnist.run(config) == found
    assert [p.read_bytes() for p in logs] == before
    text = next(tmp_path.glob("*/*/report/distill_mnist.md")).read_text()
    assert "(published errors)" in text
    assert "146" in text
    assert "| 40 |" in next(tmp_path.glob("*/*/report/distill_mnist_temperature.md")).read_text()


def test_tables_are_those_of_the_results_and_temperatures_those_with_fewest_held_out_errors():
    results = json.loads((RESULTS / "distill_mnist.json").read_text())
    assert {row["name"] for row in results["rows"]} == set(ARMS)
    for stem, table in distill_mnist.tables(results).items():
        written = (RESULTS / f"{stem}.md").read_text()
        assert table.markdown(brief(results["provenance"])) == written
    for arm in distill_mnist.CHOSEN:
        by: dict[float, list[int]] = {}
        for row in results["held out"]:
            if row["name"] == arm:
                by.setdefault(row["temperature"], []).append(row["errors"])
        assert list(by) == results["config"]["temperatures"]
        assert {len(errors) for errors in by.values()} == {results["config"]["held_out_seeds"]}
        assert results["temperatures"][arm] == min(by, key=lambda t, by=by: sum(by[t]))


@pytest.mark.parametrize("temperatures", [(), (10.0, 10.0)])
def test_temperatures_that_leave_no_choice_are_an_error(temperatures):
    with pytest.raises(ConfigError, match="one, or several different ones"):
        Config(temperatures=temperatures)


def test_moves_are_those_that_a_translation_draws_from():
    image = jnp.arange(36.0).reshape(6, 6, 1)
    moves = [
        np.asarray(distill_mnist.moved({"image": image[None]}, i, 2)["image"][0]) for i in range(25)
    ]
    assert len({m.tobytes() for m in moves}) == 25
    assert np.array_equal(moves[12], image)
    translate = jax.jit(jax.vmap(ej.augment.translate(2), in_axes=(0, None)))
    drawn = np.asarray(translate(jax.random.split(jax.random.key(0), 400), image))
    assert {d.tobytes() for d in drawn} == {m.tobytes() for m in moves}


def test_published_networks_have_their_sizes():
    for hidden, parameters in (((1200, 1200), 2_395_210), ((800, 800), 1_276_810)):
        shapes, _ = jax.eval_shape(
            mlp.model(mlp.Spec(784, hidden)).init,
            jax.random.key(0),
            {"image": jnp.zeros((1, 28, 28, 1))},
        )
        assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_columns_are_bounded_and_biases_left_alone():
    params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]]), "bias": jnp.array([9.0, 9.0])}
    tx = optax.chain(optax.sgd(1.0), bounded_norm(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert np.allclose(new["kernel"], [[0.6, 0.3], [0.8, 0.4]])
    assert new["bias"].tolist() == [9, 9]


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_dropout_acts_in_training_alone(library):
    model = mlp.model(mlp.Spec(16, (32,), dropout=0.5, inputs_dropout=0.2), library)
    batch = {"image": jnp.ones((4, 4, 4, 1))}
    params, state = model.init(jax.random.key(0), batch)
    keys = jax.random.split(jax.random.key(1), 2)
    train, test = (
        [model.apply(params, state, batch, key, mode)[0] for key in keys] for mode in (True, False)
    )
    assert not np.allclose(*train)
    assert np.array_equal(*test)
