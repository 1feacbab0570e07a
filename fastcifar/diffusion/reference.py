"""One step of a linear diffusion solver in plain PyTorch: the executable specification of ``solver_step``.

Every solver that this family has (DDPM, DDIM, DPM-Solver and ++, UniPC, DEIS, PNDM, LMS, Heun, Euler, and what a search
finds between them) is the same short program; only its numbers differ. They stand in three rows of ``TERMS`` columns,
each row of which may use what the rows above it made:

=========  =======================================================================================================
converted  ``clamp(sum over x, output, h1...h6)``: the model's output as the prediction that the solver keeps
corrected  ``sum over x, output, h1...h6, converted``: the sample after a corrector (UniPC), or one to come back to
x_next     ``sum over x, output, h1...h6, converted, corrected, noise``
=========  =======================================================================================================

Source: Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (ICLR 2024),
whose update this contains; that published samplers are linear in x and outputs is a fact of their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HISTORY = 6
TERMS = ("x", "output", *(f"h{i}" for i in range(1, HISTORY + 1)), "converted", "corrected", "noise")
CONVERT, CORRECT, PREDICT = range(3)


class Step(NamedTuple):
    """What a step makes, each like x; None for what is not asked for."""

    x_next: Any
    converted: Any
    corrected: Any


def solver_step(
    x: Tensor,
    output: Tensor | None,
    history: Sequence[Tensor | None],
    coefficients: Tensor,
    noise: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    limit: float | None = None,
) -> Step:
    """``coefficients`` [3, 11], or [B, 3, 11] with a program for each sample. A term whose coefficient is exactly 0
    adds nothing, whatever its tensor holds. ``guidance`` g combines two outputs, ``uncond + g (output - uncond)``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = coefficients.to(x.device, dtype)
    rows = rows if rows.dim() == 2 else rows.movedim(0, -1)
    rows = rows.reshape(3, len(TERMS), -1, *[1] * (x.dim() - 1))

    if output is not None and uncond is not None:
        output = uncond.to(dtype) + guidance * (output.to(dtype) - uncond.to(dtype))
    terms = [None if t is None else t.to(dtype) for t in (x, output, *history)]
    terms += [None] * (2 + HISTORY - len(terms))

    def combine(row: Tensor, terms: Sequence[Tensor | None]) -> Tensor:
        total = torch.zeros_like(x, dtype=dtype)
        for c, term in zip(row, terms, strict=False):
            if term is not None:
                # Not where(c == 0, 0, c * term): a coefficient of 0 has a derivative, too.
                total = total + c * torch.where((c == 0) & ~term.isfinite(), 0.0, term)
        return total

    converted = combine(rows[CONVERT], terms)
    if limit is not None:
        converted = converted.clamp(-limit, limit)
    corrected = combine(rows[CORRECT], [*terms, converted])
    x_next = combine(rows[PREDICT], [*terms, converted, corrected, None if noise is None else noise.to(dtype)])
    return Step(x_next.to(x.dtype), converted.to(x.dtype), corrected.to(x.dtype))


def normal_numbers(seed: int, stream: int, n: int) -> Tensor:
    """Numbers 0 to n - 1 of a stream of standard normal numbers, float32: Philox 4x32-7, then Box and Muller.

    Number ``64 b + 16 j + c`` is made of the words of counter ``16 b + c``: cosine and sine of words 0 and 1 for j = 0
    and 1, of words 2 and 3 for j = 2 and 3.
    """
    blocks = (n + 63) // 64
    counter = torch.arange(16 * blocks)

    def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        low, high = (a & 0xFFFF) * b, (a >> 16) * b
        return (high + (low >> 16)) >> 16, (low + (high << 16)) & 0xFFFFFFFF

    w0, w1 = counter & 0xFFFFFFFF, counter >> 32
    w2, w3 = torch.full_like(w0, stream & 0xFFFFFFFF), torch.full_like(w0, stream >> 32 & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        high0, low0 = multiply(w0, 0xD2511F53)
        high1, low1 = multiply(w2, 0xCD9E8D57)
        w0, w1, w2, w3 = high1 ^ w1 ^ k0, low1, high0 ^ w3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF

    def pair(first: Tensor, second: Tensor) -> list[Tensor]:
        u = ((first >> 9).double() + 0.5) * 2.0**-23
        turn = second >> 8
        quarter, part = turn >> 22, (turn & 0x3FFFFF) - 0x200000
        angle = (quarter.double() + part.double() * 2.0**-22) * (math.pi / 2)
        radius = (-2 * u.log()).sqrt()
        return [radius * angle.cos(), radius * angle.sin()]

    numbers = torch.stack([*pair(w0, w1), *pair(w2, w3)])  # [4, counters]
    return numbers.view(4, blocks, 16).transpose(0, 1).reshape(-1)[:n].float()


def magnitude_quantile(x: Tensor, q: float) -> Tensor:
    """The quantile q of the magnitudes of each row of ``[B, n]``."""
    return torch.quantile(x.abs(), q, dim=1) if x.shape[0] else x.new_empty(0)
