"""Fixed point: ``ap_fixed`` to the bit, trainable binary points, and arithmetic whose results have types."""

from .tensor import FixedTensor
from .types import FixedType

__all__ = ["FixedTensor", "FixedType"]
