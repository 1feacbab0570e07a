"""The cast at the end of a layer and at the start of a network, and what marks floats as lying on a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .modules import FixedPoint
from .reference import INT_BITS
from .tensor import FixedTensor, cast_raw
from .types import FixedType

FLOAT32_EXACT, FLOAT64_EXACT = 1 << 24, 1 << 53
BIAS_BITS = 32

Values = Tensor | FixedTensor

__all__ = ["FixedCast", "FixedInput"]


def with_type(x: Tensor, type: FixedType) -> Tensor:
    """``x``, marked as lying on the grid of ``type``."""
    x.fixed_type = type  # type: ignore[attr-defined]
    return x


def type_of(op: str, x: Values) -> FixedType:
    if isinstance(x, FixedTensor):
        return x.type
    type = getattr(x, "fixed_type", None)
    if type is None:
        raise TypeError(f"{op}: expected a FixedTensor or the output of a fixed-point layer, got a plain {x.__class__}")
    return type


def exact_dtype(op: str, units: float) -> torch.dtype:
    """The dtype in which sums of up to ``units`` units of a grid are exact in any order."""
    if units <= FLOAT32_EXACT:
        return torch.float32
    if units <= FLOAT64_EXACT:
        return torch.float64
    raise ValueError(f"{op}: expected sums of at most 2^53 units, which float64 holds, got 2^{math.log2(units):.1f}")


def range_frac_bits(largest: float, width: int, signed: bool) -> int:
    """The most fraction bits with which ``largest`` is in range."""
    if not largest > 0 or math.isinf(largest):
        return width - 1
    return width - signed - math.frexp(largest)[1]


class FixedCast(FixedPoint):
    """The cast at the end of a layer, to a type whose binary point is trained: a :class:`FixedPoint` that says of what
    type its result is, and that does the same to integers.

    Args:
        width: bits of the type, 1 to 24.
        frac_bits: where the binary point starts. None (default): the first tensor that comes by decides, as
            :meth:`calibrate` does.
        signed: default True.
        rounding, overflow: modes of the cast. Defaults ``"rnd_conv"``, ``"sat"``.
        trainable: whether ``frac_bits`` is a parameter; else it is a buffer. Default True.

    Raises:
        TypeError, ValueError: as :class:`FixedType`, or ``width`` is above 24, which float32 would not hold.

    Source: QFX, 2024, where each layer has a trained binary point.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedCast
        >>> cast = FixedCast(4, frac_bits=2)
        >>> cast(torch.tensor([0.3, 5.0])).tolist(), str(cast.fixed_type)
        ([0.25, 1.75], 'ap_fixed<4, 2, AP_RND_CONV, AP_SAT>')
    """

    def __init__(
        self,
        width: int,
        frac_bits: float | None = None,
        *,
        signed: bool = True,
        rounding: str = "rnd_conv",
        overflow: str = "sat",
        trainable: bool = True,
    ) -> None:
        FixedType(width, 0, signed, rounding, overflow)
        if width > 24:
            raise ValueError(f"FixedCast: expected a width of 1 to 24, which float32 holds, got {width}")
        super().__init__(width, 0, signed=signed, rounding=rounding, overflow=overflow, trainable=trainable)
        self.frac_bits.data.fill_(width - 1 if frac_bits is None else frac_bits)
        self.calibrated = frac_bits is not None

    @property
    def fixed_type(self) -> FixedType:
        """The type at present: ``frac_bits`` rounded to the nearest, ties to even; int_bits of -4 to 40."""
        return self._type(self.frac_bits.item())

    def _type(self, frac_bits: float) -> FixedType:
        int_bits = min(max(self.width - round(frac_bits), INT_BITS[0]), INT_BITS[1])
        return FixedType(self.width, int_bits, self.signed, self.rounding, self.overflow)

    def calibrate(self, x: Tensor, method: str = "mse") -> None:
        """:meth:`FixedPoint.calibrate` on some 2^17 of the numbers, at regular distances, where there are more."""
        flat = x.detach().flatten()
        super().calibrate(flat[:: max(1, flat.numel() // 2**17)], method)

    def forward(self, x: Tensor) -> Tensor:
        if not self.calibrated:
            self.calibrate(x)
        return with_type(self._quantize(x, self.frac_bits).float(), self.fixed_type)

    def integers(self, raw: Tensor, from_frac_bits: int, largest: int) -> FixedTensor:
        """The same cast of exact integers, of at most ``largest`` in magnitude."""
        self._check()
        type = self.fixed_type
        return FixedTensor.trusted(cast_raw(raw, from_frac_bits, type, largest), type)

    def of_floats(self, x: Tensor) -> FixedTensor:
        """The same cast of any floats, into integers."""
        self._check()
        return FixedTensor.from_float(x, self.fixed_type)

    def _check(self) -> None:
        if not self.calibrated:
            raise ValueError("FixedCast: expected a calibrated binary point; train, or give a batch of floats first")

    def extra_repr(self) -> str:
        return str(self.fixed_type)


class WeightCast(FixedCast):
    """The cast of a layer's weights, calibrated on them, with a binary point for each of their output channels or one
    for all.

    With one a channel the numbers are aligned on the finest channel's grid, an exact shift: ``fixed_type`` has as many
    bits more than ``width`` as the binary points lie apart, and each channel uses ``width`` of them.

    Args:
        weight: ``[outputs, ...]``.
        width: bits of a weight.
        per_channel: whether each output channel has a binary point of its own.

    Raises:
        TypeError, ValueError: as :class:`FixedCast`.

    Source: QFX, 2024, of whose trained binary points these are one a channel.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.casting import WeightCast
        >>> weight = torch.tensor([[0.75], [12.0]])
        >>> cast = WeightCast(weight, 3, per_channel=True)
        >>> cast(weight).tolist(), str(cast.fixed_type)
        ([[0.75], [12.0]], 'ap_fixed<7, 5, AP_RND_CONV, AP_SAT>')
    """

    def __init__(self, weight: Tensor, width: int, per_channel: bool) -> None:
        super().__init__(width)
        if per_channel:
            self.per_channel, self.channel_dim = len(weight), -weight.dim()
            shape = (len(weight), *[1] * (weight.dim() - 1))
            self.frac_bits = nn.Parameter(self.frac_bits.detach().expand(shape).clone())
        self.calibrate(weight)

    @property
    def fixed_type(self) -> FixedType:
        """The narrowest type that holds every channel's numbers."""
        fine, coarse = (self._type(f.item()) for f in (self.frac_bits.max(), self.frac_bits.min()))
        width = coarse.int_bits + fine.frac_bits
        return FixedType(width, coarse.int_bits, self.signed, self.rounding, self.overflow)

    def calibrate(self, x: Tensor, method: str = "mse") -> None:
        FixedPoint.calibrate(self, x, method)

    def of_floats(self, x: Tensor) -> FixedTensor:
        type = self.fixed_type
        values = self._quantize(x.double(), self.frac_bits.detach())
        return FixedTensor.trusted((values * 2.0**type.frac_bits).long(), type)


class FixedInput(nn.Module):
    """The start of a fixed-point network: floats to the grid; in evaluation mode to a :class:`FixedTensor`.

    Args:
        width, signed: of the type; further options as :class:`FixedCast`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedInput
        >>> FixedInput(8, frac_bits=4).eval()(torch.tensor([0.3]))
        FixedTensor([0.3125], ap_fixed<8, 4, AP_RND_CONV, AP_SAT>)
    """

    def __init__(self, width: int, frac_bits: float | None = None, **options) -> None:
        super().__init__()
        self.output = FixedCast(width, frac_bits, **options)

    def forward(self, x: Tensor) -> Values:
        return self.output(x) if self.training else self.output.of_floats(x)
