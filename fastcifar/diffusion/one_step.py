"""DDPM, DDIM, Euler, ancestral Euler, and Heun with EDM's churn: solvers that keep nothing for longer than a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from .draft import Draft, Level, Row, combined, compiled, conversion, levels, scales, start_scale
from .expansion import update
from .table import Points, SolverTable

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
LEAST_VARIANCE = 1e-20
Terms = list[tuple[float, Row]]

__all__ = ["ddim", "ddpm", "euler", "euler_ancestral", "heun"]


def _lost(s: Level, t: Level) -> float:
    """``1 - e^(-2 h)``: the share of the noise's variance that is new when image t is made noise s."""
    return -math.expm1(-2 * (t.lam - s.lam)) if t.lam != s.lam else 0.0


def ddpm(
    points: Points,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    r"""DDPM's posterior: ``x_t = (sigma_t / sigma_s) e^-h x + alpha_t (1 - e^-2h) x0 + std z``, from point s to t, h =
    lambda_t - lambda_s; of successive times that is ``sqrt(ab') b / (1 - ab) x0 + sqrt(a) (1 - ab') / (1 - ab) x``.

    Args:
        points: S + 1 points.
        variance: "fixed_small" (default), ``sigma_t^2 (1 - e^-2h)``, at least 1e-20; "fixed_large", ``sigma_s^2 (1 -
            e^-2h)`` (beta); the two with "_log", which are the same deviations; "learned" and "learned_range", where z
            counts 1: give ``sample`` a ``noise`` that is multiplied by the deviation that the model predicted. There is
            no noise in a last step to sigma 0.
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: an unknown variance, or an epsilon at alpha 0.

    Source: Ho et al. (NeurIPS 2020), equations 6 and 7; Nichol and Dhariwal (ICML 2021) on variances.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, ddpm
        >>> table = ddpm(DiscreteVP.linear().points(10), limit=1.0)
        >>> table.noisy.tolist() == [True] * 9 + [False]
        True
    """
    if variance not in VARIANCES:
        raise ValueError(f"ddpm: expected variance of {', '.join(VARIANCES)}; got {variance!r}")
    found = levels(points, "ddpm")
    size = scales(found, scaled)
    drafts = []
    for i, (s, t) in enumerate(pairwise(found)):
        lost, last = _lost(s, t), t.sigma == 0
        if variance.startswith("fixed_small"):
            deviation = math.sqrt(max(t.sigma**2 * lost, LEAST_VARIANCE))
        else:
            deviation = s.sigma * math.sqrt(lost) if variance.startswith("fixed_large") else 1.0
        predict: Row = {
            "x": 0.0 if last else t.sigma / s.sigma * math.exp(s.lam - t.lam),
            "converted": t.alpha * lost,
            "noise": 0.0 if last else deviation,
        }
        convert = conversion(prediction, s, "data", f"ddpm, step {i}")
        drafts.append(Draft(convert, predict, {}, float(points.timesteps[i]), size[i]))
    return compiled(drafts, limit=limit, init_scale=start_scale(found[0]), name=f"ddpm {variance}")


def ddim(
    points: Points,
    *,
    eta: float = 0.0,
    clipped_noise: bool = False,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    r"""DDIM: ``x_t = alpha_t x0 + sqrt(sigma_t^2 - v) eps + sqrt(v) z``, ``v = eta^2 sigma_t^2 (1 - e^-2h)``.

    Args:
        points: S + 1 points. Each step goes to the next of them (diffusers' goes to ``t - N // S``, which is the next
            of "leading" times only).
        eta: 0 (the default) for the ODE, 1 for DDPM's variance.
        clipped_noise: where there is a limit, eps is what the clipped x0 leaves ("use_clipped_model_output"), else what
            the model predicted. Default False.
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: eta is negative or above what leaves a variance, or epsilon at alpha 0.

    Source: Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), equations 12 and 16.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, ddim
        >>> ddim(DiscreteVP.linear().points(10), eta=1.0).noisy.sum().item()  # not in the last step, to sigma 0
        9
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"ddim: expected eta of 0 or more, got {eta}")
    found = levels(points, "ddim")
    size = scales(found, scaled)
    drafts = []
    for i, (s, t) in enumerate(pairwise(found)):
        where = f"ddim, step {i}"
        share = eta * eta * _lost(s, t)
        if share > 1:
            raise ValueError(f"{where}: expected eta of at most {1 / math.sqrt(_lost(s, t)):.4g}, got {eta}")
        data = conversion(prediction, s, "data", where)
        if clipped_noise:
            noise: Row = {"x": 1 / s.sigma, "converted": -s.alpha / s.sigma}
        else:
            noise = conversion(prediction, s, "noise", where) if t.sigma > 0 else {}
        terms: Terms = [(t.alpha, {"converted": 1.0}), (t.sigma * math.sqrt(1 - share), noise)]
        predict = combined([*terms, (t.sigma * math.sqrt(share), {"noise": 1.0})])
        drafts.append(Draft(data, predict, {}, float(points.timesteps[i]), size[i]))
    return compiled(drafts, limit=limit, init_scale=start_scale(found[0]), name=f"ddim {eta:g}" if eta else "ddim")


def _noise_row(level: Level, prediction: str, limit: float | None, where: str) -> tuple[Row, Row]:
    """Rows "converted" and the noise in terms of it: the noise itself, or the clamped data and what they leave."""
    if limit is None:
        return conversion(prediction, level, "noise", where), {"converted": 1.0}
    data = conversion(prediction, level, "data", where)
    return data, {"x": 1 / level.sigma, "converted": -level.alpha / level.sigma}


def euler_ancestral(
    points: Points,
    *,
    eta: float = 1.0,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    """Euler's step in ``rho = sigma / alpha`` to below the target, and noise up to it: with ``up = min(rho_t, eta rho_t
    sqrt(1 - (rho_t / rho_s)^2))``, ``down = sqrt(rho_t^2 - up^2)``.

    Args:
        points: S + 1 points; usually :func:`fastcifar.diffusion.exploding`.
        eta: 1, the default; 0 is Euler's method.
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Source: crowsonkb/k-diffusion, ``sample_euler_ancestral``.

    Example:
        >>> from fastcifar.diffusion import EDMSchedule, euler_ancestral
        >>> len(euler_ancestral(EDMSchedule().points(10)))
        10
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"euler_ancestral: expected eta of 0 or more, got {eta}")
    found = levels(points, "euler_ancestral")
    size = scales(found, scaled)
    drafts = []
    for i, (s, t) in enumerate(pairwise(found)):
        if s.alpha == 0:
            raise ValueError(f"euler_ancestral, step {i}: expected some image in the sample, got alpha 0")
        rho, target = s.sigma / s.alpha, t.sigma / t.alpha
        up = min(target, eta * target * math.sqrt(_lost(s, t)))
        down = math.sqrt(target * target - up * up)
        convert, noise = _noise_row(s, prediction, limit, f"euler_ancestral, step {i}")
        terms: Terms = [
            (t.alpha / s.alpha, {"x": 1.0}),
            (t.alpha * (down - rho), noise),
            (t.alpha * up, {"noise": 1.0}),
        ]
        drafts.append(Draft(convert, combined(terms), {}, float(points.timesteps[i]), size[i]))
    return compiled(drafts, limit=limit, init_scale=start_scale(found[0]), name="euler ancestral")


