"""Launchers of diffusion samplers on CUDA tensors, which ``fastcifar._library`` registers.

The kernels are in ``kernels/diffusion_kernels.py``. Launchers check nothing: ``fastcifar.diffusion`` does. A step is
one launch. They never wait for the device: coefficients on the CPU are arguments of the launch, those on the device and
seeds are read there alone, so that a CUDA graph can capture a whole sampling loop. (A program for each sample that lies
on the CPU is copied to the device first, which a graph cannot capture.)

``magnitude_quantile`` has no kernel here: ``torch.quantile`` sorts on the device, without waiting for it either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rules import _step_like
from ..diffusion.reference import HISTORY, TERMS
from .diffusion_kernels import _step_backward_kernel, _step_kernel
from .layout import has_strides, in_order
from .normal_kernels import _normal_kernel

HOW = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
NUMBERS_BLOCK = 1024
COUNT = len(TERMS)
INPUTS = 2 + HISTORY
CONVERTED, CORRECTED, NOISE = INPUTS, INPUTS + 1, INPUTS + 2


class Plan(NamedTuple):
    """What of a step is code of its own in the kernels: terms that exist and rows that anyone asks for, a bit each."""

    GIVEN: int
    ROWS: int

    def has(self, term: int) -> bool:
        return bool(self.GIVEN >> term & 1)


def plan(numbers: Sequence[float] | None, exist: int, wanted: int) -> Plan:
    """Args: the coefficients, or None where the device alone knows them; a bit for each term that there is; a bit for
    each row (converted, corrected, x_next) whose result is wanted. What no wanted row needs is not read."""
    if numbers is None:
        rows = 7 if wanted & 4 else 3 if wanted & 2 else 1
        return Plan(exist | 1 << CONVERTED | 1 << CORRECTED, rows)
    used = rows = 0
    for row in (2, 1, 0):
        if not (wanted >> row & 1 or (used >> (CONVERTED + row) & 1 and row < 2)):
            continue
        of_row = sum(1 << t for t in range(COUNT) if numbers[row * COUNT + t] != 0)
        used |= of_row
        rows |= bool(of_row) << row
    return Plan(used & (exist | 1 << CONVERTED | 1 << CORRECTED), rows)


def blocks(dtype: torch.dtype, draws: bool, sums: bool = False) -> dict[str, object]:
    """A tile gives each thread 16 bytes at once or more, in four parts where noise is drawn; less where all terms are
    held for the coefficients' sums, which would not fit in the registers."""
    double = dtype == torch.float64
    size = (512 if double else 1024) // (4 if sums else 1)
    return {"BLOCK": 2 * size if draws else size, "COMPUTE": tl.float64 if double else tl.float32}


