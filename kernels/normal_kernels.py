"""Standard normal numbers by counter: those of ``csrc/cpu/normal.inl`` bit for bit, operation by operation, for which
kernels must be launched with ``enable_fp_fusion=False``. ``normal_numbers`` of ``fastcifar/diffusion/reference.py``
says which number is made of what.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log(x):
    """The logarithm of ``csrc/cpu/vec.h``, operation by operation: of positive normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    m = (bits - (n << 23)).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = tl.div_rn(f, m + 1.0)
    square = s * s
    p = square * (2.0 / 9) + (2.0 / 7)
    p = p * square + (2.0 / 5)
    p = p * square + (2.0 / 3)
    exponent = n.to(tl.float32)
    rest = s * (p * square - f)
    return exponent * 0.693145751953125 + (f + (rest + exponent * 1.428606765330187e-06))


@triton.jit
def _box_muller(first, second):
    """Two normal numbers of two words: a radius, and cosine and sine of an angle by its quarter and what is left."""
    u = (first >> 9).to(tl.int32).to(tl.float32) * 2.0**-23 + 2.0**-24
    radius = tl.sqrt_rn(_log(u) * -2.0)
    turn = (second >> 8).to(tl.int32)
    quarter = turn >> 22
    a = ((turn & 0x3FFFFF) - 0x200000).to(tl.float32) * (1.57079637050628662109375 * 2.0**-22)
    square = a * a
    s = square * 2.7557319224e-6 - 1.9841269841e-4
    s = (s * square + 8.3333333333e-3) * square - 1.6666666667e-1
    s = s * square * a + a
    c = square * -2.7557319224e-7 + 2.4801587302e-5
    c = (c * square - 1.3888888889e-3) * square + 4.1666666667e-2
    c = (c * square - 0.5) * square + 1.0
    swap = (quarter & 1) != 0
    one = radius * tl.where(swap, s, c)
    other = radius * tl.where(swap, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -one, one), tl.where((quarter & 2) != 0, -other, other)


@triton.jit
def _normal(counter, seed_ptr, stream):
    """The four numbers of each counter (int64): Philox 4x32-7 under the seed."""
    key = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    stream = tl.full((), stream, tl.int64)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    zero = counter.to(tl.uint32) * 0
    w0 = counter.to(tl.uint32)
    w1 = (counter >> 32).to(tl.uint32)
    w2 = zero + stream.to(tl.uint32)
    w3 = zero + (stream >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        a = tl.full((), 0xD2511F53, tl.uint32)
        b = tl.full((), 0xCD9E8D57, tl.uint32)
        high0 = tl.umulhi(w0, zero + a)
        high1 = tl.umulhi(w2, zero + b)
        low0 = w0 * a
        low1 = w2 * b
        w0 = high1 ^ w1 ^ k0
        w2 = high0 ^ w3 ^ k1
        w1 = low1
        w3 = low0
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit(do_not_specialize=["stream"])
def _normal_kernel(
    seed_ptr,  # one int64
    out_ptr,  # out: float32 [n]
    n: tl.int64,
    stream: tl.int64,
    BLOCK: tl.constexpr,  # numbers of a program, a multiple of 64
):
    """Numbers 0 ... n - 1 of a stream. Some 70 instructions a number, a third of what Philox and the transform take for
    the one number that a thread would need."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    k = tl.arange(0, BLOCK // 4)
    z0, z1, z2, z3 = _normal(base // 4 + k, seed_ptr, stream)
    place = base + k // 16 * 64 + k % 16
    tl.store(out_ptr + place, z0, mask=place < n)
    tl.store(out_ptr + place + 16, z1, mask=place + 16 < n)
    tl.store(out_ptr + place + 32, z2, mask=place + 32 < n)
    tl.store(out_ptr + place + 48, z3, mask=place + 48 < n)
