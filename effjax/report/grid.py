"""Cells of text, ranked, written as Markdown, LaTeX and HTML."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from effjax.report.footer import footer
from effjax.report.latex import latex_escape

MARKS = {1: r"\textbf{%s}", 2: r"\underline{%s}"}
CLASSES = {1: ' class="best"', 2: ' class="second"'}


class Grid(NamedTuple):
    """Text in rows and columns; the first column names the rows.

    head: one text a column.
    rows: as many texts each.
    ranks: 1 (bold) or 2 (underlined) by (row, column).
    caption: underneath.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    ranks: Mapping[tuple[int, int], int] = {}
    caption: str = ""

    def markdown(self, provenance: Mapping[str, Any] | None = None) -> str:
        """GitHub Markdown; rank 1 bold."""
        lines = [_markdown_row([_markdown_escape(text) for text in self.head])]
        lines.append(_markdown_row([":--", *["--:"] * (len(self.head) - 1)]))
        for i, row in enumerate(self.rows):
            escaped = [_markdown_escape(text) for text in row]
            lines.append(
                _markdown_row(
                    [
                        f"**{text}**" if self.ranks.get((i, j)) == 1 else text
                        for j, text in enumerate(escaped)
                    ]
                )
            )
        lines += ["", self.caption] if self.caption else []
        lines += ["", f"<sub>{html.escape(footer(provenance))}</sub>"] if provenance else []
        return "\n".join(lines) + "\n"

    def latex(self, provenance: Mapping[str, Any] | None = None) -> str:
        """A `tabular` for `\\usepackage{booktabs}`; rank 1 bold, rank 2 underlined."""
        lines = [f"% {line}" for line in (self.caption, footer(provenance)) if line]
        lines += [r"\begin{tabular}{l" + "r" * (len(self.head) - 1) + "}", r"\toprule"]
        lines += [" & ".join(map(latex_escape, self.head)) + r" \\", r"\midrule"]
        for i, row in enumerate(self.rows):
            cells = (
                MARKS.get(self.ranks.get((i, j), 0), "%s")
                % latex_escape(_minus(text) if j else text)
                for j, text in enumerate(row)
            )
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def html(self) -> str:
        """A `<table>`; cells of rank 1 and 2 carry the classes "best" and "second"."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.head)
        body = []
        for i, (name, *row) in enumerate(self.rows):
            cells = "".join(
                f"<td{CLASSES.get(self.ranks.get((i, j), 0), '')}>{html.escape(text)}</td>"
                for j, text in enumerate(row, 1)
            )
            body.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return (
            f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )


def _minus(text: str) -> str:
    """Hyphens before numbers as minus signs."""
    return re.sub(r"(^|[\[ ])-(?=\d)", "\\1\N{MINUS SIGN}", text)


def _markdown_escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
