"""Quantization: values on small integer grids, in training and after it."""

from effjax.quantize import numerics
from effjax.quantize.integer import Integer, integer
from effjax.quantize.qat import qat
from effjax.quantize.rules import Bits

__all__ = ["Bits", "Integer", "integer", "numerics", "qat"]
