"""RigL on LeNet end to end on digits: densities, what is left of the network, what is written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.select import leaves
from experiments import rigl_lenet as rigl
from experiments import sparse_report
from experiments.models import mlp

TINY = rigl.Config(seeds=1, epochs=2, every=4, batch=50, sparsity=0.9, dataset="digits")
SIZES = (64 * 300, 300 * 100, 1000)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rigl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(folder / "runs"))
        patch.setattr(sparse_report, "RESULTS", folder / "results")
        patch.setattr(sparse_report, "IMAGES", folder / "images")
        shown = rigl.run(TINY)
        assert list(shown) == [rigl.DENSE, *rigl.ARMS]
    for stem in ("rigl_lenet_pixels", "rigl_lenet_curves"):
        assert (folder / "images" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "31,914" in (folder / "results" / "rigl_lenet.md").read_text()
    return json.loads((folder / "results" / "rigl_lenet.json").read_text())


@pytest.mark.slow
def test_each_arm_has_its_density(results):
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        rigl.DENSE,
        rigl.RIGL,
        rigl.SET,
        rigl.STATIC,
        rigl.RIGL_ERK,
        rigl.STATIC_ERK,
    ]
    kept = round(0.1 * SIZES[0]) + round(0.19 * SIZES[1]) + SIZES[2]
    for name in (rigl.RIGL, rigl.SET, rigl.STATIC):
        # What is kept, less what no longer reaches the output.
        assert 1 - kept / sum(SIZES) - 1e-9 <= rows[name]["sparsity"] < 0.9
    for name in (rigl.RIGL_ERK, rigl.STATIC_ERK):
        assert rows[name]["sparsity"] == pytest.approx(0.87, abs=5e-3)
    assert rows[rigl.DENSE]["sparsity"] == 0
    assert rows[rigl.STATIC]["bytes"] < rows[rigl.DENSE]["bytes"] / 3
    assert all(0 < row["error"] < 0.9 for row in rows.values())


@pytest.mark.slow
def test_connections_of_pixels_move_and_stay_as_many(results):
    for name in (rigl.RIGL, rigl.SET):
        start, end = (np.asarray(results["pixels"][name][when][0]) for when in ("start", "end"))
        assert start.sum() == end.sum() == round(0.1 * SIZES[0])
        assert not np.array_equal(start, end)
    static = results["pixels"][rigl.STATIC]
    assert static["start"] == static["end"]


@pytest.mark.slow
def test_training_flops_follow_the_papers_formula(results):
    rows = {row["name"]: row for row in results["rows"]}
    kept = round(0.1 * SIZES[0]) + round(0.19 * SIZES[1]) + SIZES[2]
    sparse, dense, between = 2 * kept, 2 * sum(SIZES), TINY.every - 1
    wanted = (3 * sparse * between + 2 * sparse + dense) / (between + 1) / (3 * dense)
    assert rows[rigl.RIGL]["train flops"] == pytest.approx(wanted, rel=1e-6)
    assert rows[rigl.STATIC]["train flops"] == pytest.approx(sparse / dense, rel=1e-6)
    assert rows[rigl.DENSE]["train flops"] == 1


def test_the_network_that_is_left_computes_the_same():
    model = mlp.model(mlp.Spec(inputs=20, hidden=(12, 8), classes=3))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 20)).astype(np.float32)
    params, _ = model.init(jax.random.key(0), {"image": jnp.asarray(images)})
    params = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), params)
    for path, leaf in leaves(params).items():
        if path.startswith("dense"):
            leaf *= rng.random(leaf.shape) < 0.12 if path.endswith("kernel") else 1.0
    small, pixels = rigl.shrunk(params)
    assert len(pixels) == small["dense_0"]["kernel"].shape[0] < 20
    assert small["dense_1"]["kernel"].shape[0] < 12
    assert small["dense_1"]["kernel"].shape[1] < 8
    for name in ("dense_0", "dense_1"):  # every pixel and unit that is left has a connection
        kernel = small[name]["kernel"] != 0
        assert kernel.any(axis=0).all()
        assert kernel.any(axis=1).all()

    def outputs(params, images):
        x = images
        for name in ("dense_0", "dense_1"):
            x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    wanted, found = outputs(params, images), outputs(small, images[:, pixels])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_unit_that_nothing_comes_in_to_goes_into_the_next_biases():
    params = {
        "dense_0": {"kernel": np.array([[1.0, 0.0], [0.0, 0.0]]), "bias": np.array([0.0, 2.0])},
        "dense_1": {"kernel": np.array([[1.0], [3.0]]), "bias": np.array([1.0])},
        "head": {"kernel": np.array([[1.0]]), "bias": np.array([0.0])},
    }
    params = jax.tree.map(np.float32, params)
    small, pixels = rigl.shrunk(params)
    assert pixels.tolist() == [0]
    assert small["dense_0"]["kernel"].tolist() == [[1.0]]
    assert small["dense_1"]["bias"].tolist() == [7.0]
    assert ej.footprint(small).totals.parameters == 6
