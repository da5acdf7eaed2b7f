"""Proxies and DARTS on a table: what is written from tiny runs on digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nas import Table, nasbench201
from effjax.nas.tabular import OPERATIONS
from effjax.select import map_named
from experiments import nas_darts, nas_proxies, sparse_report
from experiments.harness import data
from experiments.harness.errors import ConfigError
from experiments.models import nasbench201 as bench


def toy(_):
    """Cells are better by their 3x3 convolutions."""
    space = nasbench201()
    genes = space.enumerate()
    value = 80.0 + 2 * (genes == 3).sum(axis=1)
    return Table(space, value[:, None], np.full(len(genes), 50.0))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sparse_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sparse_report, "IMAGES", tmp_path / "images")
    for module in (nas_proxies, nas_darts):
        monkeypatch.setattr(module, "load_table", toy)
    return tmp_path


def fake(spec, names):
    """A scorer that counts 3x3 convolutions, and has no score for none."""

    def scores(edges, *_):
        threes = float(edges[:, OPERATIONS.index("conv3x3")].sum())
        return {name: np.float32(threes or np.nan) for name in names}

    return scores


def test_proxies_are_compared_and_go_on_where_they_stopped(folders, monkeypatch):
    config = nas_proxies.Config(cells=40, again=30, batch=8, pixels=4, width=2, dataset="digits")
    monkeypatch.setattr(nas_proxies, "scorer", fake)
    shown = nas_proxies.run(config)
    assert shown["snip"].startswith("1.00 [1.00, 1.00]")
    found = json.loads((folders / "results" / "nas_proxies.json").read_text())
    assert {row["name"] for row in found["rows"]} == {*nas_proxies.ORDER, *nas_proxies.SIZES}
    missing = {row["without"] for row in found["rows"] if row["name"] == "zen"}
    assert missing != {0}
    assert "| synflow |" in (folders / "results" / "nas_proxies.md").read_text()
    assert (folders / "images" / "nas_proxies.png").read_bytes().startswith(b"\x89PNG")

    def never(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(nas_proxies, "scorer", lambda *_: never)
    assert nas_proxies.run(config) == shown  # from the records alone


def test_sizes_and_images():
    genes = np.array([[3, 3, 3, 1, 3, 2], [0, 0, 0, 0, 0, 0]])
    found = nas_proxies.sizes(genes)
    assert found["parameters"].tolist() == [1_073_466, 73_306]
    # 15 cells, 32 x 32 pixels of 16 x 16 channels or as much: four 3x3 and one 1x1.
    assert found["MACs"].tolist() == [15 * 32 * 32 * 16 * 16 * (4 * 9 + 1), 0]
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    assert data.shrunk(image, 2)[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    with pytest.raises(ConfigError, match="no equal squares"):
        data.shrunk(image, 3)
    with pytest.raises(ConfigError, match="at most that"):
        nas_proxies.Config(cells=10, again=11)
    with pytest.raises(ConfigError, match=r"no proxies \['magic'\]"):
        nas_proxies.Config(proxies=("magic",))
    assert nas_proxies.Config(proxies=("zen",)).programs() == {"-more": ("zen",)}


@pytest.mark.slow
def test_every_proxy_scores_the_real_network():
    spec = bench.Spec(width=2, cells=1)
    scores = nas_proxies.scorer(spec, nas_proxies.ORDER)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32),
        "label": jnp.arange(6) % 10,
    }
    params, state = jax.jit(bench.model(spec).init)(jax.random.key(0), batch)
    for cell in ((3, 3, 3, 1, 3, 2), (0, 0, 0, 0, 0, 0)):
        found = scores(jnp.asarray(bench.one_hot(cell)), params, state, batch, jax.random.key(1))
        assert set(found) == set(nas_proxies.ORDER)
        if cell[0]:
            assert all(np.isfinite(x) for x in found.values())
        else:  # nothing reaches the outputs
            assert found["snip"] == pytest.approx(0, abs=1e-6)
            assert not np.isfinite(found["jacob_cov"])


# Of the network drawn below: what https://github.com/SamsungLabs/zero-cost-nas (at a43bfbc, in
# PyTorch 2.14, on CPU) gives for the same weights and images, with the biases of its cells 0.
REFERENCE = {
    (3, 1, 2, 4, 3, 2): {
        "snip": 91.40376, "grad_norm": 89.26808, "grasp": -412.58148, "fisher": 30.162155,
    },
    (0, 3, 0, 2, 1, 3): {
        "snip": 142.84677, "grad_norm": 126.53013, "grasp": -436.42017, "fisher": 58.092525,
    },
}  # fmt: skip


@pytest.mark.slow
def test_scores_are_those_of_the_proxies_authors_code():
    spec = bench.Spec(width=2, cells=5)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(8, 8, 8, 3)), jnp.float32),
        "label": jnp.arange(8),
    }
    shapes, stats = jax.eval_shape(bench.model(spec).init, jax.random.key(0), batch)

    def draw(name, like):
        size = 0.3 if name.endswith("kernel") else 0.0
        first = 1.0 if name.endswith("scale") else 0.0
        return jnp.asarray(size * rng.normal(size=like.shape) + first, jnp.float32)

    params = map_named(draw, shapes)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats)
    scores = nas_proxies.scorer(spec, ("snip", "grad_norm", "grasp", "fisher"))
    for cell, wanted in REFERENCE.items():
        found = scores(jnp.asarray(bench.one_hot(cell)), params, state, batch, jax.random.key(1))
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-3), (cell, name)


def test_darts_plus_ends_before_the_second_skip_connection():
    looks = [{"skips": skips} for skips in (0, 1, 1, 2, 0, 6)]
    assert nas_darts.stop(looks) == 3
    assert nas_darts.stop(looks[:3]) == 3
    assert nas_darts.stop(looks[3:]) == 2  # the first look counts
    assert nas_darts.stop(looks[-1:]) == 1


def test_searches_that_there_are_not():
    with pytest.raises(ConfigError, match=r"arms are .'PC-DARTS'.; there are"):
        nas_darts.Config(arms=("DARTS", "PC-DARTS"))


def test_more_cells_a_stage_are_written_beside_the_other_results():
    assert nas_proxies.stem(1) == "nas_proxies"
    assert nas_proxies.stem(5) == "nas_proxies_depth5"


def test_proxies_that_loops_over_cells_have_not_are_refused():
    with pytest.raises(ConfigError, match=r"depth is 5 and the proxies have \['naswot', 'zen'\]"):
        nas_proxies.Config(depth=5, proxies=("snip", "zen", "naswot"))
    assert nas_proxies.Config(depth=5, proxies=("snip", "fisher")).depth == 5


@pytest.mark.slow
def test_searches_are_looked_up_and_written(folders):
    small = {"batch": 4, "images": 64, "width": 2, "depth": 1, "pixels": 4, "dataset": "digits"}
    config = nas_darts.Config(tuple(nas_darts.ARMS), seeds=1, steps=4, every=2, **small)
    shown = nas_darts.run(config)
    assert set(shown) == {*nas_darts.ARMS, nas_darts.STOPPED}
    found = json.loads((folders / "results" / "nas_darts.json").read_text())
    for row in found["rows"]:
        assert row["steps"] in ([2, 4], [2]) if row["name"] == "DARTS+" else row["steps"] == [2, 4]
        genes = [int(digit) for digit in row["cell"]]
        assert row["final"] == 80 + 2 * genes.count(3)
        assert row["final_skips"] == genes.count(1)
    assert (folders / "images" / "nas_darts.png").read_bytes().startswith(b"\x89PNG")
