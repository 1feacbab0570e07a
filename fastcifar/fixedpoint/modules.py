"""Fixed point as modules: casts with a binary point that is fixed, learnt from data, or trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .digits import limit_digits
from .functional import INT_BITS, check_int_bits, check_type, check_x, quantize_trainable

CALIBRATIONS = ("range", "mse")


class FixedPoint(nn.Module):
    """:func:`~fastcifar.fixedpoint.quantize` as a layer, whose binary point may be trained.

    Args:
        width: bits in all, 1 to 32.
        int_bits: bits before the binary point, the sign included, -4 to 40: where the binary point is, or starts.
        signed, rounding, overflow, saturated_bits: as in :func:`~fastcifar.fixedpoint.quantize`.
        trainable: whether ``frac_bits`` is a parameter (it starts at ``width - int_bits``), else a buffer.
        per_channel: how many channels have a binary point each; None, the default, gives all of ``x`` one.
        channel_dim: the dimension of ``x``, counted from the last, that these channels are. Default -3, as in
            ``[B, C, H, W]``.
        calibration: ``"range"`` or ``"mse"`` moves the binary point at the first call in training mode to where
            :meth:`calibrate` puts it; None, the default, does not.
        wrap_gradient: as in :func:`~fastcifar.fixedpoint.quantize`.

    Attributes:
        frac_bits: F before it is rounded, a scalar or ``[C, 1, ...]``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (QFX), 2024.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedPoint
        >>> cast = FixedPoint(8, 4, rounding="rnd_conv", overflow="sat", trainable=True, calibration="range")
        >>> cast(torch.tensor([0.3, 1.7])).tolist(), cast.frac_bits.item()  # 7 bits hold -2 to 2
        ([0.296875, 1.703125], 6.0)
    """

    frac_bits: Tensor

    def __init__(
        self,
        width: int,
        int_bits: int,
        *,
        signed: bool = True,
        rounding: str = "trn",
        overflow: str = "wrap",
        saturated_bits: int = 0,
        trainable: bool = False,
        per_channel: int | None = None,
        channel_dim: int = -3,
        calibration: str | None = None,
        wrap_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_type("FixedPoint", width, signed, rounding, overflow, saturated_bits)
        check_int_bits("FixedPoint", int_bits)
        if calibration not in (None, *CALIBRATIONS):
            raise ValueError(f"FixedPoint: expected calibration to be None, range or mse, got {calibration!r}")
        if channel_dim >= 0:
            raise ValueError(f"FixedPoint: expected channel_dim below 0, counted from the last, got {channel_dim}")
        if per_channel is not None and per_channel < 1:
            raise ValueError(f"FixedPoint: expected per_channel to be None or above 0, got {per_channel}")
        self.width, self.signed, self.rounding, self.overflow = width, signed, rounding, overflow
        self.saturated_bits, self.wrap_gradient = saturated_bits, wrap_gradient
        self.per_channel, self.channel_dim = per_channel, channel_dim
        self.calibration, self.calibrated = calibration, False
        shape = () if per_channel is None else (per_channel, *[1] * (-channel_dim - 1))
        start = torch.full(shape, float(width - int_bits))
        if trainable:
            self.frac_bits = nn.Parameter(start)
        else:
            self.register_buffer("frac_bits", start)

    def forward(self, x: Tensor) -> Tensor:
        if self.calibration is not None and self.training and not self.calibrated:
            self.calibrate(x, self.calibration)
        return self._quantize(x, self.frac_bits)

    @torch.no_grad()
    def calibrate(self, x: Tensor, method: str = "range") -> None:
        """Moves the binary point to where it suits ``x``.

        Args:
            x: data, finite, not empty.
            method: ``"range"`` takes the fewest integer bits that hold the largest magnitude (2^n itself counts as
                above n bits); ``"mse"`` tries that and up to four more fractional bits, and takes the first with the
                least mean squared error.

        Raises:
            ValueError: ``x`` is empty or not finite, or the method is another.
        """
        op = type(self).__name__
        check_x(op, x)
        if method not in CALIBRATIONS:
            raise ValueError(f"{op}: expected method range or mse, got {method!r}")
        if x.numel() == 0 or not bool(x.isfinite().all()):
            raise ValueError(f"{op}: expected finite data, at least one number, to calibrate with")
        wide = x.detach().double()
        largest = self._over_sharing(wide.abs(), torch.amax)
        int_bits = torch.frexp(largest).exponent + int(self.signed)
        best = self._kept(self.width - int_bits.double())
        if method == "mse":
            first, least = best, torch.full_like(best, torch.inf)
            for more in range(min(self.width, 5)):
                tried = self._kept(first + more)
                error = self._over_sharing((self._quantize(wide, tried) - wide).square(), torch.mean)
                best = torch.where(error < least, tried, best)
                least = torch.minimum(error, least)
        self.frac_bits.copy_(best)
        self.calibrated = True

    def _kept(self, frac_bits: Tensor) -> Tensor:
        return frac_bits.clamp(self.width - INT_BITS[1], self.width - INT_BITS[0])

    def _over_sharing(self, t: Tensor, reduce: Any) -> Tensor:
        """``reduce`` over all elements that share a binary point, in the shape of ``frac_bits``."""
        if self.per_channel is None:
            return reduce(t.flatten(), 0)
        return reduce(t.movedim(self.channel_dim, 0).flatten(1), 1).view_as(self.frac_bits)

    def _quantize(self, x: Tensor, frac_bits: Tensor) -> Tensor:
        return quantize_trainable(
            x,
            frac_bits,
            self.width,
            signed=self.signed,
            rounding=self.rounding,
            overflow=self.overflow,
            saturated_bits=self.saturated_bits,
            wrap_gradient=self.wrap_gradient,
        )

    def get_extra_state(self) -> dict[str, bool]:
        return {"calibrated": self.calibrated}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.calibrated = state["calibrated"]

    def extra_repr(self) -> str:
        shown = f"{self.width}, signed={self.signed}, rounding={self.rounding!r}, overflow={self.overflow!r}"
        shown += f", saturated_bits={self.saturated_bits}, trainable={isinstance(self.frac_bits, nn.Parameter)}"
        if self.per_channel is not None:
            shown += f", per_channel={self.per_channel}, channel_dim={self.channel_dim}"
        return shown + f", calibration={self.calibration!r}"


class PowerOfTwo(nn.Module):
    """:func:`limit_digits` as a layer, to follow a cast.

    Args:
        k, signed_digits: as there.

    Raises:
        TypeError, ValueError: as there.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import PowerOfTwo
        >>> PowerOfTwo(1)(torch.tensor([0.75, -3.0])).tolist()
        [0.5, -2.0]
    """

    def __init__(self, k: int, signed_digits: bool = False) -> None:
        super().__init__()
        limit_digits(torch.zeros(0), k)  # refuses what is no k
        self.k, self.signed_digits = k, signed_digits

    def forward(self, x: Tensor) -> Tensor:
        return limit_digits(x, self.k, signed_digits=self.signed_digits)

    def extra_repr(self) -> str:
        return f"{self.k}, signed_digits={self.signed_digits}"
