"""What a model costs: parameters, bytes and MACs counted, latency measured."""

from effjax.cost.compute import Compute, compute
from effjax.cost.footprint import Footprint, Leaf, Totals, footprint
from effjax.cost.latency import Latency, latency

__all__ = ["Compute", "Footprint", "Latency", "Leaf", "Totals", "compute", "footprint", "latency"]
