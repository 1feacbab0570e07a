"""PNDM and iPNDM: Adams and Bashforth's and Runge and Kutta's weights as if points were evenly spaced, and DDIM's
way."""

from __future__ import annotations

from itertools import pairwise

from .draft import Draft, Level, Name, Row, compiled, conversion, levels, scales, start_scale
from .expansion import update
from .table import Points, SolverTable

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)

__all__ = ["ipndm", "pndm"]


def _transfer(s: Level, t: Level, base: Name, noise: dict[Name, float], where: str) -> Row:
    """``x_t = (alpha_t / alpha_s) base + (sigma_t - sigma_s alpha_t / alpha_s) noise``: DDIM, PNDM's equation 9."""
    made = update("noise", (s, t), 0, 1, where=where)
    row: Row = {name: made.weights[0] * weight for name, weight in noise.items()}
    row[base] = row.get(base, 0.0) + made.carry
    return row


def ipndm(points: Points, order: int = 4, *, prediction: str = "epsilon", scaled: bool = False) -> SolverTable:
    """DDIM's step with ``sum_i w_i eps_i`` for eps, w of Adams and Bashforth: 1; (3, -1) / 2; (23, -16, 5) / 12; (55,
    -59, 37, -9) / 24, of as many points as there are.

    Args:
        points: S + 1 points.
        order: 1 to 4. Default 4.
        prediction, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Source: Zhang and Chen (ICLR 2023), equation 15 and appendix ("iPNDM").

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, ipndm
        >>> ipndm(DiscreteVP.linear().points(10)).slots
        3
    """
    if not isinstance(order, int) or not 1 <= order <= 4:
        raise ValueError(f"ipndm: expected order of 1 to 4, got {order!r}")
    found = levels(points, "ipndm")
    size = scales(found, scaled)
    drafts = []
    for i, (s, t) in enumerate(pairwise(found)):
        where = f"ipndm, step {i}"
        weights = ADAMS_BASHFORTH[min(order, i + 1) - 1]
        noise: dict[Name, float] = {"converted": weights[0]}
        noise |= {("converted", i - j): w for j, w in enumerate(weights) if j}
        convert = conversion(prediction, s, "noise", where)
        drafts.append(Draft(convert, _transfer(s, t, "x", noise, where), {}, float(points.timesteps[i]), size[i]))
    return compiled(drafts, init_scale=start_scale(found[0]), name=f"ipndm{order}")


def pndm(
    points: Points, *, middle: Points | None = None, prediction: str = "epsilon", scaled: bool = False
) -> SolverTable:
    """PNDM: as :func:`ipndm` of order 4 but for its start.

    Without ``middle`` ("skip_prk_steps", PLMS) the first step is taken twice, the second time with the mean of the
    noise at both its ends, so that the table has S + 1 steps. With the three points in the middle of the first three
    intervals these are steps of Runge and Kutta's fourth order: four calls each, S + 9 steps.

    Args:
        points: S + 1 points, S of 2 or more (4 with ``middle``).
        middle: three points, or None (the default).
        prediction, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: too few steps, or ``middle`` of other than three points.

    Source: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds" (ICLR 2022), equations 9, 12, 13.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, pndm
        >>> len(pndm(DiscreteVP.linear().points(10)))  # the first step is taken twice
        11
    """
    found = levels(points, "pndm")
    steps, times = len(found) - 1, points.timesteps.tolist()
    if steps < (2 if middle is None else 4):
        raise ValueError(f"pndm: expected {2 if middle is None else 4} steps or more, got {steps}")
    drafts: list[Draft] = []
    kept: list[Name] = []  # the noise before, the last first

    def add(at: Level, time: float, s: Level, t: Level, base: Name, noise: dict[Name, float], correct: Row) -> None:
        where = f"pndm, step {len(drafts)}"
        convert = conversion(prediction, at, "noise", where)
        predict = _transfer(s, t, base, noise, where)
        drafts.append(Draft(convert, predict, correct, time, scales((at,), scaled)[0]))

    def adams_bashforth(i: int) -> None:
        weights = ADAMS_BASHFORTH[min(len(kept), 3)]
        noise: dict[Name, float] = dict(zip(["converted", *kept], weights, strict=False))
        add(found[i], times[i], found[i], found[i + 1], "x", noise, {})
        kept.insert(0, ("converted", len(drafts) - 1))

    if middle is None:
        add(found[0], times[0], found[0], found[1], "x", {"converted": 1.0}, {"x": 1.0})
        kept.append(("converted", 0))
        mean: dict[Name, float] = {"converted": 0.5, ("converted", 0): 0.5}
        add(found[1], times[1], found[0], found[1], ("corrected", 0), mean, {})
        for i in range(1, steps):
            adams_bashforth(i)
    else:
        halves = levels(middle, "pndm, middle")
        if len(halves) != 3:
            raise ValueError(f"pndm: expected three points in the middle of the first intervals, got {len(halves)}")
        for i, (half, time) in enumerate(zip(halves, middle.timesteps.tolist(), strict=True)):
            s, t, first = found[i], found[i + 1], len(drafts)
            base: Name = ("corrected", first)
            add(s, times[i], s, half, "x", {"converted": 1.0}, {"x": 1.0})
            add(half, time, s, half, base, {"converted": 1.0}, {})
            add(half, time, s, t, base, {"converted": 1.0}, {})
            noise: dict[Name, float] = {("converted", first + j): RUNGE_KUTTA[j] for j in range(3)}
            add(t, times[i + 1], s, t, base, {**noise, "converted": RUNGE_KUTTA[3]}, {})
            kept.insert(0, ("converted", first))
        for i in range(3, steps):
            adams_bashforth(i)
    return compiled(drafts, init_scale=start_scale(found[0]), name="pndm" if middle is not None else "plms")
