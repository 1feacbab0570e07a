"""The numbers of one solver update in float64: exact integrals of a Taylor expansion of what the model predicts.

From a point s to a point t every solver of this family is

``x_t = carry x_s + sum over k of M_k F^(k)``,

where F is the prediction that it expands, ``F^(k)`` its k-th derivative at s, estimated from other points, and ``M_k``
the exact integral of the k-th Taylor term. With ``h = lambda_t - lambda_s``, ``rho = sigma / alpha``, ``u = sigma /
(alpha + sigma)``, and s in the last column sigma_t:

=========  ========  ======  =============================  ====================================  ====================
kind       F         in      carry                          M_k                                   noise
=========  ========  ======  =============================  ====================================  ====================
noise      eps       lambda  ``alpha_t / alpha_s``          ``-sigma_t h^(k+1) phi_(k+1)(h)``     0
data       x0        lambda  ``sigma_t / sigma_s``          ``alpha_t h^(k+1) phi_(k+1)(-h)``     0
flow       eps - x0  u       ratio of ``alpha + sigma``     ``(alpha + sigma)_t du^(k+1)/(k+1)!`` 0
rho        eps       rho     ``alpha_t / alpha_s``          ``alpha_t drho^(k+1) / (k+1)!``       0
sde_noise  eps       lambda  ``alpha_t / alpha_s``          twice that of noise                   ``s sqrt(e^2h - 1)``
sde_data   x0        lambda  ``sigma_t / sigma_s e^-h``     ``2 alpha_t h^(k+1) phi_(k+1)(-2h)``  ``s sqrt(1 - e^-2h)``
=========  ========  ======  =============================  ====================================  ====================

Sources: "noise" and "data" are equations 5 and 6 of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) as USF (Liu et al.,
ICLR 2024) generalises them; the "sde" kinds are of DPM-Solver++ too; "rho" is the ODE of EDM (Karras et al. 2022) and
of LMS; "flow" is that of rectified flow, whose alpha + sigma is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .draft import Level

KINDS = {"noise": "noise", "data": "data", "flow": "flow", "rho": "noise", "sde_noise": "noise", "sde_data": "data"}
RELAXATIONS = ("linear", "dpmsolver-2", "unipc-bh1", "unipc-bh2", "0.5exp", "-0.5exp")

__all__ = ["KINDS", "RELAXATIONS", "Update", "phi", "polynomial_weights", "relaxation_factor", "update"]


def phi(k: int, z: float) -> float:
    """``phi_k(z)``: ``phi_0 = e^z``, ``phi_{k+1}(z) = (phi_k(z) - 1/k!) / z``; by its series where |z| is below 2, so
    that 0 is allowed and nothing near it cancels."""
    if abs(z) < 2:
        total = 0.0
        for j in reversed(range(26)):
            total = total * z + 1 / math.factorial(j + k)
        return total
    value = math.expm1(z) / z if k else math.exp(z)
    for i in range(1, k):
        value = (value - 1 / math.factorial(i)) / z
    return value


def relaxation_factor(name: str | None, z: float, h: float, coefficient: float = 0.0) -> float:
    """What the first derivative's term is multiplied by: 1 + O(h).

    =============  ======================================  =====================
    linear         ``1 + k h``
    dpmsolver-2    ``0.5 z expm1(z) / (expm1(z) - z)``     = ``phi_1 / 2 phi_2``
    unipc-bh2      the same
    unipc-bh1      ``0.5 z^2 / (expm1(z) - z)``            = ``1 / 2 phi_2``
    0.5exp         ``1 + 0.5 expm1(z)``
    -0.5exp        ``1 - 0.5 expm1(z)``
    =============  ======================================  =====================

    z is h, and -h where data are expanded (-2h in the SDE's); 0 is allowed.
    """
    if name is None:
        return 1.0
    if name == "linear":
        return 1 + coefficient * h
    if name in ("dpmsolver-2", "unipc-bh2"):
        return 0.5 * phi(1, z) / phi(2, z)
    if name == "unipc-bh1":
        return 0.5 / phi(2, z)
    if name in ("0.5exp", "-0.5exp"):
        return 1 + math.copysign(0.5, float(name.removesuffix("exp"))) * math.expm1(z)
    raise ValueError(f"relaxation: expected one of {', '.join(RELAXATIONS)} or None; got {name!r}")


class Update(NamedTuple):
    """What x at the start weighs, the predictions by their point, and noise."""

    carry: float
    weights: dict[int, float]
    noise: float


def _place(kind: str, level: Level) -> float:
    if kind == "flow":
        return level.sigma / (level.alpha + level.sigma)
    if kind == "rho":
        return level.sigma / level.alpha if level.alpha > 0 else math.inf
    return level.lam


def _integrals(kind: str, s: Level, t: Level, count: int, where: str) -> tuple[float, list[float], float, float]:
    """carry, ``M_0...``, z of the relaxations, and the weight of noise."""
    h = _place(kind, t) - _place(kind, s)
    if KINDS[kind] == "noise" and s.alpha == 0:
        raise ValueError(f"{where}: expected some image in the sample where a step expands noise, got alpha 0")
    if kind in ("flow", "rho"):
        a = (t.alpha, s.alpha) if kind == "rho" else (t.alpha + t.sigma, s.alpha + s.sigma)
        powers = [h ** (k + 1) / math.factorial(k + 1) for k in range(count)]
        return a[0] / a[1], [a[0] * p for p in powers], h, 0.0
    if kind.endswith("noise"):
        twice = 2.0 if kind == "sde_noise" else 1.0
        if h == math.inf:  # sigma_t e^h is what is left of it
            left = t.alpha * s.sigma / s.alpha
            return t.alpha / s.alpha, [-twice * left] * count, h, left if kind == "sde_noise" else 0.0
        integrals = [-twice * t.sigma * h ** (k + 1) * phi(k + 1, h) for k in range(count)]
        noise = t.sigma * math.sqrt(math.expm1(2 * h)) if kind == "sde_noise" else 0.0
        return t.alpha / s.alpha, integrals, h, noise
    rate = 2.0 if kind == "sde_data" else 1.0
    if math.isinf(h):
        if count > 1 and s.alpha > 0:
            raise ValueError(
                f"{where}: expected some noise after a step of order {count} that expands data, got sigma 0; take "
                "order 1 (lower_order_final)"
            )
        # From pure noise all other points are infinitely far away, and lend no slope.
        integrals = [t.alpha, *[0.0] * (count - 1)]
        return t.sigma / s.sigma if rate == 1 else 0.0, integrals, -h, t.sigma if rate == 2 else 0.0
    carry = t.sigma / s.sigma * (math.exp(-h) if rate == 2 else 1.0)
    integrals = [t.alpha * rate * h ** (k + 1) * phi(k + 1, -rate * h) for k in range(count)]
    return carry, integrals, -rate * h, t.sigma * math.sqrt(-math.expm1(-2 * h)) if rate == 2 else 0.0


def _distinct(kind: str, found: Sequence[Level], start: int, others: Sequence[int]) -> dict[int, float]:
    """Distances of the points that lend a slope. One where another is, or infinitely far away, lends none."""
    here = _place(kind, found[start])
    result: dict[int, float] = {}
    for j in others:
        distance = _place(kind, found[j]) - here
        if math.isfinite(distance) and distance != 0 and distance not in result.values():
            result[j] = distance
    return result


def polynomial_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w with ``sum_j w_j nodes_j^k = moments_k``, k from 0: a rule that is exact for polynomials. Nodes differ."""
    size = len(nodes)
    unit = max((abs(node) for node in nodes), default=0.0) or 1.0  # powers of far nodes would drown those of near ones
    rows = [[(node / unit) ** k for node in nodes] + [moments[k] / unit**k] for k in range(size)]
    for i in range(size):
        best = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def _derivative(distances: Sequence[float], d: int) -> list[float]:
    """w with ``sum_j w_j l_j^i / i! = [i = d]``, i from 1 to the number of distances: of the Taylor series."""
    moments = [math.factorial(d) * (i == d) for i in range(1, len(distances) + 1)]
    return [w / distance for w, distance in zip(polynomial_weights(distances, moments), distances, strict=True)]


def update(
    kind: str,
    found: Sequence[Level],
    start: int,
    target: int,
    active: Sequence[Sequence[int]] = (),
    relaxation: str | None = None,
    coefficient: float = 0.0,
    factors: Sequence[float] = (),
    where: str = "update",
) -> Update:
    """From point ``start`` to point ``target``, with derivative k estimated from the points ``active[k - 1]``.

    ``relaxation`` is of the first derivative, ``factors`` are of all. Points at one place lend no slope: they are left
    out, and so is a derivative for which fewer points are left than its order.
    """
    s, t = found[start], found[target]
    carry, integrals, z, noise = _integrals(kind, s, t, 1 + len(active), where)
    weights = {start: integrals[0]}
    h = _place(kind, t) - _place(kind, s)
    for d, others in enumerate(active, 1):
        distances = _distinct(kind, found, start, others)
        if len(distances) < d or h == 0:
            continue
        weight = integrals[d] * (factors[d - 1] if d <= len(factors) else 1.0)
        if d == 1:
            weight *= relaxation_factor(relaxation, z, h, coefficient)
        for j, w in zip(distances, _derivative(list(distances.values()), d), strict=True):
            weights[j] = weights.get(j, 0.0) + weight * w
            weights[start] -= weight * w
    return Update(carry, weights, noise)
