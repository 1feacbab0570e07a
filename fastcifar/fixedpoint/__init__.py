"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, and binary points that are trained."""

from . import functional, reference
from .functional import OVERFLOWS, ROUNDINGS, from_raw, quantize, quantize_trainable, to_raw

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
    "from_raw",
    "functional",
    "quantize",
    "quantize_trainable",
    "reference",
    "to_raw",
]
