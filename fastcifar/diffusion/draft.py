"""Steps with names in place of slots: what a builder writes, and how it becomes a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .reference import HISTORY, TERMS
from .table import Points, SolverTable

Name = str | tuple[str, int]
Row = dict[Name, float]

__all__ = ["Draft", "Level", "Row", "combined", "compiled", "conversion", "levels", "scales", "start_scale"]


class Level(NamedTuple):
    """How much image and how much noise a sample holds."""

    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def levels(points: Points, where: str) -> list[Level]:
    """Of points, checked.

    Raises:
        ValueError: there is no step, or alpha or sigma is negative or not finite, or both are 0.
    """
    if not isinstance(points, Points):
        raise TypeError(f"{where}: expected Points, got {type(points).__name__}")
    sizes = [tuple(t.shape) for t in points]
    if len({*sizes}) != 1 or len(sizes[0]) != 1 or sizes[0][0] < 2:
        raise ValueError(
            f"{where}: expected timesteps, alpha and sigma of S + 1 points each, S of 1 or more, got {sizes}"
        )
    found = [Level(a, s) for a, s in zip(points.alpha.tolist(), points.sigma.tolist(), strict=True)]
    for i, (a, s) in enumerate(found):
        if not (0 <= a < math.inf and 0 <= s < math.inf and a + s > 0):
            raise ValueError(f"{where}: expected finite alpha and sigma of 0 or more, got {a} and {s} at point {i}")
        if s == 0 and i < len(found) - 1:
            raise ValueError(f"{where}: expected sigma above 0 but at the last point, got 0 at point {i}")
    return found


PREDICTIONS = {
    "epsilon": "epsilon",
    "x0": "x0",
    "sample": "x0",
    "v": "v",
    "v_prediction": "v",
    "flow": "flow",
    "flow_prediction": "flow",
}


def conversion(prediction: str, level: Level, kind: str, where: str) -> Row:
    """The row that makes a ``kind`` of prediction ("data", "noise", "flow", or "x" itself) of x and the output.

    ==========  ==========================================  ==========================================
    prediction  data                                        noise
    ==========  ==========================================  ==========================================
    epsilon     ``(x - sigma o) / alpha``                   ``o``
    x0          ``o``                                       ``(x - alpha o) / sigma``
    v           ``(alpha x - sigma n o) / n^2``             ``(sigma x + alpha n o) / n^2``
    flow        ``(x - sigma o) / (alpha + sigma)``         ``(x + alpha o) / (alpha + sigma)``
    ==========  ==========================================  ==========================================

    with ``n^2 = alpha^2 + sigma^2``: v is that of the sample scaled to preserve variance, as the model sees it. The
    "flow" kind is noise less data.

    Raises:
        ValueError: an unknown prediction, or one that does not determine the kind at this level.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"{where}: expected prediction to be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    prediction = PREDICTIONS[prediction]
    a, s = level
    if kind == "x":
        return {"x": 1.0}
    if kind == "flow":
        if prediction == "flow":
            return {"output": 1.0}
        noise, data = conversion(prediction, level, "noise", where), conversion(prediction, level, "data", where)
        return combined([(1.0, noise), (-1.0, data)])
    if prediction == "epsilon" and kind == "data" and a == 0:
        raise ValueError(
            f"{where}: expected some image in the sample where the model predicts epsilon, got alpha 0; predict v or x0"
        )
    if prediction == "x0" and kind == "noise" and s == 0:
        raise ValueError(f"{where}: expected some noise in the sample where the model predicts x0, got sigma 0")
    n = math.hypot(a, s)
    if kind == "data":
        of_x, of_output = {
            "epsilon": lambda: (1 / a, -s / a),
            "x0": lambda: (0.0, 1.0),
            "v": lambda: (a / n / n, -s / n),
            "flow": lambda: (1 / (a + s), -s / (a + s)),
        }[prediction]()
    else:
        of_x, of_output = {
            "epsilon": lambda: (0.0, 1.0),
            "x0": lambda: (1 / s, -a / s),
            "v": lambda: (s / n / n, a / n),
            "flow": lambda: (1 / (a + s), a / (a + s)),
        }[prediction]()
    return {"x": of_x, "output": of_output}


def combined(terms: Sequence[tuple[float, Mapping[Name, float]]]) -> Row:
    """The sum of rows, each times a number."""
    total: Row = {}
    for weight, row in terms:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


class Draft(NamedTuple):
    """A step. Rows may name "x", "output", "converted", "corrected", "noise" of this step, and ``("converted", i)`` and
    ``("corrected", i)`` of an earlier step i, which is all that it takes for these to be kept."""

    convert: Row
    predict: Row
    correct: Row = {}  # noqa: RUF012
    timestep: float = 0.0
    scale: float = 1.0


def scales(found: Sequence[Level], scaled: bool) -> list[float]:
    """``1 / sqrt(alpha^2 + sigma^2)`` at each level where the model is to see samples of one variance, else 1."""
    return [1 / math.hypot(*level) if scaled else 1.0 for level in found]


def start_scale(level: Level) -> float:
    """What normal noise is multiplied by to start at a level: sigma where the variance explodes (alpha 1), else 1."""
    return level.sigma if level.alpha == 1 else 1.0


def compiled(
    drafts: Sequence[Draft], *, limit: float | None = None, init_scale: float = 1.0, name: str = "solver"
) -> SolverTable:
    """A table of steps. What they keep lies in the fewest slots, each free again with the step that reads it last.

    Raises:
        ValueError: more than six slots are needed, or a coefficient is not finite.
    """
    last: dict[Name, int] = {}
    for i, draft in enumerate(drafts):
        for row in draft[:3]:
            last.update({n: i for n, value in row.items() if isinstance(n, tuple) and value != 0})
    coefficients = torch.zeros(len(drafts), 3, len(TERMS), dtype=torch.float64)
    store = torch.zeros(len(drafts), 2, dtype=torch.int64)
    slots: dict[Name, int] = {}
    for i, draft in enumerate(drafts):
        unread = "corrected" not in draft.predict and ("corrected", i) not in last
        for r, row in enumerate((draft.convert, {} if unread else draft.correct, draft.predict)):
            for term, value in row.items():
                if value != 0:
                    column = TERMS.index(term) if isinstance(term, str) else 1 + slots[term]
                    coefficients[i, r, column] += value
        slots = {term: slot for term, slot in slots.items() if last[term] > i}
        for which, what in enumerate(("converted", "corrected")):
            if last.get((what, i), -1) > i:
                free = set(range(1, HISTORY + 1)) - set(slots.values())
                if not free:
                    raise ValueError(
                        f"{name}: expected to keep at most {HISTORY} tensors, got one more in step {i}; lower the order"
                    )
                slots[what, i] = min(free)
                store[i, which] = slots[what, i]
    return SolverTable(
        coefficients,
        store,
        timesteps=torch.tensor([d.timestep for d in drafts], dtype=torch.float64),
        scale=torch.tensor([d.scale for d in drafts], dtype=torch.float64),
        limit=limit,
        init_scale=init_scale,
        name=name,
    )
