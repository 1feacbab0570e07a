"""From decisions to tables: the programs of many schedules of one build at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS
from .table import Points, SolverTable

if TYPE_CHECKING:
    from .search_space import Candidate

X, OUTPUT, CONVERTED, CORRECTED = (TERMS.index(name) for name in ("x", "output", "converted", "corrected"))
Value = tuple[str, int]  # "x", "data" or "noise" of a point

Build = tuple[tuple[int, ...], tuple[str, ...], tuple[bool, ...], tuple[int, ...], bool]

__all__ = ["phi", "plan", "programs"]


def phi(z: Tensor, count: int) -> list[Tensor]:
    """``phi_1 ... phi_count`` of z, ``phi_1 = (e^z - 1) / z`` and ``phi_{k+1} = (phi_k - 1/k!) / z``: by their series
    where |z| is below 1, so that neither 0 nor what is near it loses digits."""
    near = z.abs() < 1
    small, large = torch.where(near, z, torch.zeros_like(z)), torch.where(near, torch.ones_like(z), z)
    results, far = [], torch.expm1(large) / large
    for k in range(1, count + 1):
        series = torch.zeros_like(z)
        for j in reversed(range(20)):
            series = series * small + 1 / math.factorial(j + k)
        results.append(torch.where(near, series, far))
        far = (far - 1 / math.factorial(k)) / large
    return results


class Update(NamedTuple):
    """One step's formula, without its numbers: from which point, to which, of what, by which other points."""

    start: int
    end: int
    kind: str
    others: tuple[int, ...]

    def reads(self) -> list[Value]:
        return [("x", self.start), *((self.kind, j) for j in (self.start, *self.others))]

    def weights(self, points: Points, relaxation: Tensor) -> dict[Value, Tensor]:
        """``[C]`` of each value.

        ``x_t = (a_t / a_s) x_s - s_t (h phi_1(h) e_s + sum_d h^(d+1) phi_(d+1)(h) e^(d))``, and for data
        ``x_t = (s_t / s_s) x_s + a_t (...)`` with phi of -h; ``F^(d) = sum_j w_j (F_j - F_s)``, w of the Taylor
        series: ``sum_j w_j l_j^i / i! = [i = d]``, l_j the distance of point j in lambda.
        """
        alpha, sigma, lam = points.alpha, points.sigma, points.lam
        s, t = self.start, self.end
        h = lam[:, t] - lam[:, s]
        functions = phi(h if self.kind == "noise" else -h, len(self.others) + 1)
        base, others = h * functions[0], [torch.zeros_like(h) for _ in self.others]
        if self.others:
            count = len(self.others)
            distance = lam[:, list(self.others)] - lam[:, s : s + 1]
            powers = [distance**i / math.factorial(i) for i in range(1, count + 1)]
            inverse = torch.linalg.inv(torch.stack(powers, 1))  # [C, j, d]
            for d in range(1, count + 1):
                term = h ** (d + 1) * functions[d]
                if d == 1:
                    term = term * (1 + relaxation * h)
                for j in range(count):
                    others[j] = others[j] + term * inverse[:, j, d - 1]
            base = base - torch.stack(others).sum(0)
        if self.kind == "noise":
            carry, scale = alpha[:, t] / alpha[:, s], -sigma[:, t]
        else:
            carry, scale = sigma[:, t] / sigma[:, s], alpha[:, t]
        result = {("x", s): carry, (self.kind, s): scale * base}
        return result | {(self.kind, j): scale * w for j, w in zip(self.others, others, strict=True)}


class StepPlan(NamedTuple):
    """What a step does and keeps.

    Attributes:
        predict, correct: its update, and that of the corrector at its point or None.
        rows: which values of its point stand in the rows "converted" and "corrected", None for neither.
        store: their slots, 0 for none.
        kept: the slots of values of points before, as the step finds them.
    """

    predict: Update
    correct: Update | None
    rows: tuple[str, str | None]
    store: tuple[int, int]
    kept: dict[Value, int]


