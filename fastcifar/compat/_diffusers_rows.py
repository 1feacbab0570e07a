"""Coefficients of published samplers in float64, one step at a time: what a step of each scheduler is as a program.

Only numbers go in and come out, so that a schedule's own rounding stays where its owner put it: the levels of noise are
what the scheduler holds in float32, everything computed from them is not. Differences are formed so that a step of
length 0 (a schedule whose last sigma is doubled) gives the sample back, and phi functions are sums near 0. A level that
comes twice lends no slope: it is left out (:func:`distinct`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.draft import Level as Level
from ..diffusion.expansion import phi, polynomial_weights
from ..diffusion.reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS

X, OUTPUT, CONVERTED, CORRECTED, NOISE = 0, 1, 2 + HISTORY, 3 + HISTORY, 4 + HISTORY


def kept(i: int) -> int:
    """The column of the i-th kept tensor, from 1."""
    return 1 + i


class Program(NamedTuple):
    """The three rows of a step and what comes with them: as the op takes them, since a step has no time to ask."""

    coefficients: Tensor
    numbers: list[float]
    limit: float  # infinite for none
    wanted: int  # bits of x_next, converted and corrected
    kept: tuple[int, ...]  # which of the kept tensors are read, from 0
    noisy: bool


def program(
    predict: dict[int, float],
    convert: dict[int, float] | None = None,
    correct: dict[int, float] | None = None,
    limit: float | None = None,
    where: str = "",
) -> Program:
    rows = torch.zeros(3, len(TERMS), dtype=torch.float64)
    for row, terms in ((CONVERT, convert), (CORRECT, correct), (PREDICT, predict)):
        for column, value in (terms or {}).items():
            if not math.isfinite(value):
                raise ValueError(f"{where}: expected a step with finite coefficients, got {value}")
            rows[row, column] = value
    used = (rows != 0).any(1).tolist()
    read = (rows[:, kept(1) : kept(HISTORY) + 1] != 0).any(0).nonzero().flatten().tolist()
    wanted = 1 | used[CONVERT] << 1 | used[CORRECT] << 2
    return Program(
        rows,
        rows.flatten().tolist(),
        math.inf if limit is None else limit,
        wanted,
        tuple(read),
        bool(rows[PREDICT, NOISE]),
    )


def preserving(sigma: float) -> Level:
    """The level where the variance is preserved, of a ratio sigma / alpha."""
    alpha = 1 / math.sqrt(sigma * sigma + 1)
    return Level(alpha, sigma * alpha)


def flowing(sigma: float) -> Level:
    return Level(1 - sigma, sigma)


class Before(NamedTuple):
    """An earlier step whose prediction is kept: the column where, and its level."""

    column: int
    level: Level


def distinct(now: Level, before: Sequence[Level]) -> list[Before]:
    """The steps before that lie at levels of their own, the last first."""
    chosen: list[Before] = []
    for i, level in enumerate(before, 1):
        if level.lam != now.lam and all(level.lam != other.level.lam for other in chosen):
            chosen.append(Before(kept(i), level))
    return chosen


def weights(nodes: Sequence[float], moments: Sequence[float], where: str) -> list[float]:
    """:func:`polynomial_weights` of nodes that came from a schedule."""
    least = 1e-14 * max((abs(node) for node in nodes), default=0.0)
    ordered = sorted(nodes)
    if any(b - a <= least for a, b in itertools.pairwise(ordered)):
        raise ValueError(f"{where}: expected different levels of noise in successive steps, got one of them twice")
    return polynomial_weights(nodes, moments)


def as_image(kind: str, level: Level, where: str) -> tuple[float, float]:
    """Coefficients of x and of the model's output in the predicted image."""
    if kind == "epsilon":
        if level.alpha == 0:
            raise ValueError(
                f"{where}: expected some image in the sample where the model predicts epsilon, got a level of pure "
                "noise (rescale_betas_zero_snr); predict v or the sample there"
            )
        return 1 / level.alpha, -level.sigma / level.alpha
    return {
        "sample": (0.0, 1.0),
        "v_prediction": (level.alpha, -level.sigma),
        "flow_prediction": (1.0, -level.sigma),
    }[kind]


