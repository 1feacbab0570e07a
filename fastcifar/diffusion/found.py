"""A schedule that a search found, and the table that its decisions stand for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .schedule import LinearVP, Schedule
from .search_space import Candidate
from .table import Points, SolverTable
from .usf import usf

__all__ = ["FoundSchedule", "table_of"]


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

    def table(self, schedule: Schedule | None = None, prediction: str = "epsilon") -> SolverTable:
        """The solver, for :func:`fastcifar.diffusion.sample` with a model of that prediction under that noise schedule.
        Default ``LinearVP()``."""
        return table_of(self.candidate, schedule or LinearVP(), self.start, self.end, prediction)

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


def points_of(candidate: Candidate, schedule: Schedule, start: float, end: float) -> Points:
    """The points of a candidate's positions, which are shares of the way in ``ln(alpha / sigma)``.

    Raises:
        ValueError: ``alpha / sigma`` is 0 or infinite at an end, or does not grow.
    """
    first, last = (float(schedule.lam(t)) for t in (start, end))
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise ValueError(
            f"search_schedule: expected a start and an end between which alpha / sigma grows and is finite, got "
            f"{start} and {end}, where its logarithm is {first:.4g} and {last:.4g}"
        )
    inner = torch.tensor(candidate.position[1:], dtype=torch.float64)
    ends = torch.tensor([start, end], dtype=torch.float64)
    times = torch.cat([ends[:1], schedule.time(first + inner * (last - first)), ends[1:]])
    return Points(times, schedule.alpha(times), schedule.sigma(times))


def table_of(
    candidate: Candidate, schedule: Schedule, start: float, end: float, prediction: str = "epsilon"
) -> SolverTable:
    """The solver that a candidate stands for. Raises as :func:`points_of` and :func:`fastcifar.diffusion.usf.usf`."""
    return usf(
        points_of(candidate, schedule, start, end),
        candidate.decisions(),
        prediction=prediction,
        first_free=candidate.first_free,
        scaled=schedule.scaled,
        name="searched",
    )
