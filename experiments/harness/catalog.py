"""Which experiments there are: found by folder, read without importing them.

An experiment is a module below `experiments/` with a docstring, a dataclass `Config` and a function
`run(config) -> dict`. The docstring's first line says what it is; a line "Cost: ..." what it takes.
"""

import ast
import difflib
import re
from pathlib import Path
from typing import NamedTuple

from experiments.harness.errors import ExperimentError

_NOT_EXPERIMENTS = {"harness", "models"}


class Entry(NamedTuple):
    """One experiment, as the list shows it."""

    name: str  # "quickstart", "bench.prune"
    title: str
    cost: str
    path: Path


def entries(root: Path | None = None) -> list[Entry]:
    """The experiments below a folder, by default this package's, in order of name."""
    root = root or Path(__file__).resolve().parents[1]
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in _NOT_EXPERIMENTS or any(part.startswith("_") for part in parts):
            continue
        if entry := _read(".".join(parts), path):
            found.append(entry)
    return found


def find(name: str, root: Path | None = None) -> Entry:
    """The experiment of this name.

    Raises:
      ExperimentError: there is none; the message has the names that come near.
    """
    by_name = {entry.name: entry for entry in entries(root)}
    if name in by_name:
        return by_name[name]
    last = {n.rsplit(".", 1)[-1]: n for n in by_name}
    near = difflib.get_close_matches(name, by_name, n=3) or [
        last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=3)
    ]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ExperimentError(
        f"there is no experiment {name!r}.{hint} `python -m experiments list` shows them all."
    )


def _read(name: str, path: Path) -> Entry | None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ExperimentError(f"{path} is not Python: {error}.") from error
    defined = {getattr(node, "name", None): type(node) for node in tree.body}
    if defined.get("Config") is not ast.ClassDef or defined.get("run") is not ast.FunctionDef:
        return None
    doc = ast.get_docstring(tree) or ""
    title = doc.split("\n\n")[0].replace("\n", " ").strip()
    cost = re.search(r"^\s*Cost:\s*(.+)$", doc, re.MULTILINE)
    return Entry(name, title or "(no docstring)", cost.group(1).strip() if cost else "", path)
