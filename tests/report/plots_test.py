"""Figures: what they show, that labels stay apart, that two runs write the same bytes."""

import itertools
import sys

import numpy as np
import pytest

from effjax.errors import ReportError
from effjax.report import Column, curves_plot, pareto_plot, save, summarise
from effjax.report.labels import Box

COLUMNS = (
    Column("kb", "stored size (KB)", ",.1f", "min"),
    Column("acc", "accuracy (%)", ".1f", "max", 100),
    Column("macs", "MACs", ",.0f"),
)
SIZES = {"teacher": 420, "student": 65, "+ distillation": 65, "+ pruning": 16, "+ int8": 17.5}
PROVENANCE = {"commit": "ab12cd", "jax": "0.10"}


def table(spread=0.004):
    rng = np.random.default_rng(0)
    return summarise(
        [
            {
                "name": n,
                "seed": s,
                "kb": kb,
                "acc": 0.9 + kb / 1e4 + spread * rng.normal(),
                "macs": 1,
            }
            for n, kb in SIZES.items()
            for s in range(3)
        ],
        COLUMNS,
    )


def texts(figure):
    return {t.get_text(): t for t in figure.axes[0].texts}


def extent(figure, artist):
    return Box(*artist.get_window_extent(figure.canvas.get_renderer()).extents)


def test_the_pareto_plot_names_every_point_without_overlap():
    figure = pareto_plot(table(), "kb", "acc", highlight="+ int8", provenance=PROVENANCE)
    found = texts(figure)
    assert set(SIZES) <= set(found)
    assert found["+ int8"].get_fontweight() == "bold"
    boxes = [extent(figure, found[name]) for name in SIZES]
    assert all(a.overlap(b) < 1 for a, b in itertools.combinations(boxes, 2))
    axes = extent(figure, figure.axes[0])
    assert all(box.outside(axes) < 1 for box in boxes)
    assert "ab12cd" in figure.get_supxlabel()


def test_wide_ranges_get_a_log_axis_and_narrow_ones_do_not():
    axes = pareto_plot(table(), "kb", "acc").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_the_staircase_joins_the_points_of_the_front():
    rows = [
        {"name": n, "kb": kb, "acc": acc}
        for n, kb, acc in (("a", 1, 0.5), ("b", 2, 0.7), ("c", 3, 0.6))
    ]
    axes = pareto_plot(summarise(rows, COLUMNS[:2]), "kb", "acc").axes[0]
    corners = next(
        np.column_stack(line.get_data()) for line in axes.lines if len(line.get_xdata()) > 2
    )
    bottom, right = axes.get_ylim()[0], axes.get_xlim()[1]
    np.testing.assert_allclose(corners, [(1, bottom), (1, 50), (2, 50), (2, 70), (right, 70)])
    hollow = [c.lines[0].get_markerfacecolor() == "white" for c in axes.containers]
    assert hollow == [False, False, True]


@pytest.mark.parametrize("better", [("min", "min"), ("max", "max"), ("max", "min")])
def test_any_corner_can_be_the_better_one(better):
    columns = [Column("kb", "x", best=better[0]), Column("acc", "y", best=better[1])]
    rows = [{"name": n, "kb": a, "acc": b} for n, a, b in (("a", 1, 2), ("b", 2, 1), ("c", 3, 3))]
    axes = pareto_plot(summarise(rows, columns), "kb", "acc").axes[0]
    front = {c.lines[0].get_xdata()[0] for c in axes.containers if is_filled(c)}
    assert front == {("min", "min"): {1, 2}, ("max", "max"): {3}, ("max", "min"): {2, 3}}[better]


def is_filled(container):
    return container.lines[0].get_markerfacecolor() != "white"


def test_curves_show_mean_and_band_and_keep_their_names_apart():
    steps = np.arange(5)
    runs = np.stack([steps, steps + 2.0])
    series = {name: (steps, runs + i / 100) for i, name in enumerate("abc")}
    figure = curves_plot(series, "step", "accuracy", bottom=0, provenance=PROVENANCE)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), steps + 1.0)
    assert len(axes.collections) == 3
    assert axes.get_ylim()[0] == 0
    below = curves_plot(series, "step", "accuracy", bottom=5.02).axes[0]  # an end out of sight
    assert below.get_ylim()[0] == 5.02
    boxes = [extent(figure, t) for t in axes.texts]
    assert len(boxes) == 3
    assert all(a.overlap(b) < 1 for a, b in itertools.combinations(boxes, 2))


def test_files_are_reproducible_and_carry_their_provenance(tmp_path):
    figure = pareto_plot(table(), "kb", "acc", title="Size", provenance=PROVENANCE)
    png, svg, pdf = save(figure, tmp_path / "plots" / "pareto.v1", PROVENANCE)
    assert [p.name for p in (png, svg, pdf)] == [f"pareto.v1.{s}" for s in ("png", "svg", "pdf")]
    before = png.read_bytes(), svg.read_bytes(), pdf.read_bytes()
    assert b"commit ab12cd" in before[0]
    assert b"commit ab12cd" in before[1]
    again = pareto_plot(table(), "kb", "acc", title="Size", provenance=PROVENANCE)
    save(again, tmp_path / "plots" / "pareto.v1", PROVENANCE)
    assert (png.read_bytes(), svg.read_bytes(), pdf.read_bytes()) == before
    assert b"/FontFile2" in before[2]  # TrueType, embedded
    assert b"/Type3" not in before[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kb", "loss"), "no column 'loss'"),
        (("macs", "acc"), "which end of 'macs' is better"),
    ],
)
def test_columns_that_cannot_be_plotted_are_refused(arguments, says):
    with pytest.raises(ReportError, match=says):
        pareto_plot(table(), *arguments)


def test_unknown_highlights_and_misshaped_curves_are_refused():
    with pytest.raises(ReportError, match="nothing named 'x'"):
        pareto_plot(table(), "kb", "acc", highlight="x")
    with pytest.raises(ReportError, match="no curves"):
        curves_plot({}, "step", "loss")
    with pytest.raises(ReportError, match=r"shape \(1, 3\) for 2 steps"):
        curves_plot({"a": ([0, 1], [1, 2, 3])}, "step", "loss")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'effjax\[experiments\]'"):
        pareto_plot(table(), "kb", "acc")
