"""The HTML page: complete, escaped, and with nothing to fetch."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from effjax.errors import ReportError
from effjax.report import Section, image, page
from effjax.report.html import pair, text


class Tags(HTMLParser):
    """Collects attributes, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make(tmp_path):
    picture = tmp_path / "plot.svg"
    picture.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    sections = [
        Section("Results & costs", ["<table><tr><td>1</td></tr></table>"], "A <lead>."),
        Section("Plot", [pair(image(picture, 'a "plot"'), image(picture, "b"))]),
        Section("Footprint", [text("a < b")]),
    ]
    return page(
        "All <four>",
        sections,
        lead="one & two",
        figures={"smaller": "12x"},
        provenance={"commit": "ab12", "versions": {"jax": "0.10"}},
    )


def test_the_page_is_well_formed_and_complete(tmp_path):
    found = make(tmp_path)
    tags = Tags()
    tags.feed(found)
    assert tags.open == []
    for expected in (
        "<h1>All &lt;four&gt;</h1>",
        "one &amp; two",
        "<b>12x</b><span>smaller</span>",
        "<h2>Results &amp; costs</h2><p>A &lt;lead&gt;.</p><table>",
        "<pre>a &lt; b</pre>",
        "<dt>versions.jax</dt><dd>0.10</dd>",
    ):
        assert expected in found


def test_nothing_is_fetched(tmp_path):
    found = make(tmp_path)
    tags = Tags()
    tags.feed(found)
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in found
    assert not re.search(r"https?://|url\(|@import", found)


def test_an_image_holds_its_bytes(tmp_path):
    path = tmp_path / "dot.png"
    path.write_bytes(b"\x89PNG")
    found = re.search(
        r'src="data:image/png;base64,([^"]+)" alt="&lt;dot&gt;"', image(path, "<dot>")
    )
    assert base64.b64decode(found.group(1)) == b"\x89PNG"
    with pytest.raises(ReportError, match=r"data\.txt is none of the image types"):
        image(tmp_path / "data.txt", "x")


def test_reports_import_no_plotting_library():
    code = "import sys, effjax, effjax.report; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
