"""The page of benchmarks is that of the committed results, and names what is not measured."""

import json

from experiments.bench import export, tables


def test_the_committed_pages_are_those_of_the_committed_results():
    text, missing = tables.page("cpu")
    assert (tables.RESULTS / "bench_cpu.md").read_text() == text
    assert not missing
    rows = json.loads((tables.RESULTS / "bench_export_cpu.json").read_text())["rows"]
    assert (tables.RESULTS / "bench_export_cpu.md").read_text() == export.table(rows)


def test_what_is_not_measured_is_named():
    text, missing = tables.page("abacus")
    others = "file_sizes, augment, latency_table"
    assert missing == list(tables.PAGES)
    assert f"Not measured on this platform: quantize, integer, {others}." in text
