"""The cast at the end of a layer and at the start of a network, and what marks floats as lying on a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from .integer import recast
from .tensor import FixedTensor
from .types import FixedType

FLOAT32_EXACT, FLOAT64_EXACT = 1 << 24, 1 << 53

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


class FixedCast(nn.Module):
    """The cast at the end of a layer, to a type whose binary point is trained.

    Args:
        width: bits of the type.
        frac_bits: where the binary point starts. None (default): the first tensor that comes by decides, as
            :meth:`calibrate` does.
        signed: default True.
        rounding, overflow: modes of the cast. Defaults ``"rnd_conv"``, ``"sat"``.
        trainable: whether ``frac_bits`` is a parameter; else it is a buffer. Default True.

    Raises:
        TypeError, ValueError: as :class:`FixedType`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedCast
        >>> cast = FixedCast(4, frac_bits=2)
        >>> cast(torch.tensor([0.3, 5.0])).tolist(), str(cast.fixed_type)
        ([0.25, 1.75], 'ap_fixed<4, 2, AP_RND_CONV, AP_SAT>')
    """

    frac_bits: Tensor

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
        super().__init__()
        FixedType(width, 0, signed, rounding, overflow)
        if not 1 <= width <= 24:
            raise ValueError(f"FixedCast: expected a width of 1 to 24, which float32 holds, got {width}")
        self.width, self.signed, self.rounding, self.overflow = width, signed, rounding, overflow
        start = torch.tensor(float(width - 1 if frac_bits is None else frac_bits))
        if trainable:
            self.frac_bits = nn.Parameter(start)
        else:
            self.register_buffer("frac_bits", start)
        self.register_buffer("calibrated", torch.tensor(frac_bits is not None))

    @property
    def fixed_type(self) -> FixedType:
        """The type at present: ``frac_bits`` rounded to the nearest, ties to even; int_bits of -4 to 40."""
        int_bits = min(max(self.width - round(self.frac_bits.item()), -4), 40)
        return FixedType(self.width, int_bits, self.signed, self.rounding, self.overflow)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets the binary point to what has the least mean squared error on ``x``, of that which just holds its range
        and the three that saturate more."""
        flat = x.detach().flatten()
        flat = flat[:: max(1, flat.numel() // 2**17)].float()
        most = range_frac_bits(flat.abs().max().item() if flat.numel() else 0.0, self.width, self.signed)
        tried = [min(max(most + more, self.width - 40), self.width + 4) for more in range(4)]
        errors = [(self._cast(flat, flat.new_tensor(float(f))) - flat).square().mean().item() for f in tried]
        self.frac_bits.fill_(tried[errors.index(min(errors))])
        self.calibrated.fill_(True)  # type: ignore[operator]

    def _cast(self, x: Tensor, frac_bits: Tensor) -> Tensor:
        return functional.quantize_trainable(
            x, frac_bits, self.width, signed=self.signed, rounding=self.rounding, overflow=self.overflow
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.calibrated:
            self.calibrate(x)
        return with_type(self._cast(x, self.frac_bits).float(), self.fixed_type)

    def integers(self, raw: Tensor, from_frac_bits: int) -> FixedTensor:
        """The same cast of exact integers."""
        self._check()
        return FixedTensor.trusted(recast(raw, from_frac_bits, self.fixed_type), self.fixed_type)

    def of_floats(self, x: Tensor) -> FixedTensor:
        """The same cast of any floats, into integers."""
        self._check()
        t = self.fixed_type
        raw = functional.to_raw(x, t.width, t.int_bits, signed=t.signed, rounding=t.rounding, overflow=t.overflow)
        return FixedTensor.trusted(raw, t)

    def _check(self) -> None:
        if not self.calibrated:
            raise ValueError("FixedCast: expected a calibrated binary point; train, or give a batch of floats first")

    def extra_repr(self) -> str:
        return str(self.fixed_type)


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
