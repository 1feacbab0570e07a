"""Spectral mixing as functions: the arguments, what they mean, and what is refused; autograd lives here.

:mod:`fastcifar.spectral.reference` spells the formulas out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library
from .._checks import expect_tensors
from . import reference

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 64  # side of a grid that the kernels serve; larger ones run the reference
# On a CPU, the reference is faster where a register would be nearly empty: of up to 4 channels, at most so many in all
# images together, of more pixels than that.
FEW_CHANNELS, FEW_IN_ALL = 4, ((2, 1100), (8, 3600))

__all__ = ["LARGEST", "as_kernel", "inverse_spectrum", "spectral_gate", "spectrum"]


def spectral_gate(
    x: Tensor,
    weight: Tensor,
    spatial_size: Sequence[int] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A learnt filter in the frequency domain: ``irfft2(rfft2(x) * weight)``, orthonormal, in one pass over memory.

    It equals a circular convolution of each channel with a kernel as large as the grid (:func:`as_kernel`). As in
    ``torch.fft.irfft2``, the anti-Hermitian part of the product in columns 0 and, for even W, W / 2 is dropped.
    Only ``x`` (and ``weight``) are saved for backward; the gradient to ``weight`` is summed in an order that does not
    depend on threads. The op is bilinear, and its derivatives of any order are exact. A grid with a side above
    :data:`LARGEST` runs the reference, and so do, on a CPU, channels that leave most of a register empty: one or two
    in all images together on a grid of more than 1100 pixels, and of up to 4 up to 8 in all on more than 3600.

    Args:
        x: tokens ``[B, H, W, C]``, or ``[B, N, C]`` with N = H W in row-major order; float32, float64, bfloat16 or
            float16, any layout (one whose channels are not adjacent in memory is copied once).
        weight: complex gates as pairs of reals ``[H, W // 2 + 1, C, 2]``, float32 (float64 for float64 ``x``; one in
            ``x``'s dtype is accepted).
        spatial_size: ``(H, W)``; None takes it from a four-dimensional ``x``, and the square root of N otherwise.
        out_dtype: None gives ``x``'s dtype; ``torch.float32`` is the official code's rule, whatever the input.

    Returns:
        Mixed tokens in the shape of ``x``, contiguous.

    Raises:
        TypeError: an argument is not a tensor or of a wrong dtype.
        ValueError: a shape is not as described (also where broadcasting would accept it), or devices differ.

    Source: Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021, eqs. 4 to 6 (``GlobalFilter``);
    Patro et al., "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", 2023
    (``SpectralGatingNetwork``).

    Example:
        >>> import torch
        >>> from fastcifar.spectral.functional import spectral_gate
        >>> x, weight = torch.arange(16.0).view(1, 4, 4, 1), torch.zeros(4, 3, 1, 2)
        >>> weight[0, 0, 0, 0] = 1  # keeps the mean alone
        >>> spectral_gate(x, weight).unique().tolist()
        [7.5]
    """
    op = "spectral_gate"
    grid = check_tokens(op, x, spatial_size)
    if out_dtype not in (None, torch.float32, x.dtype):
        raise TypeError(f"{op}: expected out_dtype None, torch.float32 or x's {x.dtype}, got {out_dtype}")
    state = _library.state_dtype(x.dtype)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: expected weight to be a tensor, got {type(weight).__name__}")
    if weight.dtype not in (state, x.dtype):
        raise TypeError(f"{op}: expected weight in {state} for x in {x.dtype}, got {weight.dtype}")
    height, width = grid
    expected = (height, width // 2 + 1, x.shape[-1], 2)
    if weight.shape != expected:
        raise ValueError(
            f"{op}: expected weight [H, W // 2 + 1, C, 2] = {expected} for a grid of {height} x {width}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: expected weight on x's device {x.device}, got {weight.device}")
    tokens = x if x.dim() == 4 else x.reshape(x.shape[0], height, width, x.shape[-1])
    weight = weight if weight.dtype == state else weight.to(state)
    wide = out_dtype == torch.float32 and state == torch.float32 and x.dtype != state
    if not _library.serves("spectral_gate_forward", x) or max(grid) > LARGEST or _leaves_lanes_empty(tokens):
        out = reference.spectral_gate(tokens, weight, out_dtype=out_dtype)
    elif torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out = _gate(tokens, weight, wide)
    else:
        out = torch.ops.fastcifar.spectral_gate_forward.default(tokens, weight, wide)
    out = out if x.dim() == 4 else out.view(x.shape)
    return out if out.dtype == (out_dtype or x.dtype) else out.to(out_dtype or x.dtype)


def _leaves_lanes_empty(x: Tensor) -> bool:
    batch, height, width, channels = x.shape
    if channels > FEW_CHANNELS or not x.is_cpu or torch.compiler.is_compiling():
        return False
    return any(batch * channels <= few and height * width > many for few, many in FEW_IN_ALL)


def check_tokens(op: str, x: Tensor, spatial_size: Sequence[int] | None) -> tuple[int, int]:
    """The grid (H, W) of tokens ``[B, H, W, C]`` or ``[B, N, C]``; raises in the name of ``op`` what does not fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: expected x to be a dense tensor, got {x.layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: expected x in float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: expected x [B, H, W, C] or [B, N, C], got {tuple(x.shape)}")
    if x.dim() == 4:
        grid = (x.shape[1], x.shape[2])
        if spatial_size is not None and tuple(spatial_size) != grid:
            raise ValueError(f"{op}: expected spatial_size {grid} as in x, got {tuple(spatial_size)}")
    elif spatial_size is None:
        side = int(x.shape[1] ** 0.5 + 0.5)  # not isqrt, which torch.compile does not know for symbols
        if side * side != x.shape[1]:
            raise ValueError(f"{op}: expected spatial_size, as {x.shape[1]} tokens are no square")
        grid = (side, side)
    else:
        if len(spatial_size) != 2 or not all(isinstance(side, int | torch.SymInt) for side in spatial_size):
            raise TypeError(f"{op}: expected spatial_size to be two integers (H, W), got {spatial_size!r}")
        grid = (spatial_size[0], spatial_size[1])
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"{op}: expected {grid[0]} x {grid[1]} tokens, got {x.shape[1]}")
    if 0 in grid:
        raise ValueError(f"{op}: expected a grid of at least 1 x 1, got {grid[0]} x {grid[1]}")
    return grid


def as_kernel(weight: Tensor, spatial_size: Sequence[int]) -> Tensor:
    """The kernel ``k`` of :func:`spectral_gate`: ``y[i, j] = sum_mn k[m, n] x[(i - m) % H, (j - n) % W]``, a channel.

    Args:
        weight: ``[H, W // 2 + 1, C, 2]``.
        spatial_size: ``(H, W)``; the weight alone does not tell an even W from the odd one after it.

    Returns:
        Kernels ``[C, H, W]``.

    Raises:
        ValueError: ``weight`` is not of that grid.

    Source: the convolution theorem; GFNet, section 3.2.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.functional import as_kernel
        >>> identity = torch.tensor([1.0, 0.0]).expand(4, 3, 1, 2)
        >>> as_kernel(identity, (4, 4)).nonzero().tolist()
        [[0, 0, 0]]
    """
    expect_tensors("as_kernel", weight=weight)
    height, width = spatial_size
    if weight.dim() != 4 or weight.shape[:2] != (height, width // 2 + 1) or weight.shape[3] != 2:
        raise ValueError(
            f"as_kernel: expected weight [{height}, {width // 2 + 1}, C, 2] for a grid of {height} x {width}, "
            f"got {tuple(weight.shape)}"
        )
    return reference.as_kernel(weight, width)


def spectrum(x: Tensor, spatial_size: Sequence[int] | None = None, *, blocks: int = 1) -> Tensor:
    """The orthonormal ``rfft2`` of tokens, in the layout that a block-diagonal product wants.

    Args:
        x: as in :func:`spectral_gate`.
        spatial_size: as in :func:`spectral_gate`.
        blocks: into how many equal blocks the channels are split. Default 1.

    Returns:
        ``[blocks, B, H, W // 2 + 1, 2, C / blocks]``, real parts before imaginary parts, contiguous; float32, or
        float64 for float64 ``x``. Differentiable any number of times.

    Raises:
        TypeError, ValueError: as :func:`spectral_gate`, or ``blocks`` does not divide the channels.

    Source: the first half of AFNO's token mixer, Guibas et al., ICLR 2022.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.functional import spectrum
        >>> spectrum(torch.ones(1, 4, 4, 1)).count_nonzero().item()
        1
    """
    op = "spectrum"
    grid = check_tokens(op, x, spatial_size)
    if not isinstance(blocks, int) or blocks < 1 or x.shape[-1] % blocks:
        raise ValueError(f"{op}: expected blocks to divide {x.shape[-1]} channels, got {blocks}")
    tokens = x if x.dim() == 4 else x.reshape(x.shape[0], *grid, x.shape[-1])
    if not _library.serves("spectrum_forward", x) or max(grid) > LARGEST:
        return reference.spectrum(tokens, blocks=blocks)
    if torch.is_grad_enabled() and x.requires_grad:
        return _spectrum(tokens, blocks, 1.0)
    return torch.ops.fastcifar.spectrum_forward.default(tokens, blocks, 1.0)


def inverse_spectrum(spectrum: Tensor, width: int, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """The orthonormal ``irfft2`` of what :func:`spectrum` returns.

    Args:
        spectrum: ``[blocks, B, H, width // 2 + 1, 2, C / blocks]``; bfloat16 and float16 are computed in float32.
        width: W of the grid; the spectrum alone does not tell an even W from the odd one after it.
        out_dtype: dtype of the result; None gives that of ``spectrum``.

    Returns:
        Tokens ``[B, H, width, C]``, contiguous.

    Raises:
        TypeError, ValueError: ``spectrum`` is not as described.

    Example:
        >>> import torch
        >>> from fastcifar.spectral.functional import inverse_spectrum, spectrum
        >>> x = torch.randn(2, 4, 5, 3)
        >>> torch.allclose(inverse_spectrum(spectrum(x), 5), x, atol=1e-6)
        True
    """
    op = "inverse_spectrum"
    if not isinstance(spectrum, Tensor):
        raise TypeError(f"{op}: expected spectrum to be a tensor, got {type(spectrum).__name__}")
    if spectrum.dtype not in FLOATING:
        raise TypeError(f"{op}: expected spectrum in float32, float64, bfloat16 or float16, got {spectrum.dtype}")
    if spectrum.dim() != 6 or spectrum.shape[4] != 2 or width < 1 or spectrum.shape[3] != width // 2 + 1:
        raise ValueError(
            f"{op}: expected spectrum [blocks, B, H, {width // 2 + 1}, 2, C / blocks] for width {width}, "
            f"got {tuple(spectrum.shape)}"
        )
    out_dtype = out_dtype or spectrum.dtype
    if not _library.serves("spectrum_inverse", spectrum) or max(spectrum.shape[2], width) > LARGEST:
        return reference.inverse_spectrum(spectrum, width=width, out_dtype=out_dtype)
    spectrum = spectrum.to(_library.state_dtype(spectrum.dtype))
    if torch.is_grad_enabled() and spectrum.requires_grad:
        out = _inverse(spectrum, width, 1.0)
    else:
        out = torch.ops.fastcifar.spectrum_inverse.default(spectrum, width, 1.0)
    return out.to(out_dtype)


# ---- autograd --------------------------------------------------------------------------------------------------------
# With F(x, w) the gate and R(x, g) the gradient to w, <g, F(x, w)> = <F(g, conj w), x> = <R(x, g), w>: derivatives of
# any order are F and R again.


def _conj(weight: Tensor) -> Tensor:
    return torch.stack([weight[..., 0], -weight[..., 1]], -1)


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, wide):
        return torch.ops.fastcifar.spectral_gate_forward.default(x, weight, wide)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _gate_backward(grad, x, weight, *ctx.needs_input_grad[:2])
        return grad_x, grad_weight, None


class _GateBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, weight, wants_x, wants_weight):
        return torch.ops.fastcifar.spectral_gate_backward.default(grad, x, weight, wants_x, wants_weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.wants = inputs[3:]

    @staticmethod
    def backward(ctx, u_x, u_weight):
        grad, x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.wants
        needs_grad, needs_x, needs_weight = ctx.needs_input_grad[:3]
        to_grad = to_x = to_weight = None
        if needs_grad and wants_x:
            to_grad = _gate(u_x, weight, False).to(grad.dtype)
        if needs_grad and wants_weight:
            through_weight = _gate(x, u_weight, False).to(grad.dtype)
            to_grad = through_weight if to_grad is None else to_grad + through_weight
        if needs_x and wants_weight:
            to_x = _gate(grad, _conj(u_weight), False).to(x.dtype)
        if needs_weight and wants_x:
            to_weight = _gate_backward(grad, u_x, weight, False, True)[1]
        return to_grad, to_x, to_weight, None, None


class _Spectrum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, blocks, inner):
        return torch.ops.fastcifar.spectrum_forward.default(x, blocks, inner)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.width, ctx.dtype, ctx.inner = inputs[0].shape[2], inputs[0].dtype, inputs[2]

    @staticmethod
    def backward(ctx, grad):
        # The inverse counts every inner column twice (for itself and its mirror image), the adjoint once.
        return _inverse(grad, ctx.width, ctx.inner / 2).to(ctx.dtype), None, None


class _Inverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spectrum, width, inner):
        return torch.ops.fastcifar.spectrum_inverse.default(spectrum, width, inner)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.blocks, ctx.inner = inputs[0].shape[0], inputs[2]

    @staticmethod
    def backward(ctx, grad):
        return _spectrum(grad, ctx.blocks, ctx.inner * 2), None, None


_gate_apply = _library.direct_apply(_Gate)
_gate_backward_apply = _library.direct_apply(_GateBackward)
_spectrum = _library.direct_apply(_Spectrum)
_inverse = _library.direct_apply(_Inverse)


def _gate(x: Tensor, weight: Tensor, wide: bool) -> Tensor:
    return _gate_apply(x, weight, wide)


def _gate_backward(grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool):
    """Gradients to x and to weight; None for what is not wanted. Differentiable where a graph is being made."""
    if torch.is_grad_enabled():
        grads = _gate_backward_apply(grad, x, weight, wants_x, wants_weight)
    else:
        grads = torch.ops.fastcifar.spectral_gate_backward.default(grad, x, weight, wants_x, wants_weight)
    return grads[0] if wants_x else None, grads[1] if wants_weight else None
