"""Searches the schedule of a diffusion solver: what each step does, and where, for the least error of few steps."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from hashlib import sha256
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from .._checks import expect_tensors
from .found import points_of
from .mixture import PREDICTIONS
from .objective import FromScore, Model, Objective, Runner, pool_size
from .predictor import SchedulePredictor
from .refine import DAMPINGS, free_numbers
from .schedule import LinearVP, Schedule
from .search_result import SearchResult, SearchState, Trial
from .search_space import Candidate, SearchSpace

REFERENCE_STEPS = 200
CLASSICAL = [(order, prediction) for order in (2, 3, 4) for prediction in ("noise", "data")]
FINALISTS = 8
FIRST_DAMPING = 0.01

__all__ = ["search_schedule"]


def search_schedule(
    model: Model,
    budget: int,
    steps: int | Iterable[int],
    *,
    noise: Tensor,
    prediction: str = "epsilon",
    schedule: Schedule | None = None,
    start: float | None = None,
    end: float | None = None,
    targets: Tensor | None = None,
    fitness: Callable[[Tensor], float] | None = None,
    space: SearchSpace | None = None,
    population: int = 32,
    refine: float | None = None,
    predictor: SchedulePredictor | bool | None = True,
    seed: int = 0,
    batch: int = 8,
    executor: Executor | None = None,
    workers: int | None = None,
    threads: int = 1,
    state: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    r"""Finds a schedule of few steps whose samples end where an accurate solution ends, or score best.

    An evolution of USF's decisions, then least squares on the numbers among them:

    1. The first generation is classical multistep solvers and candidates drawn from ``space``.
    2. Each next one is children of the best ``population`` so far. Eight times as many are made as will be tried; a
       predictor, trained on all that has been tried, ranks them; its first three quarters are tried, and a quarter at
       random.
    3. With the share ``refine`` of the budget, the best eight of different build are refined
       (:func:`fastcifar.diffusion.refine.refine_candidate`), of which after each of four equal parts of that share the
       better half goes on.

    Args:
        model: ``model(x, t)``, ``t`` ``[B]``, float: a denoiser, or a score.
        budget: schedules to try, for each number of steps; one is a run over all of ``noise``.
        steps: calls of the model that a schedule may make (a free first step is none), or several such numbers.
        noise: standard normal ``[N, ...]`` that the error is taken on; its dtype is the one to compute in. A mean error
            that few samples make large asks for many.
        prediction: what the model gives: "epsilon" (default), "x0", "v", "flow" or "score".
        schedule: of noise. Default ``LinearVP()``.
        start, end: times between which to go. Defaults: the schedule's ``first`` and ``last``. ``alpha / sigma`` is
            neither 0 nor infinite at either.
        targets: where ``noise`` should end, ``[N, ...]``. Default: where a third-order multistep solver takes it in 200
            steps.
        fitness: of the samples ``[N, ...]``, less is better, for instance an FID. Default: the mean over the samples of
            the root of the mean squared distance to the target.
        space: the decisions. Default ``SearchSpace()``.
        population: candidates of a generation, and parents of the next. Default 32.
        refine: share of the budget for step 3. Default 0.5, and 0 with a ``fitness``, whose slopes are not known.
        predictor: a :class:`~fastcifar.diffusion.predictor.SchedulePredictor`. Default True, a new one; None or False:
            children are tried in the order in which they are made.
        seed: of everything that is drawn.
        batch: candidates that run at once, see :func:`~fastcifar.diffusion.batched.run_tables`. Default 8.
        executor: any ``concurrent.futures.Executor``, as Dask's ``Client.get_executor()``. Default: a process pool
            (whose processes import the calling script: guard its main part).
        workers: processes of that pool; 0 runs everything in this one. Default: as many as processors.
        threads: of PyTorch in each evaluation. Default 1.
        state: a JSON file to save to after each generation, and to resume from where it exists.
        progress: whether to show a bar, where tqdm is installed.

    Neither executor, workers nor an interruption change the result by a bit: evaluations are pure functions of their
    candidates, what is drawn depends on ``seed`` and the generation's number alone, and ``batch`` and ``threads``,
    which may change a last bit, are fixed.

    Raises:
        ValueError: an argument is not as described; the file of ``state`` is of another search.
        TypeError: ``space`` is no SearchSpace or ``schedule`` no Schedule; the model cannot be sent to another process.

    Source: Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (ICLR
    2024): the decisions, the evolution and the idea of the predictor. The refinement is ours.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import GaussianMixture, search_schedule
        >>> mixture = GaussianMixture.smooth()
        >>> noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> targets = mixture.solve(noise, 1.0, 1e-3)
        >>> result = search_schedule(
        ...     mixture.model(), 200, 3, noise=noise, targets=targets, population=16, workers=0, progress=False
        ... )
        >>> len(result.trials[3]) <= 200, result[3].evaluations, result[3].error < 0.1
        (True, 3, True)
    """
    counts = [steps] if isinstance(steps, int) else list(steps)
    refine = refine if refine is not None else 0.5 if fitness is None else 0.0
    space = SearchSpace() if space is None else space
    if not isinstance(space, SearchSpace):
        raise TypeError(f"search_schedule: expected space to be a SearchSpace, got {type(space).__name__}")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"search_schedule: expected schedule to be a Schedule, got {type(schedule).__name__}")
    expect_tensors("search_schedule", noise=noise, targets=noise if targets is None else targets)
    if executor is not None and not hasattr(executor, "submit"):
        raise TypeError(f"search_schedule: expected executor to have submit, got {type(executor).__name__}")
    workers = pool_size(executor, workers)
    _check(counts, budget, noise, prediction, targets, fitness, refine, population, batch, workers, threads)
    if not isinstance(predictor, SchedulePredictor | bool | None):
        raise TypeError(
            "search_schedule: expected predictor to be a SchedulePredictor, a bool or None, got "
            f"{type(predictor).__name__}"
        )
    learner = SchedulePredictor() if predictor is True else predictor or None
    schedule = LinearVP() if schedule is None else schedule
    start, end = schedule.first if start is None else start, schedule.last if end is None else end
    epsilon = FromScore(model, schedule) if prediction == "score" else None
    told = (epsilon, "epsilon") if epsilon is not None else (model, prediction)
    objective = Objective(*told, schedule, start, end, noise, targets, fitness)
    points_of(_multistep((0.0,), 1, "noise"), schedule, start, end)  # which complains about the ends
    settings = {
        "budget": budget,
        "seed": seed,
        "population": population,
        "refine": refine,
        "batch": batch,
        "threads": threads,
        "prediction": prediction,
        "start": start,
        "end": end,
        "space": space.record(),
        "predictor": learner and learner.record(),
        "schedule": type(schedule).__name__,
        "noise": sha256(noise.detach().cpu().numpy().tobytes()).hexdigest(),
    }
    saved = SearchState.open(state, settings)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if targets is None and fitness is None:
            objective = _with_targets(objective)
        with Runner(objective, executor, workers, threads).open() as runner:
            for count in counts:
                bar = _Bar(progress, budget, f"{count} evaluations")
                try:
                    _Search(objective, runner, space, learner, count, saved, bar, settings).run()
                finally:
                    bar.close()
    finally:
        torch.set_num_threads(before)
    return SearchResult({count: saved.trials[count] for count in counts}, start, end, settings)


def _check(
    counts: Sequence[int],
    budget: int,
    noise: Tensor,
    prediction: str,
    targets: Tensor | None,
    fitness: object,
    refine: float,
    population: int,
    batch: int,
    workers: int,
    threads: int,
) -> None:
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(f"search_schedule: expected different steps of 1 or more, got {counts}")
    if min(budget, batch, threads) < 1 or population < 2 or workers < 0:
        raise ValueError(
            "search_schedule: expected budget, batch and threads of 1 or more, a population of 2 or more and workers "
            f"of 0 or more, got {budget}, {batch}, {threads}, {population} and {workers}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"search_schedule: expected prediction to be one of {', '.join(PREDICTIONS)}; got {prediction!r}"
        )
    if noise.dtype not in (torch.float32, torch.float64) or noise.dim() < 2 or not noise.numel():
        raise ValueError(
            f"search_schedule: expected noise [N, ...] of float32 or float64, got {list(noise.shape)} of {noise.dtype}"
        )
    if targets is not None and (targets.shape != noise.shape or targets.dtype != noise.dtype):
        raise ValueError(
            f"search_schedule: expected targets like noise, {list(noise.shape)} of {noise.dtype}, got "
            f"{list(targets.shape)} of {targets.dtype}"
        )
    if not 0 <= refine < 1 or (fitness is not None and (refine or targets is not None)):
        raise ValueError(
            "search_schedule: expected a share refine of 0 or more and below 1, and neither it nor targets beside a "
            f"fitness, got {refine}{'' if targets is None else ' and targets'}"
        )


def _with_targets(objective: Objective) -> Objective:
    """The objective of where many steps end."""
    s = REFERENCE_STEPS
    many = _multistep(tuple(i / s for i in range(s)), 3, "data")
    targets = objective.samples([many])[0]
    if not bool(torch.isfinite(targets).all()):
        raise ValueError(
            f"search_schedule: expected a model with which {s} steps stay finite, got others; is its prediction "
            f"{objective.prediction!r}?"
        )
    o = objective
    return Objective(o.model, o.prediction, o.schedule, o.start, o.end, o.noise, targets)


def _multistep(position: tuple[float, ...], order: int, prediction: str) -> Candidate:
    s = len(position)
    orders = tuple(min(order, i + 1) for i in range(s))
    none = (0.0,) * s
    return Candidate(position, orders, (prediction,) * s, none, (False,) * s, none, (0,) * s)


class _Bar:
    """tqdm's, where it is wanted and there."""

    def __init__(self, wanted: bool, total: int, title: str) -> None:
        self.bar = None
        if wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, desc=title, unit="schedule", file=sys.stderr)

    def to(self, done: int, error: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"error {error:.3g}", refresh=False)
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Search:
    """For one number of evaluations."""

    def __init__(
        self,
        objective: Objective,
        runner: Runner,
        space: SearchSpace,
        learner: SchedulePredictor | None,
        count: int,
        saved: SearchState,
        bar: _Bar,
        settings: dict,
    ) -> None:
        self.objective, self.runner, self.space, self.learner, self.count = objective, runner, space, learner, count
        self.saved, self.bar = saved, bar
        self.trials = saved.trials.setdefault(count, [])
        self.seed, self.population, self.batch = settings["seed"], settings["population"], settings["batch"]
        self.budget = settings["budget"]
        self.evolution = self.budget - int(settings["refine"] * self.budget)

    @property
    def used(self) -> int:
        return self.trials[-1].used if self.trials else 0

    def run(self) -> None:
        if self.trials:
            self._report()
        while len(self.trials) < self.evolution:
            generation = -(-len(self.trials) // self.population)
            room = min(self.population, self.evolution - len(self.trials))
            candidates = self._first(room) if generation == 0 else self._children(generation, room)
            chunks = [candidates[i : i + self.batch] for i in range(0, len(candidates), self.batch)]
            stage = "drawn" if generation == 0 else "child"
            done: list[Trial] = []
            for chunk, errors in zip(chunks, self.runner.map("errors", [(c,) for c in chunks]), strict=True):
                for candidate, error in zip(chunk, errors, strict=True):
                    done.append(Trial(candidate, error, stage, self.used + len(done) + 1))
                self._report(done)
            self._keep(done)
        self._refine()

    def _report(self, more: Sequence[Trial] = ()) -> None:
        every = [*self.trials, *more]
        self.bar.to(every[-1].used, min(trial.error for trial in every))

    def _keep(self, trials: Sequence[Trial]) -> None:
        self.trials += trials
        self.saved.save()

    def _rng(self, generation: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.count, generation])

    def _first(self, room: int) -> list[Candidate]:
        rng, bases = self._rng(0), self.objective.bases()[:2]
        even = np.arange(self.count) / self.count
        first = [
            _multistep(tuple(np.interp(even, np.linspace(0, 1, len(base)), base).tolist()), order, prediction)
            for base in bases
            for order, prediction in CLASSICAL
            if order in self.space.orders and prediction in self.space.predictions
        ][: room // 2]
        return self._filled(first, room, rng)

    def _filled(self, candidates: list[Candidate], room: int, rng: np.random.Generator) -> list[Candidate]:
        """With as many drawn anew as are missing: of children, few may fit."""
        drawn = (self.space.draw(self.count, self.objective.bases(), rng) for _ in itertools.count())
        return candidates + list(itertools.islice(filter(Candidate.fits, drawn), room - len(candidates)))

    def _children(self, generation: int, room: int) -> list[Candidate]:
        rng = self._rng(generation)
        parents = sorted(self.trials, key=lambda trial: trial.error)[: self.population]
        # The better a parent is placed, the more children it has.
        share = np.arange(len(parents), 0, -1, dtype=np.float64)
        pool = []
        for _ in range(8 * room):
            first, second = rng.choice(len(parents), 2, p=share / share.sum())
            pool.append(self.space.child(parents[first].candidate, parents[second].candidate, rng))
        if self.learner is None:
            return self._filled([candidate for candidate in pool if candidate.fits()][:room], room, rng)
        features = self.space.encode([trial.candidate for trial in self.trials], self.count)
        errors = torch.tensor([trial.error for trial in self.trials], dtype=torch.float64)
        self.learner.fit(features, errors, seed=int(rng.integers(2**31)))
        order = self.learner.score(self.space.encode(pool, self.count)).argsort(stable=True).tolist()
        best = list(itertools.islice((i for i in order if pool[i].fits()), room - room // 4))
        others = (i for i in rng.permutation([i for i in order if i not in best]).tolist() if pool[i].fits())
        return self._filled([pool[i] for i in best + list(itertools.islice(others, room // 4))], room, rng)

    def _refine(self) -> None:
        """Halving: equal parts of what is left for eight, four, two and one candidates."""
        evolved = [trial for trial in self.trials if trial.stage != "refined"]
        saved = [trial for trial in self.trials if trial.stage == "refined"]  # parts of a search that is resumed
        used = evolved[-1].used
        field = self._finalists(evolved, self.budget - used)
        while field:
            results = saved[: len(field)]
            saved = saved[len(field) :]
            if not results:
                part = (self.budget - used) // len(field).bit_length() // len(field)
                calls = [
                    (t.candidate, (part - 1) // _iteration(t.candidate), t.damping or FIRST_DAMPING) for t in field
                ]
                for found in self.runner.map("refine", calls):
                    used += found.evaluations
                    results.append(Trial(found.candidate, found.error, "refined", used, found.damping))
                    self._report(results)
                self._keep(results)
            used = results[-1].used
            best = sorted(results, key=lambda trial: trial.error)
            field = best[: len(field) // 2]

    def _finalists(self, trials: Sequence[Trial], left: int) -> list[Trial]:
        """The best of different build, at most eight, and no more than can have an iteration each."""
        best: dict[tuple, Trial] = {}
        for trial in sorted(trials, key=lambda trial: trial.error):
            if math.isfinite(trial.error):
                best.setdefault(trial.candidate.build, trial)
        count = FINALISTS
        while count:
            field = list(best.values())[:count]
            if left // count.bit_length() // count > max((_iteration(t.candidate) for t in field), default=0):
                return field
            count //= 2
        return []


def _iteration(candidate: Candidate) -> int:
    return len(free_numbers(candidate)) + len(DAMPINGS)
