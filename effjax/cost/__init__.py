"""What a model costs: parameters, bytes and MACs counted, latency measured."""

from effjax.cost.footprint import Footprint, Leaf, Totals, footprint
from effjax.cost.latency import Latency, latency

__all__ = ["Footprint", "Latency", "Leaf", "Totals", "footprint", "latency"]
