"""Spectral mixing in plain PyTorch: the executable specification of the family.

A token grid is ``x[B, H, W, C]``; ``K = W // 2 + 1`` columns of the spectrum of a real signal are kept; complex numbers
are pairs of reals in the last dimension, as in the official code. Transforms are orthonormal (``norm="ortho"``).
Everything is computed in ``x``'s dtype, bfloat16 and float16 in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import state_dtype


def spectral_gate(x: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """``irfft2(rfft2(x) * weight)`` over the grid (GFNet, eqs. 4 to 6)."""
    mixed = _irfft2(_rfft2(x) * _complex(weight), x.shape[2])
    return mixed.to(out_dtype or x.dtype)


def spectrum(x: Tensor, *, blocks: int = 1) -> Tensor:
    """``rfft2(x)`` as ``[blocks, B, H, K, 2, C / blocks]``: real parts before imaginary parts, channels in blocks."""
    z = _rfft2(x).unflatten(-1, (blocks, x.shape[-1] // blocks)).permute(3, 0, 1, 2, 4)
    return torch.stack([z.real, z.imag], dim=4)


def inverse_spectrum(spectrum: Tensor, *, width: int, out_dtype: torch.dtype | None = None) -> Tensor:
    """``irfft2`` of :func:`spectrum`'s result, back to ``[B, H, width, C]``."""
    re, im = spectrum.to(state_dtype(spectrum.dtype)).permute(4, 1, 2, 3, 0, 5)  # each [B, H, K, blocks, C / blocks]
    return _irfft2(torch.complex(re, im).flatten(-2), width).to(out_dtype or spectrum.dtype)


def as_kernel(weight: Tensor, width: int) -> Tensor:
    """The kernel ``[C, H, width]`` of the circular convolution that ``weight`` is the transfer function of."""
    half = _complex(weight).permute(2, 0, 1)
    return torch.fft.irfft2(half, s=(weight.shape[0], width))


def _complex(pairs: Tensor) -> Tensor:
    if pairs.is_contiguous() and pairs.storage_offset() % 2 == 0:  # what torch can look at as complex numbers
        return torch.view_as_complex(pairs)
    return torch.complex(*pairs.unbind(-1))


def _rfft2(x: Tensor) -> Tensor:
    if x.numel() == 0:  # which torch.fft refuses
        columns = x[:, :, : x.shape[2] // 2 + 1].to(state_dtype(x.dtype))
        return torch.complex(columns, columns)
    return torch.fft.rfft2(x.to(state_dtype(x.dtype)), dim=(1, 2), norm="ortho")


def _irfft2(z: Tensor, width: int) -> Tensor:
    if z.numel() == 0:
        return z.real[:, :, :1].expand(-1, -1, width, -1)
    return torch.fft.irfft2(z, s=(z.shape[1], width), dim=(1, 2), norm="ortho")