def solver_step(
    x: Tensor,
    output: Tensor | None,
    uncond: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor | None,
    numbers: list[float],
    guidance: float,
    limit: float,
    stream: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastcifar::solver_step``. It makes all that coefficients on the device may want."""
    if wanted < 0:
        known, _ = _program(x, coefficients, numbers)
        used = [True] * 3 if known is None else [any(known[r * COUNT : r * COUNT + COUNT]) for r in (2, 0, 1)]
        wanted = sum(bit << i for i, bit in enumerate(used))
    results = [_step_like(x) if wanted >> i & 1 else x.new_empty(0) for i in range(3)]
    x_next, converted, corrected = (r if wanted >> i & 1 else None for i, r in enumerate(results))
    tensors = x, output, uncond, history, noise
    _launch(tensors, seed, coefficients, numbers, guidance, limit, stream, (converted, corrected, x_next))
    return results[0], results[1], results[2]


def solver_step_into(
    x: Tensor,
    output: Tensor | None,
    uncond: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor | None,
    numbers: list[float],
    guidance: float,
    limit: float,
    stream: int,
    x_next: Tensor | None,
    converted: Tensor | None,
    corrected: Tensor | None,
) -> None:
    """``fastcifar::solver_step_into``. A result whose samples lie otherwise than x's is written by one more copy."""
    strides = _step_like(x).stride()
    given = converted, corrected, x_next
    into = [t if t is None or has_strides(t, strides) else _step_like(x) for t in given]
    tensors = x, output, uncond, history, noise
    _launch(tensors, seed, coefficients, numbers, guidance, limit, stream, into)
    for t, made in zip(given, into, strict=True):
        if t is not None and t is not made:
            t.copy_(made)


def solver_table_step(
    ring: Tensor,
    output: Tensor | None,
    table: Tensor,
    step: int,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    guidance: float = 1.0,
) -> None:
    """``fastcifar::solver_table_step``; the table is on the CPU, so nothing waits for the device to read it."""
    *numbers, to_converted, to_corrected, limit = table[step].tolist()
    x, *history = ring.unbind(0)
    slots = [None if to == 0 else ring[int(to)] for to in (to_converted, to_corrected)]
    tensors = x, output, uncond, history, noise
    _launch(tensors, seed, None, numbers, guidance, limit, step, (*slots, x))


def solver_step_backward(
    grad_x_next: Tensor | None,
    grad_converted: Tensor | None,
    grad_corrected: Tensor | None,
    x: Tensor,
    output: Tensor | None,
    uncond: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor | None,
    numbers: list[float],
    guidance: float,
    limit: float,
    stream: int,
    wants: int,
) -> tuple[Tensor, Tensor]:
    """``fastcifar::solver_step_backward``; coefficients' gradients are summed in an order that the shape fixes."""
    like = _step_like(x)
    strides, total = like.stride(), x.numel()
    count = (wants & 1023).bit_count()
    grads = x.new_empty_strided((count, *x.shape), (total, *strides))
    of_program = wants >> 10 & 1
    each = coefficients is not None and coefficients.dim() == 3
    programs = x.shape[0] if each else 1
    home = x.device if coefficients is None else coefficients.device
    if total == 0 or wants == 0:
        shape = (programs, 3, COUNT) if of_program else (0,)
        return grads, torch.zeros(shape, dtype=torch.float64, device=home)
    numbers_or_none, pointer = _program(x, coefficients, numbers)
    exist = _exist(output, history, noise, seed)
    limited = not math.isinf(limit)
    if of_program:
        chosen = Plan(exist | 1 << CONVERTED | 1 << CORRECTED, 3)
    elif limited:  # what `converted` was before its clamp
        chosen = plan(numbers_or_none, exist, 1)
    else:
        chosen = Plan(0, 0)
    draws = seed is not None and bool(of_program)
    tile = blocks(x.dtype, False, bool(of_program))
    samples, length, per = _cut(x, each, False, tile["BLOCK"])
    sums = x.new_zeros((samples * per, 3, COUNT), dtype=torch.float64) if of_program else None
    with torch.cuda.device_of(x):
        _step_backward_kernel[(samples * per,)](
            *(None if g is None else in_order(g, strides) for g in (grad_x_next, grad_converted, grad_corrected)),
            *_pointers(chosen, strides, x, output, uncond, history, noise),
            seed if draws else None,
            pointer,
            grads,
            sums,
            total,
            length,
            per,
            stream,
            guidance,
            limit,
            *(numbers_or_none or [0.0] * (3 * COUNT)),
            GUIDED=uncond is not None,
            WANTS=wants,
            GIVEN=chosen.GIVEN,
            ROWS=chosen.ROWS,
            LIMITED=limited,
            EACH=each,
            **tile,
            **HOW,
        )
    if sums is None:
        return grads, torch.empty(0, dtype=torch.float64, device=home)
    return grads, sums.view(programs, -1, 3, COUNT).sum(1).to(home)


def normal_numbers(seed: Tensor, stream: int, n: int) -> Tensor:
    """``fastcifar::normal_numbers``."""
    out = seed.new_empty(n, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(seed):
            _normal_kernel[(triton.cdiv(n, NUMBERS_BLOCK),)](seed, out, n, stream, BLOCK=NUMBERS_BLOCK, **HOW)
    return out


# ---- how to launch ---------------------------------------------------------------------------------------------------


def _program(x: Tensor, coefficients: Tensor | None, numbers: list[float]) -> tuple[list[float] | None, Tensor | None]:
    """Numbers for the launch, or what the device reads."""
    if coefficients is None:
        return numbers, None
    if coefficients.is_cpu and not x.is_cpu and coefficients.dim() == 2:
        return coefficients.flatten().tolist(), None
    return None, coefficients.to(x.device).contiguous()


def _exist(output: Tensor | None, history: Sequence[Tensor], noise: Tensor | None, seed: Tensor | None) -> int:
    """A bit for each term that there is."""
    bits = 1 | (output is not None) << 1 | (noise is not None or seed is not None) << NOISE
    return bits | ((1 << len(history)) - 1) << 2


def _pointers(
    chosen: Plan,
    strides: tuple[int, ...],
    x: Tensor,
    output: Tensor | None,
    uncond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
) -> list[Tensor | None]:
    """The tensors that are read, in x's order of dimensions."""
    tensors = [x, output, uncond, *history, *[None] * (HISTORY - len(history)), noise]
    terms = [0, 1, 1, *range(2, INPUTS), NOISE]
    pairs = zip(tensors, terms, strict=True)
    return [None if t is None or not chosen.has(term) else in_order(t, strides) for t, term in pairs]


def _cut(x: Tensor, each: bool, draws: bool, block: int) -> tuple[int, int, int]:
    """Samples, elements of one, programs of one: samples that share their coefficients are one."""
    samples = x.shape[0] if each else 1
    length = x.numel() // samples
    shifted = 63 if draws and samples > 1 else 0  # tiles then start at multiples of 64
    return samples, length, triton.cdiv(length + shifted, block)


def _launch(
    tensors: tuple,
    seed: Tensor | None,
    coefficients: Tensor | None,
    numbers: list[float],
    guidance: float,
    limit: float,
    stream: int,
    into: Sequence[Tensor | None],
) -> None:
    """Results go to `into`: converted, corrected, x_next, of one order of dimensions."""
    x, output, uncond, history, noise = tensors
    wanted = sum(1 << i for i, t in enumerate(into) if t is not None)
    if x.numel() == 0 or wanted == 0:
        return
    strides = next(t for t in into if t is not None).stride()
    numbers_or_none, pointer = _program(x, coefficients, numbers)
    chosen = plan(numbers_or_none, _exist(output, history, noise, seed), wanted)
    draws = seed is not None and chosen.has(NOISE)
    each = pointer is not None and pointer.dim() == 3
    tile = blocks(x.dtype, draws)
    samples, length, per = _cut(x, each, draws, tile["BLOCK"])
    converted, corrected, x_next = into
    with torch.cuda.device_of(x):
        _step_kernel[(samples * per,)](
            *_pointers(chosen, strides, x, output, uncond, history, noise),
            seed if draws else None,
            pointer,
            x_next,
            converted,
            corrected,
            length,
            per,
            stream,
            guidance,
            limit,
            *(numbers_or_none or [0.0] * (3 * COUNT)),
            GIVEN=chosen.GIVEN,
            ROWS=chosen.ROWS,
            LIMITED=not math.isinf(limit),
            EACH=each,
            **tile,
            **HOW,
        )
