"""Matrix products and convolutions of stored integers: the sums of their products, exact whatever their size.

int16 operands on a CPU go to the kernel (csrc/cpu/integer_matmul.inl). Others are computed in float64 where no sum
of products exceeds 2^53, which is exact in any order, and in int64 beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library

FLOAT64_EXACT = 1 << 53
INT32 = (1 << 31) - 1

__all__ = ["integer_conv2d", "integer_matmul"]


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def integer_matmul(a: Tensor, b: Tensor, a_largest: int, b_largest: int) -> Tensor:
    """``a @ b.T``, every bit of it.

    Args:
        a: ``[..., K]``, integers; int16 for the kernel.
        b: ``[N, K]``, integers; int16 for the kernel.
        a_largest, b_largest: bounds of their magnitudes, from their types; what the result's dtype follows from.

    Returns:
        ``[..., N]``, int32 where ``K * a_largest * b_largest < 2 ** 31`` and the kernel made it, else int64.

    Raises:
        ValueError: the sums might not fit int64.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.products import integer_matmul
        >>> a = torch.full((1, 4608), 2047, dtype=torch.int16)
        >>> integer_matmul(a, a, 2047, 2047).item() == 4608 * 2047**2  # no float32
        True
    """
    out = integer_conv2d(a.reshape(-1, a.shape[-1], 1, 1), b[:, :, None, None], a_largest, b_largest)
    return out.reshape(*a.shape[:-1], b.shape[0])


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    x_largest: int,
    weight_largest: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` of integers, every bit of it.

    Args:
        x: ``[N, C, H, W]``, integers; int16 for the kernel. Channels last in memory spares a copy.
        weight: ``[O, C / groups, kH, kW]``, integers; int16 for the kernel.
        x_largest, weight_largest: as in :func:`integer_matmul`, with K = C / groups * kH * kW.
        stride, padding, dilation, groups: as in ``conv2d``.

    Returns:
        ``[N, O, y, x]``, int32 or int64 as in :func:`integer_matmul`; channels last in memory from the kernel.

    Raises:
        ValueError: the sums might not fit int64.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.products import integer_conv2d
        >>> x = torch.full((1, 64, 3, 3), 127, dtype=torch.int16)
        >>> integer_conv2d(x, x, 128, 128).item()
        9290304
    """
    bound = weight[0].numel() * x_largest * weight_largest
    if bound >= 1 << 63:
        raise ValueError(f"integer_conv2d: expected sums that fit 64 bits, got up to {bound}; cast an operand first")
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if x.dtype == weight.dtype == torch.int16 and _library.serves("integer_conv", x):
        x, weight = (t.permute(0, 2, 3, 1) for t in (x, weight))
        out = torch.ops.fastcifar.integer_conv.default(x, weight, stride, padding, dilation, groups, bound > INT32)
        return out.permute(0, 3, 1, 2)
    if bound <= FLOAT64_EXACT:
        return F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups).long()
    # Halves of x, so that each is exact in float64; the sums of the halves meet in int64.
    if x_largest > 1 << 16:
        half = x_largest.bit_length() // 2
        high, low = x.long() >> half, x.long() & ((1 << half) - 1)
        options = (stride, padding, dilation, groups)
        upper = integer_conv2d(high, weight, (x_largest >> half) + 1, weight_largest, *options)
        return (upper << half) + integer_conv2d(low, weight, 1 << half, weight_largest, *options)
    half = weight_largest.bit_length() // 2
    high, low = weight.long() >> half, weight.long() & ((1 << half) - 1)
    options = (stride, padding, dilation, groups)
    upper = integer_conv2d(x.long(), high, x_largest, (weight_largest >> half) + 1, *options)
    return (upper << half) + integer_conv2d(x.long(), low, x_largest, 1 << half, *options)
