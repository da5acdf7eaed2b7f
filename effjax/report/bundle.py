"""A study as a folder: Markdown, LaTeX, CSV, JSON, figures and one HTML page."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effjax.report.canvas import save
from effjax.report.files import write_text
from effjax.report.footer import footer
from effjax.report.grid import Grid
from effjax.report.html import Section, image, page, pair, text
from effjax.report.latex import latex_document
from effjax.report.study import Study

HEADINGS = {
    "table": "Results",
    "fronts": "Pareto front and hypervolume",
    "comparison": "Is it the seeds?",
}


def write_report(
    folder: str | Path,
    study: Study,
    provenance: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes a study's report, and returns the path of its page.

    | file | holds |
    |---|---|
    | `report.md`, `index.html` | everything, to read; the page needs no other file |
    | `report.tex` | all tables and figures as a document |
    | `table`, `fronts`, `comparison` `.md`, `.tex` | one table each |
    | `table.csv`, `rows.csv` | means and deviations; every seed |
    | `results.json` | all of it at full precision, with the whole provenance |
    | `pareto`, `curves`, `layers` `.png`, `.svg`, `.pdf` | figures, a column wide |

    Tables and figures are made before the first file is written, every file is written whole, and
    the page last.

    Args:
      folder: made where it is not there; files of an earlier report are replaced.
      study: the results.
      provenance: short, for every table and figure.
      sources: the whole provenance of every run, {label: provenance}.

    Raises:
      ReportError: from the study's tables and figures.
    """
    folder, sources = Path(folder), sources or {}
    grids, figures = study.grids(), study.figures(provenance)
    runs = sources_grid(sources) if sources else None
    texts = {
        "report.md": _markdown(study, grids, figures, runs, provenance),
        "report.tex": latex_document(
            *(grid.latex(provenance) for grid in grids.values()),
            figures=[f"{stem}.pdf" for stem in figures],
        ),
        "table.csv": study.table.csv(provenance),
        "rows.csv": rows_csv(study.rows, provenance),
        "results.json": results_json(study, provenance, sources),
    }
    for stem, grid in grids.items():
        texts[f"{stem}.md"] = grid.markdown(provenance)
        texts[f"{stem}.tex"] = grid.latex(provenance)
    images = {}
    for stem, (figure, words) in figures.items():
        images[stem] = image(save(figure, folder / stem, provenance)[1], words)
    for name, content in texts.items():
        write_text(folder / name, content)
    sections = [Section(HEADINGS[stem], [grid.html()]) for stem, grid in grids.items()]
    for kind, heading in (("layers", "Layers"), ("curves", "Training"), ("pareto", "Trade-off")):
        if own := [found for stem, found in images.items() if stem.startswith(kind)]:
            sections.insert(1, Section(heading, [pair(*own)], _LEADS[kind]))
    sections += [Section("Notes", [text("\n".join(study.notes))])] if study.notes else []
    sections += [Section("Runs", [runs.html()])] if runs else []
    return write_text(folder / "index.html", page(study.title, sections, provenance={**provenance}))


_LEADS = {
    "pareto": "Filled points are on the Pareto front: nothing is better in both respects. Bars are "
    "one standard deviation over seeds.",
    "curves": "Means over seeds; bands are one standard deviation.",
    "layers": "Of every weight that multiplies. Dense float32 networks are left out; of a series "
    "of many, the cheapest is shown.",
}


def sources_grid(sources: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Where each run comes from, as a table."""
    rows = []
    for label, source in sources.items():
        commit, hardware = source.get("commit") or "-", source.get("hardware", {})
        short = commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
        versions = ", ".join(
            f"{name} {source.get('versions', {}).get(name)}" for name in ("jax", "flax")
        )
        where = f"{hardware.get('device', '-')}, {hardware.get('cpu', '-')}"
        when = source.get("date", "-")[:16].replace("T", " ")
        rows.append([label, short, versions, where, source.get("config_hash", "-"), when])
    return Grid(["run", "commit", "versions", "hardware", "config", "date"], rows)


def rows_csv(rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> str:
    """Every seed: one line a row, numbers and words at full precision."""
    plain = [{k: v for k, v in r.items() if isinstance(v, (int, float, str))} for r in rows]
    out = io.StringIO()
    fields = list(dict.fromkeys(["name", "series", "seed", *(key for r in plain for key in r)]))
    writer = csv.DictWriter(out, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return out.getvalue() + f"# {footer(provenance)}\n"


def results_json(
    study: Study, provenance: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
) -> str:
    """Everything that the report shows, at full precision; a number that does not exist is null."""
    baseline, compared = study.comparisons
    found = {
        **json.loads(study.table.json()),
        "quality": study.quality.key if study.quality else None,
        "cost": study.cost.key if study.cost else None,
        "fronts": [{**one._asdict(), "volume": one.volume._asdict()} for one in study.fronts],
        "baseline": baseline or None,
        "comparisons": [
            {**one._asdict(), "interval": one.interval._asdict() if one.interval else None}
            for one in compared
        ],
        "seeds": study.rows,
        "curves": {n: {"steps": s, "values": v} for n, (s, v) in study.curves.items()},
        "notes": study.notes,
        "provenance": {**provenance, "runs": sources},
    }
    return json.dumps(_plain(found), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """As JSON has it: lists for arrays, null for NaN and infinity, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _markdown(
    study: Study,
    grids: Mapping[str, Grid],
    figures: Mapping[str, tuple[Any, str]],
    runs: Grid | None,
    provenance: Mapping[str, Any],
) -> str:
    parts = [f"# {study.title}"]
    for stem, grid in grids.items():
        parts += [f"## {HEADINGS[stem]}", grid.markdown().rstrip()]
        if stem == "table":
            parts += [f"![{words}]({name}.svg)" for name, (_, words) in figures.items()]
    parts += ["## Notes", *(f"- {note}" for note in study.notes)] if study.notes else []
    parts += ["## Runs", runs.markdown().rstrip()] if runs else []
    parts.append(f"<sub>{html.escape(footer(provenance))}</sub>")
    return "\n\n".join(parts) + "\n"
