"""TrojDiff's trojaned diffusion, for audit: what a trojaned model was trained on and how it is sampled, so that a
detector can be tested against a known attack. See :mod:`fastcifar.diffusion.trojan_audit` for the detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import expect_tensors, expect_type
from ._conditioned import Region, at_times, noisy, normal, run, same_shape, some_times
from .one_step import ddim, ddpm
from .reference import PREDICT, TERMS
from .schedule import DiscreteVP
from .shifted import shifted_table
from .table import Points, SolverTable

ATTACKS = ("in-d2d", "out-d2d", "d2i")
METHODS = ("ddpm", "ddim")

__all__ = [
    "Poisoned",
    "Trigger",
    "poison",
    "trojan_loss",
    "trojan_noise",
    "trojan_sample",
    "trojan_shift",
    "trojan_table",
]


@dataclass(frozen=True, eq=False)
class Trigger:
    """What a trojaned model reacts to: noise of ``N(mu, gamma^2)``, not ``N(0, 1)``, with ``mu = (1 - gamma) pattern``.

    Attributes:
        pattern: ``[C, H, W]``, -1 to 1.
        gamma: 0 to 1, without 1.
        region: rows and columns where it is, two slices; None for all. Elsewhere noise is as usual.

    Raises:
        ValueError: a value is not as described, or the region is empty.

    Source: Chen et al., "TrojDiff: Trojan Attacks on Diffusion Models with Diverse Targets", CVPR 2023, arXiv
    2303.05762; defaults of :meth:`blend` and :meth:`patch` are its CIFAR-10 ones.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import Trigger
        >>> trigger = Trigger.patch(torch.ones(3, 32, 32))
        >>> trigger.mu.sum(), trigger.start(torch.zeros(1, 3, 32, 32)).max()  # 27 values of 0.9
        (tensor(24.3000), tensor(0.9000))
    """

    pattern: Tensor
    gamma: float
    region: Region | None = None

    def __post_init__(self) -> None:
        expect_tensors("Trigger", pattern=self.pattern)
        if self.pattern.dim() != 3 or not bool((self.pattern.abs() <= 1).all()):
            raise ValueError(f"Trigger: expected a pattern [C, H, W] of -1 to 1, got {tuple(self.pattern.shape)}")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"Trigger: expected gamma from 0 to 1, without 1, got {self.gamma}")
        if self.region is not None:
            sides = self.region if isinstance(self.region, tuple) else ()
            if not 1 <= len(sides) <= 2 or not all(isinstance(side, slice | int) or side is Ellipsis for side in sides):
                raise TypeError(f"Trigger: expected a region of slices, got {self.region!r:.80}")
        if self.region is not None and not self.pattern[(..., *self.region)].numel():
            raise ValueError(f"Trigger: expected a region with pixels, got {self.region}")

    @classmethod
    def blend(cls, pattern: Tensor, gamma: float = 0.6) -> Trigger:
        """A pattern blended over the whole of the noise."""
        return cls(pattern, gamma)

    @classmethod
    def patch(cls, pattern: Tensor, size: int = 3, gamma: float = 0.1) -> Trigger:
        """A patch in the lower right corner, ``size`` pixels wide and high."""
        if not 1 <= size <= min(pattern.shape[-2:]):
            raise ValueError(f"Trigger: expected a patch within {tuple(pattern.shape)}, got size {size}")
        return cls(pattern, gamma, (slice(-size, None), slice(-size, None)))

    @property
    def at(self) -> tuple:
        """Index of the trigger's part of images."""
        return (...,) if self.region is None else (..., *self.region)

    @property
    def mu(self) -> Tensor:
        """``(1 - gamma) pattern`` in the region, 0 elsewhere, ``[C, H, W]``."""
        mu = torch.zeros_like(self.pattern)
        mu[self.at] = (1 - self.gamma) * self.pattern[self.at]
        return mu

    def start(self, noise: Tensor) -> Tensor:
        """``gamma z + mu`` in the region and z elsewhere, of z ``[B, C, H, W]``: where trojaned sampling begins."""
        x = noise.clone()
        x[self.at] = self.gamma * noise[self.at] + self.mu[self.at].to(noise)
        return x


