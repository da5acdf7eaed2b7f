"""The code of a page of the docs, by section."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def sections(page):
    """{heading: its Python code} of docs/`page`, in order."""
    text = (DOCS / page).read_text()
    found, heading = {}, ""
    for match in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```", text, re.M | re.S):
        heading = match[1] or heading
        if match[2]:
            found[heading] = found.get(heading, "") + match[2]
    return found


def run(page, heading, code, names=None):
    """Runs a section's code with the names of others; returns its names."""
    namespace = {"__name__": "docs", **(names or {})}
    exec(compile(code, f"docs/{page}: {heading}", "exec"), namespace)
    return namespace
