"""A model and a solver's table as one reverse transition, which is what a tree search takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import solver_step
from .reference import HISTORY
from .table import SolverTable


class TableStep:
    r"""One reverse transition ``x_{t-1} ~ p(. | x_t)`` of a model and a table, as :class:`TreeSampler` takes it.

    Transition t of S is step S - t of the table. A tree's states remember no others, so the table may use no history;
    one without noise (DDIM with eta = 0) makes every child of a state the same, and only x_T is then searched. Noise is
    torch's, from the generator that each call gives.

    Args:
        model: ``model(x, t)``, with x times the table's ``scale`` and t ``[B]``, float64 where x is and else float32;
            a pair of outputs is (output, uncond).
        table: S steps, for what the model predicts.
        guidance: of a pair, ``uncond + guidance (output - uncond)``. Default 1.

    Raises:
        TypeError: ``table`` is no :class:`SolverTable`.
        ValueError: the table reads a history slot.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]],
        table: SolverTable,
        guidance: float = 1.0,
    ) -> None:
        if not isinstance(table, SolverTable):
            raise TypeError(f"TableStep: expected table to be a SolverTable, got {type(table).__name__}")
        if bool(table.coefficients[:, :, 2 : 2 + HISTORY].any()):
            raise ValueError(f"TableStep: expected a table without history (one step at a time), got {table.name!r}")
        self.model, self.table, self.guidance = model, table, guidance
        columns = (table.coefficients, table.timesteps, table.scale, table.evaluates, table.noisy)
        self._steps = list(zip(*(column.tolist() for column in columns), strict=True))

    def __call__(self, x: Tensor, t: int, generator: torch.Generator) -> Tensor:
        rows, time, scale, evaluates, noisy = self._steps[len(self._steps) - t]
        output = uncond = noise = None
        if evaluates:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            made = self.model(x if scale == 1 else x * scale, torch.full((len(x),), time, dtype=dtype, device=x.device))
            output, uncond = made if isinstance(made, tuple) else (made, None)
        if noisy:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        step = solver_step(x, output, (), rows, noise, uncond, self.guidance, self.table.limit, wanted=("x_next",))
        return step.x_next
