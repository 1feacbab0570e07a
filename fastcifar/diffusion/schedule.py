"""Noise schedules, and the choice of points on them: what a solver's table starts from. All in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import expect_type
from .table import Points

SPACINGS = ("linspace", "leading", "trailing", "quadratic", "lambda", "karras")

__all__ = ["CosineVP", "DiscreteVP", "EDMSchedule", "FlowSchedule", "LinearVP", "Schedule", "exploding"]


def _time(t: Tensor | float | Sequence[float]) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _log_alpha(lam: Tensor) -> Tensor:
    """ln alpha of a variance preserving schedule: ``-ln(1 + e^(-2 lambda)) / 2``."""
    return -0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam)


class Schedule:
    """How much image (alpha) and noise (sigma) a sample holds at a time: ``alpha x0 + sigma eps``.

    Attributes:
        first: the time of most noise, where sampling starts.
        last: that of least noise, the last at which the model is called.
        scaled: whether the model is to see ``x / sqrt(alpha^2 + sigma^2)``. False.
    """

    first: float
    last: float
    scaled = False

    def alpha(self, t: Tensor | float) -> Tensor:
        """How much image there is at times t; float64, of t's shape."""
        raise NotImplementedError

    def sigma(self, t: Tensor | float) -> Tensor:
        """How much noise there is at times t."""
        raise NotImplementedError

    def lam(self, t: Tensor | float) -> Tensor:
        """``ln(alpha / sigma)`` at times t."""
        return torch.log(self.alpha(t) / self.sigma(t))

    def time(self, lam: Tensor | float) -> Tensor:
        """The inverse of :meth:`lam`."""
        raise NotImplementedError

    def time_of_ratio(self, ratio: float) -> float:
        """The time at which sigma is ``ratio`` times alpha."""
        return float(self.time(-math.log(ratio)))

    def points(
        self,
        steps: int,
        spacing: str | None = None,
        *,
        final: str | None = None,
        rho: float = 7.0,
        offset: int = 0,
        dropped: int = 0,
        rounded: bool | None = None,
        times: Sequence[float] | Tensor | None = None,
    ) -> Points:
        """S + 1 points for ``steps`` S.

        ==========  ===================================================================================================
        linspace    times evenly from ``first`` to ``last``
        leading     times ``i floor(N / S) + offset``, i from S - 1 to 0; discrete only
        trailing    times ``N - i N / S - 1``, i from 0 to S - 1 (of a continuous schedule ``first (1 - i / S)``)
        quadratic   the square root of times evenly
        lambda      ``ln(alpha / sigma)`` evenly (DPM-Solver's logSNR)
        karras      ``(sigma / alpha)^(1 / rho)`` evenly (EDM, equation 5)
        ==========  ===================================================================================================

        Args:
            steps: S.
            spacing: as above. Default "leading" for a discrete schedule, "karras" for EDM's, else "linspace".
            final: the last point: "zero" adds one without noise, where no model is called; "min" is ``last`` itself.
                Default "min" for continuous variance preserving schedules, which cannot be called at 0; else "zero".
            rho: of "karras". Default 7.
            offset: of "leading": 1 for Stable Diffusion. Default 0.
            dropped: of "linspace" and "leading": as many more times are laid out, and dropped at the end again; 1 is
                what the DPM-Solver, UniPC and DEIS schedulers of diffusers do, 0 what DDIM, DDPM, PNDM and Euler do.
                Default 0.
            rounded: whether timesteps are whole numbers; sigmas of "lambda" and "karras" then stay as they were laid
                out, those of the others go by the rounded times. Default True for discrete schedules.
            times: the times themselves, decreasing: S of them, or S + 1 where ``final`` is "min". ``steps`` must agree.

        Raises:
            ValueError: an unknown spacing or final, or times that are not in the schedule or not decreasing.
        """
        where = f"{type(self).__name__}.points"
        discrete = isinstance(self, DiscreteVP)
        spacing = spacing or ("leading" if discrete else "karras" if isinstance(self, EDMSchedule) else "linspace")
        final = final or ("min" if isinstance(self, LinearVP | CosineVP) else "zero")
        rounded = discrete if rounded is None else rounded
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{where}: expected steps of 1 or more, got {steps!r}")
        if spacing not in SPACINGS or final not in ("zero", "min"):
            raise ValueError(
                f"{where}: expected spacing of {', '.join(SPACINGS)} and final of zero, min; got {spacing!r}, {final!r}"
            )
        count = steps if final == "zero" else steps + 1
        exact = None
        if times is not None:
            t = _time(times)
            if t.shape != (count,):
                raise ValueError(f"{where}: expected {count} times for {steps} steps, got {list(t.shape)}")
        elif spacing in ("lambda", "karras"):
            ends = self.lam(torch.tensor([self.first, self.last], dtype=torch.float64))
            exact = _between(ends, count, None if spacing == "lambda" else rho)
            t = self.time(exact)
        else:
            t = self._laid_out(spacing, steps, count, offset, dropped, where)
        if rounded:
            t = t.round()
        low, high = min(self.first, self.last), max(self.first, self.last)
        if not bool(((t >= low - 1e-9) & (t <= high + 1e-9)).all()) or not bool((t.diff() <= 0).all()):
            raise ValueError(f"{where}: expected decreasing times of {low} to {high}, got {t.tolist()}")
        alpha, sigma = (self.alpha(t), self.sigma(t)) if exact is None else self._levels(exact)
        if final == "zero":
            zero = torch.zeros(1, dtype=torch.float64)
            t, alpha, sigma = torch.cat([t, zero]), torch.cat([alpha, zero + 1]), torch.cat([sigma, zero])
        return Points(t, alpha, sigma)

    def _levels(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        return _log_alpha(lam).exp(), _log_alpha(-lam).exp()

    def _laid_out(self, spacing: str, steps: int, count: int, offset: int, dropped: int, where: str) -> Tensor:
        if spacing == "leading":
            raise ValueError(f"{where}: expected a discrete schedule for leading times, got a continuous one")
        u = torch.linspace(0, 1, count + dropped, dtype=torch.float64)[:count]
        if spacing == "linspace":
            return self.first + u * (self.last - self.first)
        if spacing == "quadratic":
            return (math.sqrt(self.first) + u * (math.sqrt(self.last) - math.sqrt(self.first))) ** 2
        t = self.first * (1 - torch.arange(count, dtype=torch.float64) / steps)
        return t.clamp_min(self.last)


def _between(ends: Tensor, count: int, rho: float | None) -> Tensor:
    """lambda, evenly or as Karras et al. lay out ``sigma / alpha``."""
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    if rho is None:
        return ends[0] + u * (ends[1] - ends[0])
    high, low = (-ends / rho).exp()
    return -rho * (high + u * (low - high)).log()


class DiscreteVP(Schedule):
    """``alpha_t = sqrt(prod_(i <= t) (1 - beta_i))``, ``sigma_t = sqrt(1 - alpha_t^2)``, times 0 to N - 1; between
    whole times lambda is linear, and beyond the ends a time is that of the end.

    Args:
        betas: ``[N]``, of 0 to 1, N of 2 or more; computed with in float64.

    Raises:
        ValueError: betas are not as described, or lambda does not decrease with time.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020).

    Example:
        >>> from fastcifar.diffusion import DiscreteVP
        >>> schedule = DiscreteVP.linear()
        >>> schedule.points(4).timesteps.tolist()
        [750.0, 500.0, 250.0, 0.0, 0.0]
        >>> round(float(schedule.time(schedule.lam(123.5))), 6)
        123.5
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = _time(betas)
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"DiscreteVP: expected two or more betas above 0 and below 1, got {list(betas.shape)} of them"
            )
        self._set(torch.log1p(-betas).cumsum(0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor) -> DiscreteVP:
        """Of ``alpha_t^2``, as diffusers' schedulers hold them; above 0 and below 1, decreasing."""
        schedule = cls.__new__(cls)
        schedule._set(torch.log(_time(alphas_cumprod)))
        return schedule

    @classmethod
    def linear(cls, count: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteVP:
        """Betas evenly from ``start`` to ``end``; DDPM's are the defaults."""
        return cls(torch.linspace(start, end, count, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, count: int = 1000, start: float = 0.00085, end: float = 0.012) -> DiscreteVP:
        """Their square roots evenly; Stable Diffusion's are the defaults."""
        return cls(torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, count: int = 1000, limit: float = 0.999) -> DiscreteVP:
        """``beta_t = min(1 - f((t + 1) / N) / f(t / N), limit)``, ``f(u) = cos^2((u + 0.008) / 1.008 pi / 2)``;
        "squaredcos_cap_v2". Source: Nichol and Dhariwal, "Improved DDPM" (ICML 2021), equation 17."""
        u = torch.arange(count + 1, dtype=torch.float64) / count
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp_max(limit))

    def _set(self, log_alphas_cumprod: Tensor) -> None:
        self._log_alpha = 0.5 * log_alphas_cumprod
        self._log_sigma = 0.5 * torch.log(-torch.expm1(log_alphas_cumprod))
        self._lam = self._log_alpha - self._log_sigma
        if not bool(torch.isfinite(self._lam).all()) or not bool((self._lam.diff() < 0).all()):
            raise ValueError("DiscreteVP: expected alpha that decreases from below 1 to above 0, got another")
        self.first, self.last = float(len(self._lam) - 1), 0.0

    def __len__(self) -> int:
        return len(self._lam)

    def alpha(self, t: Tensor | float) -> Tensor:
        return self._at(_time(t), self._log_alpha, _log_alpha)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self._at(_time(t), self._log_sigma, lambda lam: _log_alpha(-lam))

    def _at(self, t, values, of_lam) -> Tensor:
        whole = t.round()
        exact = values[whole.clamp(0, self.first).long()]
        return torch.where(whole == t, exact, of_lam(self.lam(t))).exp()

    def lam(self, t: Tensor | float) -> Tensor:
        t = _time(t).clamp(0, self.first)
        below = t.floor().clamp_max(self.first - 1).long()
        share = t - below
        return self._lam[below] * (1 - share) + self._lam[below + 1] * share

    def time(self, lam: Tensor | float) -> Tensor:
        lam = _time(lam).clamp(self._lam[-1], self._lam[0])
        above = torch.searchsorted(-self._lam, -lam).clamp(1, len(self) - 1)
        high, low = self._lam[above - 1], self._lam[above]
        return above - 1 + (high - lam) / (high - low)

    def _laid_out(self, spacing: str, steps: int, count: int, offset: int, dropped: int, where: str) -> Tensor:
        total = len(self)
        if steps + dropped > total:
            raise ValueError(f"{where}: expected at most {total - dropped} steps of {total} times, got {steps}")
        index = torch.arange(steps + dropped, dtype=torch.float64)
        if spacing == "leading":
            t = (index * (total // (steps + dropped)) + offset).flip(0)[:steps]
        elif spacing == "linspace":
            t = torch.linspace(0, self.first, steps + dropped, dtype=torch.float64).flip(0)[:steps]
        elif spacing == "trailing":
            t = total - index[:steps] * (total / steps) - 1
        else:
            t = (torch.linspace(0, math.sqrt(self.first), steps, dtype=torch.float64) ** 2).flip(0)
        return t if count == steps else torch.cat([t, torch.zeros(1, dtype=torch.float64)])


class LinearVP(Schedule):
    """``ln alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2``, ``sigma = sqrt(1 - alpha^2)``; t of ``last`` to
    1.

    Args:
        beta_min, beta_max: 0.1 and 20.
        last: the least time, 1e-3.

    Source: Song et al., "Score-Based Generative Modeling through SDEs" (ICLR 2021), appendix C; the inverse is DPM-
    Solver's (Lu et al. 2022, appendix D.4).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, last: float = 1e-3) -> None:
        if not 0 < beta_min < beta_max < math.inf or not 0 < last < 1:
            raise ValueError(
                f"LinearVP: expected 0 < beta_min < beta_max and last of 0 to 1, got {beta_min}, {beta_max}"
            )
        self.beta_min, self.beta_max, self.first, self.last = beta_min, beta_max, 1.0, last

    def _log(self, t: Tensor | float) -> Tensor:
        t = _time(t)
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor | float) -> Tensor:
        return self._log(t).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-torch.expm1(2 * self._log(t))).sqrt()

    def time(self, lam: Tensor | float) -> Tensor:
        twice = -4 * _log_alpha(_time(lam))
        rise = self.beta_max - self.beta_min
        return twice / ((self.beta_min**2 + rise * twice).sqrt() + self.beta_min)


class CosineVP(Schedule):
    """``alpha = cos((t + s) / (1 + s) pi / 2) / cos(s / (1 + s) pi / 2)``, ``sigma = sqrt(1 - alpha^2)``; t of ``last``
    to 0.9946, where its betas reach 999 / 1000.

    Args:
        s: 0.008.
        last: the least time, 1e-3.

    Source: Nichol and Dhariwal (ICML 2021), in the continuous form of DPM-Solver (Lu et al. 2022, appendix D.4).
    """

    def __init__(self, s: float = 0.008, last: float = 1e-3) -> None:
        if not 0 < s < 1 or not 0 < last < 0.9946:
            raise ValueError(f"CosineVP: expected s of 0 to 1 and last of 0 to 0.9946, got {s} and {last}")
        self.s, self.first, self.last = s, 0.9946, last
        self._origin = math.cos(self._angle(torch.zeros((), dtype=torch.float64)))

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1 + self.s) * (math.pi / 2)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(self._angle(_time(t))) / self._origin

    def sigma(self, t: Tensor | float) -> Tensor:
        # cos^2 a - cos^2 b = sin(b - a) sin(b + a), which does not cancel near 0.
        b, a = self._angle(_time(t)), self._angle(torch.zeros((), dtype=torch.float64))
        return (torch.sin(b - a) * torch.sin(b + a)).sqrt() / self._origin

    def time(self, lam: Tensor | float) -> Tensor:
        return torch.acos(_log_alpha(_time(lam)).exp() * self._origin) * (2 / math.pi) * (1 + self.s) - self.s


class EDMSchedule(Schedule):
    """alpha 1 and ``sigma = t`` ("the variance explodes"), t of ``sigma_max`` to ``sigma_min``.

    Args:
        sigma_min, sigma_max: 0.002 and 80.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NeurIPS 2022), table 1.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"EDMSchedule: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.first, self.last = float(sigma_max), float(sigma_min)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return _time(t)

    def time(self, lam: Tensor | float) -> Tensor:
        return (-_time(lam)).exp()

    def _levels(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(lam), (-lam).exp()


class FlowSchedule(Schedule):
    """``alpha = 1 - t``, ``sigma = t``, t of ``first`` to ``last``; ``shift`` moves evenly laid out times to
    ``shift t / (1 + (shift - 1) t)``.

    Args:
        shift: 1, none.
        first, last: 1 and 1e-3. At time 1 there is no image, so what needs ``ln(alpha / sigma)`` starts below.

    Source: Liu et al., "Flow Straight and Fast" (ICLR 2023); the shift is of Esser et al. (ICML 2024), equation 23.
    """

    def __init__(self, shift: float = 1.0, first: float = 1.0, last: float = 1e-3) -> None:
        if not 0 < shift < math.inf or not 0 < last < first <= 1:
            raise ValueError(
                f"FlowSchedule: expected shift above 0 and 0 < last < first <= 1, got {shift}, {first}, {last}"
            )
        self.shift, self.first, self.last = shift, first, last

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - _time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return _time(t)

    def time(self, lam: Tensor | float) -> Tensor:
        return torch.sigmoid(-_time(lam))

    def _levels(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(lam), torch.sigmoid(-lam)

    def _laid_out(self, spacing: str, steps: int, count: int, offset: int, dropped: int, where: str) -> Tensor:
        t = super()._laid_out(spacing, steps, count, offset, dropped, where)
        return self.shift * t / (1 + (self.shift - 1) * t)


def exploding(points: Points) -> Points:
    """The same points for ``x / alpha``: alpha 1 and sigma ``sigma / alpha``, as Euler, Heun and LMS are usually run on
    a model of a variance preserving schedule (which then sees ``x / sqrt(1 + sigma^2)``: ``scaled`` of a builder).

    Args:
        points: S + 1 points whose alpha is above 0.

    Returns:
        :class:`Points` of the same timesteps.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, exploding
        >>> exploding(DiscreteVP.linear().points(3)).alpha.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    expect_type("exploding", Points, "Points", points=points)
    return Points(points.timesteps, torch.ones_like(points.alpha), points.sigma / points.alpha)
