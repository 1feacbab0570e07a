"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, and binary points that are trained."""

from . import functional, modules, reference
from .functional import OVERFLOWS, ROUNDINGS, from_raw, quantize, quantize_trainable, to_raw
from .modules import FixedPoint, PowerOfTwo, limit_digits

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
    "FixedPoint",
    "PowerOfTwo",
    "from_raw",
    "functional",
    "limit_digits",
    "modules",
    "quantize",
    "quantize_trainable",
    "reference",
    "to_raw",
]
