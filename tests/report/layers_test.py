"""Bars of layers: values, error bars, what is missing."""

import pytest

from effjax.errors import ReportError
from effjax.report import layer_facts, layers_plot

PRUNED = {
    "conv/kernel": {"sparsity": [0.7, 0.9], "bits": 8},
    "head/kernel": {"sparsity": 0.5, "bits": 4},
}
DENSE = {"conv/kernel": {"sparsity": 0.0, "bits": 32}}


def widths(axes):
    return [patch.get_width() for patch in axes.patches]


def test_one_panel_a_metric_with_means_and_deviations():
    figure = layers_plot({"pruned": PRUNED}, title="Layers", provenance={"commit": "ab12"})
    sparsity, bits = figure.axes
    assert widths(sparsity) == pytest.approx([80, 50])
    assert widths(bits) == [8, 4]
    assert [t.get_text() for t in sparsity.get_yticklabels()] == ["conv", "head"]
    assert [t.get_text() for t in sparsity.texts] == ["80", "50"]
    (bar,) = sparsity.containers[1].lines[2]  # the only error bar: one value has no deviation
    assert bar.get_segments()[0][:, 0] == pytest.approx([80 - 200**0.5, 80 + 200**0.5])
    assert "ab12" in figure.get_supxlabel()


def test_models_side_by_side_have_a_legend_and_gaps():
    figure = layers_plot({"dense": DENSE, "pruned": PRUNED})
    assert len(figure.axes[1].patches) == 3
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["dense", "pruned"]
    colours = [patch.get_facecolor() for patch in figure.axes[1].patches]
    assert colours[0] != colours[1] == colours[2]


def test_facts_of_a_footprint_leave_out_what_does_not_multiply():
    leaf = {"path": "a/kernel", "parameters": 100, "nonzeros": 25, "bits": 8, "op": "dense"}
    bias = {"path": "a/bias", "parameters": 10, "nonzeros": 10, "bits": 32, "op": ""}
    assert layer_facts({"leaves": [bias, leaf]}) == {"a/kernel": {"sparsity": 0.75, "bits": 8}}
    assert layer_facts({"leaves": [bias]}) == {"a/bias": {"sparsity": 0.0, "bits": 32}}


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({}, "no layers"),
        ({"a": {}}, "no layers"),
        ({str(i): DENSE for i in range(8)}, "8 models are more than the 7 colours"),
        ({"a": {"conv": {"bits": 8}}}, "no layer has 'sparsity'"),
    ],
)
def test_what_cannot_be_drawn(models, says):
    with pytest.raises(ReportError, match=says):
        layers_plot(models)
