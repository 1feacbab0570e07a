"""Triton kernels of spectral mixing on grids above 16 x 16; what ``kernels/spectral_kernels.py`` says holds here too.

Rows and columns have kernels of their own. Between them lies [B, W, H, C] in float32: W real numbers a row of tokens,
first the K real parts of its half spectrum, then the imaginary parts of the columns that have one. It is as large as
the tokens, and is written, read, written and read: a gate in float32 moves three times the floor of one read and one
write. In return every program is small, and no grid up to 64 x 64 spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .spectral_kernels import _dot, _inner_scale, _matrix


@triton.jit
def _rows_kernel(
    x_ptr,  # tokens [B, H, W, C]: read, or written where INVERSE
    rows_ptr,  # [B, W, H, C]: written, or read
    matrices,
    H,
    C,
    x_b,
    x_h,
    x_w,
    W: tl.constexpr,
    WP: tl.constexpr,
    HT: tl.constexpr,  # rows a program
    CT: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles, groups = tl.cdiv(C, CT), tl.cdiv(H, HT)
    first = tl.program_id(0) % tiles * CT
    group = tl.program_id(0) // tiles % groups * HT
    b = (tl.program_id(0) // tiles // groups).to(tl.int64)
    w = tl.arange(0, WP)[:, None]
    j = tl.arange(0, HT * CT)[None, :]
    h, c = group + j // CT, first + j % CT
    there = (w < W) & (h < H) & (c < C)
    tokens = x_ptr + b * x_b + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c
    rows = rows_ptr + b * (W * H * C) + (w * H + h) * C + c
    if INVERSE:
        y = _dot(_matrix(matrices + WP * WP, WP, WP), tl.load(rows, there, 0.0), PRECISION)
        tl.store(tokens, y.to(x_ptr.dtype.element_ty), there)
    else:
        x = tl.load(tokens, there, 0.0).to(rows_ptr.dtype.element_ty)
        tl.store(rows, _dot(_matrix(matrices, WP, WP), x, PRECISION), there)


@triton.jit
def _turn(re, im, matrices, HP: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """The transform of columns, [HP, CT] each part, or its inverse. The barriers keep ptxas from loading a matrix while
    it has another in registers."""
    tl.debug_barrier()
    cos = _matrix(matrices, HP, HP)
    out_re, out_im = _dot(cos, re, PRECISION), _dot(cos, im, PRECISION)
    tl.debug_barrier()
    sin = _matrix(matrices + HP * HP, HP, HP)
    if BACK:
        sin = -sin
    return out_re + _dot(sin, im, PRECISION), out_im - _dot(sin, re, PRECISION)


@triton.jit
def _columns_kernel(
    rows_ptr,  # [B, W, H, C]; read and written in place where a gate is given
    w_ptr,  # gates, or None
    s_ptr,  # spectrum [blocks, B, H, K, 2, channels], or None
    matrices,
    B,
    C,
    H,
    channels,
    again,
    inner: tl.float64,
    W: tl.constexpr,
    HP: tl.constexpr,
    CT: tl.constexpr,
    CONJ: tl.constexpr,
    INVERSE: tl.constexpr,  # from the spectrum
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = W // 2 + 1
    tiles = tl.cdiv(C, CT)
    first = tl.program_id(0) % tiles * CT
    k = tl.program_id(0) // tiles % K
    b = (tl.program_id(0) // tiles // K).to(tl.int64)
    h = tl.arange(0, HP)[:, None]
    c = first + tl.arange(0, CT)[None, :]
    there = (h < H) & (c < C)
    two_parts = there & (k > 0) & (2 * k < W)
    rows = rows_ptr + b * (W * H * C) + (k * H + h) * C + c
    second = rows + (K - 1) * H * C
    if s_ptr is not None:
        spectrum = s_ptr + ((c // channels * B + b) * H + h) * (K * 2 * channels) + k * 2 * channels + c % channels
    scale = _inner_scale(k, inner, W, rows_ptr.dtype.element_ty)
    if INVERSE:
        re = tl.load(spectrum, there, 0.0) * scale
        im = tl.load(spectrum + channels, there, 0.0) * scale
    else:
        re, im = tl.load(rows, there, 0.0), tl.load(second, two_parts, 0.0)
        re, im = _turn(re, im, matrices, HP, False, PRECISION)
    if w_ptr is not None:
        gates = w_ptr + ((h * K + k) * C + c) * 2
        wr = tl.load(gates, there, 0.0)
        wi = tl.load(gates + 1, there, 0.0)
        if CONJ:
            wi = -wi
        re, im = re * wr - im * wi, re * wi + im * wr
    if s_ptr is None or INVERSE:
        re, im = _turn(re, im, matrices + again, HP, True, PRECISION)
        tl.store(rows, re, there)
        tl.store(second, im, two_parts)
    else:
        tl.store(spectrum, re * scale, there)
        tl.store(spectrum + channels, im * scale, there)


@triton.jit
def _columns_backward_kernel(
    g_ptr,  # rows of the gradient, [B, W, H, C]; becomes rows of the gradient to x where WANTS_X
    x_ptr,  # rows of x or, for tall grids, whose transforms fill the registers one at a time, its spectrum
    w_ptr,
    sums_ptr,  # [chunks, H, K, C, 2]
    matrices,
    B,
    C,
    H,
    per,
    again,
    W: tl.constexpr,
    HP: tl.constexpr,
    CT: tl.constexpr,
    SPECTRUM: tl.constexpr,  # of x
    WANTS_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = W // 2 + 1
    tiles = tl.cdiv(C, CT)
    first = tl.program_id(0) % tiles * CT
    k = tl.program_id(0) // tiles % K
    chunk = (tl.program_id(0) // tiles // K).to(tl.int64)
    h = tl.arange(0, HP)[:, None]
    c = first + tl.arange(0, CT)[None, :]
    there = (h < H) & (c < C)
    two_parts = there & (k > 0) & (2 * k < W)
    first_part = (k * H + h) * C + c
    second_part = first_part + (K - 1) * H * C
    gates = ((h * K + k) * C + c) * 2
    sum_re = tl.zeros(gates.shape, w_ptr.dtype.element_ty)
    sum_im = tl.zeros(gates.shape, w_ptr.dtype.element_ty)
    for b in range(chunk * per, tl.minimum(chunk * per + per, B)):
        g = g_ptr + b * (W * H * C)
        g_re, g_im = tl.load(g + first_part, there, 0.0), tl.load(g + second_part, two_parts, 0.0)
        g_re, g_im = _turn(g_re, g_im, matrices + b * again, HP, False, PRECISION)
        if SPECTRUM:
            x = x_ptr + b * (H * K * 2 * C) + (h * K + k) * 2 * C + c
            x_re, x_im = tl.load(x, there, 0.0), tl.load(x + C, there, 0.0)
        else:
            x = x_ptr + b * (W * H * C)
            x_re, x_im = tl.load(x + first_part, there, 0.0), tl.load(x + second_part, two_parts, 0.0)
            x_re, x_im = _turn(x_re, x_im, matrices + 2 * b * again, HP, False, PRECISION)
        sum_re += x_re * g_re + x_im * g_im
        sum_im += x_re * g_im - x_im * g_re
        if WANTS_X:
            wr = tl.load(w_ptr + gates, there, 0.0)
            wi = tl.load(w_ptr + gates + 1, there, 0.0)
            re, im = _turn(g_re * wr + g_im * wi, g_im * wr - g_re * wi, matrices + 3 * b * again, HP, True, PRECISION)
            tl.store(g + first_part, re, there)
            tl.store(g + second_part, im, two_parts)
    twice = _inner_scale(k, 2.0, W, sum_re.dtype)
    sums = sums_ptr + chunk * (H * K * C * 2) + gates
    tl.store(sums, sum_re * twice, there)
    tl.store(sums + 1, sum_im * twice, there)
