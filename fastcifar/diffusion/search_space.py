"""What a search of schedules chooses between: USF's decisions, how they are drawn, mutated, crossed and encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .table import Points
from .usf import Corrector, Decision, usf

PREDICTIONS = ("noise", "data")
ORDERS = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}

__all__ = ["Candidate", "SearchSpace"]


@dataclass(frozen=True)
class Candidate:
    """One schedule of S steps, as decisions; each but the last is of every step.

    Attributes:
        position: where each step starts, as a share of the way in ``ln(alpha / sigma)`` from noise (0, which the first
            is) to image (1, where the last step ends), increasing.
        order: of the Taylor expansion, 1 to 4, at most the number of outputs that are there.
        prediction: "noise" or "data", whichever is expanded.
        relaxation: k of the factor ``1 + k h`` on the first derivative's term.
        corrector: whether the step is done again, one order higher, once the model has been called at its end.
        corrector_relaxation: its k.
        back: how many points before its own a step starts from: 0 multistep, else singlestep.
        first_free: whether the first step takes ``x / sigma`` for the noise and so calls no model.
    """

    position: tuple[float, ...]
    order: tuple[int, ...]
    prediction: tuple[str, ...]
    relaxation: tuple[float, ...]
    corrector: tuple[bool, ...]
    corrector_relaxation: tuple[float, ...]
    back: tuple[int, ...]
    first_free: bool = False

    def __len__(self) -> int:
        return len(self.order)

    @property
    def build(self) -> tuple[tuple[int, ...], tuple[str, ...], tuple[bool, ...], tuple[int, ...], bool]:
        """The decisions that are not numbers: schedules that share them have programs of one shape."""
        return self.order, self.prediction, self.corrector, self.back, self.first_free

    def decisions(self) -> list[Decision]:
        """USF's, one a step."""
        made = []
        for i, back in enumerate(self.back):
            others = [j for j in range(i, -1, -1) if j != i - back][: self.order[i] - 1]  # later ones first
            active = (tuple(j - i - 1 for j in others),) * (self.order[i] - 1)
            again = Corrector(relaxation="linear", coefficient=self.corrector_relaxation[i])
            made.append(
                Decision(
                    self.order[i],
                    self.prediction[i],
                    -1 - back,
                    active,
                    "linear",
                    self.relaxation[i],
                    corrector=again if self.corrector[i] else None,
                )
            )
        return made

    def fits(self) -> bool:
        """Whether six slots hold what its steps read: some candidates that mix singlesteps, correctors and both
        predictions need more."""
        sigma = torch.linspace(0.9, 0.1, len(self) + 1, dtype=torch.float64)
        try:
            usf(Points(sigma, 1 - sigma, sigma), self.decisions(), first_free=self.first_free)
        except ValueError:
            return False
        return True

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Candidate:
        """What :meth:`record` gave."""
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in record.items()}
        return cls(**fields)


