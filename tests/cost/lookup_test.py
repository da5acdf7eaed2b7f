"""The table of latencies: what is measured, once, and what is looked up; and the fitted model."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.stats import spearmanr

import effjax as ej
from effjax.cost import LatencyModel, LatencyTable, fit_latency, latency_features, lookup
from effjax.errors import SetupError


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), (2, 2))(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4)(nn.relu(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(64)(nn.Dense(64)(x))


@pytest.fixture(scope="module")
def net():
    model = ej.from_linen(Net())
    batch = {"image": jnp.ones((2, 8, 8, 1))}
    params, state = jax.eval_shape(model.init, jax.random.key(0), batch)
    return model.apply, params, batch, state


@pytest.fixture
def measured(monkeypatch):
    """The operations that were timed; each takes 1, 2, ... microseconds."""
    done = []

    def latency(calls, batch_size, samples):
        for name, call in calls.items():
            done.append(name)
            jax.block_until_ready(call())
        return {name: ej.cost.Latency(1e-6 * len(done), 0.0, 1, samples, "") for name in calls}

    monkeypatch.setattr(lookup, "latency", latency)
    return done


def test_each_operation_is_measured_once(net, measured, tmp_path):
    table = LatencyTable(tmp_path / "table.json")
    found = table.sites(*net)
    paths = ["Conv_0/kernel", "Conv_1/kernel", "Dense_1/kernel", "Dense_0/kernel"]
    assert [e.site.path for e in found] == paths
    assert len(table) == len(measured) == 3  # both dense layers are one operation
    assert found[2].seconds == found[3].seconds
    assert len({text for text in measured if "feature_group_count=4" in text}) == 1
    apply, _, _, state = net
    table.sites(*net)
    wide = {"image": jnp.ones((2, 7, 7, 1))}
    shapes = jax.eval_shape(ej.from_linen(Net()).init, jax.random.key(0), wide)
    table.sites(apply, shapes[0], wide, state)
    assert len(measured) == 4  # the later layers are as they were
    again = LatencyTable(tmp_path / "table.json")
    assert again.sites(*net) == found
    assert len(measured) == 4


def test_times_of_another_device_or_version_are_not_taken(net, measured, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    LatencyTable(path).sites(*net)
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    LatencyTable(path).sites(*net)
    assert len(measured) == 6
    assert len(json.loads(path.read_text())) == 2


def test_two_tables_on_one_file_lose_nothing(net, measured, tmp_path):
    path = tmp_path / "table.json"
    one, other = LatencyTable(path), LatencyTable(path)
    one.sites(*net)
    dense = ej.from_function(lambda params, x: x @ params["kernel"])
    other.sites(dense, {"kernel": jnp.ones((3, 5))}, {"image": jnp.ones((2, 3))})
    assert len(LatencyTable(path)) == 4
    assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == ["table.json"]


def test_scans_count_their_iterations_and_tables_their_rows(measured):
    def apply(params, model_state, batch, key, train):
        x = params["embedding"][batch["token"]]
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, params["kernel"])
        return jnp.einsum("nd,md->nm", x, x), model_state

    params = {"embedding": jnp.ones((9, 4)), "kernel": jnp.ones((3, 4, 4))}
    found = LatencyTable().sites(apply, params, {"token": jnp.zeros(5, int)})
    assert [(e.site.op, e.times) for e in found] == [
        ("gather", 1), ("dot_general", 3), ("dot_general", 1)
    ]  # fmt: skip
    features = latency_features(LatencyTable(), apply, params, {"token": jnp.zeros(5, int)})
    assert features["sites"] == 5
    assert features["macs"] == 3 * 5 * 4 * 4 + 5 * 5 * 4
    assert features["bytes"] > 0


def test_real_times_are_positive(net):
    found = LatencyTable(samples=2).sites(*net)
    assert all(entry.seconds > 0 for entry in found)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "t").write_text("[1]")
    with pytest.raises(SetupError, match="no table of latencies"):
        LatencyTable(tmp_path / "t")


def test_the_fit_is_the_best_without_negative_coefficients():
    rng = np.random.default_rng(0)
    for _ in range(5):
        columns = rng.uniform(0.1, 2, (20, 3))
        seconds = columns @ [1.0, 0.5, -0.2] + rng.uniform(0.5, 1.5, 20)
        features = [dict(zip("abc", row, strict=True)) for row in columns]
        model = fit_latency(features, seconds, "abc")
        whole = np.concatenate([np.ones((20, 1)), columns], axis=1) / seconds[:, None]
        wanted, _ = nnls(whole, np.ones(20))
        np.testing.assert_allclose([model.base, *model.coefficients.values()], wanted, atol=1e-8)


def test_the_error_by_hand():
    model = LatencyModel(1.0, {"x": 2.0})
    found = model.error([{"x": 1.0}, {"x": 2.0}, {"x": 0.5}], [2.0, 5.0, 4.0])
    assert found.mean == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert found.worst == pytest.approx(0.5)
    assert found.bias == pytest.approx(0.0)
    assert found.spearman == pytest.approx(spearmanr([3, 5, 2], [2, 5, 4]).statistic)


@pytest.mark.parametrize(
    ("features", "seconds", "use", "match"),
    [
        ([{"a": 1.0}], [1.0], ["a"], "more networks"),
        ([{"a": 1.0}] * 3, [1.0] * 2, ["a"], "one time a network"),
        ([{"a": 1.0}] * 3, [1.0] * 3, ["b"], "not among"),
        ([{"a": 1.0}] * 3, [1.0, 0.0, 1.0], ["a"], "positive"),
    ],
)
def test_what_cannot_be_fitted(features, seconds, use, match):
    with pytest.raises(SetupError, match=match):
        fit_latency(features, seconds, use)
