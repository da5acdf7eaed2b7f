"""Quantization: values on small integer grids, in training and after it."""

from effjax.quantize import numerics
from effjax.quantize.anneal import soft_to_hard
from effjax.quantize.binary import binary, dorefa, ternary
from effjax.quantize.fold import fold_batchnorm, folded
from effjax.quantize.integer import Integer, integer
from effjax.quantize.learned import lsq, lsq_plus, pact
from effjax.quantize.noise import quant_noise
from effjax.quantize.qat import qat
from effjax.quantize.rules import Bits

__all__ = [
    "Bits",
    "Integer",
    "binary",
    "dorefa",
    "fold_batchnorm",
    "folded",
    "integer",
    "lsq",
    "lsq_plus",
    "numerics",
    "pact",
    "qat",
    "quant_noise",
    "soft_to_hard",
    "ternary",
]