def euler(
    points: Points,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    time: Callable[[float], float] | None = None,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    """Euler's method in ``sigma / alpha``, which is DDIM; arguments are as those of :func:`heun`.

    Raises:
        ValueError: as :func:`heun`.

    Source: Karras et al. (NeurIPS 2022), algorithm 2 without its correction.

    Example:
        >>> from fastcifar.diffusion import EDMSchedule, euler
        >>> len(euler(EDMSchedule().points(10)))
        10
    """
    return _edm(points, False, churn, churn_min, churn_max, churn_noise, time, prediction, limit, scaled)


def heun(
    points: Points,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    time: Callable[[float], float] | None = None,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    r"""Heun's method in ``rho = sigma / alpha``, EDM's sampler: two calls a step, one in a last step to sigma 0.

    ``x' = a x_s + alpha_t d eps_s``, then ``x_t = a x_s + alpha_t d (eps_s + eps_t) / 2`` with ``a = alpha_t /
    alpha_s`` and ``d = rho_t - rho_s``. Where there is churn, noise first raises sigma to ``sigma (1 + gamma)``,
    ``gamma = min(churn / S, sqrt(2) - 1)`` for sigma of ``churn_min`` to ``churn_max``; it is added in the same pass as
    the step before.

    Args:
        points: S + 1 points: the table has 2 S steps, one less where the last sigma is 0, one more where churn comes
            first.
        churn, churn_min, churn_max, churn_noise: EDM's S_churn, S_min, S_max and S_noise: 0, 0, infinity, 1. Needs
            points whose alpha is 1.
        time: the timestep of a sigma, which churn needs. Default: sigma is its own timestep (EDM).
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: churn where alpha is not 1, or is negative.

    Source: Karras et al. (NeurIPS 2022), algorithms 1 and 2.

    Example:
        >>> from fastcifar.diffusion import EDMSchedule, heun
        >>> len(heun(EDMSchedule().points(10)))  # the last sigma is 0
        19
    """
    return _edm(points, True, churn, churn_min, churn_max, churn_noise, time, prediction, limit, scaled)


def _edm(
    points: Points,
    twice: bool,
    churn: float,
    churn_min: float,
    churn_max: float,
    churn_noise: float,
    time: Callable[[float], float] | None,
    prediction: str,
    limit: float | None,
    scaled: bool,
) -> SolverTable:
    name = "heun" if twice else "euler"
    found = levels(points, name)
    steps = len(found) - 1
    if churn and (churn < 0 or any(level.alpha != 1 for level in found)):
        raise ValueError(f"{name}: expected churn of 0 or more, and only where alpha is 1, got churn {churn}")
    drafts: list[Draft] = []
    for i, t in enumerate(found[1:]):
        s, timestep = found[i], float(points.timesteps[i])
        where = f"{name}, step {i}"
        if churn and churn_min <= s.sigma <= churn_max:
            raised = s.sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            weight = churn_noise * math.sqrt(raised**2 - s.sigma**2)
            if drafts:
                drafts[-1] = drafts[-1]._replace(predict={**drafts[-1].predict, "noise": weight})
            else:
                drafts.append(Draft({}, {"x": 1.0, "noise": weight}, {}, timestep))
            s = Level(1.0, raised)
            timestep = raised if time is None else time(raised)
        made = update("rho", (s, t), 0, 1, where=where)
        convert, noise = _noise_row(s, prediction, limit, where)
        half = (0.5 * made.weights[0], noise)
        predict = combined([(made.carry, {"x": 1.0}), half, half])
        # What the second call starts from: half of the step is taken, the other half goes by the noise at its end.
        correct = combined([(made.carry, {"x": 1.0}), half]) if twice and t.sigma > 0 else {}
        drafts.append(Draft(convert, predict, correct, timestep, scales((s,), scaled)[0]))
        if correct:
            convert, noise = _noise_row(t, prediction, limit, where)
            predict = combined([(1.0, {("corrected", len(drafts) - 1): 1.0}), (0.5 * made.weights[0], noise)])
            drafts.append(Draft(convert, predict, {}, float(points.timesteps[i + 1]), scales((t,), scaled)[0]))
    return compiled(drafts, limit=limit, init_scale=start_scale(found[0]), name=name)
