"""The code of docs/augmentation.md runs, each section after the setup, and names everything."""

import re

import pytest

from effjax import augment
from tests import pages

NAME = "augmentation.md"
CODE = pages.sections(NAME)
SETUP = CODE.pop("Setup")


@pytest.fixture(scope="module")
def setup():
    return pages.run(NAME, "Setup", SETUP)


@pytest.mark.parametrize("heading", CODE)
def test_the_code_of_every_section_runs(setup, heading):
    pages.run(NAME, heading, CODE[heading], setup)


def test_every_augmentation_is_on_the_page():
    text = (pages.DOCS / NAME).read_text()
    types = {"Operation", "TokenOperation"}
    assert [n for n in augment.__all__ if n not in types and not re.search(rf"\b{n}\b", text)] == []
    assert (pages.DOCS / "images" / "augmentation_grid.png").exists()
