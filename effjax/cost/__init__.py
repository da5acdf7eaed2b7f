"""What a model costs: parameters, bytes and MACs counted, latency measured and predicted."""

from effjax.cost.compute import Compute, compute
from effjax.cost.footprint import Footprint, Leaf, Totals, footprint
from effjax.cost.latency import Latency, latency
from effjax.cost.lookup import Entry, LatencyTable
from effjax.cost.predict import Error, LatencyModel, fit_latency, latency_features

__all__ = [
    "Compute",
    "Entry",
    "Error",
    "Footprint",
    "Latency",
    "LatencyModel",
    "LatencyTable",
    "Leaf",
    "Totals",
    "compute",
    "fit_latency",
    "footprint",
    "latency",
    "latency_features",
]
