"""The two Triton kernels of the fixed-point cast, forward and backward. kernels/fixedpoint.py launches them.

The specification is ``fastcifar/fixedpoint/reference.py``, whose float64 they equal bit for bit. As on the CPU, numbers
are rounded as magnitudes, whose fraction is exact, and reduced modulo a power of two by a floor and a product, which is
exact for every float. Types of at most 24 bits are computed in float32, where every step is exact too, others and
float64 in float64. Both kernels must be launched with ``enable_fp_fusion=False``, so that there is nothing to argue.

A tensor lies in memory as rows of `length` neighbours, and binary points (axis) are "one" for all, one for all that is
in one of the "rows", or given by the place in a row, one of the "columns". Threads exchange nothing until a gradient to
a binary point is summed: both kernels are streams, limited by the bandwidth of the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_INT_BITS = tl.constexpr(-4)
MOST_INT_BITS = tl.constexpr(40)
LN_2 = tl.constexpr(0.693147180559945309417232121458)


@triton.constexpr_function
def _is_one_of(name, *names):
    return name in names


@triton.jit
def _power_of_two(n, COMPUTE: tl.constexpr):
    """2^n, from its bits."""
    if COMPUTE == tl.float64:  # noqa: SIM300
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def _to_even(a):
    """The nearest whole number of a magnitude: the addition leaves no room for a fraction, and what is too large for it
    has none."""
    no_fraction = tl.full((), 2.0**52 if a.dtype == tl.float64 else 2.0**23, a.dtype)
    return tl.where(a < no_fraction, (a + no_fraction) - no_fraction, a)


@triton.jit
def _scales(frac_bits_ptr, frac, channel, mask, width, COMPUTE: tl.constexpr):
    """2^F and 2^-F. A trained binary point is rounded and kept where the type has a legal int_bits; NaN stays."""
    if frac_bits_ptr is None:
        scale = _power_of_two(frac, COMPUTE)
        inverse = _power_of_two(-frac, COMPUTE)
    else:
        point = tl.load(frac_bits_ptr + channel, mask=mask, other=0.0)
        whole = tl.where(point < 0, -_to_even(-point), _to_even(point))
        whole = tl.where(whole < width - MOST_INT_BITS, (width - MOST_INT_BITS).to(point.dtype), whole)
        whole = tl.where(whole > width - LEAST_INT_BITS, (width - LEAST_INT_BITS).to(point.dtype), whole)
        known = whole == whole
        n = tl.where(known, whole, 0.0).to(tl.int32)
        nan = tl.full((), float("nan"), COMPUTE)
        scale = tl.where(known, _power_of_two(n, COMPUTE), nan)
        inverse = tl.where(known, _power_of_two(-n, COMPUTE), nan)
    return scale, inverse


# ---- random numbers: a function of the seed and of the element's index -----------------------------------------------


@triton.jit
def _keys(seed_ptr):
    """Where the seed's sequence starts and its step, an odd number, by the finaliser of SplitMix64."""
    z = tl.load(seed_ptr).to(tl.uint64, bitcast=True) + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32) | 1