def as_noise(kind: str, level: Level, where: str) -> tuple[float, float]:
    """Coefficients of x and of the model's output in the predicted noise."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v_prediction":
        return level.sigma, level.alpha
    if level.sigma == 0:
        raise ValueError(f"{where}: expected some noise in the sample, got none")
    p, q = as_image(kind, level, where)
    return (1 - level.alpha * p) / level.sigma, -level.alpha * q / level.sigma


def exploding(kind: str, sigma: float) -> tuple[float, float]:
    """Those of the predicted image where the variance explodes: alpha is 1 and the model sees ``x / sqrt(1 + s^2)``."""
    if kind == "epsilon":
        return 1.0, -sigma
    if kind == "v_prediction":
        return 1 / (sigma * sigma + 1), -sigma / math.sqrt(sigma * sigma + 1)
    return 0.0, 1.0


def slope(kind: str, sigma: float, raised: float | None = None) -> tuple[float, float]:
    """Coefficients of x and of the model's output in ``dx / dsigma = (x - image) / sigma``, which need not go through
    the image: at small sigmas that is a difference of close numbers. Churn has ``raised`` sigma before."""
    if kind == "epsilon":
        return 0.0, 1.0
    p, q = exploding(kind, sigma)
    return (1 - p) / (raised or sigma), -q / (raised or sigma)


def dpm_solver(
    kind: str, midpoint: bool, target: Level, now: Level, before: Sequence[Before], where: str
) -> dict[int, float]:
    """A multistep DPM-Solver step as the published code takes it (the third order one is of second order).

    Source: Lu et al. 2022, arXiv 2211.01095.
    """
    h = target.lam - now.lam
    image, stochastic = kind.endswith("++"), kind.startswith("sde")
    if math.isinf(h) and (before or not image):
        raise ValueError(f"{where}: expected some noise after a step other than a first order one, got a sigma of 0")
    z = (-2 * h if stochastic else -h) if image else h
    if image:
        first = -target.alpha * math.expm1(z)
        sample = target.sigma / now.sigma * (math.exp(-h) if stochastic else 1.0)
        noise = target.sigma * math.sqrt(-math.expm1(-2 * h))
    else:
        first = -(2 if stochastic else 1) * target.sigma * math.expm1(z)
        sample = target.alpha / now.alpha
        noise = target.sigma * math.sqrt(math.expm1(2 * h)) if stochastic else 0.0
    terms = {X: sample, CONVERTED: first}
    if stochastic:
        terms[NOISE] = noise
    if not before:
        return terms
    # What slope and curvature of the predictions weigh, with the signs of the two forms.
    if image:
        bent = -target.alpha * z * phi(2, z)
        second = -target.alpha * (phi(2, z) + 0.5) if stochastic else -target.alpha * z * phi(3, z)
    else:
        bent = -(2 if stochastic else 1) * target.sigma * z * phi(2, z)
        second = -target.sigma * z * phi(3, z)
    near = h / (now.lam - before[0].level.lam)
    if len(before) == 1:
        slope = (0.5 * first if midpoint else bent) * near
        terms[CONVERTED] += slope
        terms[before[0].column] = -slope
        return terms
    gaps = now.lam - before[0].level.lam, before[0].level.lam - before[1].level.lam
    far, both = h / gaps[1], gaps[0] + gaps[1]
    terms |= {place.column: 0.0 for place in before}
    for coefficient, of_near, of_far in (
        (bent, 1 + gaps[0] / both, -gaps[0] / both),
        (second, h / both, -h / both),
    ):
        terms[CONVERTED] += coefficient * of_near * near
        terms[before[0].column] += coefficient * (of_far * far - of_near * near)
        terms[before[1].column] -= coefficient * of_far * far
    return terms


def deis(target: Level, now: Level, before: Sequence[Before], where: str) -> list[float]:
    """Weights of x and of the noise predicted now and before: exact integrals of their polynomial in ``ln rho``.

    Source: Zhang and Chen 2022, arXiv 2204.13902, in the time ``ln(sigma / alpha)``.
    """
    span = now.lam - target.lam
    if math.isinf(span):
        raise ValueError(f"{where}: expected some noise after each step, got a sigma of 0")
    nodes = [0.0, *(now.lam - place.level.lam for place in before)]
    grown = math.exp(span)
    moments = [math.factorial(k) * span ** (k + 1) * grown * phi(k + 1, -span) for k in range(len(nodes))]
    scale = target.alpha * now.sigma / now.alpha
    return [target.alpha / now.alpha, *(scale * w for w in weights(nodes, moments, where))]


def uni(
    image: bool, kind: str, target: Level, now: Level, before: Sequence[Before], corrector: bool, where: str
) -> list[float]:
    """Weights of x and of predictions in a step of UniP, or of UniC (where the first of them is the one at the target).

    Source: Zhao et al. 2023, arXiv 2302.04867, whose orders 1 of the corrector and 2 of the predictor use ``B(h)``
    ("bh1", "bh2"); in the others B cancels.
    """
    h = target.lam - now.lam
    z = -h if image else h
    scale = target.alpha if image else target.sigma
    start = (target.sigma / now.sigma) if image else (target.alpha / now.alpha)
    if math.isinf(h):
        if before or corrector or not image:
            raise ValueError(f"{where}: expected some noise after a step of order 2 and more, got a sigma of 0")
        return [start, scale]
    nodes = [place.level.lam - now.lam for place in before] + ([h] if corrector else [])
    if h == 0:
        found = [0.0] * len(nodes)
    elif len(nodes) == 1:
        found = [0.5 * (z if kind == "bh1" else math.expm1(z)) * h / nodes[0]]
    else:
        # sum_j w_j node_j^i = i! h^i z phi_{i+1}(z) for i = 1...: divided by a node, the moments of one degree less
        moments = [math.factorial(i) * h**i * z * phi(i + 1, z) for i in range(1, len(nodes) + 1)]
        found = [w / node for w, node in zip(weights(nodes, moments, where), nodes, strict=True)]
    old = [-scale * w for w in found]
    new = [old.pop()] if corrector else []
    return [start, *new, -scale * math.expm1(z) - sum(old) - sum(new), *old]


def adams(target: float, now: float, before: Sequence[float], where: str) -> list[float]:
    """Weights of the derivatives now and before: integrals of their polynomial in sigma."""
    span = target - now
    nodes = [0.0, *(sigma - now for sigma in before)]
    return weights(nodes, [span ** (k + 1) / (k + 1) for k in range(len(nodes))], where)


def transfer(kind: str, alpha: float, target: float) -> tuple[float, float]:
    """PNDM's coefficients of the sample and of the output from one cumulative alpha to another.

    Source: Liu et al. 2022, arXiv 2202.09778, equation 9.
    """
    change = -(target - alpha) / (alpha * math.sqrt(1 - target) + math.sqrt(alpha * (1 - alpha) * target))
    sample = math.sqrt(target / alpha)
    if kind == "v_prediction":
        return sample + change * math.sqrt(1 - alpha), change * math.sqrt(alpha)
    return sample, change
