"""Matrix products and convolutions of stored integers: the sums of their products, exact whatever their size.

int16 operands on a CPU go to the kernel (csrc/cpu/integer_matmul.inl). Others are computed in float64 where no sum
of products exceeds 2^53, which is exact in any order, and by halves beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from .integer import INTEGERS

FLOAT64_EXACT = 1 << 53
INT32 = (1 << 31) - 1

__all__ = ["integer_conv2d", "integer_matmul"]


Pair = int | Sequence[int]


def integer_matmul(a: Tensor, b: Tensor, a_largest: int, b_largest: int) -> Tensor:
    """``a @ b.T``, every bit of it.

    Args:
        a: ``[..., K]``, integers; int16 for the kernel.
        b: ``[N, K]``, integers; int16 for the kernel.
        a_largest, b_largest: bounds of their magnitudes, from their types; what the result's dtype follows from.

    Returns:
        ``[..., N]``, int32 where ``K * a_largest * b_largest < 2 ** 31``, else int64.

    Raises:
        TypeError: an operand holds no integers, or a bound is none.
        ValueError: shapes that do not meet, a bound below 0, or sums that might not fit int64.
        RuntimeError: an operand is beyond its bound, so that a sum might not fit int32 (seen by the kernel).

    Source: the exact accumulator of a multiply-accumulate unit in an FPGA (UG1399, whose types grow by a product and a
    sum).

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.products import integer_matmul
        >>> a = torch.full((1, 4608), 2047, dtype=torch.int16)
        >>> integer_matmul(a, a, 2047, 2047).item() == 4608 * 2047**2  # no float32
        True
    """
    op = "integer_matmul"
    _check_operands(op, a=(a, a_largest), b=(b, b_largest))
    if a.dim() < 1 or b.dim() != 2 or a.shape[-1] != b.shape[1] or not b.numel():
        raise ValueError(
            f"{op}: expected a [..., K] and b [N, K], not empty, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    _check_sums(op, b.shape[1] * a_largest * b_largest)
    rows = a.reshape(-1, a.shape[-1], 1, 1)
    out = _conv2d(rows, b[:, :, None, None], a_largest, b_largest, [1, 1], [0, 0], [1, 1], 1)
    return out.reshape(*a.shape[:-1], b.shape[0])


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    x_largest: int,
    weight_largest: int,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
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
        TypeError: as :func:`integer_matmul`.
        ValueError: as there, or a stride, padding, dilation or number of groups that ``conv2d`` has no result for.
        RuntimeError: as there.

    Source: as :func:`integer_matmul`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.products import integer_conv2d
        >>> x = torch.full((1, 64, 3, 3), 127, dtype=torch.int16)
        >>> integer_conv2d(x, x, 128, 128).item()
        9290304
    """
    op = "integer_conv2d"
    _check_operands(op, x=(x, x_largest), weight=(weight, weight_largest))
    strides, margins, steps = (
        _pair(op, name, value, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    if x.dim() != 4 or weight.dim() != 4 or not weight.numel():
        raise ValueError(
            f"{op}: expected x [N, C, H, W] and weight [O, C / groups, kH, kW], not empty, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    outputs, inputs, *kernel = weight.shape
    if not isinstance(groups, int) or groups < 1 or inputs * groups != x.shape[1] or outputs % groups:
        raise ValueError(
            f"{op}: expected groups that divide {x.shape[1]} channels and {outputs} outputs, {inputs} channels each, "
            f"got {groups!r}"
        )
    reach = [size + 2 * m - d * (k - 1) for size, m, d, k in zip(x.shape[2:], margins, steps, kernel, strict=True)]
    if min(*reach, *x.shape[2:]) < 1:
        raise ValueError(
            f"{op}: expected a kernel no larger than the padded image, got {tuple(kernel)} over {tuple(x.shape[2:])}"
        )
    _check_sums(op, inputs * kernel[0] * kernel[1] * x_largest * weight_largest)
    return _conv2d(x, weight, x_largest, weight_largest, strides, margins, steps, groups)


def _conv2d(x: Tensor, weight: Tensor, x_largest: int, weight_largest: int, *geometry) -> Tensor:
    bound = weight[0].numel() * x_largest * weight_largest
    if x.dtype == weight.dtype == torch.int16 and _library.serves("integer_conv", x):
        x, weight = (t.permute(0, 2, 3, 1) for t in (x, weight))
        return torch.ops.fastcifar.integer_conv.default(x, weight, *geometry, bound > INT32).permute(0, 3, 1, 2)
    sums = _by_floats(x.long(), weight.long(), x_largest, weight_largest, *geometry)
    return sums if bound > INT32 else sums.int()


def _by_floats(x: Tensor, weight: Tensor, x_largest: int, weight_largest: int, *geometry) -> Tensor:
    """int64 sums by float64, which is exact up to 2^53; where sums are larger, of the halves of an operand, that meet
    in int64."""
    if weight[0].numel() * x_largest * weight_largest <= FLOAT64_EXACT:
        return F.conv2d(x.double(), weight.double(), None, *geometry).long()
    if x_largest > 1 << 16:
        half = x_largest.bit_length() // 2
        upper = _by_floats(x >> half, weight, (x_largest >> half) + 1, weight_largest, *geometry)
        return (upper << half) + _by_floats(x & ((1 << half) - 1), weight, 1 << half, weight_largest, *geometry)
    half = weight_largest.bit_length() // 2
    upper = _by_floats(x, weight >> half, x_largest, (weight_largest >> half) + 1, *geometry)
    return (upper << half) + _by_floats(x, weight & ((1 << half) - 1), x_largest, 1 << half, *geometry)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_operands(op: str, **operands: tuple[Tensor, int]) -> None:
    (_, (first, _)), *_ = operands.items()
    for name, (t, largest) in operands.items():
        if not isinstance(t, Tensor) or t.dtype not in INTEGERS:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{op}: expected {name} to be a tensor of integers (int8 to int64), got {got}")
        if isinstance(largest, bool) or not isinstance(largest, int):
            raise TypeError(f"{op}: expected {name}_largest to be an integer, got {largest!r}")
        if largest < 0:
            raise ValueError(f"{op}: expected {name}_largest of at least 0, got {largest}")
        if t.device != first.device:
            raise ValueError(f"{op}: expected operands on one device, got {first.device} and {t.device}")


def _check_sums(op: str, bound: int) -> None:
    if bound >= 1 << 63:
        raise ValueError(f"{op}: expected sums that fit 64 bits, got up to {bound}; cast an operand first")


def _pair(op: str, name: str, value: Pair, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{op}: expected {name} to be an integer or two, of at least {least}, got {value!r}")
    return pair
