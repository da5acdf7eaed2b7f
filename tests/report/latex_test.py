"""LaTeX: tables that compile, and a checker that finds those that would not."""

import shutil
import subprocess

import pytest

from effjax.report import Column, latex_document, latex_escape, latex_problems, summarise

NASTY = r"a_b & 50% $x$ #1 {y} ~ ^ \z ± × ≤ < > | α → é 漢"  # noqa: RUF001


def tables():
    names = ("dense", NASTY, "+ int8")
    rows = [
        {"name": n, "seed": s, "acc": 0.9 - i / 10 + s / 100, "kb": 10.0 - i}
        for i, n in enumerate(names)
        for s in range(2)
    ]
    columns = [Column("acc", "accuracy (%)", ".1f", "max", 100), Column("kb", "KB & µ", best="min")]
    table = summarise(rows, columns, caption="Two seeds & 100% of them.\nSecond line")
    return table.latex({"commit": "ab12_cd", "note": "50% ± 1"})


def test_characters_that_latex_has_not_are_shown_by_their_code():
    assert latex_escape("漢 < é") == "[U+6F22] $<$ é"


def test_tables_compile_or_pass_the_checker(tmp_path):
    text = latex_document(tables(), tables())
    assert latex_problems(text) == []
    if _has_booktabs():
        (tmp_path / "table.tex").write_text(text, encoding="utf-8")
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / "table.pdf").read_bytes().startswith(b"%PDF")


def _has_booktabs():
    """Whether there is a LaTeX that knows the packages of a table."""
    if not shutil.which("pdflatex") or not shutil.which("kpsewhich"):
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


GOOD = "\\begin{tabular}{lrr}\n\\toprule\na & b & c \\\\\n\\midrule\nx\\_y & 1\\% & 2 \\\\\n"
END = "\\bottomrule\n\\end{tabular}\n"


def test_a_good_table_has_no_problems():
    assert latex_problems(GOOD + END) == []
    fancy = "\\begin{tabular}{@{}l|p{2cm}>{\\bfseries}r@{}}\\multicolumn{2}{c}{a} & $b_1$ \\\\"
    assert latex_problems(fancy + "\\end{tabular} % a_b {") == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (GOOD, "line 1: \\begin{tabular} is never ended"),
        (GOOD + END + "\\end{table}\n", "line 8: \\end{table} without a beginning"),
        ("\\begin{table}" + GOOD + "\\end{table}", "line 6: \\end{table} ends 'tabular' of line 1"),
        (GOOD + "x_y & 1 & 2 \\\\\n" + END, 'line 6: "_" outside of math'),
        (GOOD + "x & #1 & 2 \\\\\n" + END, 'line 6: "#" outside of math'),
        (GOOD + "x & $1 & 2 \\\\\n" + END, 'line 6: a "$" without its partner'),
        (GOOD + "x & 1 \\\\\n" + END, "line 6: 2 columns in a tabular of 3"),
        (GOOD + "x & 1 & 2 & 3 \\\\\n" + END, "line 6: 4 columns in a tabular of 3"),
        (GOOD + "x & 50% & 2 \\\\\n" + END, "the row that begins with 'x & 50' has no \\\\"),
        (GOOD + "x & \\textbf{1 & 2 \\\\\n" + END, "4 opening braces and 3 closing ones"),
        (GOOD + "x & 漢 & 2 \\\\\n" + END, "line 6: '漢' is in no font"),
    ],
)
def test_broken_tables_are_found(broken, says):
    assert any(says in problem for problem in latex_problems(broken)), latex_problems(broken)
