"""The code of docs/distillation.md runs, each section after the setup."""

import re

import pytest

from tests import pages

NAME = "distillation.md"
CODE = pages.sections(NAME)
SETUP = CODE.pop("Setup")


@pytest.fixture(scope="module")
def setup():
    return pages.run(NAME, "Setup", SETUP)


@pytest.mark.parametrize("heading", CODE)
def test_the_code_of_every_section_runs(setup, heading):
    pages.run(NAME, heading, CODE[heading], setup)


def test_every_loss_and_transform_is_on_the_page():
    from effjax import distill

    text = (pages.DOCS / NAME).read_text()
    helpers = {"Cache", "Cached", "Learned", "TopK", "read_cache", "top_k"}
    missing = [n for n in distill.__all__ if n not in helpers and not re.search(rf"\b{n}\b", text)]
    assert not missing