@dataclass(frozen=True)
class SearchSpace:
    """Which decisions a search may take, and how often it takes them.

    Attributes:
        orders: probability of each order, 1 to 4. Default ``{1: .2, 2: .4, 3: .3, 4: .1}`` (S3).
        predictions: of "noise" and "data". Default both.
        correctors, singlesteps, free_first: whether these may be. Default True.
        crossover: share of children that have two parents. Default 0.3 (S3).
        mutation: probability that a child's decisions of one kind change. Default 0.3 (S3), of each kind; at how many
            steps they do is ours: at each with probability 2 / S, and at one at least.
        position_sigma: standard deviation of a mutation of a position. Default 0.08 (S3), but no more than half of the
            mean distance of two positions (ours).
        relaxation_sigma: of a mutation of a relaxation, and of its first value. Default 0.1, ours.

    Raises:
        ValueError: an order or prediction that is not there, or a probability that is none.

    Source: Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (ICLR
    2024) and its official code's configuration; what is ours is named.
    """

    orders: Mapping[int, float] = field(default_factory=lambda: dict(ORDERS))
    predictions: Sequence[str] = PREDICTIONS
    correctors: bool = True
    singlesteps: bool = True
    free_first: bool = True
    crossover: float = 0.3
    mutation: float = 0.3
    position_sigma: float = 0.08
    relaxation_sigma: float = 0.1

    def __post_init__(self) -> None:
        if not self.orders or not set(self.orders) <= set(ORDERS) or not sum(self.orders.values()) > 0:
            raise ValueError(f"SearchSpace: expected orders of 1 to 4 with probabilities, got {dict(self.orders)}")
        if not self.predictions or not set(self.predictions) <= set(PREDICTIONS):
            raise ValueError(
                f"SearchSpace: expected predictions to be of {', '.join(PREDICTIONS)}; got {tuple(self.predictions)}"
            )
        shares = (self.crossover, self.mutation, *self.orders.values())
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"SearchSpace: expected probabilities of 0 to 1, got {shares}")
        if not all(0 <= sigma < math.inf for sigma in (self.position_sigma, self.relaxation_sigma)):
            raise ValueError(
                f"SearchSpace: expected finite sigmas of 0 or more, got {self.position_sigma}, {self.relaxation_sigma}"
            )

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        orders = {str(order): share for order, share in self.orders.items()}
        return asdict(self) | {"orders": orders, "predictions": list(self.predictions)}

    def draw(self, evaluations: int, bases: Sequence[Sequence[float]], rng: np.random.Generator) -> Candidate:
        """A candidate that calls the model ``evaluations`` times. Its positions are those of one of ``bases`` (each a
        curve from 0 to 1, sampled evenly), shaken."""
        first_free = bool(self.free_first and rng.random() < 0.5)
        steps = evaluations + first_free
        curve = bases[int(rng.integers(len(bases)))]
        position = np.interp(np.arange(steps) / steps, np.linspace(0, 1, len(curve)), curve)
        position[1:] += rng.normal(0, self._spread(steps), steps - 1)
        one = self._prediction(rng)
        mixed = rng.random() < 0.5
        return self.valid(
            Candidate(
                tuple(position.tolist()),
                tuple(self._order(rng) for _ in range(steps)),
                tuple(self._prediction(rng) if mixed else one for _ in range(steps)),
                tuple(rng.normal(0, self.relaxation_sigma, steps).tolist()),
                tuple(self._corrector(rng) for _ in range(steps)),
                tuple(rng.normal(0, self.relaxation_sigma, steps).tolist()),
                tuple(self._back(rng) for _ in range(steps)),
                first_free,
            )
        )

    def child(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """Of one parent or of two, and mutated."""
        child = first
        if rng.random() < self.crossover and len(first) == len(second) > 1:
            child = self._crossed(first, second, int(rng.integers(1, len(first))))
        steps, s = len(child), self
        draws = {
            "position": lambda value: value + float(rng.normal(0, s._spread(steps))),
            "order": lambda _: s._order(rng),
            "prediction": lambda _: s._prediction(rng),
            "relaxation": lambda value: value + float(rng.normal(0, s.relaxation_sigma)),
            "corrector": lambda _: s._corrector(rng),
            "corrector_relaxation": lambda value: value + float(rng.normal(0, s.relaxation_sigma)),
            "back": lambda _: s._back(rng),
        }
        changed: dict[str, Any] = {}
        for name, draw in draws.items():
            if rng.random() >= self.mutation:
                continue
            where = rng.random(steps) < 2 / steps
            where[rng.integers(steps)] = True
            old = getattr(child, name)
            changed[name] = tuple(draw(value) if hit else value for value, hit in zip(old, where, strict=True))
        return self.valid(replace(child, **changed))

    def valid(self, candidate: Candidate) -> Candidate:
        """The same schedule without what has no effect: a first step of order 1 from its own point, orders that the
        outputs are there for, positions in order and apart, and no relaxation where there is nothing to relax."""
        steps = len(candidate)
        position = np.sort(np.clip(np.array(candidate.position[1:]), 0, 1))
        gaps = np.diff(np.concatenate([[0.0], position, [1.0]])).clip(0.1 / steps)
        position = np.cumsum(gaps / gaps.sum())[:-1]
        order = tuple(min(k, i + 1) for i, k in enumerate(candidate.order))
        # A corrector needs a call of the model at the end of its step, so the last step has none.
        corrector = tuple(on and i < steps - 1 for i, on in enumerate(candidate.corrector))
        back = tuple(min(b, i) if k > 1 else 0 for i, (b, k) in enumerate(zip(candidate.back, order, strict=True)))
        relaxation = tuple(k if o > 1 else 0.0 for k, o in zip(candidate.relaxation, order, strict=True))
        again = tuple(k if on else 0.0 for k, on in zip(candidate.corrector_relaxation, corrector, strict=True))
        return replace(
            candidate,
            position=(0.0, *position.tolist()),
            order=order,
            corrector=corrector,
            back=back,
            relaxation=relaxation,
            corrector_relaxation=again,
        )

    def encode(self, candidates: Sequence[Candidate], evaluations: int) -> Tensor:
        """What a predictor sees of candidates that call the model ``evaluations`` times, float64 ``[N, F]``: a row of
        numbers a step, and the free one, or zeros, before them."""
        rows = []
        for c in candidates:
            ends = (*c.position[1:], 1.0)
            steps = [
                [
                    *(float(c.order[i] == k) for k in ORDERS),
                    float(c.prediction[i] == "data"),
                    c.position[i],
                    math.log(ends[i] - c.position[i]),
                    c.relaxation[i],
                    float(c.corrector[i]),
                    c.corrector_relaxation[i],
                    float(c.back[i]),
                ]
                for i in range(len(c))
            ]
            padding = [[0.0] * len(steps[0])] * (evaluations + 1 - len(c))
            rows.append([float(c.first_free), *(number for step in padding + steps for number in step)])
        return torch.tensor(rows, dtype=torch.float64)

    def _spread(self, steps: int) -> float:
        return self.position_sigma if steps < 2 else min(self.position_sigma, 0.5 / steps)

    def _order(self, rng: np.random.Generator) -> int:
        share = np.array(list(self.orders.values()))
        return int(rng.choice(list(self.orders), p=share / share.sum()))

    def _prediction(self, rng: np.random.Generator) -> str:
        return self.predictions[int(rng.integers(len(self.predictions)))]

    def _corrector(self, rng: np.random.Generator) -> bool:
        return bool(self.correctors and rng.random() < 0.5)

    def _back(self, rng: np.random.Generator) -> int:
        return int(rng.choice(3, p=[0.8, 0.15, 0.05])) if self.singlesteps else 0

    def _crossed(self, first: Candidate, second: Candidate, cut: int) -> Candidate:
        parts: dict[str, Any] = {
            name: (*getattr(first, name)[:cut], *getattr(second, name)[cut:])
            for name in asdict(first)
            if name != "first_free"
        }
        return Candidate(**parts, first_free=first.first_free)
