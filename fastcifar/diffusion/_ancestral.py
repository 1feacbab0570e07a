"""DDPM's and DDIM's tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import Points, SolverTable


def points_of(alphas_cumprod: Tensor, timesteps: Tensor) -> Points:
    """Points at ``timesteps`` of a discrete schedule and at its clean end."""
    product = torch.cat([alphas_cumprod.double()[timesteps], torch.ones(1, dtype=torch.float64)])
    times = torch.cat([timesteps.double(), torch.zeros(1, dtype=torch.float64)])
    return Points(times, product.sqrt(), (1 - product).sqrt())


def ddpm_table(points: Points, variance: str = "fixedlarge", limit: float | None = 1.0) -> SolverTable:
    (a, s), (a1, s1) = _pairs(points)
    kept = a / a1
    beta = s**2 - (kept * s1) ** 2
    rows = torch.zeros(len(a), 3, 11, dtype=torch.float64)
    rows[:, 0, 0], rows[:, 0, 1] = 1 / a, -s / a
    rows[:, 2, 0], rows[:, 2, 8] = kept * s1**2 / s**2, a1 * beta / s**2
    variance_of = beta if variance == "fixedlarge" else beta * s1**2 / s**2
    rows[:, 2, 10] = variance_of.sqrt() * (s1 > 0)
    return _table(points, rows, limit, "DDPM")


def ddim_table(points: Points, eta: float = 0.0, limit: float | None = None) -> SolverTable:
    (a, s), (a1, s1) = _pairs(points)
    noise = eta * (s1 / s * (1 - (a / a1) ** 2).sqrt())
    rows = torch.zeros(len(a), 3, 11, dtype=torch.float64)
    rows[:, 0, 0], rows[:, 0, 1] = 1 / a, -s / a
    rows[:, 2, 8], rows[:, 2, 1], rows[:, 2, 10] = a1, (s1**2 - noise**2).sqrt(), noise
    return _table(points, rows, limit, "DDIM")


def _pairs(points: Points) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (points.alpha[:-1], points.sigma[:-1]), (points.alpha[1:], points.sigma[1:])


def _table(points: Points, rows: Tensor, limit: float | None, name: str) -> SolverTable:
    steps = len(rows)
    store, scale = torch.zeros(steps, 2, dtype=torch.int64), torch.ones(steps, dtype=torch.float64)
    return SolverTable(rows, store, points.timesteps[:-1], scale, limit, name=name)


def linear_alphas_cumprod(steps: int = 1000) -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)
