"""What a search of schedules minimises, and where: pure functions of candidates that any executor may run."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from .batched import run_tables
from .found import table_of
from .refine import Refined, refine_candidate
from .schedule import Schedule
from .search_space import Candidate

__all__ = ["Objective", "Runner"]

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Objective:
    """The error of a schedule: how far it ends from where the noises should end, or what ``fitness`` says.

    Attributes:
        model, prediction: see :func:`fastcifar.diffusion.search_schedule`, as for all of these.
        schedule, start, end: the noise schedule, and its times between which schedules run.
        noise: ``[N, ...]``.
        targets: as noise, or None where ``fitness`` needs none.
        fitness: of samples ``[N, ...]``, or None for the mean over the samples of the root mean square error.
    """

    model: Model
    prediction: str
    schedule: Schedule
    start: float
    end: float
    noise: Tensor
    targets: Tensor | None
    fitness: Callable[[Tensor], float] | None = None

    def samples(self, candidates: Sequence[Candidate]) -> Tensor:
        """``[C, N, ...]``."""
        with torch.no_grad():
            tables = [table_of(c, self.schedule, self.start, self.end, self.prediction) for c in candidates]
            return run_tables(self.model, tables, self.noise)

    def residuals(self, candidates: Sequence[Candidate]) -> Tensor:
        """``[C, N, D]``."""
        if self.targets is None:
            raise ValueError("Objective: expected targets where residuals are asked for, got none")
        return (self.samples(candidates) - self.targets).flatten(2)

    def errors(self, candidates: Sequence[Candidate]) -> list[float]:
        """Of each candidate; infinite where it diverged."""
        if self.fitness is not None:
            values = [float(self.fitness(samples)) for samples in self.samples(candidates)]
        else:
            values = self.residuals(candidates).double().square().mean(2).sqrt().mean(1).tolist()
        return [value if math.isfinite(value) else math.inf for value in values]

    def refine(self, candidate: Candidate, iterations: int, damping: float) -> Refined:
        """See :func:`fastcifar.diffusion.refine.refine_candidate`."""
        return refine_candidate(self.residuals, candidate, iterations, damping)

    def bases(self) -> list[list[float]]:
        """Curves of positions that schedules begin with: even in ``ln(alpha / sigma)``, in time, in the square root of
        time, and Karras et al.'s."""
        even = torch.linspace(0, 1, 65, dtype=torch.float64)
        time = self.start + (self.end - self.start) * even
        root = (self.start**0.5 + (self.end**0.5 - self.start**0.5) * even).square()
        curves = [even]
        first, last = (self.schedule.lam(t) for t in (self.start, self.end))
        curves += [(self.schedule.lam(t) - first) / (last - first) for t in (time, root)]
        rho = 7.0
        high, low = (-first / rho).exp(), (-last / rho).exp()
        lam = -rho * (high + (low - high) * even).log()
        curves.append((lam - first) / (last - first))
        return [curve.tolist() for curve in curves]


class FromScore:
    """``-sigma score``: the noise that a model of the score predicts. An object, so that it can be pickled."""

    def __init__(self, score: Model, schedule: Schedule) -> None:
        self.score, self.schedule = score, schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.schedule.sigma(t).to(x.device, x.dtype)
        return -sigma.view(-1, *[1] * (x.dim() - 1)) * self.score(x, t)


_objectives: dict[str, Objective] = {}  # of this process, the last one: a worker unpacks a model once


def _call(packed: bytes, key: str, threads: int, method: str, arguments: tuple) -> Any:
    if key not in _objectives:
        _objectives.clear()
        _objectives[key] = pickle.loads(packed)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return getattr(_objectives[key], method)(*arguments)


class Runner:
    """Calls an objective's methods in this process, in a pool, or in any executor; the results come in the order of the
    calls, whoever is done first."""

    def __init__(self, objective: Objective, executor: Executor | None, workers: int, threads: int) -> None:
        self.objective, self.executor, self.workers, self.threads = objective, executor, workers, threads
        self._packed, self._key = b"", ""

    @contextmanager
    def open(self) -> Iterator[Runner]:
        """Starts what is needed, and ends what it started."""
        threads, own = torch.get_num_threads(), None
        if self.executor is not None or self.workers:
            try:
                self._packed = pickle.dumps(self.objective)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TypeError(
                    "search_schedule: expected a model, schedule and fitness that can be pickled for other processes "
                    f"(or workers=0, which runs here), got: {error}"
                ) from error
            self._key = sha256(self._packed).hexdigest()
        if self.executor is None and self.workers:
            # Not by fork, which torch's threads do not survive.
            own = self.executor = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        try:
            if self.executor is None:
                torch.set_num_threads(self.threads)
            yield self
        finally:
            if own is not None:
                own.shutdown(cancel_futures=True)
                self.executor = None
            torch.set_num_threads(threads)

    def map(self, method: str, calls: Sequence[tuple]) -> Iterator[Any]:
        """``objective.method(*call)`` of each call."""
        if self.executor is None:
            for arguments in calls:
                yield getattr(self.objective, method)(*arguments)
            return
        futures = [
            self.executor.submit(_call, self._packed, self._key, self.threads, method, arguments) for arguments in calls
        ]
        for future in futures:
            yield future.result()


def pool_size(executor: Executor | None, workers: int | None) -> int:
    """Processes of the pool: as many as processors, unless told, and none beside an executor."""
    if executor is not None:
        return 0
    return (os.cpu_count() or 1) if workers is None else workers