@lru_cache(maxsize=4096)
def plan(build: Build) -> tuple[StepPlan, ...]:
    """Of each step of a build (:attr:`fastcifar.diffusion.search_space.Candidate.build`).

    What later steps read of a point is stored there: its data or noise prediction or both, and the sample where a step
    starts again from it; but where nothing was corrected the two predictions give the sample.

    Raises:
        ValueError: it needs more than six slots, or three values of a corrected point.
    """
    orders, predictions, correctors, back, first_free = build
    predicted: list[Update] = []
    corrected: dict[int, Update] = {}
    for i, (order, kind, again, steps_back) in enumerate(zip(orders, predictions, correctors, back, strict=True)):
        start = i - steps_back
        others = [j for j in range(i, -1, -1) if j != start][: order - 1]
        predicted.append(Update(start, i + 1, kind, tuple(others)))
        if again:
            others = [i + 1, *[j for j in range(i, -1, -1) if j != start][: order - 1]]
            corrected[i + 1] = Update(start, i + 1, kind, tuple(others))
    last: dict[Value, int] = {}
    for i, update in enumerate(predicted):
        for value in update.reads() + (corrected[i].reads() if i in corrected else []):
            last[value] = i
    kept: dict[Value, int] = {}
    steps = []
    for i, update in enumerate(predicted):
        # The data of a free first step are 0, which nobody needs to keep.
        free = i == 0 and first_free
        later = [k for k in ("noise", "data") if last.get((k, i), 0) > i and not (free and k == "data")]
        again = last.get(("x", i), 0) > i
        main = "noise" if free else predictions[i]
        main = main if main in later or not later else later[0]
        second = next((k for k in later if k != main), None)
        if again and second and i in corrected:
            raise ValueError(f"plan: expected to keep two values at most of a corrected point, got three of point {i}")
        if again and second:  # the two give the sample, so they stay as long as it is read
            for kind in later:
                last[kind, i] = max(last[kind, i], last["x", i])
        if second is None and (again or i in corrected):
            second = "x"
        before, kept = kept, {value: slot for value, slot in kept.items() if last[value] > i}
        store = [0, 0]
        for row, what in enumerate((main, second)):
            if what is not None and last.get((what, i), 0) > i:
                store[row] = min(set(range(1, len(kept) + 2)) - set(kept.values()))
                kept[what, i] = store[row]
        if len(kept) > HISTORY:
            raise ValueError(f"plan: expected {HISTORY} slots to be enough, got {len(kept)} values to keep at step {i}")
        steps.append(StepPlan(update, corrected.get(i), (main, second), (store[0], store[1]), before))
    return tuple(steps)


def _conversions(prediction: str, alpha: Tensor, sigma: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What x and output weigh in the data, and in the noise."""
    a, s, one, zero = alpha, sigma, torch.ones_like(alpha), torch.zeros_like(alpha)
    square, total = a * a + s * s, a + s
    data, noise = {
        "epsilon": ((1 / a, -s / a), (zero, one)),
        "x0": ((zero, one), (1 / s, -a / s)),
        "v": ((a / square, -s / square), (s / square, a / square)),
        "flow": ((1 / total, -s / total), (1 / total, a / total)),
        "score": ((1 / a, s * s / a), (zero, -s)),
    }[prediction]
    return {"data": data, "noise": noise}


def programs(candidates: Sequence[Candidate], points: Points, prediction: str) -> list[SolverTable]:
    """The tables of candidates of one build; ``points`` hold ``[C, S + 1]``. Raises as :func:`plan` does."""
    first, steps = candidates[0], plan(candidates[0].build)
    count = len(candidates)
    relaxation = torch.tensor([c.relaxation for c in candidates], dtype=torch.float64)
    again = torch.tensor([c.corrector_relaxation for c in candidates], dtype=torch.float64)
    coefficients = torch.zeros(count, len(steps), 3, len(TERMS), dtype=torch.float64)

    def unit(column: int, values: Tensor | float = 1.0) -> Tensor:
        row = torch.zeros(count, len(TERMS), dtype=torch.float64)
        row[:, column] = values
        return row

    for i, step in enumerate(steps):
        alpha, sigma = points.alpha[:, i], points.sigma[:, i]
        forms = {value: unit(1 + slot) for value, slot in step.kept.items()}
        for j in {j for kind, j in step.kept if kind == "data"}:
            if ("noise", j) in step.kept:
                a, s = points.alpha[:, j, None], points.sigma[:, j, None]
                forms["x", j] = a * forms["data", j] + s * forms["noise", j]
        if first.first_free:
            forms["data", 0] = torch.zeros_like(unit(X))
        if i == 0 and first.first_free:
            forms["noise", 0] = unit(X, 1 / sigma)
        else:
            for kind, (of_x, of_output) in _conversions(prediction, alpha, sigma).items():
                forms[kind, i] = unit(X, of_x) + unit(OUTPUT, of_output)
        forms["x", i] = unit(X)
        main, second = step.rows
        coefficients[:, i, CONVERT] = forms[main, i]
        forms[main, i] = unit(CONVERTED)
        if step.correct is not None:
            forms["x", i] = _combined(step.correct.weights(points, again[:, i - 1]), forms)
        if second is not None:
            coefficients[:, i, CORRECT] = forms[second, i]
            forms[second, i] = unit(CORRECTED)
        coefficients[:, i, PREDICT] = _combined(step.predict.weights(points, relaxation[:, i]), forms)
    store = torch.tensor([step.store for step in steps], dtype=torch.int64)
    ones = torch.ones(len(steps), dtype=torch.float64)
    return [SolverTable(coefficients[c], store, points.timesteps[c, :-1], ones, name="searched") for c in range(count)]


def _combined(weights: dict[Value, Tensor], forms: dict[Value, Tensor]) -> Tensor:
    """The row of a weighted sum of values."""
    return torch.stack([weight[:, None] * forms[value] for value, weight in weights.items()]).sum(0)
