"""From results to what a paper shows: tables, Pareto fronts, figures, one HTML page."""

from effjax.report.canvas import save
from effjax.report.curves import curves_plot
from effjax.report.files import whole, write_text
from effjax.report.footer import footer
from effjax.report.html import Section, image, page
from effjax.report.pareto import pareto_front
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
from effjax.report.tables import Cell, Column, Table, latex_escape, summarise

__all__ = [
    "Cell",
    "Column",
    "Interval",
    "Section",
    "Table",
    "Welch",
    "curves_plot",
    "footer",
    "holm",
    "hypervolume",
    "image",
    "latex_escape",
    "page",
    "paired_bootstrap",
    "pareto_front",
    "pareto_plot",
    "save",
    "summarise",
    "welch",
    "whole",
    "worst_corner",
    "write_text",
]
