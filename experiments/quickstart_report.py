"""What the quickstart writes: tables, figures and one HTML page in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import effjax as ej
from effjax.report import (
    Column,
    Section,
    Table,
    curves_plot,
    image,
    page,
    pareto_plot,
    save,
    summarise,
    write_text,
)
from effjax.report.html import pair, text
from experiments.harness.provenance import brief, provenance
from experiments.harness.runs import Run, read_metrics

ALL_FOUR = "all four"
STUDENT = "student"
COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("parameters", "parameters", ",.0f", "min"),
    Column("nonzeros", "non-zeros", ",.0f", "min"),
    Column("bytes", "stored size (KB)", ",.1f", "min", 1e-3),
    Column("macs", "MACs (thousands)", ",.0f", "min", 1e-3),
    Column("effective_macs", "effective MACs (thousands)", ",.0f", "min", 1e-3),
    Column("latency", "latency (ms)", ".2f", "min", 1e3),
)
SHORT = {
    "accuracy": "accuracy\n(%)",
    "parameters": "params",
    "nonzeros": "non-\nzeros",
    "bytes": "stored\n(KB)",
    "macs": "kMACs",
    "effective_macs": "eff.\nkMACs",
    "latency": "ms",
}  # headings for the terminal


def write(
    run: Run,
    rows: list[dict[str, Any]],
    footprints: Mapping[str, ej.cost.Footprint],
    latency: Mapping[str, ej.cost.Latency],
    seconds: float,
) -> dict[str, Any]:
    """Writes the report and summary.json, prints the table, and returns the headline.

    Args:
      run: its folder gets `report/`.
      rows: one an arm and seed.
      footprints: of each arm's first seed.
      latency: of each arm's first seed.
      seconds: that the whole run took.
    """
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    whole = provenance(run.config)
    source = brief(whole)
    timed = next(iter(latency.values()))
    seeds = len({row["seed"] for row in rows})
    caption = (
        f"{f'Mean ± standard deviation over {seeds} seeds' if seeds > 1 else 'One seed'}; test "
        "split of 360 images. Stored bytes "
        "include masks, scales and BatchNorm statistics. Latency: median of float32 kernels at "
        f"batch {timed.batch_size} on {timed.device}, where zeros and 8 bits save no time yet; "
        "effective MACs leave out products with zero."
    )
    table = summarise(rows, COLUMNS, caption=caption)
    written = {"table.md": table.markdown, "table.tex": table.latex, "table.csv": table.csv}
    for name, render in written.items():
        write_text(folder / name, render(source))
    figures = draw(run, table, rows, source, folder)
    story = headline(table)
    html = page(
        "Four techniques, one train step",
        sections(table, figures, footprints),
        lead="A small CNN on the digits data set: pruned, quantized, distilled and narrowed, by "
        "each technique alone and by all four in one jitted JAX step.",
        figures=story,
        provenance={"seconds": round(seconds, 1), **whole},
    )
    write_text(folder / "index.html", html)
    run.finish(
        {
            "seconds": seconds,
            "rows": rows,
            "columns": [column._asdict() for column in COLUMNS],
            "baseline": STUDENT,
            "table": {
                name: {c.key: table.cells[name, c.key]._asdict() for c in COLUMNS}
                for name in table.names
            },
            "latency": {name: found.to_dict() for name, found in latency.items()},
            "footprints": {name: found.to_dict() for name, found in footprints.items()},
        }
    )
    show(table, caption)
    return {**story, "seconds": round(seconds, 1), "report": str(folder / "index.html")}


def draw(
    run: Run, table: Table, rows: list[dict[str, Any]], source: Mapping[str, Any], folder: Path
) -> dict[str, Path]:
    """The figures, as SVG and PNG: {name: SVG}."""
    title = "Digits: accuracy against {}"
    found = curves(run, rows)
    last = [100 * values[:, -1].mean() for _, values in found.values()]
    figures = {
        "pareto": pareto_plot(
            table,
            "bytes",
            "accuracy",
            highlight=ALL_FOUR,
            title=title.format("stored size"),
            provenance=source,
        ),
        "pareto_macs": pareto_plot(
            table,
            "effective_macs",
            "accuracy",
            highlight=ALL_FOUR,
            title=title.format("effective MACs"),
            provenance=source,
        ),
        "curves": curves_plot(
            found,
            "training step",
            "validation accuracy (%)",
            title="Training",
            scale=100,
            bottom=max(0, int(min(last)) - 5),  # what is above is told apart
            provenance=source,
        ),
    }
    return {name: save(figure, folder / name, source)[1] for name, figure in figures.items()}


def curves(run: Run, rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], np.ndarray]]:
    """Validation accuracy in training: {arm: (steps, [seeds, steps])}."""
    found: dict[str, tuple[list[int], list[list[float]]]] = {}
    for row in rows:
        records = read_metrics(run.path / row["part"] / "metrics.jsonl")
        points = [(r["step"], r["validation"]) for r in records if "validation" in r]
        _, values = found.setdefault(row["name"], ([step for step, _ in points], []))
        values.append([value for _, value in points])
    return {name: (steps, np.asarray(values)) for name, (steps, values) in found.items()}


def headline(table: Table) -> dict[str, str]:
    """The few numbers to see first: all four techniques together against the dense student."""

    def mean(name: str, key: str) -> float:
        return table.cells[name, key].mean

    def times(key: str) -> str:
        return f"{mean(STUDENT, key) / mean(ALL_FOUR, key):.1f}x"

    change = mean(ALL_FOUR, "accuracy") - mean(STUDENT, "accuracy")
    return {
        "smaller than the dense student, as stored": times("bytes"),
        "fewer effective MACs": times("effective_macs"),
        "smaller than the teacher": f"{mean('teacher', 'bytes') / mean(ALL_FOUR, 'bytes'):.0f}x",
        "test accuracy": f"{mean(ALL_FOUR, 'accuracy'):.1f}%",
        "points of accuracy against the dense student": f"{change:+.1f}",
    }


def sections(
    table: Table, figures: Mapping[str, Path], footprints: Mapping[str, ej.cost.Footprint]
) -> list[Section]:
    """The page's sections."""
    pareto = [
        image(figures["pareto"], "Test accuracy against stored size, with the Pareto front"),
        image(figures["pareto_macs"], "Test accuracy against effective MACs"),
    ]
    return [
        Section("Results", [table.html()]),
        Section(
            "What accuracy costs",
            [pair(*pareto)],
            "Filled points are on the Pareto front: nothing is both smaller and more accurate. "
            "Bars are one standard deviation over seeds.",
        ),
        Section(
            "Training",
            [pair(image(figures["curves"], "Validation accuracy in training"))],
            "Sparse and quantized arms are evaluated as they would be shipped. Until the first "
            "ranges are known, and while masks still move, they may lag behind.",
        ),
        Section(
            "Where the bytes are: all four techniques",
            [text(str(footprints[ALL_FOUR]))],
            "Each tensor is stored dense, or as a bit mask and its non-zero values, whichever is "
            "smaller at its bit width.",
        ),
    ]


def show(table: Table, caption: str) -> None:
    """Prints the table; of the costs the means, so that 80 columns hold it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Rich

    shown = Rich(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for label in (table.heading, *SHORT.values()):
        shown.add_column(label, justify="left" if label == table.heading else "right")

    def cell(name: str, column: Column) -> str:
        if column.key == "accuracy":
            found = table.text(name, column)
        else:
            found = format(table.cells[name, column.key].mean, column.format)
        style = {1: "bold cyan", 2: "underline"}.get(table.ranks(column).get(name, 0))
        return f"[{style}]{found}[/]" if style else found

    for name in table.names:
        cells = [cell(name, column) for column in table.columns]
        shown.add_row(f"[bold]{name}[/]" if name == ALL_FOUR else name, *cells)
    Console().print(shown)
