"""A study: what is drawn of which names, and a folder that is whole."""

import json

import pytest

from effjax.errors import ReportError
from effjax.report import Column, Study, fronts, fronts_grid, latex_problems, write_report
from effjax.report.canvas import legend_columns

ACC = Column("acc", "test accuracy (%)", ".1f", "max", 100)
KB = Column("kb", "size (KB)", ",.1f", "min")
SOURCE = {"effjax": "ab12cd34ef", "date": "2026-01-02"}


def rows(methods=2, levels=1, seeds=3):
    return [
        {
            "name": f"method {m} at {level}",
            "series": f"method {m}",
            "seed": s,
            "acc": 0.9 - 0.1 * level - 0.02 * m + 0.01 * s,
            "kb": 100.0 / (1 + level) + m,
            "layers": {"a/kernel": {"sparsity": 0.1 * level, "bits": 32 if m else 8}},
        }
        for m in range(methods)
        for level in range(levels)
        for s in range(seeds)
    ]


def test_fronts_are_shares_of_the_box_worked_by_hand():
    # Worst corner (4.2, 0.68), best (2, 0.9): boxes of 0.2 x 1 and 2.2 x 0.1 in one of 2.2 x 0.22.
    points = {"dense": (4, 0.9), "sparse": (2, 0.8), "worse": (4, 0.7)}
    found = fronts(
        [{"name": n, "seed": 0, "kb": k, "acc": a} for n, (k, a) in points.items()], KB, ACC
    )
    volumes = {one.name: one.volume.mean for one in found}
    box = 2.2 * 0.22
    assert volumes["dense"] == pytest.approx(100 * 0.2 * 0.22 / box)
    assert volumes["sparse"] == pytest.approx(100 * 2.2 * 0.12 / box)
    assert volumes["all together"] == pytest.approx(100 * (2.2 * 0.12 + 0.2 * 0.1) / box)
    lost = {one.name: one.lost for one in found}
    assert lost["dense"] == pytest.approx(100 * 0.2 * 0.1 / box)
    assert lost["worse"] == pytest.approx(0)
    grid = fronts_grid(found, KB, ACC)
    assert grid.rows[-1] == ["all together", "3", "2", f"{volumes['all together']:.1f}", "-"]


def test_a_wide_cost_is_taken_logarithmically_and_seeds_give_a_deviation():
    # 1, 10 and 100 KB lie evenly: halfway is half of the axis, before the margin of a tenth.
    points = [("a", 1, 0.5), ("b", 10, 0.5), ("c", 100, 0.5)]
    found = fronts([{"name": n, "seed": 0, "kb": k, "acc": a} for n, k, a in points], KB, ACC)
    shares = {one.name: one.volume.mean for one in found}
    assert shares["b"] == pytest.approx(shares["a"] * (0.5 + 0.1) / (1 + 0.1))
    seeds = fronts(rows(methods=1), KB, ACC)
    assert seeds[0].volume.n == 3
    assert seeds[0].volume.std > 0


def test_series_without_a_seed_in_common_count_by_their_means():
    some = rows(methods=1, levels=2, seeds=1)
    some[1]["seed"] = 7
    assert [one.volume.n for one in fronts(some, KB, ACC)] == [0, 0]


def test_fronts_refuse_what_has_no_order():
    with pytest.raises(ReportError, match="which end of cost"):
        fronts(rows(), KB._replace(best=None), ACC)
    with pytest.raises(ReportError, match="no row has both 'kb' and 'x'"):
        fronts(rows(), KB, ACC._replace(key="x"))
    with pytest.raises(ReportError, match="not finite"):
        fronts([{"name": "a", "kb": float("nan"), "acc": 1.0}], KB, ACC)


