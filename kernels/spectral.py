"""Launchers of spectral mixing on CUDA tensors, which ``fastcifar._library`` registers.

The Triton kernels are in ``kernels/spectral_kernels.py``; float64 is ``kernels/spectral_wide.py``. Where
``fastcifar/_cuda.so`` was built (``make cuda``), the gate of the grids that it has, in float32, runs its CUDA C++
kernels (``spectral_cuda.owner`` says so). Launchers check nothing but sizes: ``fastcifar.spectral`` does. They never
wait for the device, so a CUDA graph can capture them, after a first call outside the capture that puts a grid's
matrices on the device.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from . import spectral_cuda, spectral_wide
from .spectral_kernels import _gate_backward_kernel, _gate_kernel, _spectrum_kernel
from .spectral_large_kernels import _columns_backward_kernel, _columns_kernel, _rows_kernel

# Three TF32 products for a float32 one; "ieee" takes the units that are no tensor cores. "tf32" errs by 5e-4.
PRECISION = "tf32x3"
PROGRAMS = 512  # that images are dealt to, about four a multiprocessor; the same on every GPU, as sums depend on it
LARGEST_IMAGE = 2**29  # places inside of an image are 32-bit numbers, between images 64-bit


def spectral_gate_forward(x: Tensor, weight: Tensor, wide: bool) -> Tensor:
    """``fastcifar::spectral_gate_forward``."""
    return _gate(x, weight, weight.dtype if wide else x.dtype, False)


def spectral_gate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """``fastcifar::spectral_gate_backward``; the gradient to the weight is summed in an order that B and C fix."""
    if not wants_weight:
        return _gate(grad, weight, x.dtype, True) if wants_x else x.new_empty(0), weight.new_empty(0)
    B, H, W, C = x.shape
    grad_x = x.new_empty(x.shape if wants_x else 0)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if weight.dtype == torch.float64:
        in_x, in_weight = spectral_wide.gate_backward(grad, x, weight)
        return grad_x.copy_(in_x) if wants_x else grad_x, in_weight
    weight, x, grad = weight.contiguous(), _adjacent(x), _adjacent(grad)
    if spectral_cuda.serves(x) and grad.dtype == torch.float32:
        return grad_x, spectral_cuda.gate_backward(grad, x, weight, grad_x if wants_x else None)
    how = plan(H, W, backward=True)
    tiles = triton.cdiv(C, how.get("COLUMNS", how["CT"]))
    per, chunks = runs(B, tiles * (1 if "P" in how else W // 2 + 1))
    sums = weight.new_empty(chunks, *weight.shape)
    with torch.cuda.device_of(x):
        table = matrices(H, W, x.device)
        if "P" in how:
            _gate_backward_kernel[(tiles * chunks,)](
                grad,
                x,
                weight,
                grad_x,
                sums,
                table,
                B,
                C,
                *grad.stride()[:3],
                *x.stride()[:3],
                per,
                0,
                H=H,
                W=W,
                WANTS_X=wants_x,
                PRECISION=PRECISION,
                **how,
            )
        else:
            g_rows = _rows(grad, how)
            tall = how["HP"] == 64
            x_rows = spectrum_forward(x, 1, 1.0) if tall else _rows(x, how)
            _columns_backward_kernel[(tiles * chunks * (W // 2 + 1),)](
                g_rows,
                x_rows,
                weight,
                sums,
                table[2 * how["WP"] ** 2 :],
                B,
                C,
                H,
                per,
                0,
                W=W,
                HP=how["HP"],
                CT=how["COLUMNS"],
                SPECTRUM=tall,
                WANTS_X=wants_x,
                PRECISION=PRECISION,
                num_warps=8,
                num_stages=1,
            )
            if wants_x:
                _rows(grad_x, how, g_rows)
    return grad_x, sums[0] if chunks == 1 else sums.sum(0)


def spectrum_forward(x: Tensor, blocks: int, inner: float) -> Tensor:
    """``fastcifar::spectrum_forward``."""
    B, H, W, C = x.shape
    wide = x.dtype == torch.float64
    out = x.new_empty((blocks, B, H, W // 2 + 1, 2, C // blocks), dtype=x.dtype if wide else torch.float32)
    if wide and out.numel():
        return spectral_wide.spectrum(x, blocks, inner)
    if out.numel():
        _spectrum(_adjacent(x), out, inner, False)
    return out


def spectrum_inverse(spectrum: Tensor, width: int, inner: float) -> Tensor:
    """``fastcifar::spectrum_inverse``."""
    blocks, B, H, _, _, channels = spectrum.shape
    out = spectrum.new_empty((B, H, width, blocks * channels))
    if out.numel() and out.dtype == torch.float64:
        return spectral_wide.inverse(spectrum, width, inner)
    if out.numel():
        _spectrum(out, spectrum.contiguous(), inner, True)
    return out


def _gate(x: Tensor, weight: Tensor, dtype: torch.dtype, conj: bool) -> Tensor:
    B, H, W, C = x.shape
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel() == 0:
        return y
    if weight.dtype == torch.float64:
        return y.copy_(spectral_wide.gate(x, weight, conj))
    weight, x = weight.contiguous(), _adjacent(x)
    if spectral_cuda.serves(x) and dtype == torch.float32:
        spectral_cuda.gate(x, weight, y, conj)
        return y
    how = plan(H, W)
    tiles = triton.cdiv(C, how["CT"])
    with torch.cuda.device_of(x):
        table = matrices(H, W, x.device)
        if "P" in how:
            per, chunks = runs(B, tiles)
            _gate_kernel[(tiles * chunks,)](
                x,
                weight,
                y,
                table,
                B,
                C,
                *x.stride()[:3],
                per,
                0,
                H=H,
                W=W,
                CONJ=conj,
                PRECISION=PRECISION,
                **how,
            )
        else:
            rows = _rows(x, how)
            _columns(rows, weight, None, H, W, how, 1.0, conj, False)
            _rows(y, how, rows)
    return y


def _spectrum(x: Tensor, spectrum: Tensor, inner: float, inverse: bool) -> None:
    B, H, W, C = x.shape
    how = plan(H, W)
    tiles = triton.cdiv(C, how["CT"])
    with torch.cuda.device_of(x):
        if "P" in how:
            per, chunks = runs(B, tiles)
            _spectrum_kernel[(tiles * chunks,)](
                x,
                spectrum,
                matrices(H, W, x.device),
                B,
                C,
                spectrum.shape[-1],
                *x.stride()[:3],
                per,
                0,
                inner,
                H=H,
                W=W,
                INVERSE=inverse,
                PRECISION=PRECISION,
                **how,
            )
        elif inverse:
            rows = spectrum.new_empty(B, W, H, C)
            _columns(rows, None, spectrum, H, W, how, inner, False, True)
            _rows(x, how, rows)
        else:
            _columns(_rows(x, how), None, spectrum, H, W, how, inner, False, False)


def _rows(x: Tensor, how: dict, rows: Tensor | None = None) -> Tensor:
    """The transforms of the rows of x, or, where these are given, x of them."""
    B, H, W, C = x.shape
    inverse = rows is not None
    if rows is None:
        rows = x.new_empty((B, W, H, C), dtype=torch.float32)
    grid = triton.cdiv(C, how["CT"]) * triton.cdiv(H, how["HT"]) * B
    table, sizes = matrices(H, W, x.device), {name: how[name] for name in ("WP", "HT", "CT")}
    _rows_kernel[(grid,)](
        x, rows, table, H, C, *x.stride()[:3], W=W, **sizes, INVERSE=inverse, PRECISION=PRECISION, num_warps=4
    )
    return rows


def _columns(
    rows: Tensor,
    weight: Tensor | None,
    spectrum: Tensor | None,
    H: int,
    W: int,
    how: dict,
    inner: float,
    conj: bool,
    inverse: bool,
) -> None:
    B, _, _, C = rows.shape
    _columns_kernel[(triton.cdiv(C, how["COLUMNS"]) * (W // 2 + 1) * B,)](
        rows,
        weight,
        spectrum,
        matrices(H, W, rows.device)[2 * how["WP"] ** 2 :],
        B,
        C,
        H,
        1 if spectrum is None else spectrum.shape[-1],
        0,
        inner,
        W=W,
        HP=how["HP"],
        CT=how["COLUMNS"],
        CONJ=conj,
        INVERSE=inverse,
        PRECISION=PRECISION,
        num_warps=4,
        num_stages=1,
    )


def _adjacent(x: Tensor) -> Tensor:
    """x itself where its channels are adjacent in memory, else one copy."""
    if math.prod(x.shape[1:]) >= LARGEST_IMAGE:
        raise ValueError(f"spectral: expected images of less than {LARGEST_IMAGE} numbers, got {tuple(x.shape)}")
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def runs(B: int, tiles: int) -> tuple[int, int]:
    """Images a program, and how many such runs there are."""
    per = triton.cdiv(B, max(1, PROGRAMS // tiles))
    return per, triton.cdiv(B, per)


def plan(H: int, W: int, backward: bool = False) -> dict:
    """How a grid is transformed in float32: sizes of tiles, and with "P", where one kernel does it, how to compile it.

    As many channels as registers allow without a spill, in a gate or its backward pass: 8 are 32 bytes, the least that
    memory moves, and programs with 4 share them in the L2 cache."""
    if H * W <= 16:
        sizes = (_padded(H * W), _padded(H * (W // 2 + 1)))
        return {"P": sizes, "CT": 32, "DENSE": True, **_compiled(4)}
    if max(H, W) <= 16:
        sizes = (_padded(H, 8), _padded(W), _padded(W // 2 + 1, 8))
        channels = 8 if W == 16 else 16
        if backward and H > 8:
            channels //= 2
        return {"P": sizes, "CT": channels, "DENSE": False, **_compiled(8)}
    return {"HP": _padded(H), "WP": _padded(W), "HT": 2, "CT": 16, "COLUMNS": 8}


def _compiled(num_warps: int) -> dict:
    return {"num_warps": num_warps, "num_stages": 1}


def _padded(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def matrices(H: int, W: int, device: torch.device) -> Tensor:
    """The padded matrices of a grid's transforms, one after the other, computed in float64 on the host: at most 64 kB.
    Made at the first call and kept."""
    how = plan(H, W)
    K = W // 2 + 1
    twice = torch.tensor([1.0 if k == 0 or 2 * k == W else 2.0 for k in range(K)], dtype=torch.float64)
    of_h, of_w = spectral_wide.angles(H, H), spectral_wide.angles(W, K)  # [h, h'], [w, k]
    scale_h, scale_w = 1 / math.sqrt(H), 1 / math.sqrt(W)
    if "P" in how and how["DENSE"]:
        points, modes = how["P"]
        angle = (of_h[:, None, :, None] + of_w[None, :, None, :]).reshape(H * W, H * K)
        cos, sin = angle.cos() * scale_h * scale_w, angle.sin() * scale_h * scale_w
        weight = twice.repeat(H)
        parts = [_pad(t, modes, points) for t in (cos.T, -sin.T)]
        parts += [_pad(t, points, modes) for t in (cos * weight, -sin * weight)]
    else:
        cos_w, sin_w = of_w.cos() * scale_w, of_w.sin() * scale_w
        cos_h, sin_h = of_h.cos() * scale_h, of_h.sin() * scale_h
        if "P" in how:
            HP, WP, KP = how["P"]
            rows = torch.cat([_pad(cos_w.T, KP, WP), _pad(-sin_w.T, KP, WP)])
            back = torch.cat([_pad(cos_w * twice, WP, KP), _pad(-sin_w * twice, WP, KP)], 1)
            cos_h, sin_h = (_pad(t, HP, HP) for t in (cos_h, sin_h))
            columns = [torch.cat([torch.cat([cos_h, s], 1), torch.cat([-s, cos_h], 1)]) for s in (sin_h, -sin_h)]
            parts = [rows, back, *columns]
        else:
            HP, WP, odd = how["HP"], how["WP"], slice(1, W - K + 1)  # odd: the columns with an imaginary part
            rows = torch.cat([cos_w.T, -sin_w.T[odd]])
            back = torch.cat([cos_w * twice, (-sin_w * twice)[:, odd]], 1)
            parts = [*(_pad(t, WP, WP) for t in (rows, back)), *(_pad(t, HP, HP) for t in (cos_h, sin_h))]
    return torch.cat([part.reshape(-1) for part in parts]).to(device, torch.float32)


def _pad(t: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))
