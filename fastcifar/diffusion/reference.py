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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 6
TERMS = ("x", "output", *(f"h{i}" for i in range(1, HISTORY + 1)), "converted", "corrected", "noise")
CONVERT, CORRECT, PREDICT = range(3)


class Step(NamedTuple):
    """What a step makes, each like x."""

    x_next: Tensor
    converted: Tensor
    corrected: Tensor


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
                total = total + torch.where(c == 0, torch.zeros_like(term), c * term)
        return total

    converted = combine(rows[CONVERT], terms)
    if limit is not None:
        converted = converted.clamp(-limit, limit)
    corrected = combine(rows[CORRECT], [*terms, converted])
    x_next = combine(rows[PREDICT], [*terms, converted, corrected, None if noise is None else noise.to(dtype)])
    return Step(x_next.to(x.dtype), converted.to(x.dtype), corrected.to(x.dtype))
