"""Numbers with few binary digits, on a GPU; formula: fastcifar/fixedpoint/reference.py.

A read and a write of memory are what it costs: some ten operations a digit beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _limit_digits_kernel(
    x_ptr,  # float32, float64, bfloat16 or float16
    out_ptr,  # out: dtype and layout of x
    n: tl.int64,  # elements
    k: tl.int32,  # digits
    SIGNED: tl.constexpr,  # digits of -1, 0 and 1
    COMPUTE: tl.constexpr,  # tl.float64 for float64, else tl.float32
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < n
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(COMPUTE)
    rest = x
    back = tl.full(x.shape, 1.0, COMPUTE)
    if COMPUTE == tl.float32:  # noqa: SIM300
        # A subnormal number has digits too, and the double of the largest one's is finite, as in float64.
        small = tl.abs(x) < 2.0**-64
        large = tl.abs(x) >= 2.0**64
        rest = x * tl.where(small, 2.0**64, tl.where(large, 0.25, 1.0))
        back = tl.where(small, 2.0**-64, tl.where(large, 4.0, 1.0))
    digits = tl.zeros(x.shape, COMPUTE)
    for _ in range(k):
        if COMPUTE == tl.float64:  # noqa: SIM300
            digit = ((rest.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)
            tiny = tl.full((), 2.0**-1022, COMPUTE)
        else:
            digit = ((rest.to(tl.int32, bitcast=True) >> 23) << 23).to(tl.float32, bitcast=True)
            tiny = tl.full((), 2.0**-126, COMPUTE)
        digit = tl.where(tl.abs(rest) < tiny, 0.0, digit)
        if SIGNED:
            digit = tl.where(tl.abs(rest) >= 1.5 * tl.abs(digit), 2.0 * digit, digit)
        digits += digit
        rest -= digit
    value = tl.where(tl.abs(x) < float("inf"), digits * back, x)
    if out_ptr.dtype.element_ty == tl.bfloat16 or out_ptr.dtype.element_ty == tl.float16:
        value = value.to(tl.float32)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=there)
