"""A run of many steps in place."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _library
from . import reference
from .functional import check_tensors
from .noise import checked_number, seed_tensor
from .table import SolverTable

__all__ = ["SolverRun"]


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
        check_tensors(op, x, None, (), None, None)
        self.table, self.guidance, self.index = table, checked_number(op, "guidance", guidance), 0
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
        self._seed = torch.randint(2**63 - 1, ()) if seed is None else seed_tensor(op, seed, torch.empty(0))
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
