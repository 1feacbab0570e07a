"""The spectral mixers in complex arithmetic, as the papers write them: the executable specification of ``mixers.py``.

Weights ``[2, blocks, in, out]`` and biases ``[2, blocks, out]`` hold real and imaginary parts in dimension 0.
Transforms are orthonormal, but for FNet's. Everything is computed in the dtype of the weights (FNet: of ``x``), at
least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import state_dtype


def _complex(pair: Tensor) -> Tensor:
    wide = pair.to(state_dtype(pair.dtype))
    return torch.complex(wide[0], wide[1])


def _per_part(function, z: Tensor) -> Tensor:
    """A real function of the real and of the imaginary part, each on its own."""
    return torch.complex(function(z.real), function(z.imag))


def _mix(x: Tensor, blocks: int, dtype: torch.dtype, kept_columns: int | None, mlp) -> Tensor:
    """``x + irfft2(mlp(rfft2(x)))`` on a grid ``[B, H, W, C]``; ``mlp`` sees the kept columns in blocks of channels."""
    z = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm="ortho").unflatten(-1, (blocks, -1))
    mixed = torch.zeros_like(z)
    mixed[:, :, :kept_columns] = mlp(z[:, :, :kept_columns])
    return x + torch.fft.irfft2(mixed.flatten(-2), s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


def _product(z: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...bi,bio->...bo", z, _complex(weight))


def afno(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, sparsity_threshold: float, kept_columns: int | None
) -> Tensor:
    """AFNO's token mixer, residual included (Guibas et al., ICLR 2022, section 4), on ``[B, H, W, C]``."""

    def mlp(z: Tensor) -> Tensor:
        hidden = _per_part(F.relu, _product(z, w1) + _complex(b1))
        out = _product(hidden, w2) + _complex(b2)
        return _per_part(lambda part: F.softshrink(part, sparsity_threshold), out)

    return _mix(x, w1.shape[1], state_dtype(w1.dtype), kept_columns, mlp)


def bfno(x: Tensor, w1: Tensor, *, kept_columns: int | None) -> Tensor:
    """AFNO's mixer with one linear layer and nothing else, residual included, on ``[B, H, W, C]``."""
    return _mix(x, w1.shape[1], state_dtype(w1.dtype), kept_columns, lambda z: _product(z, w1))


def fnet(x: Tensor) -> Tensor:
    """``Re(FFT over tokens of FFT over hidden)`` of ``[..., N, C]``, unnormalised (FNet, eq. 3)."""
    if x.numel() == 0:  # which torch.fft refuses
        return x.clone()
    z = torch.fft.fft(torch.fft.fft(x.to(state_dtype(x.dtype)), dim=-1), dim=-2)
    return z.real.to(x.dtype)
