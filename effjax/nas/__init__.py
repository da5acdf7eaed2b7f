"""Architecture search: spaces of configurations, and sub-networks that share weights."""

from effjax.nas.dimensions import Choice, Float, Integer, Repeat, When
from effjax.nas.groups import WidthSpace, width_space
from effjax.nas.search import Evolution, LocalSearch, RandomSearch, Search, Strategy, Trial
from effjax.nas.space import Space
from effjax.nas.subnet import make_recalibrate, subnet
from effjax.nas.width import width

__all__ = [
    "Choice",
    "Evolution",
    "Float",
    "Integer",
    "LocalSearch",
    "RandomSearch",
    "Repeat",
    "Search",
    "Space",
    "Strategy",
    "Trial",
    "When",
    "WidthSpace",
    "make_recalibrate",
    "subnet",
    "width",
    "width_space",
]