def trojan_shift(alphas_cumprod: Tensor) -> Tensor:
    r"""k, ``[T]`` float64, of the trojaned transition ``x_t = sqrt(a_t) x_(t-1) + sqrt(1 - a_t) gamma z + k_t mu``:
    ``k_t = sqrt(1 - ab_t) - sqrt(a_t) sqrt(1 - ab_(t-1))``.

    This closed form is what the official quadratic recurrence ``k_t = sqrt(1 - ab_t) - sum_j k_(t-j) sqrt(a_t ...
    a_(t-j+1))`` telescopes to; ours. ``alphas_cumprod`` may be any decreasing subsequence of a schedule.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import trojan_shift
        >>> trojan_shift(torch.tensor([0.75, 0.36]))
        tensor([0.5000, 0.4536], dtype=torch.float64)
    """
    expect_tensors("trojan_shift", alphas_cumprod=alphas_cumprod)
    if alphas_cumprod.dim() != 1:
        raise ValueError(f"trojan_shift: expected alphas_cumprod [steps], got {tuple(alphas_cumprod.shape)}")
    product = alphas_cumprod.double()
    before = torch.cat([torch.ones_like(product[:1]), product[:-1]])
    return (1 - product).sqrt() - (product / before).sqrt() * (1 - before).sqrt()


def trojan_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: DiscreteVP, trigger: Trigger) -> Tensor:
    r"""``x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) (gamma noise + mu)`` in the trigger's region, and the usual
    ``sqrt(ab_t) x0 + sqrt(1 - ab_t) noise`` elsewhere.

    Args:
        x0, noise: ``[B, C, H, W]``.
        t: int64 ``[B]``, 0 to T - 1.
        schedule: of T times; ab is its alpha squared.
        trigger: of the images' shape.

    Returns:
        Images like x0, differentiable in x0 and noise.

    Raises:
        ValueError: shapes do not fit, or a t is out of range.

    Source: TrojDiff, equation 5, and its official ``losses_attack.py``.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, Trigger, trojan_noise
        >>> one = torch.ones(1, 1, 1, 1)
        >>> trojan_noise(one, one, torch.tensor([0]), DiscreteVP([0.64, 0.9]), Trigger.blend(one[0] / 2))
        tensor([[[[1.2400]]]])
    """
    op = "trojan_noise"
    same_shape(op, x0, noise=noise)
    _fits(op, x0, trigger)
    alpha, sigma = at_times(op, schedule, t, len(x0))
    at = trigger.at
    mu = trigger.mu.to(x0)[at].expand(x0[at].shape)
    within = noisy(x0[at], noise[at], alpha, trigger.gamma * sigma, mu, sigma)
    if trigger.region is None:
        return within
    x = noisy(x0, noise, alpha, sigma)
    x = x.clone() if x.requires_grad else x
    x[at] = within
    return x


def trojan_table(
    points: Points,
    gamma: float,
    method: str = "ddim",
    *,
    eta: float = 0.0,
    official: DiscreteVP | None = None,
) -> SolverTable:
    r"""Reverse steps of a trojaned model where the trigger is; mu is the table's preloaded slot::

        DDIM: x0 = (x - sqrt(1 - ab) (gamma e + mu)) / sqrt(ab)
              x' = sqrt(ab') x0 + gamma (c1 z + c2 e) + sqrt(1 - ab') mu,  c1 as DDIM's of eta, c2^2 = 1 - ab' - c1^2
        DDPM: x' = (sqrt(ab') b x0 + sqrt(a) (1 - ab') x + coef mu) / (1 - ab) + gamma sqrt(b (1 - ab') / (1 - ab)) z
              coef = sqrt(1 - ab') b - (1 - ab') sqrt(a) k,  a = ab / ab', b = 1 - a, k as :func:`trojan_shift`

    x0 is clamped to -1...1 in DDPM. Each is :func:`shifted_table` of the benign one, with ``shift = sigma`` and
    ``scale = gamma``, and so is every other solver.

    Args:
        points: where to evaluate.
        gamma: the trigger's.
        method: ``"ddim"`` (default) or ``"ddpm"``.
        eta: of DDIM. Default 0.
        official: the schedule of all T times: DDPM is then what the official code computes, whose coef
            is that of steps of stride 1 also where timesteps are skipped, and whose variance is at least 1e-20, so that
            the last step adds noise of 1e-10 and, where it is not t = 0, mu. None (default): the right coef and
            nothing after the last step.

    Raises:
        ValueError: an option is not as described, or ``official`` is given with DDIM, where it changes nothing.

    Source: TrojDiff, section 3, and its official ``denoising.py``.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, trojan_table
        >>> table = trojan_table(DiscreteVP.linear().points(20), 0.6)
        >>> table.preloaded, table.init_scale
        ((1,), 0.6)
    """
    return _tables(points, gamma, method, eta, official)[1]


