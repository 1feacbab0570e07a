"""A mixture of Gaussians as data: its denoiser is known exactly, and so is where every noise ought to end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import expect_tensors
from .schedule import LinearVP, Schedule

LINEAR = LinearVP()
PREDICTIONS = ("epsilon", "x0", "v", "flow", "score")

__all__ = ["GaussianMixture"]


class GaussianMixture:
    r"""``x0 ~ sum_k w_k N(mu_k, s_k^2 I)``, whose noisy samples ``alpha x0 + sigma eps`` have an exact denoiser.

    With ``V_k = alpha^2 s_k^2 + sigma^2`` and ``r = softmax_k(ln w_k - D/2 ln V_k - |x - alpha mu_k|^2 / (2 V_k))``,

    ``E[x0 | x] = sum_k r_k (sigma^2 mu_k + alpha s_k^2 x) / V_k`` and
    ``E[eps | x] = sigma sum_k r_k (x - alpha mu_k) / V_k``,

    neither of which is got from the other by a difference that cancels.

    Args:
        means: ``[K, ...]``, the shape of a sample behind the first dimension.
        std: ``s_k``, ``[K]`` or one number; above 0.
        weights: ``w_k``, ``[K]``, above 0; scaled to sum to 1. Default: all equal.

    Whatever the dtype of ``x``, everything is computed in float64 and rounded once to that dtype; gradients flow to
    ``x``, ``alpha`` and ``sigma``.

    Raises:
        ValueError: no components, a shape that does not fit, or a std or weight that is not finite and above 0.

    Source: the conditional mean is Bayes' rule; mixtures as the test of samplers with a known score are usual, the two
    presets are ours.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import GaussianMixture
        >>> mixture = GaussianMixture.smooth()
        >>> noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> model = mixture.model("epsilon")
        >>> model(noise, 1.0).shape
        torch.Size([4, 16])
        >>> image = mixture.solve(noise, start=1.0, end=0.0)  # by the probability flow ODE
        >>> bool((torch.cdist(image, mixture.means).min(1).values < 4).all())
        True
    """

    def __init__(self, means: Tensor, std: Tensor | float = 1.0, weights: Tensor | None = None) -> None:
        expect_tensors("GaussianMixture", means=means)
        count = len(means) if means.dim() else 0
        self.means = means.detach().double()
        self.std = torch.as_tensor(std, dtype=torch.float64, device=means.device).expand(count).clone()
        weights = torch.ones(count, device=means.device) if weights is None else weights
        if means.dim() < 2 or not means.numel() or weights.shape != (count,):
            raise ValueError(
                f"GaussianMixture: expected means [K, ...] and weights [K], got {list(means.shape)} and "
                f"{list(weights.shape)}"
            )
        self.weights = weights.double() / weights.double().sum()
        positive = (self.std > 0) & (self.std < math.inf) & (self.weights > 0) & (self.weights < math.inf)
        if not bool(positive.all()):
            raise ValueError(
                f"GaussianMixture: expected finite std and weights above 0, got {self.std.tolist()} and "
                f"{weights.tolist()}"
            )
        self._flat = self.means.flatten(1)

    @classmethod
    def smooth(cls, seed: int = 0) -> GaussianMixture:
        """8 components of std 0.4 in 16 dimensions, their means drawn from a normal of std 0.3: all in all 0.5, as of
        images from -1 to 1."""
        return cls(0.3 * _normal(seed, 8, 16), 0.4)

    @classmethod
    def sharp(cls, seed: int = 0) -> GaussianMixture:
        """As :meth:`smooth`, of std 0.1 and means of 0.4: components that do not overlap, between which a sample
        decides while there is noise, so that a solver's error may end it in another one."""
        return cls(0.4 * _normal(seed, 8, 16), 0.1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` samples of the data, float64 ``[count, ...]``."""
        device = self.means.device
        which = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, self._flat.shape[1], dtype=torch.float64, device=device, generator=generator)
        return (self._flat[which] + self.std[which].unsqueeze(1) * noise).view(count, *self.means.shape[1:])

    def predict(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction: str = "epsilon") -> Tensor:
        """The exact prediction for noisy samples ``x`` [B, ...], like x; ``alpha`` and ``sigma`` numbers or ``[B]``.

        ``prediction``: "epsilon" E[eps | x]; "x0"; "v", (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2); "flow",
        eps - x0; "score", -eps / sigma, which is the gradient of the logarithm of the density, also where sigma is 0.

        Raises:
            ValueError: ``prediction`` is none of these, or a shape does not fit.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"GaussianMixture: expected prediction to be one of {', '.join(PREDICTIONS)}; got {prediction!r}"
            )
        if x.dim() < 1 or x.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"GaussianMixture: expected x [B, {self._shape}], got {list(x.shape)}")
        flat = x.double().flatten(1)
        alpha, sigma = (self._column(value, name, len(x)) for value, name in ((alpha, "alpha"), (sigma, "sigma")))
        variance = alpha.square() * self.std.square() + sigma.square()
        inner, norms = flat @ self._flat.T, self._flat.square().sum(1)
        distance = flat.square().sum(1, keepdim=True) - 2 * alpha * inner + alpha.square() * norms
        logits = self.weights.log() - 0.5 * (flat.shape[1] * variance.log() + distance / variance)
        share = logits.softmax(1) / variance
        total, centre = share.sum(1, keepdim=True), share @ self._flat
        slope = total * flat - alpha * centre  # eps / sigma
        if prediction == "score":
            result = -slope
        else:
            x0 = sigma.square() * centre + alpha * (share @ self.std.square()).unsqueeze(1) * flat
            eps = sigma * slope
            v = (alpha * eps - sigma * x0) / torch.hypot(alpha, sigma)
            result = {"epsilon": eps, "x0": x0, "v": v, "flow": eps - x0}[prediction]
        return result.view(x.shape).to(x.dtype)

    def model(
        self, prediction: str = "epsilon", schedule: Schedule = LINEAR
    ) -> Callable[[Tensor, Tensor | float], Tensor]:
        """``model(x, t)``, as a sampler calls a denoiser: :meth:`predict` at the alpha and sigma of times ``t``, a
        number or ``[B]``, of a ``schedule`` that is not ``scaled``. Default ``LinearVP()``."""
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"GaussianMixture: expected prediction to be one of {', '.join(PREDICTIONS)}; got {prediction!r}"
            )
        return _Model(self, prediction, schedule)

    def solve(
        self,
        x: Tensor,
        start: float,
        end: float,
        schedule: Schedule = LINEAR,
        *,
        tolerance: float = 1e-11,
    ) -> Tensor:
        """Where the probability flow ODE takes samples ``x`` [B, ...] of time ``start`` by time ``end``: the truth for
        samplers. ``tolerance`` (1e-11, and measured errors stay below ten times that) is of a step. See
        :meth:`transport`."""
        first, last = ((float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (start, end))
        return self.transport(x, first, last, tolerance=tolerance)

    def transport(
        self, x: Tensor, start: tuple[float, float], end: tuple[float, float], *, tolerance: float = 1e-11
    ) -> Tensor:
        r"""As :meth:`solve`, between points ``(alpha, sigma)``; sigma of either may be 0, alpha not.

        With ``y = x / alpha`` and ``rho = sigma / alpha`` the ODE is ``dy / d rho = E[eps]``, whatever the schedule. It
        is solved over ``u`` of ``rho = c sinh(u)``, c the least std, which steps as a logarithm does where rho is large
        and reaches 0; by Gragg's midpoint rule, extrapolated to order 16, in steps that are as short as the sample that
        turns the most needs them.
        """
        if not all(0 < alpha < math.inf and 0 <= sigma < math.inf for alpha, sigma in (start, end)):
            raise ValueError(
                f"GaussianMixture: expected finite alpha above 0 and sigma of 0 or more, got {start}, {end}"
            )
        unit = float(self.std.min())

        def slope(y: Tensor, u: float) -> Tensor:
            return self.predict(y, 1.0, unit * math.sinh(u), "epsilon") * (unit * math.cosh(u))

        first, last = (math.asinh(sigma / alpha / unit) for alpha, sigma in (start, end))
        y = _extrapolated(slope, x.detach().double() / start[0], first, last, tolerance)
        return (end[0] * y).to(x.dtype)

    @property
    def _shape(self) -> str:
        return ", ".join(map(str, self.means.shape[1:]))

    def _column(self, value: Tensor | float, name: str, batch: int) -> Tensor:
        column = torch.as_tensor(value, dtype=torch.float64, device=self.means.device).reshape(-1, 1)
        if len(column) not in (1, batch):
            raise ValueError(f"GaussianMixture: expected {name} to be a number or [{batch}], got {len(column)} of it")
        return column


class _Model:
    """Of :meth:`GaussianMixture.model`: an object, so that it can be sent to another process."""

    def __init__(self, mixture: GaussianMixture, prediction: str, schedule: Schedule) -> None:
        self.mixture, self.prediction, self.schedule = mixture, prediction, schedule

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.mixture.predict(x, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _extrapolated(
    slope: Callable[[Tensor, float], Tensor], y: Tensor, first: float, last: float, tolerance: float
) -> Tensor:
    """``y`` at ``last``, of ``dy/du = slope(y, u)``: Gragg's modified midpoint rule with 2, 4...16 substeps, whose
    errors are series in the square of the substep, extrapolated to 0; a step whose last two columns differ by more than
    ``tolerance`` of the largest value is done again, shorter."""
    columns = 8
    at, step = first, (last - first) / 16
    shortest = 1e-10 * abs(last - first)
    while abs(last - at) > 1e-14 * (1 + abs(last)):
        step = math.copysign(min(abs(step), abs(last - at)), last - first)
        table: list[Tensor] = []
        initial = slope(y, at)
        error = math.inf
        for row in range(columns):
            count = 2 * (row + 1)
            h = step / count
            before, now = y, y + h * initial
            for i in range(1, count):
                before, now = now, before + 2 * h * slope(now, at + i * h)
            current = 0.5 * (before + now + h * slope(now, at + step))
            for column in range(row):
                previous = table[column]
                table[column] = current
                ratio = ((row + 1) / (row - column)) ** 2
                current = current + (current - previous) / (ratio - 1)
            error = float((current - table[-1]).abs().max()) if row and len(y) else 0.0
            table.append(current)
        # Where rho is large so is y, and what is lost there shrinks with it.
        error /= max(1.0, float(table[-1].abs().max()) if len(y) else 1.0)
        if error <= tolerance:
            at, y = at + step, table[-1]
        elif not abs(step) > shortest:
            raise RuntimeError(f"GaussianMixture: expected steps to reach {tolerance}, got {error} in the shortest")
        step *= min(2.0, max(0.2, 0.9 * (tolerance / max(error, 1e-300)) ** (1 / (2 * columns - 1))))
    return y
