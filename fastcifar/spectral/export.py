"""Spectral mixing for exporters: Fourier transforms as products with small constant matrices, in real arithmetic.

ONNX has no inverse real FFT that exporters would emit, and many runtimes know no complex numbers. These functions give
what those of :mod:`fastcifar.spectral` give, to rounding, with nothing but matrix products, sums and permutations, and
every side of the grid is a constant of the exported graph. Modules take them with ``dft="matmul"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .._library import state_dtype
from .functional import check_tokens

__all__ = ["fnet_matmul", "inverse_spectrum_matmul", "spectral_gate_matmul", "spectrum_matmul"]

# As lists, not tensors: a tensor cached while a graph is traced would be the tracer's.


@cache
def _cosines(n: int, columns: int) -> list[list[float]]:
    return [[math.cos(2 * math.pi * (i * k % n) / n) for k in range(columns)] for i in range(n)]


@cache
def _sines(n: int, columns: int) -> list[list[float]]:
    # sin(pi) is not 0 in floating point, and what the inverse ignores must be ignored exactly
    return [[0.0 if 2 * i * k % n == 0 else math.sin(2 * math.pi * (i * k % n) / n) for k in range(columns)]
            for i in range(n)]  # fmt: skip


def _tables(n: int, columns: int, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i k / n, ``[n, columns]`` each."""
    pair = torch.tensor([_cosines(n, columns), _sines(n, columns)], dtype=torch.float64, device=like.device).to(dtype)
    return pair[0], pair[1]


def _column_matrix(n: int, like: Tensor) -> Tensor:
    """``[2 n, 2 n]``: the orthonormal transform of a column, real parts before imaginary parts; its transpose undoes
    it."""
    cos, sin = _tables(n, n, like, like.dtype)
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0) / math.sqrt(n)


def spectrum_matmul(x: Tensor, spatial_size: Sequence[int] | None = None, *, blocks: int = 1) -> Tensor:
    """:func:`fastcifar.spectral.spectrum` as matrix products: same arguments, result, errors and gradients.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.export import spectrum_matmul
        >>> spectrum_matmul(torch.ones(1, 4, 4, 1)).abs().gt(1e-6).sum().item()
        1
    """
    height, width = check_tokens("spectrum_matmul", x, spatial_size)
    channels = x.shape[-1]
    if not isinstance(blocks, int) or blocks < 1 or channels % blocks:
        raise ValueError(f"spectrum_matmul: expected blocks to divide {channels} channels, got {blocks}")
    columns = width // 2 + 1
    tokens = x.to(state_dtype(x.dtype))
    cos, sin = _tables(width, columns, tokens, tokens.dtype)
    rows = torch.cat([cos, -sin], 1).t() / math.sqrt(width)  # [2 K, W]
    half = torch.matmul(rows, tokens.reshape(-1, height, width, channels))  # [B, H, 2 K, C]
    half = half.reshape(-1, height, 2, columns * channels).transpose(1, 2).reshape(-1, 2 * height, columns * channels)
    full = torch.matmul(_column_matrix(height, half), half)
    return full.reshape(-1, 2, height, columns, blocks, channels // blocks).permute(4, 0, 2, 3, 1, 5)


def inverse_spectrum_matmul(spectrum: Tensor, width: int, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """:func:`fastcifar.spectral.inverse_spectrum` as matrix products: same arguments and result.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.export import inverse_spectrum_matmul, spectrum_matmul
        >>> x = torch.randn(2, 4, 5, 3)
        >>> torch.allclose(inverse_spectrum_matmul(spectrum_matmul(x), 5), x, atol=1e-5)
        True
    """
    blocks, _, height, columns, _, block = spectrum.shape
    channels = blocks * block
    full = spectrum.permute(1, 4, 2, 3, 0, 5).reshape(-1, 2 * height, columns * channels)
    half = torch.matmul(_column_matrix(height, full).t(), full).reshape(-1, 2, height, columns * channels)
    half = half.transpose(1, 2).reshape(-1, height, 2 * columns, channels)
    cos, sin = _tables(width, columns, half, half.dtype)
    once = [1.0 if k == 0 or 2 * k == width else 2.0 for k in range(columns)]  # inner columns stand for their mirror
    counts = torch.tensor(once, dtype=half.dtype, device=half.device) / math.sqrt(width)
    rows = torch.cat([cos * counts, -sin * counts], 1)  # [W, 2 K]
    out = torch.matmul(rows, half)
    return out.to(out_dtype or out.dtype)


def spectral_gate_matmul(
    x: Tensor,
    weight: Tensor,
    spatial_size: Sequence[int] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`fastcifar.spectral.spectral_gate` as matrix products, for ``torch.export`` and ONNX.

    Args:
        x, weight, spatial_size, out_dtype: as there.

    Returns:
        Mixed tokens in the shape of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is not as described there, or ``weight`` is of another grid.

    Source: as there; the discrete Fourier transform written out.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import spectral_gate
        >>> from fastcifar.spectral.export import spectral_gate_matmul
        >>> x, weight = torch.randn(2, 16, 3), torch.randn(4, 3, 3, 2)
        >>> torch.allclose(spectral_gate_matmul(x, weight), spectral_gate(x, weight), atol=1e-5)
        True
    """
    op = "spectral_gate_matmul"
    height, width = check_tokens(op, x, spatial_size)
    expected = (height, width // 2 + 1, x.shape[-1], 2)
    if weight.shape != expected:
        raise ValueError(
            f"{op}: expected weight [H, W // 2 + 1, C, 2] = {expected} for a grid of {height} x {width}, "
            f"got {tuple(weight.shape)}"
        )
    spectrum = spectrum_matmul(x, (height, width))[0]  # [B, H, K, 2, C]
    gate = weight.to(spectrum.dtype)
    real, imag = spectrum[..., 0, :], spectrum[..., 1, :]
    gate_real, gate_imag = gate[..., 0], gate[..., 1]
    mixed = torch.stack([real * gate_real - imag * gate_imag, real * gate_imag + imag * gate_real], -2)
    return inverse_spectrum_matmul(mixed[None], width, out_dtype=out_dtype or x.dtype).reshape(x.shape)


def fnet_matmul(x: Tensor) -> Tensor:
    """:func:`fastcifar.spectral.fnet` as matrix products: ``C x C' - S x S'`` with matrices of cosines and sines.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import fnet
        >>> from fastcifar.spectral.export import fnet_matmul
        >>> x = torch.randn(2, 7, 6)
        >>> torch.allclose(fnet_matmul(x), fnet(x), atol=1e-4)
        True
    """
    tokens, channels = x.shape[-2:]
    wide = x.to(state_dtype(x.dtype))
    cos_n, sin_n = _tables(tokens, tokens, wide, wide.dtype)
    cos_c, sin_c = _tables(channels, channels, wide, wide.dtype)
    return (cos_n @ (wide @ cos_c) - sin_n @ (wide @ sin_c)).to(x.dtype)
