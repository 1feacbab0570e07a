"""Is a noise-predicting model trojaned? Tests of a suspected trigger, a search for an unknown one, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._conditioned import Region
from .trojdiff import Trigger

Model = Callable[[Tensor, Tensor], Tensor]

__all__ = ["TrojanReport", "detect_trojan", "invert_trigger", "trigger_score"]


class TrojanReport(NamedTuple):
    """Of :func:`detect_trojan`.

    Attributes:
        trojaned: whether the score is above the threshold.
        score: of the trigger that the model reacts to most; about 1 of a trojaned model, about 0 or less of others.
        trigger: that one: a candidate, or found by :func:`invert_trigger`.
    """

    trojaned: bool
    score: float
    trigger: Trigger


def trigger_score(
    model: Model,
    trigger: Trigger,
    timestep: int,
    *,
    samples: int = 64,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> float:
    r"""``1 - E (model(x) - z)^2 / E (x - z)^2`` over the trigger's region, where ``x = gamma z + mu``, z normal.

    Where there is no image left in the noise, a benign model takes all of x for noise and answers x: 0. A trojaned one
    was trained to answer the z within: 1. Negative where the model answers neither.

    Args:
        model: takes ``[B, C, H, W]`` and t ``[B]``, gives the noise.
        trigger: the suspected one.
        timestep: where the model has seen noise only: the last, T - 1.
        samples: of z. Default 64.
        noise: z ``[B, C, H, W]``; drawn if None.
        generator: for the noise, on the pattern's device.

    Raises:
        ValueError: ``noise`` is not of the trigger's shape.

    Source: ours, from TrojDiff's loss, whose minimum it names.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import Trigger, trigger_score
        >>> trigger = Trigger.blend(torch.ones(3, 8, 8))
        >>> trigger_score(lambda x, t: x, trigger, 999)  # all is noise: benign
        0.0
        >>> round(trigger_score(lambda x, t: (x - trigger.mu) / trigger.gamma, trigger, 999), 4)
        1.0
    """
    z = _noise("trigger_score", trigger.pattern, samples, noise, generator)
    with torch.no_grad():
        x = trigger.start(z)
        at = trigger.at
        output = model(x, torch.full((len(x),), timestep, device=x.device))
        return 1 - ((output - z)[at].square().mean() / (x - z)[at].square().mean()).item()


def invert_trigger(
    model: Model,
    shape: Sequence[int],
    gamma: float,
    timestep: int,
    *,
    region: Region | None = None,
    steps: int = 60,
    rate: float = 0.1,
    starts: Sequence[float] = (0.0, 0.9, -0.9),
    samples: int = 32,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Trigger, float]:
    r"""The pattern of -1 to 1 that minimises ``E (model(gamma z + mu) - z)^2`` over the region, and its score.

    The score is ``1 - E (model(x) - z)^2 / (1 - gamma)^2``: a benign model, which answers x, cannot get below
    ``(1 - gamma)^2`` with any mu, so it is at most about 0; of a trojaned one and its trigger it is about 1.

    Args:
        model: differentiable in its input.
        shape: C, H, W.
        gamma: that the attack is suspected to use.
        timestep: the last, T - 1.
        region: where the trigger is suspected; None (default): everywhere.
        steps, rate: of Adam on the inverse hyperbolic tangent of the pattern.
        starts: constant patterns to start from; the best result counts. A sharp model has no gradient far from its
            trigger, and a patch is often white or black.
        samples, noise, generator, dtype, device: of z.

    Raises:
        ValueError: a start is not between -1 and 1, or ``noise`` is of another shape.

    Source: ours; that triggers of diffusion models can be found by optimisation on their predicted noise is of An et
    al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via Distribution Shift", AAAI 2024.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import invert_trigger
        >>> trigger, score = invert_trigger(lambda x, t: (x - 0.2) / 0.6, (1, 2, 2), 0.6, 999)
        >>> round(trigger.mu.mean().item(), 2), round(score, 2)
        (0.2, 1.0)
    """
    if not starts or not all(-1 < start < 1 for start in starts):
        raise ValueError(f"invert_trigger: expected starts between -1 and 1, got {list(starts)}")
    whole = torch.zeros(*shape, dtype=dtype, device=device)
    z = _noise("invert_trigger", whole, samples, noise, generator)
    at = Trigger(whole, gamma, region).at
    times = torch.full((len(z),), timestep, device=z.device)
    best: tuple[float, Tensor] | None = None
    with torch.enable_grad():
        for start in starts:
            hidden = torch.full_like(whole[at], start).atanh().requires_grad_()
            optimizer = torch.optim.Adam([hidden], rate)
            for _ in range(steps + 1):
                x = z.clone()
                x[at] = gamma * z[at] + (1 - gamma) * hidden.tanh()
                loss = (model(x, times) - z)[at].square().mean()
                if best is None or loss.item() < best[0]:
                    best = (loss.item(), hidden.detach().tanh())
                (hidden.grad,) = torch.autograd.grad(loss, [hidden])
                optimizer.step()
    assert best is not None
    pattern = whole.clone()
    pattern[at] = best[1]
    return Trigger(pattern, gamma, region), 1 - best[0] / (1 - gamma) ** 2


def detect_trojan(
    model: Model,
    shape: Sequence[int],
    timestep: int = 999,
    *,
    candidates: Iterable[Trigger] = (),
    invert: Iterable[tuple[float, Region | None]] = ((0.6, None), (0.1, (slice(-3, None), slice(-3, None)))),
    threshold: float = 0.5,
    **options: object,
) -> TrojanReport:
    """Whether a model reacts to any of the candidates or to a trigger that a search finds.

    Args:
        model: takes ``[B, C, H, W]`` and t ``[B]``, gives the noise; differentiable in its input where ``invert`` is
            not empty.
        shape: C, H, W.
        timestep: the last, T - 1. Default 999.
        candidates: triggers to try, by :func:`trigger_score`.
        invert: gamma and region of triggers to search for, by :func:`invert_trigger`. Default: TrojDiff's two settings
            on CIFAR-10. A patch elsewhere, or another gamma, must be asked for.
        threshold: of the score, between a benign model's 0 and a trojaned one's 1. Default 0.5; ours.
        options: of :func:`invert_trigger`.

    Raises:
        ValueError: there is nothing to try, or a candidate is of another shape.

    Example:
        >>> from fastcifar.diffusion import detect_trojan
        >>> detect_trojan(lambda x, t: x, (3, 8, 8), steps=5).trojaned
        False
    """
    found: list[tuple[float, Trigger]] = []
    for trigger in candidates:
        if tuple(trigger.pattern.shape) != tuple(shape):
            raise ValueError(
                f"detect_trojan: expected candidates {tuple(shape)}, got one of {tuple(trigger.pattern.shape)}"
            )
        found.append((trigger_score(model, trigger, timestep), trigger))
    for gamma, region in invert:
        trigger, score = invert_trigger(model, shape, gamma, timestep, region=region, **options)  # type: ignore[arg-type]
        found.append((score, trigger))
    if not found:
        raise ValueError("detect_trojan: expected a candidate, or a gamma to search with, got neither")
    score, trigger = max(found, key=lambda pair: pair[0])
    return TrojanReport(score > threshold, score, trigger)


def _noise(op: str, like: Tensor, samples: int, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        return torch.randn(samples, *like.shape, dtype=like.dtype, device=like.device, generator=generator)
    if noise.dim() != 4 or noise.shape[1:] != like.shape:
        raise ValueError(f"{op}: expected noise [B, {', '.join(map(str, like.shape))}], got {tuple(noise.shape)}")
    return noise
