"""Architecture search: spaces of configurations, and sub-networks that share weights."""

from effjax.nas import pbt, proxies
from effjax.nas.differentiable import Latency, darts
from effjax.nas.dimensions import Choice, Float, Integer, Repeat, When
from effjax.nas.elastic import elastic, progressive
from effjax.nas.fixed import fixed
from effjax.nas.found import CollapseWarning, extract
from effjax.nas.groups import WidthSpace, width_space
from effjax.nas.hardware import Constrained, mnasnet_reward, within
from effjax.nas.optuna_search import ASHA, NSGA2, TPE, Hyperband
from effjax.nas.predictor import PredictorSearch
from effjax.nas.search import Search, Stopper, Strategy, Trial
from effjax.nas.slices import Bits, Depth, Kernel, Resolution, Sparsity, Width
from effjax.nas.space import Space
from effjax.nas.strategies import Evolution, LocalSearch, RandomSearch
from effjax.nas.subnet import make_recalibrate, subnet
from effjax.nas.subnet_costs import Costs, SubnetCost
from effjax.nas.subnet_extract import Extracted, extract_subnet
from effjax.nas.supernet import Supernet
from effjax.nas.tabular import Oracle, Table, nasbench201, trace
from effjax.nas.width import width

__all__ = [
    "ASHA",
    "NSGA2",
    "TPE",
    "Bits",
    "Choice",
    "CollapseWarning",
    "Constrained",
    "Costs",
    "Depth",
    "Evolution",
    "Extracted",
    "Float",
    "Hyperband",
    "Integer",
    "Kernel",
    "Latency",
    "LocalSearch",
    "Oracle",
    "PredictorSearch",
    "RandomSearch",
    "Repeat",
    "Resolution",
    "Search",
    "Space",
    "Sparsity",
    "Stopper",
    "Strategy",
    "SubnetCost",
    "Supernet",
    "Table",
    "Trial",
    "When",
    "Width",
    "WidthSpace",
    "darts",
    "elastic",
    "extract",
    "extract_subnet",
    "fixed",
    "make_recalibrate",
    "mnasnet_reward",
    "nasbench201",
    "pbt",
    "progressive",
    "proxies",
    "subnet",
    "trace",
    "width",
    "width_space",
    "within",
]
