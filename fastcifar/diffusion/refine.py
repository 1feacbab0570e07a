"""Refines a schedule's numbers, its positions and relaxations, by least squares; its other decisions stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .search_space import Candidate

DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # times the last one, all tried at once

__all__ = ["Refined", "free_numbers", "refine_candidate"]


class Refined(NamedTuple):
    """Of :func:`refine_candidate`.

    Attributes:
        candidate: the best that was found.
        error: its mean error.
        damping: where to go on from.
        evaluations: schedules that were tried.
    """

    candidate: Candidate
    error: float
    damping: float
    evaluations: int


def _pack(candidate: Candidate) -> Tensor:
    position = torch.tensor([*candidate.position, 1.0], dtype=torch.float64)
    numbers = (*candidate.relaxation, *candidate.corrector_relaxation)
    return torch.cat([position.diff().log(), torch.tensor(numbers, dtype=torch.float64)])


def _unpack(candidate: Candidate, numbers: Tensor) -> Candidate:
    steps = len(candidate)
    gaps = numbers[:steps].exp()
    position = (gaps.cumsum(0) / gaps.sum())[:-1].tolist()
    return replace(
        candidate,
        position=(0.0, *position),
        relaxation=tuple(numbers[steps : 2 * steps].tolist()),
        corrector_relaxation=tuple(numbers[2 * steps :].tolist()),
    )


def free_numbers(candidate: Candidate) -> list[int]:
    """Which of the numbers of a candidate of S steps have an effect: S logarithms of gaps between positions, S
    relaxations, S of the correctors."""
    steps = len(candidate)
    free = list(range(steps)) if steps > 1 else []
    free += [steps + i for i, order in enumerate(candidate.order) if order > 1]
    free += [2 * steps + i for i, on in enumerate(candidate.corrector) if on]
    return free


def refine_candidate(
    residuals: Callable[[Sequence[Candidate]], Tensor],
    candidate: Candidate,
    iterations: int,
    damping: float = 0.01,
) -> Refined:
    r"""Levenberg and Marquardt's method on the mean error over the noises, ``mean_n |r_n|``, ``|r|`` the root of the
    mean of squares.

    The mean of roots is not a sum of squares: each iteration weighs noise n by ``1 / |r_n|`` (iteratively reweighted
    least squares), so that the few noises that end in another mode do not decide alone. Derivatives are differences of
    candidates that run as one batch, so they need nothing of the model but its calls; six dampings are tried at once.
    One iteration costs as many evaluations as there are :func:`free_numbers`, and six.

    Args:
        residuals: of C candidates, ``[C, N, D]``; rows that are not finite count as infinite errors.
        candidate: where to start.
        iterations: at most so many; it ends earlier where the largest damping brings nothing.
        damping: to begin with, relative to the curvatures. Default 0.01.

    Raises:
        ValueError: the residuals of the first candidate are not finite.
    """
    free = free_numbers(candidate)
    numbers = _pack(candidate)
    here = residuals([candidate])[0]
    error, used = float(_mean_error(here)), 1
    if not math.isfinite(error):
        raise ValueError(f"refine_candidate: expected a candidate with finite residuals, got {candidate}")
    delta = 1e-4 if here.dtype == torch.float64 else 3e-3
    for _ in range(iterations if free else 0):
        shifted = numbers.repeat(len(free), 1)
        shifted[torch.arange(len(free)), free] += delta
        moved = residuals([_unpack(candidate, row) for row in shifted])
        used += len(free)
        slope = ((moved - here) / delta).double()  # [P, N, D]
        base = here.double()
        weight = 1 / base.square().mean(1).sqrt().clamp(min=1e-9 + 1e-3 * error)
        weighted = slope * weight.unsqueeze(1)
        curvature = weighted.flatten(1) @ slope.flatten(1).T
        gradient = weighted.flatten(1) @ base.flatten()
        if not bool(torch.isfinite(curvature).all() and torch.isfinite(gradient).all()):
            break
        scale = curvature.diagonal() + 1e-9 * float(curvature.diagonal().max()) + 1e-300
        dampings = [min(max(damping * factor, 1e-8), 1e8) for factor in DAMPINGS]
        trials = numbers.repeat(len(dampings), 1)
        for row, strength in zip(trials, dampings, strict=True):
            step = torch.linalg.solve(curvature + strength * torch.diag(scale), -gradient)
            row[free] += step.clamp(-1, 1)
        results = residuals([_unpack(candidate, row) for row in trials])
        used += len(dampings)
        errors = _mean_error(results)
        errors = torch.where(torch.isfinite(errors), errors, torch.full_like(errors, math.inf))
        best = int(errors.argmin())
        if float(errors[best]) < error:
            numbers, here, error, damping = trials[best], results[best], float(errors[best]), dampings[best]
        elif damping >= 1e3:
            break
        else:
            damping *= 1e2
    return Refined(_unpack(candidate, numbers), error, damping, used)


def _mean_error(residuals: Tensor) -> Tensor:
    return residuals.double().square().mean(-1).sqrt().mean(-1)
