"""Sampling: a solver's table, run with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import expect_tensors
from .draft import conversion, levels
from .functional import solver_step
from .noise import dynamic_threshold
from .reference import CONVERT, HISTORY, TERMS
from .run import SolverRun
from .schedule import DiscreteVP, EDMSchedule, Schedule
from .solvers import solver_table
from .table import Points, SolverTable

Output = Tensor | tuple[Tensor, Tensor]
Noise = Callable[[int, Tensor], Tensor] | Sequence[Tensor]

__all__ = ["Thresholding", "sample"]


class Thresholding(NamedTuple):
    """Dynamic thresholding: see :func:`fastcifar.diffusion.dynamic_threshold`, whose arguments these are."""

    ratio: float = 0.995
    max_value: float = 1.0


def sample(
    model: Callable[[Tensor, Tensor], Output],
    x: Tensor,
    solver: str | SolverTable = "dpm_solver",
    steps: int | None = None,
    *,
    schedule: Schedule | None = None,
    points: Points | None = None,
    spacing: str | None = None,
    final: str | None = None,
    prediction: str | None = None,
    guidance: float = 1.0,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    thresholding: Thresholding | None = None,
    coefficients: Tensor | None = None,
    preload: Mapping[int, Tensor] | None = None,
    start_scale: float | None = None,
    grad: bool | None = None,
    callback: Callable[[int, Tensor], Any] | None = None,
    return_trajectory: bool = False,
    progress: bool = False,
    **options: Any,
) -> Any:
    r"""Samples of a diffusion model, by any linear solver: from noise ``x`` over S points to an image.

    Args:
        model: ``model(x, t)`` with t ``[B]``, float64 where x is, else float32 (whole numbers of a discrete schedule:
            ``t.long()`` for an embedding table); what it predicts is ``prediction``. A pair (output, uncond) is
            combined to ``uncond + guidance (output - uncond)``.
        x: standard normal noise ``[B, ...]``, which is multiplied by the table's ``init_scale``; left as it is.
        solver: a name of ``SOLVERS``, whose further ``options`` (order, eta, ...) are its builder's arguments, or a
            :class:`SolverTable`, which says all by itself. Default "dpm_solver" (DPM-Solver++ 2M).
        steps: S; not with a table or ``points``.
        schedule: of noise. Default ``DiscreteVP.linear()``, DDPM's.
        points: in place of ``schedule``.
        spacing, final: see :meth:`fastcifar.diffusion.Schedule.points`.
        prediction: "epsilon" (the default), "x0", "v" or "flow".
        guidance: of a pair. Default 1. (diffusers' convention; DiffuseVAE's w is g - 1.)
        noise: for solvers that add some: ``noise(step, x)``, called after the model, or a tensor for each step.
        generator: of torch, for noise as torch draws it.
        seed: of noise drawn in the kernel. Default: where no other noise is given, one of torch's generator.
        thresholding: of the predicted data at each step (not a linear step: it takes a second pass over the output),
            for solvers that expand data and have no ``limit``.
        coefficients: ``[S, 3, 11]`` in place of the table's; gradients flow to it.
        preload: tensors of the table's preloaded slots.
        start_scale: in place of ``init_scale``: 1 for an ``x`` that is a sample already.
        grad: whether the graph is kept, so that a gradient flows to x, coefficients and the model. Default: whether
            grad is enabled and x or coefficients require one.
        callback: ``callback(step, x)`` after each step.
        return_trajectory: whether to return ``(x, [x before each step..., x])``. Default False.
        progress: whether to draw a bar (needs tqdm). Default False.

    Returns:
        The samples, like x, or with ``return_trajectory`` a pair.

    Raises:
        TypeError, ValueError: an argument is not as described, or two of them exclude each other.
        ImportError: ``progress`` without tqdm.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import sample
        >>> model = lambda x, t: 0.1 * x
        >>> noise = torch.randn(2, 3, 8, 8)
        >>> sample(model, noise, "unipc", 10, order=3).shape
        torch.Size([2, 3, 8, 8])
    """
    table, found, prediction = _table(solver, steps, schedule, points, spacing, final, prediction, options)
    if sum(source is not None for source in (noise, generator, seed)) > 1:
        raise ValueError("sample: expected one of noise, generator and seed, got more")
    if coefficients is not None:
        expect_tensors("sample", coefficients=coefficients)
    if coefficients is not None and coefficients.shape != table.coefficients.shape:
        raise ValueError(
            f"sample: expected coefficients {list(table.coefficients.shape)}, got {list(coefficients.shape)}"
        )
    expect_tensors("sample", x=x)
    wanted = x.requires_grad or (coefficients is not None and coefficients.requires_grad)
    if grad is None:
        grad = torch.is_grad_enabled() and wanted
    if thresholding is not None:
        _check_thresholding(table, found, prediction)
    start = table.init_scale if start_scale is None else start_scale
    with torch.set_grad_enabled(grad):
        x = x * start if start != 1 else x
        if grad or thresholding is not None or coefficients is not None:
            run: Any = _Differentiable(table, x, guidance, seed, preload, coefficients, thresholding)
        else:
            run = SolverRun(table, x, guidance, seed, preload)
        trajectory = [run.x.clone()] if return_trajectory else []
        calls, noisy, times, sizes = (t.tolist() for t in (table.evaluates, table.noisy, table.timesteps, table.scale))
        time_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        for i in _steps(len(table), progress, table.name):
            output: Output | None = None
            if calls[i]:
                t = torch.full((len(x),), times[i], dtype=time_dtype, device=x.device)
                output = model(run.x if sizes[i] == 1 else run.x * sizes[i], t)
            output, uncond = output if isinstance(output, tuple) else (output, None)
            run.step(output, uncond=uncond, noise=_noise(i, run.x, noise, generator) if noisy[i] else None)
            if callback is not None:
                callback(i, run.x)
            if return_trajectory:
                trajectory.append(run.x.clone())
    return (run.x, trajectory) if return_trajectory else run.x


def _table(
    solver: str | SolverTable,
    steps: int | None,
    schedule: Schedule | None,
    points: Points | None,
    spacing: str | None,
    final: str | None,
    prediction: str | None,
    options: dict[str, Any],
) -> tuple[SolverTable, Points | None, str]:
    if isinstance(solver, SolverTable):
        given = {"steps": steps, "schedule": schedule, "points": points, "spacing": spacing, "final": final}
        named = [name for name, value in {**given, "prediction": prediction, **options}.items() if value is not None]
        if named:
            raise ValueError(f"sample: expected a table to come alone, got {', '.join(named)} with it")
        return solver, None, "epsilon"
    if not isinstance(solver, str):
        raise TypeError(f"sample: expected solver to be a name or a SolverTable, got {type(solver).__name__}")
    prediction = prediction or "epsilon"
    if points is not None:
        if any(value is not None for value in (steps, schedule, spacing, final)):
            raise ValueError("sample: expected points or steps of a schedule, got both")
    elif steps is None:
        raise ValueError("sample: expected steps, points or a table, got none of them")
    else:
        schedule = DiscreteVP.linear() if schedule is None else schedule
        points = schedule.points(steps, spacing, final=final)
        options = {"scaled": True, **options} if schedule.scaled else options
        if solver in ("edm", "heun", "euler") and not isinstance(schedule, EDMSchedule):
            options = {"time": schedule.time_of_ratio, **options}
    return solver_table(solver, points, prediction=prediction, **options), points, prediction


def _check_thresholding(table: SolverTable, points: Points | None, prediction: str) -> None:
    """Whether ``converted`` is the predicted data, and nothing clamps it: its rows tell."""
    if points is None or len(points.alpha) != len(table) + 1:
        raise ValueError(
            f"sample: expected a solver by its name, with one call a step, for thresholding, which is not linear; got "
            f"the table {table.name!r}"
        )
    data = torch.zeros(len(table), len(TERMS), dtype=torch.float64)
    for i, level in enumerate(levels(points, "sample")[:-1]):
        for name, value in conversion(prediction, level, "data", "sample").items():
            data[i, TERMS.index(str(name))] = value
    if table.limit is not None or not torch.allclose(table.coefficients[:, CONVERT], data, rtol=1e-12, atol=0):
        raise ValueError(
            f"sample: expected a solver that expands data and has no limit for thresholding, got {table.name!r}"
        )


def _noise(i: int, x: Tensor, noise: Noise | None, generator: torch.Generator | None) -> Tensor | None:
    if generator is not None:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    if noise is None:
        return None
    return noise(i, x) if callable(noise) else noise[i]


def _steps(count: int, progress: bool, name: str) -> Iterator[int]:
    steps: Iterable[int] = range(count)
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            raise ImportError("sample: expected tqdm for progress=True (pip install 'fastcifar[progress]')") from None
        steps = tqdm(steps, desc=name)
    yield from steps


class _Differentiable:
    """As :class:`SolverRun`, but nothing is overwritten: what a step made stays as long as a backward pass reads it."""

    def __init__(
        self,
        table: SolverTable,
        x: Tensor,
        guidance: float,
        seed: int | None,
        preload: Mapping[int, Tensor] | None,
        coefficients: Tensor | None,
        thresholding: Thresholding | None,
    ) -> None:
        preload = preload or {}
        if sorted(preload) != sorted(table.preloaded):
            raise ValueError(f"sample: expected tensors for the slots {list(table.preloaded)}, got {sorted(preload)}")
        self.table, self.x, self.guidance, self.thresholding = table, x, guidance, thresholding
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.rows = table.coefficients if coefficients is None else coefficients
        self.history: list[Tensor | None] = [preload.get(slot) for slot in range(1, HISTORY + 1)]
        self.noisy, self.index = table.noisy.tolist(), 0

    def step(self, output: Tensor | None, uncond: Tensor | None, noise: Tensor | None) -> None:
        i, table, rows, limit = self.index, self.table, self.rows[self.index], self.table.limit
        if self.thresholding is not None:
            data = solver_step(
                self.x,
                output,
                self.history,
                rows,
                noise,
                uncond,
                self.guidance,
                wanted=("converted",),
                **self._seed(i, noise),
            )
            size = dynamic_threshold(data.converted, *self.thresholding).double()
            rows = rows.expand(len(self.x), *rows.shape).clone()
            rows[:, CONVERT] /= size[:, None].to(rows.device)
            limit = 1.0
        made = solver_step(
            self.x, output, self.history, rows, noise, uncond, self.guidance, limit, **self._seed(i, noise)
        )
        for slot, value in zip(table.store[i].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                self.history[slot - 1] = value
        self.x, self.index = made.x_next, i + 1

    def _seed(self, i: int, noise: Tensor | None) -> dict[str, Any]:
        return {"seed": self.seed, "stream": i} if noise is None and self.noisy[i] else {}
