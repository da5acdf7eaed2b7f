"""From results to what a paper shows: tables, Pareto fronts, figures, one HTML page."""

from effjax.report.footer import footer
from effjax.report.html import Section, image, page
from effjax.report.pareto import pareto_front
from effjax.report.plots import curves_plot, pareto_plot, save
from effjax.report.tables import Cell, Column, Table, latex_escape, summarise

__all__ = [
    "Cell",
    "Column",
    "Section",
    "Table",
    "curves_plot",
    "footer",
    "image",
    "latex_escape",
    "page",
    "pareto_front",
    "pareto_plot",
    "save",
    "summarise",
]
