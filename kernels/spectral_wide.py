"""Spectral mixing in float64 on a GPU: the formulas of ``kernels/spectral_kernels.py`` as products of torch's with the
same matrices. A Triton product in float64 spills on sm_100, and float64 is there to check gradients, not for speed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def angles(n: int, modes: int) -> Tensor:
    """``2 pi j k / n``, reduced to one turn before it is rounded."""
    return torch.outer(torch.arange(n), torch.arange(modes)).remainder(n).double() * (2 * math.pi / n)


@functools.cache
def _matrices(H: int, W: int, device: torch.device) -> tuple[Tensor, ...]:
    """Cosines and sines of the columns, [H, H], and of the rows, [K, W], each orthonormal; how often the half spectrum
    stands for a column of the whole, [K, 1]."""
    K = W // 2 + 1
    twice = torch.tensor([[1.0 if k == 0 or 2 * k == W else 2.0] for k in range(K)], dtype=torch.float64)
    of_h, of_w = angles(H, H), angles(W, K).T.contiguous()
    trigonometric = [f(angle) / math.sqrt(n) for angle, n in ((of_h, H), (of_w, W)) for f in (torch.cos, torch.sin)]
    return tuple(t.to(device) for t in (*trigonometric, twice))


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of rfft2, [B, H, K, C]."""
    cos_h, sin_h, cos_w, sin_w, _ = _matrices(x.shape[1], x.shape[2], x.device)
    x = x.double()
    re, im = (torch.matmul(t, x).flatten(2) for t in (cos_w, -sin_w))
    parts = cos_h @ re + sin_h @ im, cos_h @ im - sin_h @ re
    re, im = (t.unflatten(2, (-1, x.shape[3])) for t in parts)
    return re, im


def _inverse(re: Tensor, im: Tensor, width: int) -> Tensor:
    """irfft2 of them, [B, H, width, C]."""
    cos_h, sin_h, cos_w, sin_w, twice = _matrices(re.shape[1], width, re.device)
    shape = re.shape[2:]
    re, im = re.flatten(2), im.flatten(2)
    re, im = ((t.unflatten(2, shape) * twice) for t in (cos_h @ re - sin_h @ im, cos_h @ im + sin_h @ re))
    return torch.matmul(cos_w.T, re) - torch.matmul(sin_w.T, im)


def gate(x: Tensor, weight: Tensor, conj: bool) -> Tensor:
    """irfft2(rfft2(x) * weight), or times its conjugate."""
    re, im = _forward(x)
    wr, wi = weight.unbind(-1)
    wi = -wi if conj else wi
    return _inverse(re * wr - im * wi, re * wi + im * wr, x.shape[2])


def gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`gate` to x and to weight."""
    re, im = _forward(x)
    g_re, g_im = _forward(grad)
    sums = torch.stack([(re * g_re + im * g_im).sum(0), (re * g_im - im * g_re).sum(0)], -1)
    twice = _matrices(x.shape[1], x.shape[2], x.device)[4]
    return gate(grad, weight, True), sums * twice.unsqueeze(-1)


def spectrum(x: Tensor, blocks: int, inner: float) -> Tensor:
    """``fastcifar::spectrum_forward``."""
    pairs = torch.stack(_forward(x), 3) * _scale(x.shape[1], x.shape[2], inner, x.device)  # [B, H, K, 2, C]
    return pairs.unflatten(-1, (blocks, -1)).movedim(-2, 0).contiguous()


def inverse(spectrum: Tensor, width: int, inner: float) -> Tensor:
    """``fastcifar::spectrum_inverse``."""
    pairs = spectrum.movedim(0, -2).flatten(-2) * _scale(spectrum.shape[2], width, inner, spectrum.device)
    return _inverse(*pairs.unbind(3), width)


def _scale(H: int, W: int, inner: float, device: torch.device) -> Tensor:
    """inner, but 1 in the columns that are their own mirror image, [K, 1, 1]."""
    return ((_matrices(H, W, device)[4] - 1) * (inner - 1) + 1).unsqueeze(-1)
