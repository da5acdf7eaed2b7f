"""effjax: quantization, sparsity, distillation and architecture search in one JAX train step."""

from effjax import augment, distill, errors, nas, prune, quantize, schedules, select, testing
from effjax.attach import Attached, NNXOptimizer, attach
from effjax.core import Ctx, Setup, Transform, Vars, chain
from effjax.cost import footprint, latency
from effjax.export.packed import Packed, load_packed, save_packed
from effjax.inspection import inspect
from effjax.model import Model, from_function, from_linen, from_nnx
from effjax.population import Population, Run, grid, population
from effjax.sharding import Layout, state_shardings
from effjax.sites import Site, find_sites
from effjax.step import Mean, TrainState, export, forward, init_state, make_eval, make_step

__all__ = [
    "Attached",
    "Ctx",
    "Layout",
    "Mean",
    "Model",
    "NNXOptimizer",
    "Packed",
    "Population",
    "Run",
    "Setup",
    "Site",
    "TrainState",
    "Transform",
    "Vars",
    "attach",
    "augment",
    "chain",
    "distill",
    "errors",
    "export",
    "find_sites",
    "footprint",
    "forward",
    "from_function",
    "from_linen",
    "from_nnx",
    "grid",
    "init_state",
    "inspect",
    "latency",
    "load_packed",
    "make_eval",
    "make_step",
    "nas",
    "population",
    "prune",
    "quantize",
    "save_packed",
    "schedules",
    "select",
    "state_shardings",
    "testing",
]
