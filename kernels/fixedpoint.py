"""Launchers of the fixed-point cast on CUDA tensors, which ``fastcifar._library`` registers.

The kernels are in ``kernels/fixedpoint_kernels.py``. Launchers check nothing: ``fastcifar.fixedpoint`` does. They never
wait for the device, which alone reads binary points and seeds, so that a CUDA graph can capture them.

Products of integers (``integer_conv``) have no kernel here: on a GPU ``products.py`` computes them in float64, exact.
What bounds one, by figures of vendors: its bytes, 2 for each number of x and of the weight and 4 or 8 for a sum, and
for 16 bits four products of int8 halves on tensor cores. 128 images of 32 x 32 x 64 channels, 3 x 3, are 50 MB, 11 us
on an H200, and 4.8 G products, 5 us as int8 and 20 us as int16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fixedpoint.reference import MOST_DIGITS, OVERFLOWS, ROUNDINGS
from .digits_kernels import _limit_digits_kernel
from .fixedpoint_kernels import _cast_backward_kernel, _cast_kernel
from .layout import in_order

SHORTEST_ROW = 64  # neighbours that share a binary point: fewer, and a tile's columns bring their own
PROGRAMS = 2048  # about sixteen a multiprocessor, the same on every GPU, as sums depend on it
_STOCHASTIC = ROUNDINGS.index("stochastic")


def fixed_quantize(
    x: Tensor,
    frac_bits: Tensor | None,
    seed: Tensor | None,
    width: int,
    int_bits: int,
    signed: bool,
    rounding: int,
    overflow: int,
    saturated_bits: int,
) -> Tensor:
    """``fastcifar::fixed_quantize``."""
    out = _like(x, rounding, x.dtype)
    _forward(x, out, frac_bits, seed, width, int_bits, signed, rounding, overflow, saturated_bits, False)
    return out


def fixed_to_raw(
    x: Tensor,
    seed: Tensor | None,
    width: int,
    int_bits: int,
    signed: bool,
    rounding: int,
    overflow: int,
    saturated_bits: int,
) -> Tensor:
    """``fastcifar::fixed_to_raw``."""
    out = _like(x, rounding, torch.int64 if width == 32 and not signed else torch.int32)
    _forward(x, out, None, seed, width, int_bits, signed, rounding, overflow, saturated_bits, True)
    return out


def fixed_quantize_backward(
    grad: Tensor,
    x: Tensor,
    frac_bits: Tensor | None,
    seed: Tensor | None,
    width: int,
    int_bits: int,
    signed: bool,
    rounding: int,
    overflow: int,
    saturated_bits: int,
    wrap_gradient: bool,
    wants_x: bool,
    wants_frac_bits: bool,
) -> tuple[Tensor, Tensor]:
    """``fastcifar::fixed_quantize_backward``; the gradient to the binary points is summed in an order that the shape
    fixes."""
    like = _like(x, rounding, x.dtype, None if wants_x else "meta")
    grad_x = like if wants_x else x.new_empty(0)
    points = 0 if frac_bits is None or not wants_frac_bits else frac_bits.numel()
    if x.numel() == 0 or not (wants_x or points):
        return grad_x, x.new_zeros(points, dtype=torch.float64)
    strides = like.stride()
    walk = plan(frac_bits, x.shape, strides, x.itemsize, compute_type(x.dtype, width))
    tiles = walk.tiles()
    rows, blocks = triton.cdiv(walk.rows, walk.ROWS * tiles), triton.cdiv(walk.length, walk.COLUMNS)
    sums = None
    if points:
        shape = (rows, walk.length) if walk.AXIS == "columns" else (walk.rows, blocks)
        sums = x.new_empty(shape, dtype=torch.float64)
    with torch.cuda.device_of(x):
        _cast_backward_kernel[(rows * blocks,)](
            in_order(grad, strides),
            in_order(x, strides),
            None if frac_bits is None else frac_bits.contiguous(),
            seed if rounding == _STOCHASTIC else None,
            grad_x if wants_x else None,
            sums,
            x.numel(),
            walk.length,
            walk.inner,
            walk.channels,
            tiles,
            width - int_bits,
            width,
            saturated_bits,
            PASSES=wrap_gradient and OVERFLOWS[overflow] in ("wrap", "wrap_sm"),
            **modes(signed, rounding, overflow, saturated_bits),
            **walk.constexprs(),
            **HOW,
        )
        if sums is None:
            return grad_x, x.new_empty(0, dtype=torch.float64)
        if walk.AXIS == "columns":
            return grad_x, sums.view(-1, walk.channels, walk.inner).sum((0, 2))
        return grad_x, sums.view(-1, walk.channels, blocks).sum((0, 2))


def limit_digits(x: Tensor, k: int, signed_digits: bool) -> Tensor:
    """``fastcifar::limit_digits``."""
    out = torch.empty_like(x)
    n, compute = x.numel(), compute_type(x.dtype, 0)
    if n:
        tile = tile_of(x.itemsize, compute)
        with torch.cuda.device_of(x):
            _limit_digits_kernel[(triton.cdiv(n, tile),)](
                in_order(x, out.stride()),
                out,
                n,
                min(k, MOST_DIGITS),
                SIGNED=signed_digits,
                COMPUTE=compute,
                BLOCK=tile,
                **HOW,
            )
    return out


# ---- how to launch ---------------------------------------------------------------------------------------------------

HOW = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Walk(NamedTuple):
    """How a tensor's memory is cut into rows of `length`, and these into tiles; see the kernels."""

    AXIS: str
    ROWS: int
    COLUMNS: int
    COMPUTE: tl.dtype
    rows: int = 1
    length: int = 1
    inner: int = 1
    channels: int = 1

    def tiles(self) -> int:
        """Of a program of the backward kernel: it sums them up before it writes."""
        if self.AXIS != "columns":
            return 1
        every = triton.cdiv(self.rows, self.ROWS) * triton.cdiv(self.length, self.COLUMNS)
        return triton.cdiv(every, PROGRAMS)

    def constexprs(self) -> dict[str, object]:
        return {"AXIS": self.AXIS, "ROWS": self.ROWS, "COLUMNS": self.COLUMNS, "COMPUTE": self.COMPUTE}


