"""Text for LaTeX, and a checker of tables for where no LaTeX is installed."""

import re
from collections.abc import Iterable, Iterator

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    # In LaTeX's oldest font encoding, still its default, these are other characters.
    **{c: f"${c}$" for c in "<>|"},
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{MICRO SIGN}": r"$\mu$",
    "\N{DEGREE SIGN}": r"$^\circ$",
    "\N{SUPERSCRIPT TWO}": "$^2$",
    "\N{LESS-THAN OR EQUAL TO}": r"$\le$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\ge$",
    "\N{ALMOST EQUAL TO}": r"$\approx$",
    "\N{RIGHTWARDS ARROW}": r"$\to$",
    "\N{INFINITY}": r"$\infty$",
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{GREEK SMALL LETTER BETA}": r"$\beta$",
    "\N{GREEK SMALL LETTER LAMDA}": r"$\lambda$",
    "\N{GREEK SMALL LETTER SIGMA}": r"$\sigma$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
}


def latex_escape(text: str) -> str:
    """Text as LaTeX shows it literally. What its fonts lack is written as its code point."""
    return "".join(LATEX.get(c) or (c if ord(c) < 256 else f"[U+{ord(c):04X}]") for c in text)


def latex_document(*tables: str, figures: Iterable[str] = ()) -> str:
    """Tables and figures (names of PDF files beside it) as a document that compiles by itself;
    what is wider than the page is made to fit."""
    fitted = [
        f"\\sbox0{{%\n{table}}}%\n\\ifdim\\wd0>\\linewidth"
        "\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\n"
        for table in tables
    ]
    drawn = [f"\\includegraphics{{{name}}}\n" for name in figures]
    body = "\n\\bigskip\n\n".join([*fitted, *drawn])
    return (
        "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs}\n"
        "\\usepackage{graphicx}\n\\usepackage[margin=2cm]{geometry}\n\\setlength{\\parindent}{0pt}\n"
        f"\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )


def latex_problems(text: str) -> list[str]:
    """What would keep LaTeX from compiling a table, or make it show another one; empty if nothing.

    Looks at environments, braces, dollars, special characters that are not escaped, rows' ends and
    numbers of columns. Not a LaTeX: macros are taken as they are.

    Example:
      >>> from effjax.report.latex import latex_problems
      >>> latex_problems(r"\\begin{tabular}{lr} a_b & 1 & 2 \\\\ \\end{tabular}")
      ['line 1: "_" outside of math', 'line 1: 3 columns in a tabular of 2']
    """
    lines = [_without_comment(line) for line in text.splitlines()]
    problems = list(_environments(lines))
    problems += [found for number, line in enumerate(lines, 1) for found in _specials(number, line)]
    plain = re.sub(r"\\.", "", "\n".join(lines))
    if plain.count("{") != plain.count("}"):
        problems.append(f"{plain.count('{')} opening braces and {plain.count('}')} closing ones")
    return [*problems, *_rows("\n".join(lines))]


def _without_comment(line: str) -> str:
    return re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", line)


def _environments(lines: list[str]) -> Iterator[str]:
    open_: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        for which, name in re.findall(r"\\(begin|end)\{([^}]*)\}", line):
            if which == "begin":
                open_.append((name, number))
            elif not open_:
                yield f"line {number}: \\end{{{name}}} without a beginning"
            elif (last := open_.pop())[0] != name:
                yield f"line {number}: \\end{{{name}}} ends {last[0]!r} of line {last[1]}"
    for name, number in open_:
        yield f"line {number}: \\begin{{{name}}} is never ended"


def _specials(number: int, line: str) -> Iterator[str]:
    plain = re.sub(r"\\.", "  ", line)
    if plain.count("$") % 2:
        yield f'line {number}: a "$" without its partner'
        return
    outside = re.sub(r"\$[^$]*\$", "", plain)
    for special in sorted(set(outside) & set("_^#")):
        yield f'line {number}: "{special}" outside of math'
    for character in sorted({c for c in line if ord(c) > 255}):
        yield f"line {number}: {character!r} is in no font of LaTeX's"


def _rows(text: str) -> Iterator[str]:
    for found in re.finditer(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        columns, body = _columns(found[1])
        number = 1 + text[: found.start(1)].count("\n")
        *rows, rest = re.split(r"\\\\", body)
        for row in rows:
            bare = re.sub(r"\\(top|mid|bottom)rule|\\hline", "", row)
            number += len(bare) - len(bare.lstrip("\n")) if not bare.strip() else 0
            here = number + row[: len(row) - len(row.lstrip())].count("\n")
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", bare)]
            cells = len(re.findall(r"(?<!\\)&", bare)) + 1 + sum(spans) - len(spans)
            if cells != columns:
                yield f"line {here}: {cells} columns in a tabular of {columns}"
            number += row.count("\n")
        if re.sub(r"\\(top|mid|bottom)rule|\\hline", "", rest).strip():
            last = rest.strip().splitlines()[0]
            yield f"the row that begins with {last[:30]!r} has no \\\\ at its end"


def _columns(text: str) -> tuple[int, str]:
    """How many columns {l@{}p{2cm}r} has, and what comes after it."""
    depth, end = 0, 0
    for position, character in enumerate(text):
        depth, end = depth + (character == "{") - (character == "}"), position
        if depth == 0:
            break
    spec = re.sub(r"[@!<>]\{[^{}]*\}|(?<=[pmb])\{[^{}]*\}", "", text[1:end])
    return len(re.findall("[lrcpmb]", spec)), text[end + 1 :]
