"""One step of a linear diffusion solver as a function, and a run of many steps in place.

:mod:`fastcifar.diffusion.reference` spells the formulas out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference
from .reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS, Step
from .table import SolverTable

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROWS = (PREDICT, CONVERT, CORRECT)  # in the order of the results

__all__ = ["SolverRun", "Step", "dynamic_threshold", "normal_numbers", "solver_step"]


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
    _check_tensors(op, x, output, history, noise, uncond)
    numbers, tensor = _coefficients(op, coefficients, x)
    limit = _number(op, "limit", math.inf if limit is None else limit)
    guidance = _number(op, "guidance", guidance)
    if not limit > 0:
        raise ValueError(f"{op}: expected a positive limit, got {limit}")
    if noise is not None and seed is not None:
        raise ValueError(f"{op}: expected noise or a seed, got both")
    if uncond is not None and output is None:
        raise ValueError(f"{op}: expected an output beside uncond, got None")
    _check_given(op, numbers, tensor, (x, output, *history), noise is not None or seed is not None)
    mask = _wanted(op, wanted, numbers, tensor)
    given = [x if h is None else h for h in history]  # not read: its coefficients are 0
    seeds = None if seed is None else _seed(op, seed, x)
    if seeds is not None:
        x = x.contiguous()
    arguments = (x, output, uncond, noise, seeds, tensor, guidance, limit, stream, numbers)
    if out is not None:
        return _into(op, out, arguments, given)
    results = _apply(*arguments, mask, *given) if grad else _call(*arguments, mask, given)
    x_next, converted, corrected = (r if mask >> i & 1 else None for i, r in enumerate(results))
    return Step(x_next, converted, corrected)


def _at_once(x, output, history, coefficients, noise, uncond, guidance, limit, stream) -> Step | None:
    """The plain call of the op, which checks for itself; None where it refuses, so that the checks here may say why."""
    if not isinstance(x, Tensor) or not x.is_cpu or not x.dim() or any(h is None for h in history):
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


def _number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    if value != value:
        raise ValueError(f"{op}: expected {name} to be a number, got nan")
    return float(value)


def _check_tensors(op: str, x: Any, output: Any, history: Any, noise: Any, uncond: Any) -> None:
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
    if not tensor.is_cpu or torch.compiler.is_compiling() or _library.transformed(tensor):
        return 7
    rows = (tensor.detach() != 0).movedim(-2, 0).flatten(1).any(1).tolist()
    return sum(1 << i for i, row in enumerate(_ROWS) if rows[row])


def _seed(op: str, seed: Any, x: Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise TypeError(f"{op}: expected a seed of one int64 on x's device, got {seed.dtype} {tuple(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: expected seed to be an integer or a tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: expected a seed of 64 bits, got {seed}")
    return torch.tensor(seed, device=x.device)


# ---- beside the step -------------------------------------------------------------------------------------------------


def normal_numbers(seed: int | Tensor, n: int, *, stream: int = 0) -> Tensor:
    """Numbers 0 to n - 1 of a stream of standard normal numbers: Philox 4x32-7 and Box and Muller's transform.

    Any number is a function of its place, of ``seed`` and of ``stream`` alone: 64 n' + 16 j + c is made of word j of
    the counter 16 n' + c under the key ``seed``. The radius has 23 bits, so the largest magnitude is 5.77.

    Args:
        seed: a 64-bit integer, or an int64 tensor of one element, on whose device the numbers are made.
        n: how many.
        stream: which of 2^63 independent streams of the seed. Default 0.

    Returns:
        float32 ``[n]``.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).

    Example:
        >>> from fastcifar.diffusion import normal_numbers
        >>> bool((normal_numbers(1, 100)[:10] == normal_numbers(1, 10)).all())
        True
    """
    op = "normal_numbers"
    for name, value in (("n", n), ("stream", stream)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: expected {name} to be an integer, got {type(value).__name__}")
    if not 0 <= n < 2**40 or not 0 <= stream < 2**63:
        raise ValueError(f"{op}: expected n below 2^40 and stream of 0 to 2^63 - 1, got {n} and {stream}")
    like = seed if isinstance(seed, Tensor) else torch.empty(0)
    key = _seed(op, seed, like)
    if _library.serves(op, key):
        return torch.ops.fastcifar.normal_numbers.default(key, stream, n)
    return reference.normal_numbers(int(key), stream, n).to(key.device)


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Per sample, what dynamic thresholding clamps at: ``s = min(max(quantile(|x0|, ratio), 1), max_value)``.

    The quantile is interpolated as ``torch.quantile`` does. Clamping to -s...s and dividing by s is the step whose row
    ``converted`` is divided by s and whose limit is 1.

    Args:
        x0: ``[B, ...]``, the predicted image; float32 or float64 (half precision is read as float32).
        ratio: the quantile, 0 to 1. Default 0.995.
        max_value: the largest s, at least 1. The default 1, diffusers' ``sample_max_value``, makes it a plain clamp.

    Returns:
        ``[B]`` in float32 or float64; NaN where a sample has one.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, or out of range.

    Source: Saharia et al., Imagen (NeurIPS 2022), section 2.3.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import dynamic_threshold
        >>> dynamic_threshold(torch.tensor([[0.5, -3.0], [0.1, 0.2]]), 1.0, max_value=2.0).tolist()
        [2.0, 1.0]
    """
    op = "dynamic_threshold"
    if not isinstance(x0, Tensor) or x0.dtype not in FLOATING:
        got = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"{op}: expected x0 to be a tensor in float32, float64, bfloat16 or float16, got {got}")
    if x0.dim() == 0 or (x0.shape[0] and x0[0].numel() == 0):
        raise ValueError(f"{op}: expected x0 [B, ...] with elements, got {tuple(x0.shape)}")
    ratio, max_value = _number(op, "ratio", ratio), _number(op, "max_value", max_value)
    if not 0 <= ratio <= 1 or not max_value >= 1:
        raise ValueError(f"{op}: expected ratio of 0 to 1 and max_value of at least 1, got {ratio} and {max_value}")
    rows = x0.detach().reshape(x0.shape[0], -1) if x0.shape[0] else x0.detach().reshape(0, 1)
    rows = rows.to(_library.state_dtype(x0.dtype))
    if _library.serves("magnitude_quantile", rows):
        quantile = torch.ops.fastcifar.magnitude_quantile.default(rows, ratio)
    else:
        quantile = reference.magnitude_quantile(rows, ratio)
    return quantile.clamp(1.0, max_value)


