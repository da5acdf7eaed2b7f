"""From results to what a paper shows: tables, Pareto fronts, figures, one HTML page."""

from effjax.report.bundle import write_report
from effjax.report.canvas import save
from effjax.report.comparisons import Comparison, compare, comparison_grid
from effjax.report.curves import curves_plot
from effjax.report.files import whole, write_text
from effjax.report.footer import footer
from effjax.report.fronts import Front, fronts, fronts_grid
from effjax.report.grid import Grid
from effjax.report.html import Section, image, page
from effjax.report.latex import latex_document, latex_escape, latex_problems
from effjax.report.layers import layer_facts, layers_plot
from effjax.report.pareto import pareto_front
from effjax.report.ranks import Correlation, spearman, spearman_interval
from effjax.report.scatter import pareto_plot
from effjax.report.statistics import (
    Interval,
    Welch,
    holm,
    hypervolume,
    paired_bootstrap,
    welch,
    worst_corner,
)
from effjax.report.study import Study
from effjax.report.tables import Cell, Column, Table, summarise

__all__ = [
    "Cell",
    "Column",
    "Comparison",
    "Correlation",
    "Front",
    "Grid",
    "Interval",
    "Section",
    "Study",
    "Table",
    "Welch",
    "compare",
    "comparison_grid",
    "curves_plot",
    "footer",
    "fronts",
    "fronts_grid",
    "holm",
    "hypervolume",
    "image",
    "latex_document",
    "latex_escape",
    "latex_problems",
    "layer_facts",
    "layers_plot",
    "page",
    "paired_bootstrap",
    "pareto_front",
    "pareto_plot",
    "save",
    "spearman",
    "spearman_interval",
    "summarise",
    "welch",
    "whole",
    "worst_corner",
    "write_report",
    "write_text",
]