@triton.jit
def _mix(z):
    z = (z ^ (z >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    z = (z ^ (z >> 15)) * tl.full((), 0x735A2D97, tl.uint32)
    return z ^ (z >> 15)


@triton.jit
def _uniform(index, seed_ptr, COMPUTE: tl.constexpr):
    """For each 64-bit index a number in (0, 1)."""
    key, gamma = _keys(seed_ptr)
    above = (index >> 32).to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)
    mixed = _mix(index.to(tl.uint32) * gamma + key + above)
    return ((mixed >> 9) * 2 + 1).to(tl.int32).to(COMPUTE) * tl.full((), 2.0**-24, COMPUTE)


# ---- one cast --------------------------------------------------------------------------------------------------------


@triton.jit
def _rounds_up(part, x, index, seed_ptr, ROUNDING: tl.constexpr):
    """Whether a magnitude with the fraction `part` and the sign of x goes up; rnd_conv and trn_zero do not ask."""
    if ROUNDING == "trn":
        up = (x < 0) & (part > 0)
    elif ROUNDING == "rnd":
        up = (part > 0.5) | ((part == 0.5) & (x > 0))
    elif ROUNDING == "rnd_zero":
        up = part > 0.5
    elif ROUNDING == "rnd_min_inf":
        up = (part > 0.5) | ((part == 0.5) & (x < 0))
    elif ROUNDING == "rnd_inf":
        up = part >= 0.5
    else:
        up = _uniform(index, seed_ptr, part.dtype) < part
    return up


@triton.jit
def _wrapped(v, below, width, saturated_bits, SIGNED: tl.constexpr, SM: tl.constexpr, N: tl.constexpr):
    """The stored integer of a v that is out of range, by the rules of wrap and wrap_sm with N saturated bits (2 stands
    for more than one); `below` is the number before it was rounded, without its fraction."""
    kept = width if not SIGNED and N == 0 else width - 1 if N == 0 else width - saturated_bits
    half = _power_of_two(kept, v.dtype)
    full = _power_of_two(width, v.dtype)
    if not SIGNED and N == 0:
        q = v - tl.floor(v * _power_of_two(-width, v.dtype)) * full
    else:
        m = v - tl.floor(v * _power_of_two(-kept - 1, v.dtype)) * (2 * half)
        top = m >= half
        rest = tl.where(top, m - half, m)
        sign = v < 0
        if SM and N == 0:
            shifted = tl.floor(below * _power_of_two(-width, v.dtype))
            sign = shifted - tl.floor(shifted * 0.5) * 2 == 1
        if not SM and N == 0:
            q = tl.where(top, m - full, m)
        else:
            if SM:
                flips = sign == top if N == 2 else sign != top
                rest = tl.where(flips, (half - 1) - rest, rest)
            if SIGNED:
                positive = full * 0.5 - half if N == 2 else half * 0
                q = rest + tl.where(sign, full * -0.5, positive)
            else:
                q = rest + (full - half)
    return q


@triton.jit
def _cast(
    x,
    scale,
    index,
    seed_ptr,
    width,
    saturated_bits,
    SIGNED: tl.constexpr,
    ROUNDING: tl.constexpr,
    OVERFLOW: tl.constexpr,
    N: tl.constexpr,
):
    """The stored integer of x, and whether it was in range."""
    a = tl.abs(x) * scale
    # To the left of the point the product may underflow, or lose bits; any magnitude near 0 rounds as x does. What is
    # left is no subnormal number: Triton's floor of float32 would flush one to 0.
    least = tl.full((), 2.0**-1000 if x.dtype == tl.float64 else 2.0**-100, x.dtype)
    a = tl.where((a < least) & (x != 0), least, a)
    WRAPS: tl.constexpr = _is_one_of(OVERFLOW, "wrap", "wrap_sm")
    if WRAPS:  # infinity: any large number
        most = tl.full((), 2.0**1000 if x.dtype == tl.float64 else 2.0**100, x.dtype)
        a = tl.where(a > most, most, a)
    whole = tl.floor(a)
    if ROUNDING == "rnd_conv":
        m = _to_even(a)
    elif ROUNDING == "trn_zero":
        m = whole
    else:
        m = tl.where(_rounds_up(a - whole, x, index, seed_ptr, ROUNDING), whole + 1, whole)
    v = tl.where(x < 0, -m, m)

    high = _power_of_two(width - 1 if SIGNED else width, x.dtype) - 1
    low = high * 0
    if OVERFLOW == "sat_sym" and SIGNED:
        low = -tl.where(high > 1, high, high * 0 + 1)  # a single bit is its sign
    elif SIGNED:
        low = -high - 1
    inside = (v >= low) & (v <= high)  # not NaN
    if WRAPS:
        below = tl.where(x < 0, -tl.where(a > whole, whole + 1, whole), whole)
        q = _wrapped(v, below, width, saturated_bits, SIGNED, OVERFLOW == "wrap_sm", N)
        q = tl.where((v < low) | (v > high), q, v)
    elif OVERFLOW == "sat_zero":
        q = tl.where((v < low) | (v > high), 0.0, v)
    else:
        q = tl.where(v > high, high, v)
        q = tl.where(q < low, low, q)
    return q + 0.0, inside  # no -0


@triton.jit
def _narrowed(value, dtype: tl.constexpr):
    """As torch converts: float64 to 16 bits by way of float32."""
    if dtype == tl.bfloat16 or dtype == tl.float16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _program(length, AXIS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which block of columns and group of rows is this program's, and how many blocks there are. Divisions have 32
    bits: one of 64 takes over a hundred instructions."""
    program = tl.program_id(0)
    blocks = tl.cdiv(length, COLUMNS).to(tl.int32)
    if AXIS == "one":
        block = program
        group = program * 0
    else:
        block = program % blocks
        group = program // blocks
    return block.to(tl.int64), group.to(tl.int64), blocks


@triton.jit
def _place(rows, columns, total, length, AXIS: tl.constexpr):
    """The offsets of a tile, and which of them exist."""
    if AXIS == "one":  # no product with a row, which would hide that tiles start on 16 bytes
        offset = columns[None, :]
        mask = offset < total
    else:
        offset = rows[:, None] * length + columns[None, :]
        mask = (columns < length)[None, :] & (offset < total)
    return offset, mask


@triton.jit
def _scales_of_tile(
    frac_bits_ptr,
    frac,
    rows,
    columns,
    total,
    length,
    inner,
    channels,
    width,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    if AXIS == "rows":
        exists = rows * length < total
        channel = rows.to(tl.int32) % channels  # of 64 numbers and more: no memory holds 2^31 of them
        scale, inverse = _scales(frac_bits_ptr, frac, channel, exists, width, COMPUTE)
        scale = scale[:, None]
        inverse = inverse[:, None]
    elif AXIS == "columns":
        channel = columns.to(tl.int32) // inner % channels
        scale, inverse = _scales(frac_bits_ptr, frac, channel, columns < length, width, COMPUTE)
        scale = scale[None, :]
        inverse = inverse[None, :]
    else:
        scale, inverse = _scales(frac_bits_ptr, frac, 0, total > 0, width, COMPUTE)
    return scale, inverse


_NUMBERS = ["inner", "channels", "frac", "width", "saturated_bits"]  # one kernel for all their values


@triton.jit(do_not_specialize=_NUMBERS)
def _cast_kernel(
    x_ptr,  # total elements: float32, float64, bfloat16 or float16
    out_ptr,  # out: values, dtype of x, or with RAW stored integers, int32 or int64; laid out as x
    frac_bits_ptr,  # binary points, float32 or float64: [channels]; None where F is `frac`
    seed_ptr,  # of stochastic rounding, one int64; otherwise None
    total: tl.int64,  # elements
    length: tl.int64,  # of a row; the last may end early
    inner: tl.int32,  # neighbours that share a binary point, where AXIS is "columns"
    channels: tl.int32,
    frac: tl.int32,  # F
    width: tl.int32,  # W
    saturated_bits: tl.int32,
    SIGNED: tl.constexpr,
    ROUNDING: tl.constexpr,  # a name of fastcifar.fixedpoint.reference.ROUNDINGS
    OVERFLOW: tl.constexpr,  # a name of OVERFLOWS there
    N: tl.constexpr,  # saturated_bits, where 2 stands for more than one
    COMPUTE: tl.constexpr,  # tl.float64 for float64 x and more than 24 bits, else tl.float32
    RAW: tl.constexpr,  # write stored integers
    AXIS: tl.constexpr,  # what tells binary points apart: "one", "rows", "columns"
    ROWS: tl.constexpr,  # a program's tile
    COLUMNS: tl.constexpr,
):
    """Values, or stored integers.

    Bytes an element: 8 in float32 (read x, write a value or an integer), 4 in 16 bits. Instructions an element, all
    counted for sm_90 in float32: 23 (rnd_conv, sat), 32 (trn, wrap), 49 (rnd_conv, wrap_sm), of which up to four, the
    floors, run at a quarter of the rate; a random number takes 18 more. An H200 has time for 55 while it moves 8 bytes,
    27 while it moves 4: float32 should take the time of a copy (2^22 numbers: 7 us at 4.8 TB/s) but for stochastic
    wrap_sm (64), in 16 bits the costly modes may not.
    """
    block, group, _ = _program(length, AXIS, COLUMNS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    rows = group * ROWS + tl.arange(0, ROWS)
    offset, mask = _place(rows, columns, total, length, AXIS)
    scale, inverse = _scales_of_tile(
        frac_bits_ptr, frac, rows, columns, total, length, inner, channels, width, AXIS, COMPUTE
    )
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
    q, _ = _cast(x, scale, offset, seed_ptr, width, saturated_bits, SIGNED, ROUNDING, OVERFLOW, N)
    if RAW:
        tl.store(out_ptr + offset, tl.where(q == q, q, 0.0).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + offset, _narrowed(q * inverse, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    seed_ptr,
    offset,
    mask,
    scale,
    inverse,
    width,
    saturated_bits,
    SIGNED: tl.constexpr,
    ROUNDING: tl.constexpr,
    OVERFLOW: tl.constexpr,
    N: tl.constexpr,
    PASSES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Writes the gradient to x of a tile and returns the terms of that to the binary point, without ln 2."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0)
    q, inside = _cast(x, scale, offset, seed_ptr, width, saturated_bits, SIGNED, ROUNDING, OVERFLOW, N)
    kept = x if PASSES else tl.where(inside, x, 0.0)
    change = kept - q * inverse
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + offset, grad if PASSES else tl.where(inside, grad, 0.0).to(grad.dtype), mask=mask)
    return tl.where(mask, grad.to(tl.float64) * change.to(tl.float64), 0.0)


@triton.jit(do_not_specialize=[*_NUMBERS, "tiles"])
def _cast_backward_kernel(
    grad_ptr,  # gradient with respect to the values, dtype and layout of x
    x_ptr,  # input of the forward pass
    frac_bits_ptr,
    seed_ptr,
    grad_x_ptr,  # out: gradient with respect to x, dtype and layout of x; None where it is not wanted
    sums_ptr,  # out: float64 sums, [rows, column tiles], where AXIS is "columns" [chunks, length]; None: not wanted
    total: tl.int64,
    length: tl.int64,
    inner: tl.int32,
    channels: tl.int32,
    tiles: tl.int32,  # that a program takes, one below the other, where AXIS is "columns"
    frac: tl.int32,
    width: tl.int32,
    saturated_bits: tl.int32,
    SIGNED: tl.constexpr,
    ROUNDING: tl.constexpr,
    OVERFLOW: tl.constexpr,
    N: tl.constexpr,
    PASSES: tl.constexpr,  # the gradient passes out of range as well
    COMPUTE: tl.constexpr,
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of _cast_kernel, which is computed again: only x was saved.

    Bytes an element: 12 in float32 (read grad and x, write grad_x), 6 in 16 bits, and 8 for a sum, one to some 1000
    elements (of a row of 64, one to 64). Instructions an element, counted for sm_90: 43 in float32 (rnd_conv, sat), two
    of them conversions to float64, which like floors run at a quarter of the rate, and two of float64. An H200 has time
    for 83 while it moves 12 bytes: the time of a copy. The sums are added up by one more, small kernel: no atomics, so
    equal calls give equal bits.
    """
    block, group, blocks = _program(length, AXIS, COLUMNS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    rows = group * ROWS + tl.arange(0, ROWS)
    scale, inverse = _scales_of_tile(
        frac_bits_ptr, frac, rows, columns, total, length, inner, channels, width, AXIS, COMPUTE
    )
    if AXIS == "columns":
        terms = tl.full((ROWS, COLUMNS), 0.0, tl.float64)
        for tile in range(tiles):
            rows = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
            offset, mask = _place(rows, columns, total, length, AXIS)
            terms += _backward_tile(
                *(grad_ptr, x_ptr, grad_x_ptr, seed_ptr, offset, mask, scale, inverse, width, saturated_bits),
                *(SIGNED, ROUNDING, OVERFLOW, N, PASSES, COMPUTE),
            )
        if sums_ptr is not None:
            tl.store(sums_ptr + group * length + columns, tl.sum(terms, 0) * LN_2, mask=columns < length)
    else:
        offset, mask = _place(rows, columns, total, length, AXIS)
        terms = _backward_tile(
            *(grad_ptr, x_ptr, grad_x_ptr, seed_ptr, offset, mask, scale, inverse, width, saturated_bits),
            *(SIGNED, ROUNDING, OVERFLOW, N, PASSES, COMPUTE),
        )
        if sums_ptr is not None:
            tl.store(sums_ptr + rows * blocks + block, tl.sum(terms, 1) * LN_2, mask=rows * length < total)
