"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, and binary points that are trained."""

from . import reference

__all__ = ["reference"]
