"""Triton kernels of spectral mixing; ``kernels/spectral.py`` launches them.

Triton has no complex numbers and no cheap butterflies, so a transform of a small grid is a product with a matrix of
cosines and sines, in float32 with three TF32 products for one (as exact as float32, on tensor cores). Channels are the
columns of every product: they are adjacent in memory, and a NaN in one of them reaches no other.

Grids up to 32 points: one product with the matrix of the whole transform. Grids up to 16 x 16: rows, then columns, both
on chip (8 x 8 takes 65,000 multiplications for 16 channels so, padding included, and 131,000 with one matrix, which
spills besides). In either case the tokens are read once and written once: that is the floor. Larger grids: three kernels through a float32 copy of the half spectrum, as large as the tokens, so three
times the floor; it holds no zeros, since of columns 0 and W / 2 the imaginary parts are not kept.

Padding: matrices have rows and columns of zeros up to powers of two of 16 and more, loads are masked to zero there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- where things are ------------------------------------------------------------------------------------------------
# A dense tile has points in rows and channels in columns: tokens [NP, CT], spectrum [MP, CT]. A separable one has W in
# rows and (h, channel) in columns, [WP, HP * CT], and of the spectrum h in rows and (k, channel) in columns.


@triton.jit
def _token_places(first, C, H: tl.constexpr, W: tl.constexpr, CT: tl.constexpr, DENSE: tl.constexpr, P: tl.constexpr):
    """h, w and c of each element of a tile of tokens, and whether it exists. P: (NP, MP) or (HP, WP, KP)."""
    if DENSE:
        n = tl.arange(0, P[0])[:, None]
        c = first + tl.arange(0, CT)[None, :]
        h, w = n // W, n % W
    else:
        w = tl.arange(0, P[1])[:, None]
        j = tl.arange(0, P[0] * CT)[None, :]
        h, c = j // CT, first + j % CT
    return h, w, c, (h < H) & (w < W) & (c < C)


@triton.jit
def _spectrum_places(
    first, C, H: tl.constexpr, W: tl.constexpr, CT: tl.constexpr, DENSE: tl.constexpr, P: tl.constexpr
):
    """h, k and c of each element of a tile of the half spectrum, and whether it exists."""
    K: tl.constexpr = W // 2 + 1
    if DENSE:
        m = tl.arange(0, P[1])[:, None]
        c = first + tl.arange(0, CT)[None, :]
        h, k = m // K, m % K
    else:
        h = tl.arange(0, P[0])[:, None]
        j = tl.arange(0, P[2] * CT)[None, :]
        k, c = j // CT, first + j % CT
    return h, k, c, (h < H) & (k < K) & (c < C)


@triton.jit
def _matrix(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _inner_scale(k, inner, W: tl.constexpr, dtype: tl.constexpr):
    """`inner`, but 1 in the columns that are their own mirror image."""
    return tl.where((k == 0) | (2 * k == W), 1.0, inner).to(dtype)


# ---- transforms of a tile --------------------------------------------------------------------------------------------


@triton.jit
def _forward(x, matrices, CT: tl.constexpr, DENSE: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """The half spectrum of a tile of tokens, real and imaginary parts."""
    if DENSE:
        NP: tl.constexpr = P[0]
        MP: tl.constexpr = P[1]
        re = _dot(_matrix(matrices, MP, NP), x, PRECISION)
        im = _dot(_matrix(matrices + MP * NP, MP, NP), x, PRECISION)
    else:
        HP: tl.constexpr = P[0]
        WP: tl.constexpr = P[1]
        KP: tl.constexpr = P[2]
        columns = matrices + 4 * KP * WP
        rows = _dot(_matrix(matrices, 2 * KP, WP), x, PRECISION)
        rows = rows.reshape(2, KP, HP, CT).permute(0, 2, 1, 3).reshape(2 * HP, KP * CT)
        both = _dot(_matrix(columns, 2 * HP, 2 * HP), rows, PRECISION)
        re, im = tl.split(both.reshape(2, HP, KP * CT).permute(1, 2, 0))
    return re, im


@triton.jit
def _inverse(re, im, matrices, CT: tl.constexpr, DENSE: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """Tokens of a half spectrum. Of its columns 0 and W / 2 the matrices drop the anti-Hermitian part, as irfft2."""
    if DENSE:
        NP: tl.constexpr = P[0]
        MP: tl.constexpr = P[1]
        matrices += 2 * MP * NP
        x = _dot(_matrix(matrices, NP, MP), re, PRECISION) + _dot(_matrix(matrices + MP * NP, NP, MP), im, PRECISION)
    else:
        HP: tl.constexpr = P[0]
        WP: tl.constexpr = P[1]
        KP: tl.constexpr = P[2]
        columns = matrices + 4 * KP * WP + 4 * HP * HP
        both = tl.join(re, im).permute(2, 0, 1).reshape(2 * HP, KP * CT)
        both = _dot(_matrix(columns, 2 * HP, 2 * HP), both, PRECISION)
        both = both.reshape(2, HP, KP, CT).permute(0, 2, 1, 3).reshape(2 * KP, HP * CT)
        x = _dot(_matrix(matrices + 2 * KP * WP, WP, 2 * KP), both, PRECISION)
    return x


# ---- grids that fit on chip ------------------------------------------------------------------------------------------
# A program has a tile of channels and a run of `per` images. `again` is 0, which the compiler does not know: otherwise
# it would take the matrices out of the loop, and spill them. They are read from a cache.


@triton.jit
def _gate_kernel(
    x_ptr,  # [B, H, W, C], channels adjacent
    w_ptr,  # [H, K, C, 2]
    y_ptr,  # [B, H, W, C]
    matrices,
    B,
    C,
    x_b,  # strides of x
    x_h,
    x_w,
    per,
    again,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    CT: tl.constexpr,
    DENSE: tl.constexpr,
    CONJ: tl.constexpr,  # of the gates, for the gradient to x
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(C, CT)
    first = tl.program_id(0) % tiles * CT
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    h, w, c, is_token = _token_places(first, C, H, W, CT, DENSE, P)
    places = h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c
    out = (h * W + w) * C + c  # of one image, which is smaller than 2**31
    h, k, c, is_gate = _spectrum_places(first, C, H, W, CT, DENSE, P)
    gates = w_ptr + ((h * (W // 2 + 1) + k) * C + c) * 2
    wr = tl.load(gates, is_gate, 0.0)
    wi = tl.load(gates + 1, is_gate, 0.0)
    if CONJ:
        wi = -wi
    for b in range(chunk * per, tl.minimum(chunk * per + per, B)):
        x = tl.load(x_ptr + b * x_b + places, is_token, 0.0).to(wr.dtype)
        re, im = _forward(x, matrices + b * again, CT, DENSE, P, PRECISION)
        y = _inverse(re * wr - im * wi, re * wi + im * wr, matrices + b * again, CT, DENSE, P, PRECISION)
        tl.store(y_ptr + b * (H * W * C) + out, y.to(y_ptr.dtype.element_ty), is_token)


@triton.jit
def _gate_backward_kernel(
    g_ptr,  # gradient to the output, [B, H, W, C], channels adjacent
    x_ptr,
    w_ptr,
    grad_x_ptr,  # [B, H, W, C]; unread without WANTS_X
    sums_ptr,  # [chunks, H, K, C, 2]: gradients to the gates of each run of images
    matrices,
    B,
    C,
    g_b,
    g_h,
    g_w,
    x_b,
    x_h,
    x_w,
    per,
    again,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    CT: tl.constexpr,
    DENSE: tl.constexpr,
    WANTS_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = W // 2 + 1
    tiles = tl.cdiv(C, CT)
    first = tl.program_id(0) % tiles * CT
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    h, w, c, is_token = _token_places(first, C, H, W, CT, DENSE, P)
    of_x = h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c
    of_g = h.to(tl.int64) * g_h + w.to(tl.int64) * g_w + c
    out = (h * W + w) * C + c
    h, k, c, is_gate = _spectrum_places(first, C, H, W, CT, DENSE, P)
    gates = ((h * K + k) * C + c) * 2
    sum_re = tl.zeros(gates.shape, w_ptr.dtype.element_ty)
    sum_im = tl.zeros(gates.shape, w_ptr.dtype.element_ty)
    for b in range(chunk * per, tl.minimum(chunk * per + per, B)):
        g = tl.load(g_ptr + b * g_b + of_g, is_token, 0.0).to(w_ptr.dtype.element_ty)
        g_re, g_im = _forward(g, matrices + b * again, CT, DENSE, P, PRECISION)
        x = tl.load(x_ptr + b * x_b + of_x, is_token, 0.0).to(w_ptr.dtype.element_ty)
        tl.debug_barrier()
        x_re, x_im = _forward(x, matrices + 2 * b * again, CT, DENSE, P, PRECISION)
        sum_re += x_re * g_re + x_im * g_im
        sum_im += x_re * g_im - x_im * g_re
        if WANTS_X:  # the gates are read again too: kept, they would take a third of the registers
            wr = tl.load(w_ptr + gates, is_gate, 0.0)
            wi = tl.load(w_ptr + gates + 1, is_gate, 0.0)
            grad = _inverse(g_re * wr + g_im * wi, g_im * wr - g_re * wi, matrices + b * again, CT, DENSE, P, PRECISION)
            tl.store(grad_x_ptr + b * (H * W * C) + out, grad.to(grad_x_ptr.dtype.element_ty), is_token)
    twice = _inner_scale(k, 2.0, W, sum_re.dtype)
    sums = sums_ptr + chunk * (H * K * C * 2) + gates
    tl.store(sums, sum_re * twice, is_gate)
    tl.store(sums + 1, sum_im * twice, is_gate)


@triton.jit
def _spectrum_kernel(
    x_ptr,  # tokens [B, H, W, C], channels adjacent: read, or written where INVERSE
    s_ptr,  # [blocks, B, H, K, 2, channels]: written, or read
    matrices,
    B,
    C,
    channels,  # of a block
    x_b,
    x_h,
    x_w,
    per,
    again,
    inner: tl.float64,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    CT: tl.constexpr,
    DENSE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = W // 2 + 1
    tiles = tl.cdiv(C, CT)
    first = tl.program_id(0) % tiles * CT
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    h, w, c, is_token = _token_places(first, C, H, W, CT, DENSE, P)
    places = h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c
    h, k, c, is_there = _spectrum_places(first, C, H, W, CT, DENSE, P)
    block = H * K * 2 * channels
    inside = (c // channels).to(tl.int64) * B * block + (h * K + k) * 2 * channels + c % channels
    scale = _inner_scale(k, inner, W, s_ptr.dtype.element_ty)
    for b in range(chunk * per, tl.minimum(chunk * per + per, B)):
        spectrum = s_ptr + b * block + inside
        if INVERSE:
            re = tl.load(spectrum, is_there, 0.0) * scale
            im = tl.load(spectrum + channels, is_there, 0.0) * scale
            x = _inverse(re, im, matrices + b * again, CT, DENSE, P, PRECISION)
            tl.store(x_ptr + b * x_b + places, x, is_token)
        else:
            x = tl.load(x_ptr + b * x_b + places, is_token, 0.0).to(s_ptr.dtype.element_ty)
            re, im = _forward(x, matrices + b * again, CT, DENSE, P, PRECISION)
            tl.store(spectrum, re * scale, is_there)
            tl.store(spectrum + channels, im * scale, is_there)


# ---- larger grids ----------------------------------------------------------------------------------------------------
# Rows and columns in kernels of their own. Between them lies [B, W, H, C]: W real numbers a row of tokens, first the K
# real parts of its half spectrum, then the imaginary parts of the columns that have one.


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
