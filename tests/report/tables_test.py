"""Tables over seeds, by hand."""

import csv
import io
import re

import pytest

from effjax.errors import ReportError
from effjax.report import Column, footer, latex_escape, summarise

ROWS = [
    {"name": "dense", "seed": 0, "acc": 0.90, "size": 1000, "macs": 7},
    {"name": "dense", "seed": 1, "acc": 0.92, "size": 1000, "macs": 7},
    {"name": "80%_sparse", "seed": 0, "acc": 0.90, "size": 250, "macs": 7},
    {"name": "80%_sparse", "seed": 1, "acc": 0.90, "size": 250, "macs": 7},
    {"name": "int8", "seed": 0, "acc": 0.80, "size": 300},
    {"name": "int8", "seed": 1, "acc": 0.80, "size": 300},
]
COLUMNS = (
    Column("acc", "accuracy (%)", ".1f", "max", 100),
    Column("size", "bytes", ",.0f", "min"),
    Column("macs", "MACs", ",.0f", "min"),
)
PROVENANCE = {"commit": "ab12", "versions": {"jax": "0.10"}, "empty": None, "seeds": [0, 1]}


def table():
    return summarise(ROWS, COLUMNS, caption="Two seeds.")


def test_mean_and_sample_deviation():
    cell = table().cells["dense", "acc"]
    assert cell.mean == pytest.approx(91.0)
    assert cell.std == pytest.approx(2**0.5)  # n - 1
    assert cell.n == 2


def test_markdown_by_hand():
    assert table().markdown(PROVENANCE) == (
        "| method | accuracy (%) | bytes | MACs |\n"
        "| :-- | --: | --: | --: |\n"
        "| dense | **91.0 ± 1.4** | 1,000 | 7 |\n"
        "| 80%_sparse | 90.0 | **250** | 7 |\n"
        "| int8 | 80.0 | 300 | - |\n"
        "\nTwo seeds.\n"
        "\n<sub>commit ab12 · versions.jax 0.10 · seeds 0, 1</sub>\n"
    )


def test_latex_by_hand():
    assert table().latex(PROVENANCE) == (
        "% Two seeds.\n"
        "% commit ab12 · versions.jax 0.10 · seeds 0, 1\n"
        "\\begin{tabular}{lrrr}\n"
        "\\toprule\n"
        "method & accuracy (\\%) & bytes & MACs \\\\\n"
        "\\midrule\n"
        "dense & \\textbf{91.0 $\\pm$ 1.4} & 1,000 & 7 \\\\\n"
        "80\\%\\_sparse & \\underline{90.0} & \\textbf{250} & 7 \\\\\n"
        "int8 & 80.0 & \\underline{300} & - \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_csv_has_full_precision_and_reads_back():
    text = table().csv(PROVENANCE)
    assert text.splitlines()[-1].startswith("# commit ab12")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert [row["method"] for row in rows] == ["dense", "80%_sparse", "int8"]
    assert float(rows[0]["acc_mean"]) == table().cells["dense", "acc"].mean
    assert (rows[2]["macs_mean"], rows[2]["macs_n"]) == ("", "0")


def test_html_marks_the_best_and_escapes():
    rows = [{"name": "<a>", "seed": 0, "acc": 0.5}, {"name": "b&c", "seed": 0, "acc": 0.4}]
    text = summarise(rows, COLUMNS[:1]).html()
    assert "<th>&lt;a&gt;</th>" in text
    assert "b&amp;c" in text
    assert '<td class="best">50.0</td>' in text
    assert '<td class="second">40.0</td>' in text


def test_what_looks_alike_ranks_alike():
    rows = [{"name": n, "acc": a} for n, a in (("a", 0.9001), ("b", 0.9004), ("c", 0.5))]
    assert summarise(rows, COLUMNS[:1]).ranks(COLUMNS[0]) == {"b": 1, "a": 1, "c": 2}


def test_nothing_is_marked_where_all_are_alike_or_no_end_is_better():
    assert table().ranks(COLUMNS[2]) == {}
    assert table().ranks(Column("acc", "accuracy")) == {}


def test_latex_escapes_every_special_character():
    escaped = latex_escape(r"a_b & 50% $x$ #1 {y} ~ ^ \z ±")
    assert escaped == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z $\pm$"
    )


def test_markdown_escapes_what_would_break_a_row():
    rows = [{"name": "a|b*c\nd", "acc": 0.5}]
    assert "| a\\|b\\*c d | 50.0 |" in summarise(rows, COLUMNS[:1]).markdown()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no rows"),
        ([{"seed": 0, "acc": 1}], "has no 'name'"),
        ([{"name": "a", "seed": 0, "acc": 1}] * 2, "count one run twice"),
        (
            [{"name": "a", "seed": 0, "acc": 1}, {"name": "a", "seed": 1}],
            re.escape("for seeds [0] but not for [1]"),
        ),
        ([{"name": "a", "seed": 0, "loss": 1}], "no row has 'acc'"),
    ],
)
def test_rows_that_would_mislead_are_refused(rows, says):
    with pytest.raises(ReportError, match=says):
        summarise(rows, COLUMNS[:1])


def test_the_footer_flattens_and_leaves_out_what_is_empty():
    assert footer(PROVENANCE, " | ") == "commit ab12 | versions.jax 0.10 | seeds 0, 1"
    assert footer(None) == ""
