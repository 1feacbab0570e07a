"""Fixed point: the FPGA tools' ``ap_fixed`` to the bit, trained binary points, and networks of such numbers."""

from . import conversion, functional, hls, integer, layers, linear, modules, products, reference, tensor, types
from .casting import FixedCast, FixedInput
from .conversion import FixedConfig, convert
from .digits import limit_digits
from .functional import OVERFLOWS, ROUNDINGS, from_raw, quantize, quantize_trainable, to_raw
from .hls import to_hls
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
from .modules import FixedPoint, PowerOfTwo
from .tensor import FixedTensor
from .types import FixedType

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
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
    "FixedPoint",
    "FixedReLU",
    "FixedTensor",
    "FixedType",
    "PowerOfTwo",
    "conversion",
    "convert",
    "from_raw",
    "functional",
    "hls",
    "integer",
    "layers",
    "limit_digits",
    "linear",
    "modules",
    "products",
    "quantize",
    "quantize_trainable",
    "reference",
    "tensor",
    "to_hls",
    "to_raw",
    "types",
]
