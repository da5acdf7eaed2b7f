"""The benchmarks' results as one page of tables. Nothing is measured.

It reads `experiments/results/bench_<name>_<platform>.json` of the benchmarks that it knows and
writes `bench_<platform>.md` beside them.

Cost: a second.
Command: python -m experiments bench.tables
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effjax.report.files import write_text
from effjax.report.grid import Grid
from experiments.harness.provenance import brief

RESULTS = Path(__file__).parents[1] / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """Whose results: the platform in the files' names."""

    platform: str = "cpu"


def run(config: Config) -> dict[str, Any]:
    """Writes the page."""
    text, missing = page(config.platform)
    written = write_text(RESULTS / f"bench_{config.platform}.md", text)
    return {"page": str(written), "missing": missing}


def page(platform: str) -> tuple[str, list[str]]:
    """The page, and the benchmarks without a file, which it names."""
    parts, missing = ["# Benchmarks\n"], list[str]()
    for name, (title, grid) in PAGES.items():
        path = RESULTS / f"bench_{name}_{platform}.json"
        if not path.exists():
            missing.append(name)
            continue
        found = json.loads(path.read_text())
        command = f"`python -m experiments bench.{name}`"
        parts += [f"## {title}\n", f"{command}\n", grid(found).markdown(brief(found["provenance"]))]
    if missing:
        parts.append(f"Not measured on this platform: {', '.join(missing)}.\n")
    return "\n".join(parts), missing


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def quantize(found: Mapping[str, Any]) -> Grid:
    rows = [
        [
            f"{row['model']}, {row['own']}, against {row['against']}",
            times(row["step_ratio"]),
            times(row["compile_ratio"]),
            f"{row['step_ms']:.3g} ms",
        ]
        for row in found["rows"]
    ]
    return Grid(["train step", "time", "trace and compile", "of effjax"], rows)


def integer(found: Mapping[str, Any]) -> Grid:
    names = ("qat", "integer", "XLA int8", "float")
    rows = [
        [
            f"{row['kind']}, batch {row['batch']}",
            f"{row['ms']['float32']:.3g} ms",
            *(times(row["times_faster"].get(name)) for name in names),
            f"{row['bytes']['integer'] / row['bytes']['float32']:.3f}x",
        ]
        for row in found["rows"]
    ]
    titles = (
        "fake-quantized",
        "integer program",
        "its convolutions XLA's",
        "its depthwise in float",
    )
    bounds = ", ".join(
        f"{times(row['times_faster'])} at batch {row['batch']}" for row in found["products"]
    )
    return Grid(
        ["network", "float32", *titles, "bytes"],
        rows,
        caption="Times as fast as float32; bytes of the integer program over float32's. XLA's own "
        f"product with a matrix of 1024 x 1024, in int8 as in float32: {bounds}.",
    )


def file_sizes(found: Mapping[str, Any]) -> Grid:
    kinds = ("ONNX", "LiteRT", "StableHLO", "StableHLO, one file")
    rows = []
    for row in found["rows"]:
        whole = row["integers"]
        sizes = [row["files"].get(kind) for kind in kinds]
        rows.append(
            [
                f"{row['network']}, {row['bits']} bits",
                f"{whole:,}",
                f"{row['scales'] / whole:.1%}",
                f"{row['floats'] / whole:.1%}",
                *("-" if size is None else f"{size / whole:.3f}x" for size in sizes),
            ]
        )
    titles = ["network", "integers, bytes", "scales add", "other floats add"]
    return Grid([*titles, *kinds], rows)


def augment(found: Mapping[str, Any]) -> Grid:
    peers = ("host", "dm-pix", "augmax")
    rows = [
        [
            row["name"],
            f"{row['examples a second']['effjax']:,.0f}",
            *(times(row["times faster than"].get(peer)) for peer in peers),
        ]
        for row in found["throughput"]
    ]
    steps = ", ".join(
        f"{row['name']} {row['ms']:.0f} ms ({row['adds']:+.1%})" for row in found["steps"]
    )
    return Grid(
        ["operation", "examples a second", "against Pillow or NumPy", *peers[1:]],
        rows,
        caption=f"A CNN's train step with augmentations: {steps}.",
    )


def latency_table(found: Mapping[str, Any]) -> Grid:
    rows = [
        [row["name"], f"{row['mean']:.1%}", f"{row['worst']:.1%}", f"{row['spearman']:.3f}"]
        for row in found["rows"]
    ]
    return Grid(["predicted from", "mean error", "worst", "rank correlation"], rows)


PAGES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Grid]]] = {
    "quantize": ("Quantization-aware training against qwix", quantize),
    "integer": ("Integer programs in XLA against float32", integer),
    "file_sizes": ("Exported files over their integers", file_sizes),
    "augment": ("Augmentations", augment),
    "latency_table": ("Latency of networks that were not measured", latency_table),
}
"""Of each benchmark that has no table of its own: its title, and its table from its results."""
