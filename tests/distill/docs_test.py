"""The code of docs/distillation.md runs, each section after the setup."""

import pathlib
import re

import pytest

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "distillation.md").read_text()


def sections():
    """{heading: its Python code}."""
    found, heading = {}, ""
    for match in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```", PAGE, re.M | re.S):
        heading = match[1] or heading
        if match[2]:
            found[heading] = found.get(heading, "") + match[2]
    return found


CODE = sections()
SETUP = compile(CODE.pop("Setup"), "docs/distillation.md: Setup", "exec")


@pytest.fixture(scope="module")
def setup():
    namespace = {"__name__": "docs"}
    exec(SETUP, namespace)
    return namespace


@pytest.mark.parametrize("heading", CODE)
def test_the_code_of_every_section_runs(setup, heading):
    namespace = dict(setup)
    exec(compile(CODE[heading], f"docs/distillation.md: {heading}", "exec"), namespace)


def test_every_loss_and_transform_is_on_the_page():
    from effjax import distill

    helpers = {"Cache", "Cached", "Learned", "TopK", "read_cache", "top_k"}
    missing = [n for n in distill.__all__ if n not in helpers and not re.search(rf"\b{n}\b", PAGE)]
    assert not missing