def plan(
    frac_bits: Tensor | None, shape: torch.Size, strides: tuple[int, ...], itemsize: int, compute: tl.dtype
) -> Walk:
    """The walk over a dense tensor with these binary points. A tile is 4 kB, two vector accesses a thread."""
    total = shape.numel()
    tile = tile_of(itemsize, compute)
    if frac_bits is None or frac_bits.numel() == 1:
        return Walk("one", 1, tile, compute, 1, total)
    channels = frac_bits.numel()
    of_x = next(d for d in range(-frac_bits.dim(), 0) if frac_bits.shape[d] != 1)
    inner = strides[of_x]
    if inner >= SHORTEST_ROW:
        columns = min(tile, 1 << (inner - 1).bit_length())
        return Walk("rows", tile // columns, columns, compute, total // inner, inner, 1, channels)
    # The columns' pattern repeats in a row where it is short, so that tiles are full; it is cut where it is long.
    period = channels * inner
    length = max(1, min(128 // period, total // period)) * period
    columns = min((256, 128, 64), key=lambda size: (triton.cdiv(length, size) * size, -size))
    return Walk("columns", tile // columns, columns, compute, triton.cdiv(total, length), length, inner, channels)


def tile_of(itemsize: int, compute: tl.dtype) -> int:
    """Elements of 4 kB, or of the registers that as many float64 take."""
    return 512 if compute == tl.float64 else 4096 // itemsize


def compute_type(dtype: torch.dtype, width: int) -> tl.dtype:
    """Float32 holds 24 bits."""
    return tl.float64 if dtype == torch.float64 or width > 24 else tl.float32


def modes(signed: bool, rounding: int, overflow: int, saturated_bits: int) -> dict[str, object]:
    """What of a type is code of its own in the kernels."""
    wraps = OVERFLOWS[overflow] in ("wrap", "wrap_sm")
    return {
        "SIGNED": signed,
        "ROUNDING": ROUNDINGS[rounding],
        "OVERFLOW": OVERFLOWS[overflow],
        "N": min(saturated_bits, 2) if wraps else 0,
    }


def _forward(
    x: Tensor,
    out: Tensor,
    frac_bits: Tensor | None,
    seed: Tensor | None,
    width: int,
    int_bits: int,
    signed: bool,
    rounding: int,
    overflow: int,
    saturated_bits: int,
    raw: bool,
) -> None:
    if x.numel() == 0:
        return
    walk = plan(frac_bits, x.shape, out.stride(), x.itemsize, compute_type(x.dtype, width))
    grid = (triton.cdiv(walk.rows, walk.ROWS) * triton.cdiv(walk.length, walk.COLUMNS),)
    with torch.cuda.device_of(x):
        _cast_kernel[grid](
            in_order(x, out.stride()),
            out,
            None if frac_bits is None else frac_bits.contiguous(),
            seed if rounding == _STOCHASTIC else None,
            x.numel(),
            walk.length,
            walk.inner,
            walk.channels,
            width - int_bits,
            width,
            saturated_bits,
            RAW=raw,
            **modes(signed, rounding, overflow, saturated_bits),
            **walk.constexprs(),
            **HOW,
        )


def _like(x: Tensor, rounding: int, dtype: torch.dtype, device: str | None = None) -> Tensor:
    """Uninitialised, in x's layout where that is dense; row by row where random numbers are counted."""
    layout = torch.contiguous_format if rounding == _STOCHASTIC else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, device=device, memory_format=layout)