def test_few_names_are_labelled_and_many_are_series_with_a_legend():
    few = Study(rows(2, 2), [ACC, KB], ACC, KB)
    labels = {t.get_text() for t in few.figures(SOURCE)["pareto"][0].axes[0].texts}
    assert {"method 0 at 0", "method 1 at 1"} <= labels
    lines = Study(rows(2, 3), [ACC, KB], ACC, KB).figures(SOURCE)["pareto"][0]
    assert [t.get_text() for t in lines.legends[0].get_texts()] == ["method 0", "method 1"]
    many = Study(rows(3, 5), [ACC, KB], ACC, KB)
    figure = many.figures(SOURCE)["pareto"][0]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "method 0",
        "method 1",
        "method 2",
    ]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    legend, axes, footer = (
        artist.get_window_extent(renderer)
        for artist in (figure.legends[0], figure.axes[0], figure._supxlabel)
    )
    assert legend.y0 >= axes.y1
    assert footer.y1 <= axes.y0
    assert footer.x1 <= figure.bbox.x1
    assert legend.x1 <= figure.bbox.x1
    assert many.shown() == ["method 0 at 4", "method 1 at 4", "method 2 at 4"]


def test_curves_and_layers_are_shared_out_among_figures_and_dense_ones_left_out():
    curves = {r["name"]: ([1, 2, 3, 4], [[0.1, 0.5, 0.7, 0.8]] * 2) for r in rows(3, 2)}
    study = Study(rows(3, 2), [ACC, KB], ACC, KB, curves=curves, curve=ACC)
    figures = study.figures(SOURCE)
    assert set(figures) == {"pareto", "curves_1", "curves_2", "layers_1", "layers_2"}
    drawn = " ".join(words for stem, (_, words) in figures.items() if "layers" in stem)
    assert "method 0 at 0" in drawn  # dense, but 8 bits
    assert "method 1 at 1" in drawn
    assert "method 1 at 0" not in drawn  # all zeros and 32s
    low, _ = figures["curves_1"][0].axes[0].get_ylim()
    assert 60 < low < 70  # the first half is cut off: 70 to 80 and a tenth


def test_long_names_of_curves_go_into_a_legend():
    name = "a rather long name of one method"
    shown = [{**r, "name": name} for r in rows(1)]
    figure = Study(shown, [ACC], curves={name: ([1, 2], [[0.1, 0.2]])}, curve=ACC).figures(SOURCE)
    assert [t.get_text() for t in figure["curves"][0].legends[0].get_texts()] == [name]
    assert legend_columns(3.5, 3, 10) == 3
    assert legend_columns(3.5, 3, 30) == 1


def test_the_folder_is_written_after_all_figures_are_made(tmp_path):
    bad = Study(rows(2), [ACC, KB], ACC, KB, baseline="nobody")
    with pytest.raises(ReportError, match="no baseline 'nobody'"):
        write_report(tmp_path / "out", bad, SOURCE)
    assert not (tmp_path / "out").exists()


def test_the_folder_holds_everything_at_full_precision(tmp_path):
    runs = {"toy/a": {"commit": "c" * 40, "versions": {"jax": "9"}, "date": "2026-01-02"}}
    study = Study(rows(2), [ACC, KB], ACC, KB, "method 0", title="A & B", notes=["mind <this>"])
    page = write_report(tmp_path, study, SOURCE, runs)
    text = page.read_text()
    for wanted in ("<h1>A &amp; B</h1>", "mind &lt;this&gt;", "cccccccccc", "2026-01-02", "Welch"):
        assert wanted in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rows"][0]["acc"] == pytest.approx({"mean": 91.0, "std": 1.0, "n": 3})
    assert len(found["seeds"]) == 6
    assert found["provenance"]["runs"] == runs
    assert found["baseline"] == "method 0 at 0"
    assert latex_problems((tmp_path / "report.tex").read_text()) == []
    assert r"\includegraphics{pareto.pdf}" in (tmp_path / "report.tex").read_text()
    assert "![" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_a_study_without_quality_is_a_table_alone(tmp_path):
    plain = [{"name": "a", "seed": 0, "kb": 1.0}]
    write_report(tmp_path, Study(plain, [KB]), SOURCE)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("index.html", "report.md", "report.tex", "results.json", "rows.csv"),
        *("table.csv", "table.md", "table.tex"),
    }
    with pytest.raises(ReportError, match="no quality and cost"):
        _ = Study(plain, [KB]).axes
