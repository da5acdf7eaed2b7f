"""Quantization: values on small integer grids, in training and after it."""

from effjax.quantize import estimators, numerics
from effjax.quantize.adaround import adaround
from effjax.quantize.anneal import soft_to_hard
from effjax.quantize.awq import awq
from effjax.quantize.binary import binary, dorefa, ternary
from effjax.quantize.bitsearch import bit_search, within
from effjax.quantize.budget import Allocation, allocate, bit_costs
from effjax.quantize.calibrate import calibrate
from effjax.quantize.correct import correct_bias
from effjax.quantize.equalize import equalize
from effjax.quantize.fidelity import signal_to_noise
from effjax.quantize.fold import fold_batchnorm, folded
from effjax.quantize.freeze import freeze
from effjax.quantize.frozen import Frozen
from effjax.quantize.gptq import gptq
from effjax.quantize.hessian import Trace, hessian_traces, objective_of
from effjax.quantize.integer import Integer, integer
from effjax.quantize.learned import lsq, lsq_plus
from effjax.quantize.noise import quant_noise
from effjax.quantize.pact import pact
from effjax.quantize.ptq import Quantized, ptq
from effjax.quantize.qat import qat
from effjax.quantize.rules import Bits, by_leaf
from effjax.quantize.sensitivity import drop_one, hawq, rounding_errors
from effjax.quantize.smooth import smooth

__all__ = [
    "Allocation",
    "Bits",
    "Frozen",
    "Integer",
    "Quantized",
    "Trace",
    "adaround",
    "allocate",
    "awq",
    "binary",
    "bit_costs",
    "bit_search",
    "by_leaf",
    "calibrate",
    "correct_bias",
    "dorefa",
    "drop_one",
    "equalize",
    "estimators",
    "fold_batchnorm",
    "folded",
    "freeze",
    "gptq",
    "hawq",
    "hessian_traces",
    "integer",
    "lsq",
    "lsq_plus",
    "numerics",
    "objective_of",
    "pact",
    "ptq",
    "qat",
    "quant_noise",
    "rounding_errors",
    "signal_to_noise",
    "smooth",
    "soft_to_hard",
    "ternary",
    "within",
]
