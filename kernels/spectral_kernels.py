"""Triton kernels of spectral mixing; ``kernels/spectral.py`` launches them.

Triton has no complex numbers and no cheap butterflies, so a transform of a small grid is a product with a matrix of
cosines and sines, in float32 with three TF32 products for one (as exact as float32, on tensor cores). Channels are the
columns of every product: they are adjacent in memory, and a NaN in one of them reaches no other.

Grids up to 16 points: one product with the matrix of the whole transform. Grids up to 16 x 16: rows, then columns, both
on chip (8 x 8 takes 65,000 multiplications for 16 channels so, padding included, and 131,000 with one matrix, which
spills besides). In either case the tokens are read once and written once: that is the floor. Larger grids are in
``kernels/spectral_large_kernels.py``.

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
