"""Several solvers at once: their samples beside one another in one batch, each with coefficients of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .functional import solver_step
from .reference import HISTORY
from .table import SolverTable

__all__ = ["run_tables"]


def run_tables(model: Callable[[Tensor, Tensor], Tensor], tables: Sequence[SolverTable], x: Tensor) -> Tensor:
    """What each of C deterministic solvers makes of the noises ``x`` [N, ...]: ``[C, N, ...]``.

    Solvers of one build (steps, slots, and where the model is called) run as one batch of ``C N`` samples, so that the
    model is called as often as for one of them: this pays where a call's fixed cost counts, as for a small model or few
    noises. ``model(x, t)`` is given ``t`` as ``[C N]`` of x's dtype.

    Raises:
        ValueError: a table adds noise.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import SolverTable
        >>> from fastcifar.diffusion.batched import run_tables
        >>> rows = torch.zeros(1, 3, 11, dtype=torch.float64)
        >>> rows[0, 2, :2] = torch.tensor([1.0, -0.5])  # x - 0.5 output
        >>> time = torch.ones(1, dtype=torch.float64)
        >>> table = SolverTable(rows, torch.zeros(1, 2, dtype=torch.int64), time, time)
        >>> run_tables(lambda x, t: x, [table, table], torch.ones(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    if noisy := [table.name for table in tables if bool(table.noisy.any())]:
        raise ValueError(f"run_tables: expected solvers without noise, got {noisy[0]!r}")
    groups: dict[tuple, list[int]] = {}
    for index, table in enumerate(tables):
        build = (len(table), table.limit, tuple(table.evaluates.tolist()), tuple(table.store.flatten().tolist()))
        groups.setdefault(build, []).append(index)
    results: list[Tensor] = [x] * len(tables)
    for members in groups.values():
        for index, result in zip(members, _run_alike(model, [tables[i] for i in members], x), strict=True):
            results[index] = result
    return torch.stack(results) if results else x.new_empty(0, *x.shape)


def _run_alike(model: Callable[[Tensor, Tensor], Tensor], tables: Sequence[SolverTable], noise: Tensor) -> Tensor:
    count, first = len(noise), tables[0]

    def each(values: Sequence[Tensor] | Sequence[float]) -> Tensor:
        """A value of each table, for each of its samples."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        return stacked.to(noise.device).repeat_interleave(count, 0)

    def column(values: Tensor) -> Tensor:
        return values.to(noise.dtype).view(-1, *[1] * (noise.dim() - 1))

    x = noise.repeat(len(tables), *[1] * (noise.dim() - 1)) * column(each([t.init_scale for t in tables]))
    history: list[Tensor | None] = [None] * HISTORY
    for i in range(len(first)):
        output = None
        if bool(first.evaluates[i]):
            scale = each([t.scale[i] for t in tables])
            output = model(x * column(scale), each([t.timesteps[i] for t in tables]).to(x.dtype))
        coefficients = torch.stack([t.coefficients[i] for t in tables])
        read = (coefficients[:, :, 2 : 2 + HISTORY] != 0).any(1).any(0).tolist()
        seen = [slot if used else None for slot, used in zip(history, read, strict=True)]
        x, converted, corrected = solver_step(x, output, seen, each(list(coefficients)), limit=first.limit)
        for slot, kept in zip(first.store[i].tolist(), (converted, corrected), strict=True):
            if slot:
                history[slot - 1] = kept
    return x.view(len(tables), *noise.shape)