class SolverRun:
    """Steps of a table in place: x and what is kept lie in one buffer, and a step allocates nothing.

    Args:
        table: the solver.
        x: samples to start from, ``[B, ...]`` and scaled as the table asks (``table.init_scale``); copied.
        guidance: of two outputs. Default 1.
        seed: of the noise that is drawn where a step is noisy and none is given: 64 bits. Default: one of torch's
            generator. The stream of a step is its number.
        preload: tensors for the table's ``preloaded`` slots, by slot.

    Attributes:
        x: the samples as they are, ``[B, ...]``: a view that each step writes to.
        index: the step that comes next.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a slot's tensor is missing or not of x's shape.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import SolverRun, SolverTable
        >>> half = torch.zeros(2, 3, 11, dtype=torch.float64)
        >>> half[:, 2, 0] = 0.5
        >>> table = SolverTable(half, torch.zeros(2, 2).long(), torch.zeros(2).double(), torch.ones(2).double())
        >>> run = SolverRun(table, torch.ones(1, 2))
        >>> run.step(), run.step()
        (None, None)
        >>> run.x
        tensor([[0.2500, 0.2500]])
    """

    def __init__(
        self,
        table: SolverTable,
        x: Tensor,
        guidance: float = 1.0,
        seed: int | None = None,
        preload: Mapping[int, Tensor] | None = None,
    ) -> None:
        op = "SolverRun"
        if not isinstance(table, SolverTable):
            raise TypeError(f"{op}: expected table to be a SolverTable, got {type(table).__name__}")
        _check_tensors(op, x, None, (), None, None)
        self.table, self.guidance, self.index = table, _number(op, "guidance", guidance), 0
        preload = preload or {}
        if sorted(preload) != sorted(table.preloaded):
            raise ValueError(f"{op}: expected tensors for the slots {list(table.preloaded)}, got {sorted(preload)}")
        self._ring = x.new_zeros((1 + table.slots, *x.shape))
        self.x = self._ring[0]
        self.x.copy_(x.detach())
        for slot, t in preload.items():
            if t.shape != x.shape:
                raise ValueError(f"{op}: expected slot {slot} of x's shape {tuple(x.shape)}, got {tuple(t.shape)}")
            self._ring[slot].copy_(t.detach())
        limit = torch.full((len(table), 1), math.inf if table.limit is None else table.limit, dtype=torch.float64)
        rows = (table.coefficients.flatten(1), table.store.to(torch.float64), limit)
        self._table = torch.cat(rows, 1).contiguous()
        self._noisy = table.noisy.tolist()
        self._seed = torch.randint(2**63 - 1, ()) if seed is None else _seed(op, seed, torch.empty(0))
        self._seed = self._seed.to(x.device)
        self._served = _library.serves("solver_table_step", x)

    def kept(self, slot: int) -> Tensor:
        """What a slot holds: a view of the buffer."""
        return self._ring[slot]

    def step(self, output: Tensor | None = None, *, uncond: Tensor | None = None, noise: Tensor | None = None) -> None:
        """Takes the next step: ``x`` and the slots are overwritten.

        Args:
            output: what the model said of ``x``; None where the step does not evaluate it.
            uncond: a second output, for guidance.
            noise: like x, in place of what would be drawn.

        Raises:
            IndexError: all steps were taken.
            RuntimeError: a gradient is required (call :func:`solver_step`, which keeps what a backward pass reads), or
                a tensor does not fit.
        """
        index = self.index
        if index >= len(self._noisy):
            raise IndexError(f"SolverRun: expected no more than {index} steps of {self.table.name!r}")
        if output is not None and output.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "SolverRun: expected an output that requires no gradient, as a step overwrites what a backward pass "
                "would read; use solver_step, or torch.no_grad()"
            )
        seed = self._seed if noise is None and self._noisy[index] else None
        if self._served and uncond is None and noise is None and seed is None:
            torch.ops.fastcifar.solver_table_step.default(self._ring, output, self._table, index)
        elif self._served:
            torch.ops.fastcifar.solver_table_step.default(
                self._ring, output, self._table, index, uncond, noise, seed, self.guidance
            )
        else:
            self._step_by_reference(index, output, uncond, noise, seed)
        self.index = index + 1

    def _step_by_reference(self, index, output, uncond, noise, seed) -> None:
        if seed is not None:
            noise = reference.normal_numbers(int(seed), index, self.x.numel()).view(self.x.shape).to(self.x)
        history = list(self._ring[1:].unbind(0))
        coefficients = self.table.coefficients[index]
        made = reference.solver_step(
            self.x, output, history, coefficients, noise, uncond, self.guidance, self.table.limit
        )
        for slot, value in zip(self.table.store[index].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                self._ring[slot].copy_(value)
        self.x.copy_(made.x_next)
