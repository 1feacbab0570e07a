"""A schedule that a search found, and the solvers' tables that such decisions stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mixture import Schedule, vp_linear
from .program import programs
from .search_space import Candidate
from .table import Points, SolverTable

__all__ = ["FoundSchedule", "build_tables"]


@dataclass(frozen=True)
class FoundSchedule:
    """The decisions of a schedule, and where it was found.

    Attributes:
        candidate: the decisions.
        start, end: times of the noise schedule between which it goes.
        evaluations: calls of the model.
        error: on what it was searched on.
        about: where it is from, for whoever finds the file.

    Example:
        >>> from fastcifar.diffusion import FoundSchedule
        >>> found = FoundSchedule.load("mixture-smooth-5")
        >>> int(found.table().evaluates.sum())
        5
    """

    candidate: Candidate
    start: float
    end: float
    evaluations: int
    error: float
    about: str = ""

    def table(self, schedule: Schedule = vp_linear, prediction: str = "epsilon") -> SolverTable:
        """The solver, for a model of that prediction under that noise schedule."""
        return build_tables([self.candidate], schedule, self.start, self.end, prediction)[0]

    def save(self, path: str | PathLike[str]) -> None:
        """As JSON, every number in full."""
        record: dict[str, Any] = {name: getattr(self, name) for name in ("about", "start", "end", "evaluations")}
        record |= {"error": self.error, "candidate": self.candidate.record()}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FoundSchedule:
        """What :meth:`save` wrote, or by its name one that comes with the package.

        Raises:
            ValueError: there is neither, or the file holds something else.
        """
        shipped = Path(__file__).parent / "schedules"
        file = Path(path)
        if not file.exists():
            file = shipped / f"{path}.json"
        if not file.exists():
            names = sorted(known.stem for known in shipped.glob("*.json"))
            raise ValueError(f"FoundSchedule: expected a file, or one of {', '.join(names)}; got {path}")
        record = json.loads(file.read_text())
        if not isinstance(record, dict) or not {"candidate", "start", "end", "evaluations", "error"} <= set(record):
            raise ValueError(f"FoundSchedule: expected what save wrote, got {file}")
        record["candidate"] = Candidate.from_record(record["candidate"])
        return cls(**record)


def log_ratio(schedule: Schedule, times: Tensor) -> Tensor:
    """``ln(alpha / sigma)`` of times."""
    alpha, sigma = schedule(times)
    return (alpha / sigma).log()


def points_of(position: Tensor, schedule: Schedule, start: float, end: float) -> Points:
    """The points ``[C, S + 1]`` of positions ``[C, S]``, which are shares of the way in ``ln(alpha / sigma)``; their
    times by bisection, for which the schedule need only be monotone."""
    ends = log_ratio(schedule, torch.tensor([start, end], dtype=torch.float64))
    if not (bool(torch.isfinite(ends).all()) and ends[0] < ends[1]):
        raise ValueError(
            f"search_schedule: expected a start and an end between which alpha / sigma grows and is finite, got "
            f"{start} and {end}, where its logarithm is {ends[0].item():.4g} and {ends[1].item():.4g}"
        )
    wanted = ends[0] + position[:, 1:] * (ends[1] - ends[0])
    noisy, clean = torch.full_like(wanted, start), torch.full_like(wanted, end)
    for _ in range(54):
        middle = (noisy + clean) / 2
        below = log_ratio(schedule, middle) < wanted
        noisy, clean = torch.where(below, middle, noisy), torch.where(below, clean, middle)
    edge = torch.ones_like(position[:, :1])
    times = torch.cat([edge * start, (noisy + clean) / 2, edge * end], 1)
    alpha, sigma = schedule(times)
    return Points(times, alpha, sigma)


def build_tables(
    candidates: Sequence[Candidate], schedule: Schedule, start: float, end: float, prediction: str = "epsilon"
) -> list[SolverTable]:
    """The solvers that candidates stand for, for a model of that ``prediction``: those of one build at once.

    Raises:
        ValueError: ``alpha / sigma`` does not grow from ``start`` to ``end``, or a build needs too many slots.
    """
    tables: dict[int, SolverTable] = {}
    lengths: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        lengths.setdefault(len(candidate), []).append(index)
    for indices in lengths.values():
        position = torch.tensor([candidates[i].position for i in indices], dtype=torch.float64)
        points = points_of(position, schedule, start, end)
        builds: dict[tuple, list[int]] = {}
        for row, index in enumerate(indices):
            builds.setdefault(candidates[index].build, []).append(row)
        for rows in builds.values():
            alike = [candidates[indices[row]] for row in rows]
            made = programs(alike, Points(*(part[rows] for part in points)), prediction)
            tables.update(zip((indices[row] for row in rows), made, strict=True))
    return [tables[i] for i in range(len(candidates))]