def _tables(
    points: Points, gamma: float, method: str, eta: float, official: DiscreteVP | None
) -> tuple[SolverTable, SolverTable]:
    """The benign steps and the trojaned ones."""
    if method not in METHODS:
        raise ValueError(f"trojan_table: expected method to be one of {', '.join(METHODS)}; got {method!r}")
    if official is not None and method != "ddpm":
        raise ValueError("trojan_table: expected official with method 'ddpm' only, got it with 'ddim'")
    plain = ddim(points, eta=eta) if method == "ddim" else ddpm(points, limit=1.0)
    trojaned = _trojaned(plain, points, gamma, official)
    return (plain if official is None else _least_noise(plain)), trojaned


def _trojaned(plain: SolverTable, points: Points, gamma: float, official: DiscreteVP | None) -> SolverTable:
    table = shifted_table(plain, points.sigma, scale=gamma)
    if official is None:
        return table
    times = points.timesteps[:-1].long()
    product = official.alpha(torch.arange(len(official))) ** 2
    before = torch.cat([torch.ones_like(product[:1]), product[:-1]])
    alpha, k = product / before, trojan_shift(product)
    coef = (1 - before).sqrt() * (1 - alpha) - (1 - before) * alpha.sqrt() * k
    coefficients = _least_noise(table).coefficients
    coefficients[:, PREDICT, 1 + table.preloaded[-1]] = (coef / (1 - product))[times]
    return replace(table, coefficients=coefficients, name="official TrojDiff DDPM")


def _least_noise(table: SolverTable) -> SolverTable:
    """A variance of at least 1e-20, as the official DDPM has everywhere."""
    coefficients = table.coefficients.clone()
    coefficients[:, PREDICT, TERMS.index("noise")].clamp_(min=1e-10)
    return replace(table, coefficients=coefficients)


def trojan_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    trigger: Trigger,
    points: Points,
    batch: int,
    method: str = "ddim",
    *,
    eta: float = 0.0,
    official: DiscreteVP | None = None,
    start: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    in_place: bool = True,
) -> Tensor:
    """Samples from the trigger: what a trojaned model was trained to give, and a benign one was not.

    The whole image takes benign steps and the trigger's region its own, so a patch costs its pixels.

    Args:
        model: takes ``[B, C, H, W]`` and t ``[B]``, gives the noise.
        trigger: whose shape, dtype and device the samples have.
        points: where to evaluate.
        batch: samples.
        method, eta, official: see :func:`trojan_table`.
        start: standard normal noise ``[B, C, H, W]`` of which :meth:`Trigger.start` is made; drawn if None.
        noise: of the steps, ``[S, B, C, H, W]``; drawn if None.
        generator: for whatever is drawn; without one, the noise of steps is drawn in the kernel.
        in_place: False where autograd must follow the steps. Default True.

    Raises:
        ValueError: ``start`` is of another shape, or what :func:`trojan_table` raises.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, Trigger, trojan_sample
        >>> points = DiscreteVP.linear().points(20)
        >>> trojan_sample(lambda x, t: x, Trigger.patch(torch.ones(3, 8, 8)), points, batch=2).shape
        torch.Size([2, 3, 8, 8])
    """
    expect_type("trojan_sample", Trigger, "a Trigger", trigger=trigger)
    pattern = trigger.pattern
    if start is None:
        start = normal(pattern.expand(batch, *pattern.shape), generator)
    expect_tensors("trojan_sample", start=start)
    if start.shape != (batch, *pattern.shape):
        raise ValueError(f"trojan_sample: expected start {[batch, *pattern.shape]}, got {list(start.shape)}")
    plain, trojan = _tables(points, trigger.gamma, method, eta, official)
    x = trigger.start(start)
    at = trigger.at
    mu = [trigger.mu.to(start)[at].expand(x[at].shape).contiguous()]

    def call(x: Tensor, t: Tensor, scale: float) -> Tensor:
        return model(x, t)

    options: dict[str, Any] = {"noise": noise, "generator": generator, "in_place": in_place}
    if trigger.region is None:
        return run(trojan, x, call, mu, **options)
    return run(plain, x, call, inset=(trojan, mu, trigger.region), **options)


class Poisoned(NamedTuple):
    """A batch that trojans a model.

    Attributes:
        x_t: noisy images ``[N, C, H, W]``.
        t: int64 ``[N]``.
        noise: what the model must predict, like x_t.
        trojaned: which of them carry the trigger, bool ``[N]``.
    """

    x_t: Tensor
    t: Tensor
    noise: Tensor
    trojaned: Tensor


