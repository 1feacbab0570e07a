"""A solver of ``y = x - shift c`` as a solver of x: how DiffuseVAE and TrojDiff use any solver, in one pass a step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .._checks import expect_type
from .reference import HISTORY, PREDICT, TERMS
from .table import SolverTable

X, OUTPUT, NOISE = (TERMS.index(name) for name in ("x", "output", "noise"))

__all__ = ["shifted_table"]


def shifted_table(table: SolverTable, shift: float | Tensor, *, scale: float = 1.0) -> SolverTable:
    r"""``table``, applied to ``y_i = x_i - shift_i c`` with the model's output and the noise times ``scale``.

    If ``x_i = alpha_i x0 + sigma_i scale eps + shift_i c`` with a fixed image c, then y is what the solver was made
    for, and each of its rows, linear in y, is one in x and c: a coefficient k of y gives c one of ``-k shift_i``, and
    ``x_next`` adds ``shift_(i+1) c``. So c is one more history slot, the first that the table leaves free; it is
    ``preloaded[-1]`` of the result, and whoever runs the table puts c there. ``corrected`` stays a y.

    Args:
        table: S steps of a solver whose model predicts the noise, or, where ``scale`` is 1, anything else that does not
            depend on c.
        shift: of every point, or float64 ``[S + 1]``.
        scale: of the model's output and of the noise. Default 1.

    Returns:
        A table of as many steps; :attr:`~SolverTable.init_scale` is times ``scale``.

    Raises:
        ValueError: ``shift`` is of another shape or not finite, ``scale`` is negative or not finite, or all slots are
            in use.

    Source: DiffuseVAE (arXiv 2201.00308), formulation 2, is ``shift = 1`` and 0 at the end; TrojDiff (CVPR 2023) is
    ``shift = sigma`` and ``scale = gamma``. That both are this is our remark.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import SolverTable, shifted_table
        >>> euler = torch.zeros(1, 3, 11, dtype=torch.float64)
        >>> euler[0, 2, :2] = torch.tensor([1.0, -0.5])  # x - output / 2
        >>> plain = SolverTable(euler, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([9.0]), torch.ones(1))
        >>> moved = shifted_table(plain, torch.tensor([1.0, 0.25]))
        >>> moved.preloaded, moved.coefficients[0, 2, :3].tolist()  # of x, the output, and c
        ((1,), [1.0, -0.5, -0.75])
    """
    expect_type("shifted_table", SolverTable, "a SolverTable", table=table)
    steps = len(table)
    shift = torch.as_tensor(shift, dtype=torch.float64)
    shift = shift.expand(steps + 1) if shift.dim() == 0 else shift
    if shift.shape != (steps + 1,) or not bool(torch.isfinite(shift).all()):
        raise ValueError(f"shifted_table: expected a finite shift of each of {steps + 1} points, got {shift.tolist()}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"shifted_table: expected a finite scale of 0 or more, got {scale}")
    slot = table.slots + 1
    if slot > HISTORY:
        raise ValueError(f"shifted_table: expected a free slot for the shift, got a table that uses all {HISTORY}")
    coefficients = table.coefficients.clone()
    coefficients[:, :, [OUTPUT, NOISE]] *= scale
    moved = -shift[:-1, None] * coefficients[:, :, X]
    moved[:, PREDICT] += shift[1:]
    coefficients[:, :, 1 + slot] = moved
    return replace(
        table,
        coefficients=coefficients,
        init_scale=table.init_scale * scale,
        name=f"shifted {table.name}",
        preloaded=(*table.preloaded, slot),
    )
