"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, and binary points that are trained."""

from . import reference
from .casting import FixedCast, FixedInput
from .conversion import FixedConfig, convert
from .layers import (
    FixedAdd,
    FixedAvgPool2d,
    FixedBatchNorm2d,
    FixedConv2d,
    FixedFlatten,
    FixedLinear,
    FixedMaxPool2d,
    FixedReLU,
)
from .tensor import FixedTensor
from .types import FixedType

__all__ = [
    "FixedAdd",
    "FixedAvgPool2d",
    "FixedBatchNorm2d",
    "FixedCast",
    "FixedConfig",
    "FixedConv2d",
    "FixedFlatten",
    "FixedInput",
    "FixedLinear",
    "FixedMaxPool2d",
    "FixedReLU",
    "FixedTensor",
    "FixedType",
    "convert",
    "reference",
]
