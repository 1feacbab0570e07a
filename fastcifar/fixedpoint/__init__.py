"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, and binary points that are trained."""

from . import reference
from .tensor import FixedTensor
from .types import FixedType

__all__ = ["FixedTensor", "FixedType", "reference"]