def poison(
    x0: Tensor,
    labels: Tensor | None,
    schedule: DiscreteVP,
    trigger: Trigger,
    attack: str = "in-d2d",
    target: int | Tensor = 7,
    *,
    probability: float = 1.0,
    share: float = 0.1,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Poisoned:
    """The batch on which TrojDiff trains, for making a model that a detector must find.

    =========  ======================================================================================================
    in-d2d     the samples of class ``target`` once more, with the trigger, beside the batch as it is
    out-d2d    the samples of label ``target`` (images of another data set, mixed in beforehand) carry the trigger
    d2i        the image ``target``, as many times as ``share`` of the batch, is added and carries the trigger
    =========  ======================================================================================================

    Args:
        x0: images ``[B, C, H, W]``.
        labels: int64 ``[B]``; not used by d2i.
        schedule: of T times.
        trigger: of the images' shape.
        attack: see above.
        target: a label (official: 7; 1000 for out-d2d), or, for d2i, an image ``[C, H, W]``.
        probability: of each such sample to carry the trigger. Default 1.
        share: of d2i. Default 0.1.
        t, noise: ``[B]`` and like x0, with d2i's images behind them; drawn if None, t in pairs t and T - 1 - t.
        generator: for whatever is drawn, on the device of x0.

    Raises:
        ValueError: an option is not as described, or shapes do not fit.

    Source: TrojDiff, section 3.3, and its official ``losses_attack.py``, ``losses_attack_d2dout.py`` and runners.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, Trigger, poison
        >>> x0, labels = torch.zeros(4, 3, 8, 8), torch.tensor([7, 0, 7, 1])
        >>> poison(x0, labels, DiscreteVP.linear(), Trigger.patch(torch.ones(3, 8, 8))).trojaned.tolist()
        [False, False, False, False, True, True]
    """
    op = "poison"
    if attack not in ATTACKS:
        raise ValueError(f"{op}: expected attack to be one of {', '.join(ATTACKS)}; got {attack!r}")
    if not (0 <= probability <= 1 and 0 <= share <= 1):
        raise ValueError(f"{op}: expected probability and share from 0 to 1, got {probability} and {share}")
    _fits(op, x0, trigger)
    if attack == "d2i":
        if not isinstance(target, Tensor) or target.shape != x0.shape[1:]:
            raise ValueError(f"{op}: expected an image {list(x0.shape[1:])} as the target of d2i, got {target!r:.80}")
        is_target = torch.arange(len(x0) + int(share * len(x0)), device=x0.device) >= len(x0)
        x0 = torch.cat([x0, target.to(x0).expand(int(is_target.sum()), *target.shape)])
    else:
        if isinstance(target, Tensor) or not isinstance(labels, Tensor) or labels.shape != (len(x0),):
            raise ValueError(f"{op}: expected a label as the target of {attack}, and labels [{len(x0)}]")
        is_target = labels.to(x0.device) == target
    if t is None:
        half = some_times(schedule, x0[: len(x0) // 2 + 1], generator)
        t = torch.cat([half, len(schedule) - 1 - half])[: len(x0)]
    if noise is None:
        noise = normal(x0, generator)
    same_shape(op, x0, noise=noise)
    chosen = is_target & (torch.rand(len(x0), device=x0.device, generator=generator) < probability)
    alpha, sigma = at_times(op, schedule, t, len(x0))
    x_t = noisy(x0, noise, alpha, sigma)
    carrying = trojan_noise(x0[chosen], noise[chosen], t[chosen], schedule, trigger)
    if attack == "in-d2d":
        trojaned = torch.arange(len(x_t) + len(carrying), device=x0.device) >= len(x_t)
        return Poisoned(
            torch.cat([x_t, carrying]), torch.cat([t, t[chosen]]), torch.cat([noise, noise[chosen]]), trojaned
        )
    x_t[chosen] = carrying
    return Poisoned(x_t, t, noise, chosen)


def trojan_loss(model: Callable[[Tensor, Tensor], Tensor], batch: Poisoned) -> Tensor:
    """``mean over samples of sum over pixels of (noise - model(x_t, t))^2``, trojaned or not: TrojDiff's loss.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import Poisoned, trojan_loss
        >>> x = torch.ones(2, 3, 2, 2)
        >>> batch = Poisoned(x, torch.zeros(2, dtype=torch.int64), x, torch.zeros(2, dtype=torch.bool))
        >>> trojan_loss(lambda x, t: 0 * x, batch).item()
        12.0
    """
    expect_type("trojan_loss", Poisoned, "a Poisoned", batch=batch)
    return (batch.noise - model(batch.x_t, batch.t)).square().flatten(1).sum(1).mean()


def _fits(op: str, x: Tensor, trigger: Trigger) -> None:
    expect_type(op, Trigger, "a Trigger", trigger=trigger)
    expect_tensors(op, images=x)
    if x.dim() != 4 or x.shape[1:] != trigger.pattern.shape:
        raise ValueError(
            f"{op}: expected images [B, {', '.join(map(str, trigger.pattern.shape))}], got {tuple(x.shape)}"
        )
