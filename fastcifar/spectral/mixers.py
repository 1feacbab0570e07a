"""Token mixers made of a spectrum and a product: AFNO, BFNO and FNet.

:mod:`fastcifar.spectral.mixers_reference` spells the formulas out in complex arithmetic. Here the spectrum is planar
(real parts before imaginary parts in a block), so that a complex layer is one batched real matrix product with
``[[wr, wi], [-wi, wr]]``, and nothing is sliced, stacked or permuted between the two transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import direct_apply, serves, state_dtype
from . import mixers_reference as reference
from .export import inverse_spectrum_matmul, spectrum_matmul
from .functional import check_tokens, inverse_spectrum, spectrum

# Bytes of tokens to a pass where no graph is made, so that what a step writes is still in the cache for the next one;
# AFNO of 64 x 14 x 14 x 384 took twice as long in one pass.
_CHUNK = 1 << 19

__all__ = ["afno", "bfno", "fnet", "kept_modes"]


def kept_modes(fraction: float, height: int, width: int, rule: str = "official") -> int:
    """How many columns of the half spectrum a fraction of modes keeps.

    Args:
        fraction: hard_thresholding_fraction, 0 or more.
        height, width: the grid, H and W.
        rule: ``"official"`` counts modes of all N = H W tokens, ``int((N // 2 + 1) * fraction)``, and yet keeps as
            many of the ``W // 2 + 1`` columns, as NVlabs' code does: unless the fraction is small it drops nothing.
            ``"grid"`` is ``int((W // 2 + 1) * fraction)``. On a grid of one row they agree.

    Raises:
        ValueError: the fraction is negative, or the rule unknown.

    Example:
        >>> from fastcifar.spectral.mixers import kept_modes
        >>> kept_modes(0.25, 14, 14), kept_modes(0.25, 14, 14, "grid")  # of 8 columns
        (8, 2)
    """
    if not fraction >= 0:
        raise ValueError(f"kept_modes: expected a fraction of 0 or more, got {fraction}")
    if rule not in ("official", "grid"):
        raise ValueError(f"kept_modes: expected rule 'official' or 'grid', got {rule!r}")
    columns = width // 2 + 1
    total = height * width // 2 + 1 if rule == "official" else columns
    return min(int(total * fraction), columns)


def afno(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    spatial_size: Sequence[int] | None = None,
    *,
    sparsity_threshold: float = 0.01,
    kept_columns: int | None = None,
    dft: str = "kernel",
) -> Tensor:
    r"""The adaptive Fourier neural operator: ``x + irfft2(S(W2 R(W1 rfft2(x) + b1) + b2))``, orthonormal.

    W1 and W2 are complex and block-diagonal over channels; R is the ReLU and S the soft threshold, each on the real
    and on the imaginary part by itself. The residual is part of the op, as in the official code. Computed in the dtype
    of the weights, at least float32; differentiable any number of times.

    Args:
        x: tokens ``[B, H, W, C]``, or ``[B, N, C]`` with N = H W; float32, float64, bfloat16 or float16. For a sequence
            give ``(1, N)`` as ``spatial_size``: that is AFNO1D.
        w1: ``[2, blocks, C / blocks, hidden]``, real and imaginary parts.
        b1: ``[2, blocks, hidden]``.
        w2: ``[2, blocks, hidden, C / blocks]``.
        b2: ``[2, blocks, C / blocks]``.
        spatial_size: ``(H, W)``; None takes it from a four-dimensional ``x``, and the square root of N otherwise.
        sparsity_threshold: lambda of the soft threshold, 0 or more. Default 0.01.
        kept_columns: how many of the ``W // 2 + 1`` columns of the spectrum are mixed (:func:`kept_modes`); the others
            are dropped, that is, only the residual carries them. None keeps all.
        dft: ``"matmul"`` transforms by real matrix products, which exporters accept (:mod:`fastcifar.spectral.export`).
            Default ``"kernel"``.

    Returns:
        Tokens in the shape and dtype of ``x``.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a shape is not as described, the threshold or ``kept_columns`` is negative, ``dft`` is unknown, or
            devices differ.

    Source: Guibas et al., "Adaptive Fourier Neural Operators", ICLR 2022, section 4 (``AFNO2D``, ``AFNO1D``).

    Example:
        >>> import torch
        >>> from fastcifar.spectral.mixers import afno
        >>> w, b = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4)
        >>> x = torch.randn(2, 64, 8)
        >>> torch.equal(afno(x, w, b, w, b), x)  # the residual alone
        True
    """
    op = "afno"
    grid = check_tokens(op, x, spatial_size)
    dtype = _check_weight(op, x, "w1", w1)
    _, blocks, block, hidden = w1.shape
    for name, t, expected in (
        ("b1", b1, (2, blocks, hidden)),
        ("w2", w2, (2, blocks, hidden, block)),
        ("b2", b2, (2, blocks, block)),
    ):
        _check_like(op, name, t, expected, w1)
    if not sparsity_threshold >= 0:
        raise ValueError(f"{op}: expected a sparsity_threshold of 0 or more, got {sparsity_threshold}")
    first, second = _expand(w1, dtype), _expand(w2, dtype)
    bias1, bias2 = _rows(b1, dtype), _rows(b2, dtype)

    def mlp(z: Tensor, in_place: bool) -> Tensor:
        out = torch.baddbmm(bias2, torch.baddbmm(bias1, z, first).relu_(), second)
        if in_place:
            return torch.ops.aten.softshrink.out(out, sparsity_threshold, out=out)
        return F.softshrink(out, sparsity_threshold)

    return _mix(op, x, grid, blocks, dtype, kept_columns, dft, mlp, w1, b1, w2, b2)


def bfno(
    x: Tensor,
    w1: Tensor,
    spatial_size: Sequence[int] | None = None,
    *,
    kept_columns: int | None = None,
    dft: str = "kernel",
) -> Tensor:
    """The block-diagonal Fourier neural operator: ``x + irfft2(W1 rfft2(x))``, orthonormal, residual included.

    Args:
        x, w1, spatial_size, kept_columns, dft: as in :func:`afno`; ``w1`` is ``[2, blocks, C / blocks, C / blocks]``.

    Returns:
        Tokens in the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: as :func:`afno`.

    Source: ``BFNO2D`` of NVlabs/AFNO-transformer, the linear ablation of AFNO.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.mixers import bfno
        >>> one = torch.stack([torch.eye(4), torch.zeros(4, 4)])[:, None].expand(2, 2, 4, 4)
        >>> x = torch.randn(2, 64, 8)
        >>> torch.allclose(bfno(x, one), 2 * x, atol=1e-5)
        True
    """
    op = "bfno"
    grid = check_tokens(op, x, spatial_size)
    dtype = _check_weight(op, x, "w1", w1)
    _check_like(op, "w1", w1, (2, w1.shape[1], w1.shape[2], w1.shape[2]), w1)
    weight = _expand(w1, dtype)
    return _mix(op, x, grid, w1.shape[1], dtype, kept_columns, dft, lambda z, _: torch.bmm(z, weight), w1)


def fnet(x: Tensor) -> Tensor:
    """FNet's mixer: the real part of the Fourier transform over tokens and hidden units, ``Re(FFT(FFT(x)))``.

    Unnormalised and without parameters. The result of (n, c) is that of (-n, -c), so that half a spectrum is computed
    and mirrored. The op is its own adjoint: derivatives of any order cost what the forward pass costs.

    Args:
        x: ``[..., N, C]``, float32, float64, bfloat16 or float16 (computed in float32, rounded once).

    Returns:
        A tensor in the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: ``x`` is not a tensor or of a wrong dtype.
        ValueError: ``x`` has fewer than two dimensions, or N or C is 0.

    Source: Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", NAACL 2022, eq. 3.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.mixers import fnet
        >>> fnet(torch.ones(1, 2, 3)).tolist()
        [[[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"fnet: expected x to be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"fnet: expected x in float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"fnet: expected x [..., N, C] with N and C of at least 1, got {tuple(x.shape)}")
    if 0 in x.shape:  # MKL refuses an empty batch
        return x.clone()
    return _fnet(x) if serves("spectrum_real_parts", x) else reference.fnet(x)


# ---- AFNO and BFNO ---------------------------------------------------------------------------------------------------


def _check_weight(op: str, x: Tensor, name: str, weight: Tensor) -> torch.dtype:
    """The dtype to compute in; raises where the first weight is none or does not fit ``x``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: expected {name} in float32, float64, bfloat16 or float16, got {weight.dtype}")
    channels = x.shape[-1]
    if weight.dim() != 4 or weight.shape[0] != 2 or weight.shape[1] * weight.shape[2] != channels or 0 in weight.shape:
        raise ValueError(
            f"{op}: expected {name} [2, blocks, C / blocks, out] for {channels} channels, got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {weight.device}")
    return state_dtype(weight.dtype)


def _check_like(op: str, name: str, t: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(t).__name__}")
    if t.shape != expected:
        raise ValueError(f"{op}: expected {name} {expected}, got {tuple(t.shape)}")
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: expected {name} in w1's {like.dtype}, got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{op}: expected {name} on w1's device {like.device}, got {t.device}")


def _expand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[2, blocks, i, o]`` as the real ``[blocks, 2 i, 2 o]`` that maps (re, im) to (re, im)."""
    real, imag = weight.to(dtype)
    return torch.cat([torch.cat([real, imag], 2), torch.cat([-imag, real], 2)], 1)


def _rows(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``[2, blocks, o]`` as ``[blocks, 1, 2 o]``."""
    return torch.cat([bias[0], bias[1]], 1).unsqueeze(1).to(dtype)


def _mix(op, x: Tensor, grid, blocks: int, dtype: torch.dtype, kept_columns: int | None, dft: str, mlp, *weights):
    if dft not in ("kernel", "matmul"):
        raise ValueError(f"{op}: expected dft 'kernel' or 'matmul', got {dft!r}")
    there, back = (spectrum, inverse_spectrum) if dft == "kernel" else (spectrum_matmul, inverse_spectrum_matmul)
    height, columns = grid[0], grid[1] // 2 + 1
    kept = columns if kept_columns is None else min(kept_columns, columns)
    if kept < 0:
        raise ValueError(f"{op}: expected kept_columns of 0 or more, got {kept_columns}")
    tokens = x if x.dim() == 4 else x.reshape(x.shape[0], *grid, x.shape[-1])
    pairs = 2 * tokens.shape[-1] // blocks
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()

    def mixed(tokens: Tensor) -> Tensor:
        batch = tokens.shape[0]
        planar = there(tokens.to(dtype) if state_dtype(x.dtype) != dtype else tokens, grid, blocks=blocks)
        cut = planar if kept == columns else planar[:, :, :, :kept]
        out = mlp(cut.reshape(blocks, batch * height * kept, pairs), not tracked and not traced)
        out = out.view(blocks, batch, height, kept, 2, pairs // 2)
        if kept != columns:
            out = F.pad(out, (0, 0, 0, 0, 0, columns - kept))
        return back(out, grid[1], out_dtype=x.dtype)

    def run() -> Tensor:
        if tracked or traced:
            return x + mixed(tokens).view(x.shape)
        step = _step(x)
        if step >= x.shape[0]:
            return mixed(tokens).view(x.shape).add_(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, source, target in zip(tokens.split(step), x.split(step), out.split(step), strict=True):
            torch.add(source, mixed(part).view(source.shape), out=target)
        return out

    if torch.is_autocast_enabled(x.device.type):  # the products must stay in the dtype of the spectrum
        with torch.autocast(x.device.type, enabled=False):
            return run()
    return run()


def _step(x: Tensor) -> int:
    """How many samples to take at a time: all of them, but on the CPU in eager mode."""
    if not x.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x.shape[0]
    sample = max(x[0].numel() if x.shape[0] else 1, 1) * 4
    return max(_CHUNK * torch.get_num_threads() // sample, 1)


# ---- FNet ------------------------------------------------------------------------------------------------------------


class _FNet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        tokens = x.reshape(-1, *x.shape[-2:]).to(state_dtype(x.dtype))
        half = torch.view_as_real(torch.fft.rfft2(tokens))
        return torch.ops.fastcifar.spectrum_real_parts.default(half, x.shape[-1]).to(x.dtype).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return _fnet(grad)


_fnet = direct_apply(_FNet)
