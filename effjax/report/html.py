"""One HTML page with everything in it: no scripts, no links, nothing to fetch."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effjax.errors import ReportError
from effjax.report.footer import flatten

TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".gif": "image/gif"}
CSS = """
:root { --ink: #1d2129; --soft: #667085; --line: #e4e7ec; --paper: #ffffff; --wash: #f7f8fa;
  --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
p { margin: 0 0 .8rem; max-width: 70ch; }
.lead { color: var(--soft); font-size: 1.05rem; margin-bottom: 1.6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem;
  margin: 0 0 1.2rem; }
.figures div { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: .9rem 1rem; }
.figures b { display: block; font-size: 1.55rem; letter-spacing: -.02em; line-height: 1.2;
  color: var(--accent); font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .85rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.3rem 1.4rem; margin: 0 0 1.2rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); padding-top: .7rem; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line);
  white-space: normal; vertical-align: bottom; }
tr > :first-child { text-align: left; font-weight: 600; }
tbody tr:hover { background: var(--wash); }
.best { font-weight: 700; color: var(--accent); }
.second { text-decoration: underline; text-underline-offset: 3px; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; background: #fff;
  border-radius: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
pre { margin: 0; font-size: .78rem; line-height: 1.45; overflow-x: auto; }
footer { color: var(--soft); font-size: .78rem; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
footer dd { margin: 0; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c323d; --paper: #171b22; --wash: #0f1217;
    --accent: #56b4e9; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


class Section(NamedTuple):
    """A heading and what is under it: HTML, from `Table.html()`, `image()` or `text()`."""

    heading: str
    body: Sequence[str]
    lead: str = ""  # plain text


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    figures: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """A self-contained HTML page.

    Args:
      title: plain text, as is `lead`.
      sections: in order.
      figures: the few numbers to see first: {"smaller than the dense student": "12.4x"}.
      provenance: listed at the foot.
    """
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
        for label, value in (figures or {}).items()
    )
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="lead">{html.escape(lead)}</p>'] if lead else []
    parts += [f'<div class="figures">{cards}</div>'] if cards else []
    for section in sections:
        words = f"<p>{html.escape(section.lead)}</p>" if section.lead else ""
        body = "".join(section.body)
        parts.append(f"<section><h2>{html.escape(section.heading)}</h2>{words}{body}</section>")
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
        for key, value in flatten(provenance or {})
    )
    parts += [f"<footer><dl>{facts}</dl></footer>"] if facts else []
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def image(path: str | Path, alt: str) -> str:
    """An image file as an `<img>` with its bytes inside."""
    path = Path(path)
    if path.suffix not in TYPES:
        raise ReportError(f"{path.name} is none of the image types {sorted(TYPES)}.")
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    return f'<img src="{source}" alt="{html.escape(alt, quote=True)}">'


def pair(*images: str) -> str:
    """Images side by side where there is room."""
    return f'<div class="pair">{"".join(images)}</div>'


def text(plain: str) -> str:
    """Preformatted text, as printed: a footprint, a table of sites."""
    return f"<pre>{html.escape(plain)}</pre>"
