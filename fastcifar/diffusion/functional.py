"""One step of a linear diffusion solver as a function.

:mod:`fastcifar.diffusion.reference` spells the formulas out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._checks import expect_tensors
from . import reference
from .noise import FLOATING, checked_number, seed_tensor
from .reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS, Step

_ROWS = (PREDICT, CONVERT, CORRECT)  # in the order of the results

__all__ = ["Step", "solver_step"]


def solver_step(
    x: Tensor,
    output: Tensor | None,
    history: Sequence[Tensor | None],
    coefficients: Tensor | Sequence[Sequence[float]],
    noise: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    limit: float | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    wanted: Sequence[str] | None = None,
    out: Step | Tensor | None = None,
) -> Step:
    r"""One step of any linear solver: three sums, each of which may use those above it, in one pass over memory.

    With ``c`` the coefficients and ``o`` the output, ``uncond + guidance (output - uncond)`` where there are two ::

        converted = clamp(c[0, 0] x + c[0, 1] o + sum_i c[0, 1 + i] h_i, -limit, limit)
        corrected = c[1, 0] x + c[1, 1] o + sum_i c[1, 1 + i] h_i + c[1, 8] converted
        x_next    = c[2, 0] x + c[2, 1] o + sum_i c[2, 1 + i] h_i + c[2, 8] converted + c[2, 9] corrected + c[2, 10] z

    A term whose coefficient is exactly 0 adds nothing, whatever its tensor holds, and is not read. Sums go from left to
    right; float32 and float64 equal the reference to the bit. bfloat16 and float16 compute in float32 and round each
    result once. There are gradients to all tensors and to the coefficients; the clamp passes a gradient where it does
    nothing. There is no second derivative: asking for one raises.

    Args:
        x: samples ``[B, ...]``; float32, float64, bfloat16 or float16. Samples may have gaps between them and any order
            of dimensions that is dense (channels_last); tensors of another order than x's are copied once.
        output: what the model said, of x's shape and dtype; None where no coefficient asks for it.
        history: up to six kept tensors, h_1 first; None where no coefficient asks for one.
        coefficients: ``[3, 11]`` numbers, or a float64 or float32 tensor ``[3, 11]`` or, a program for each sample,
            ``[B, 3, 11]``; see ``TERMS``.
        noise: z, like x.
        uncond: a second output for classifier-free guidance.
        guidance: g, 1 for the output alone; diffusers' convention (DiffuseVAE's w is g - 1). Default 1.
        limit: bounds of ``converted``; None for none. Default None.
        seed, stream: in place of ``noise``, z is drawn in the kernel: number n of x's elements in the order of its
            dimensions is ``normal_numbers(seed, stream=stream)[n]``, whatever the number of threads and the
            instruction set. Give each step a stream of its own. ``seed`` may be an int64 tensor of one element.
        wanted: which results to return, of ``"x_next"``, ``"converted"`` and ``"corrected"``. Default: those whose row
            has a coefficient.
        out: tensors to write to in place of new ones: x_next alone, or a :class:`Step`; x and kept tensors may be
            among them. No gradient is offered then.

    Returns:
        :class:`Step` of ``x_next``, ``converted`` and ``corrected``; None for what is not wanted.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or coefficients do not fit, or a tensor is missing that has a coefficient.
        RuntimeError: ``out`` where a gradient is required.

    Source: the update of USF (Liu et al., ICLR 2024), of which published samplers are rows.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import solver_step
        >>> program = torch.zeros(3, 11)
        >>> program[2, 0], program[2, 1] = 2.0, -1.0
        >>> solver_step(torch.ones(1, 2), torch.full((1, 2), 0.5), (), program).x_next
        tensor([[1.5000, 1.5000]])
    """
    op = "solver_step"
    differentiable = (x, output, uncond, noise, coefficients, *history)
    grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in differentiable)
    plain = not grad and out is None and wanted is None and seed is None and not torch.compiler.is_compiling()
    step = _at_once(x, output, history, coefficients, noise, uncond, guidance, limit, stream) if plain else None
    if step is not None:
        return step
    check_tensors(op, x, output, history, noise, uncond)
    numbers, tensor = _coefficients(op, coefficients, x)
    limit = checked_number(op, "limit", math.inf if limit is None else limit)
    guidance = checked_number(op, "guidance", guidance)
    if not limit > 0:
        raise ValueError(f"{op}: expected a positive limit, got {limit}")
    if noise is not None and seed is not None:
        raise ValueError(f"{op}: expected noise or a seed, got both")
    if uncond is not None and output is None:
        raise ValueError(f"{op}: expected an output beside uncond, got None")
    _check_given(op, numbers, tensor, (x, output, *history), noise is not None or seed is not None)
    mask = _wanted(op, wanted, numbers, tensor)
    given = [x if h is None else h for h in history]  # not read: its coefficients are 0
    seeds = None if seed is None else seed_tensor(op, seed, x)
    if seeds is not None and not (x.numel() and x[0].is_contiguous()):
        x = x.contiguous()  # numbers are counted in the order of the dimensions
    arguments = (x, output, uncond, noise, seeds, tensor, guidance, limit, stream, numbers)
    if out is not None:
        return _into(op, out, arguments, given)
    results = _apply(*arguments, mask, *given) if grad else _call(*arguments, mask, given)
    x_next, converted, corrected = (r if mask >> i & 1 else None for i, r in enumerate(results))
    return Step(x_next, converted, corrected)


def _at_once(x, output, history, coefficients, noise, uncond, guidance, limit, stream) -> Step | None:
    """The plain call of the op, which checks for itself; None where it refuses, so that the checks here may say why."""
    if not isinstance(x, Tensor) or not x.is_cpu or not x.dim() or not x.numel() or any(h is None for h in history):
        return None
    if not _library.serves("solver_step", x) or _library.transformed(x):
        return None
    numbers: list[float] = []
    tensor = coefficients
    if not isinstance(coefficients, Tensor):
        try:
            numbers, tensor = [c for row in coefficients for c in row], None
        except TypeError:
            return None
    try:
        x_next, converted, corrected = torch.ops.fastcifar.solver_step.default(
            x, output, uncond, history, noise, None, tensor, numbers, guidance, math.inf if limit is None else limit,
            stream, -1,
        )  # fmt: skip
    except (RuntimeError, TypeError):
        return None
    shape = x.shape
    return Step(
        x_next if x_next.shape == shape else None,
        converted if converted.shape == shape else None,
        corrected if corrected.shape == shape else None,
    )


def _call(x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers, wanted, history):
    if _library.serves("solver_step", x):
        return torch.ops.fastcifar.solver_step.default(
            x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream, wanted
        )
    return _reference(x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers, history)


def _reference(*arguments):
    x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers, history = arguments
    if seed is not None:
        noise = reference.normal_numbers(int(seed), stream, x.numel()).view(x.shape).to(x)
    if coefficients is None:
        coefficients = torch.tensor(numbers, dtype=torch.float64).view(3, len(TERMS))
    return reference.solver_step(x, output, history, coefficients, noise, uncond, guidance, limit)


class _SolverStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers, wanted, *history):
        return _call(
            x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers, wanted, list(history)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.guidance, ctx.limit, ctx.stream, ctx.numbers, ctx.wanted = inputs[:11]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *inputs[11:])

    @staticmethod
    def backward(ctx, *grads):
        x, output, uncond, noise, seed, coefficients, *history = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of = {"x": needs[0], "output": needs[1]} | dict(enumerate(needs[11:]))
        bits = [*of.values()] + [False] * (HISTORY - len(history)) + [needs[2], needs[3], needs[5]]
        wants = sum(1 << i for i, bit in enumerate(bits) if bit)
        given = [g if ctx.wanted >> i & 1 else None for i, g in enumerate(grads)]
        given = [None if g is None else g.to(x.dtype) for g in given]
        stack, of_coefficients = torch.ops.fastcifar.solver_step_backward.default(
            *given, x, output, uncond, history, noise, seed, coefficients, ctx.numbers, ctx.guidance, ctx.limit,
            ctx.stream, wants,
        )  # fmt: skip
        rest = iter(stack.unbind(0))
        found = [next(rest) if bit else None for bit in bits[:-1]]
        if bits[-1]:
            of_coefficients = of_coefficients.to(coefficients.dtype)
            found.append(of_coefficients if coefficients.dim() == 3 else of_coefficients.squeeze(0))
        else:
            found.append(None)
        involved = [t for t in (*given, x, output, uncond, noise, coefficients, *history) if t is not None]
        found = [None if g is None else _library.differentiable_once("solver_step", g, *involved) for g in found]
        to_x, to_output, *rest = found
        to_history, (to_uncond, to_noise, to_coefficients) = rest[: len(history)], rest[HISTORY:]
        return (to_x, to_output, to_uncond, to_noise, None, to_coefficients, *[None] * 5, *to_history)


_direct = _library.direct_apply(_SolverStep)


def _apply(*arguments):
    if _library.serves("solver_step", arguments[0]):
        return _direct(*arguments)
    *first, _, history = *arguments[:11], list(arguments[11:])
    return _reference(*first, history)  # which autograd sees through


def _into(op: str, out: Step | Tensor, arguments: tuple, history: list[Tensor]) -> Step:
    results = (out, None, None) if isinstance(out, Tensor) else tuple(out)
    x, tensors = arguments[0], [t for t in (*arguments[:6], *history, *results) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: expected no gradient to be required with out, which overwrites what a backward pass would read; "
            "call it without out, or under torch.no_grad()"
        )
    for t in results:
        if t is not None:
            expect_tensors(op, out=t)
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{op}: expected out like x {tuple(x.shape)} {x.dtype}, got {tuple(t.shape)} {t.dtype}")
    x, output, uncond, noise, seed, coefficients, guidance, limit, stream, numbers = arguments
    if _library.serves("solver_step_into", x):
        torch.ops.fastcifar.solver_step_into.default(
            x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream, *results
        )
    else:
        for t, value in zip(results, _reference(*arguments, history), strict=True):
            if t is not None:
                t.copy_(value)
    return Step(*results)


# ---- what is refused -------------------------------------------------------------------------------------------------


def check_tensors(op: str, x: Any, output: Any, history: Any, noise: Any, uncond: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: expected x to be a tensor in float32, float64, bfloat16 or float16, got {got}")
    if x.dim() == 0:
        raise ValueError(f"{op}: expected x [B, ...], got a scalar")
    if not isinstance(history, list | tuple):
        raise TypeError(f"{op}: expected history to be a list or tuple of tensors, got {type(history).__name__}")
    if len(history) > HISTORY:
        raise ValueError(f"{op}: expected up to {HISTORY} kept tensors, got {len(history)}")
    named = [("output", output), ("noise", noise), ("uncond", uncond), *(("history", h) for h in history)]
    for name, t in named:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor or None, got {type(t).__name__}")
        if t.shape != x.shape:
            raise ValueError(f"{op}: expected {name} of x's shape {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: expected {name} in x's {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {t.device}")


def _coefficients(op: str, given: Any, x: Tensor) -> tuple[list[float], Tensor | None]:
    if isinstance(given, Tensor):
        if given.dtype not in (torch.float64, torch.float32):
            raise TypeError(f"{op}: expected coefficients in float64 or float32, got {given.dtype}")
        shapes = ((3, len(TERMS)), (x.shape[0], 3, len(TERMS)))
        if tuple(given.shape) not in shapes:
            raise ValueError(f"{op}: expected coefficients [3, 11] or [{x.shape[0]}, 3, 11], got {tuple(given.shape)}")
        return [], given
    try:
        numbers = [float(c) for row in given for c in row]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: expected coefficients to be a tensor or rows of numbers, got {given!r}") from None
    if len(numbers) != 3 * len(TERMS) or len(given) != 3:
        raise ValueError(f"{op}: expected three rows of {len(TERMS)} coefficients, got {len(numbers)} numbers")
    return numbers, None


def _check_given(op: str, numbers: list[float], tensor: Tensor | None, inputs: Sequence, noisy: bool) -> None:
    """Of numbers, and of a tensor on the CPU, which no one has to wait for."""
    if tensor is not None:
        if not tensor.is_cpu or torch.compiler.is_compiling() or _library.transformed(tensor):
            return
        used = [bool(u) for u in (tensor.detach() != 0).reshape(-1, 3 * len(TERMS)).any(0).tolist()]
    else:
        used = [c != 0 for c in numbers]
    width = len(TERMS)
    for row in range(3):
        for t in range(width):
            if not used[row * width + t]:
                continue
            if not (t < 2 + HISTORY + row or (row == PREDICT and t == width - 1)):
                raise ValueError(
                    f"{op}: expected converted to use inputs only, corrected those and converted, and noise in x_next "
                    f"only; got a coefficient of {TERMS[t]} in row {row}"
                )
            missing = (t < 2 + HISTORY and (t >= len(inputs) or inputs[t] is None)) or (t == width - 1 and not noisy)
            if missing:
                raise ValueError(f"{op}: expected {TERMS[t]}, which has a coefficient, got None")


def _wanted(op: str, wanted: Sequence[str] | None, numbers: list[float], tensor: Tensor | None) -> int:
    if wanted is not None:
        for name in wanted:
            if name not in Step._fields:
                raise ValueError(f"{op}: expected wanted to be of {', '.join(Step._fields)}; got {name!r}")
        return sum(1 << i for i, name in enumerate(Step._fields) if name in wanted)
    width = len(TERMS)
    if tensor is None:
        return sum(1 << i for i, row in enumerate(_ROWS) if any(numbers[row * width : (row + 1) * width]))
    if not tensor.is_cpu or not tensor.numel() or torch.compiler.is_compiling() or _library.transformed(tensor):
        return 7
    rows = (tensor.detach() != 0).movedim(-2, 0).flatten(1).any(1).tolist()
    return sum(1 << i for i, row in enumerate(_ROWS) if rows[row])
