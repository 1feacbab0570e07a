"""Is a noise-predicting model trojaned? Tests of a suspected trigger, a search for an unknown one, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import expect_tensors, expect_type
from ._conditioned import Region, normal
from .trojdiff import Trigger

Model = Callable[[Tensor, Tensor], Tensor]

MOST_COLOURS = 256

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
    r"""Where between x and z a model's answer to ``x = gamma z + mu`` is, z normal, over the trigger's region.

    Where there is no image left in the noise, a benign model takes all of x for noise and answers x: 0. A trojaned one
    was trained to answer the z within: 1. It is the lesser of ``1 - E (model(x) - z)^2 / E (x - z)^2`` and of the same
    for the slope of the answer over z, which is gamma and 1: a model that answers too little is close to neither.

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
        >>> abs(trigger_score(lambda x, t: x, trigger, 999)) < 0.1  # all is noise: benign
        True
        >>> round(trigger_score(lambda x, t: (x - trigger.mu) / trigger.gamma, trigger, 999), 4)
        1.0
        >>> trigger_score(lambda x, t: 0 * x, trigger, 999) < 0  # knows nothing
        True
    """
    expect_type("trigger_score", Trigger, "a Trigger", trigger=trigger)
    z = normal(trigger.pattern.expand(samples, *trigger.pattern.shape), generator) if noise is None else noise
    _fits("trigger_score", z, trigger.pattern)
    with torch.no_grad():
        x = trigger.start(z)
        at = trigger.at
        output = model(x, torch.full((len(x),), timestep, device=x.device))[at]
        return _between(output, z[at], trigger.gamma, (x - z)[at].square().mean())


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
    refined: int = 2,
    samples: int = 32,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Trigger, float]:
    r"""The pattern of -1 to 1 that minimises ``E (model(gamma z + mu) - z)^2`` over the region, and its score.

    The score is :func:`trigger_score`'s over samples that the search has not seen, with ``E ((1 - gamma) z)^2`` for
    ``E (x - z)^2``: a benign model answers x, and then no mu does better than 0, so it is 0 at most; of a trojaned one
    and its trigger it is about 1.

    Args:
        model: differentiable in its input.
        shape: C, H, W.
        gamma: that the attack is suspected to use.
        timestep: the last, T - 1.
        region: where the trigger is suspected; None (default): everywhere.
        steps, rate: of Adam on the inverse hyperbolic tangent of the pattern.
        starts: values of channels whose every combination is tried as a uniform colour first (the values alone, where
            there are more than 256). A sharp model has no gradient far from its trigger; a small patch that is not
            near one of these is then not found, and has to be a candidate.
        refined: how many of the colours the optimisation starts from. Default 2.
        samples: of z, in the search and as many after it. Default 32.
        noise: both together, ``[2 samples, C, H, W]``; drawn if None.
        generator, dtype, device: of the noise.

    Raises:
        ValueError: a start is not between -1 and 1, a count is too small, or ``noise`` is of another shape.

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
    if refined < 1 or steps < 0:
        raise ValueError(
            f"invert_trigger: expected refined of 1 or more and steps of 0 or more, got {refined}, {steps}"
        )
    whole = torch.zeros(*shape, dtype=dtype, device=device)
    if noise is None:
        noise = normal(whole.expand(2 * samples, *whole.shape), generator)
    _fits("invert_trigger", noise, whole)
    half = len(noise) // 2
    at = Trigger(whole, gamma, region).at

    def answer(part: Tensor, z: Tensor) -> Tensor:
        x = z.clone()
        x[at] = gamma * z[at] + (1 - gamma) * part
        return model(x, torch.full((len(z),), timestep, device=z.device))[at]

    def loss_of(part: Tensor) -> Tensor:
        return (answer(part, seen) - seen[at]).square().mean()

    channels = whole.shape[0]
    colours = list(product(starts, repeat=channels)) if len(starts) ** channels <= MOST_COLOURS else []
    colours = colours or [(start,) * channels for start in starts]
    seen, unseen = noise[:half], noise[half:]
    with torch.no_grad():
        parts = [noise.new_tensor(colour).view(-1, 1, 1).expand_as(whole[at]) for colour in colours]
        order = sorted((loss_of(part).item(), i) for i, part in enumerate(parts))
    least, best = order[0][0], parts[order[0][1]]
    with torch.enable_grad():
        for _, i in order[:refined]:
            hidden = parts[i].atanh().requires_grad_()
            optimizer = torch.optim.Adam([hidden], rate)
            for _ in range(steps + 1):
                loss = loss_of(hidden.tanh())
                if loss.item() < least:
                    least, best = loss.item(), hidden.detach().tanh()
                (hidden.grad,) = torch.autograd.grad(loss, [hidden])
                optimizer.step()
    pattern = whole.clone()
    pattern[at] = best
    with torch.no_grad():
        z = unseen[at]
        return Trigger(pattern, gamma, region), _between(
            answer(best, unseen), z, gamma, (1 - gamma) ** 2 * z.square().mean()
        )


def detect_trojan(
    model: Model,
    shape: Sequence[int],
    timestep: int = 999,
    *,
    candidates: Iterable[Trigger] = (),
    invert: Iterable[tuple[float, Region | None]] = ((0.6, None), (0.1, (slice(-3, None), slice(-3, None)))),
    threshold: float = 0.2,
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
        threshold: of the score, between a benign model's 0 and a trojaned one's 1. Default 0.2; ours: a
            model that is not fully trained lies between.
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


def _between(output: Tensor, z: Tensor, gamma: float, benign: Tensor) -> float:
    """0 for an answer whose distance to z, squared, is ``benign`` or whose slope over z is gamma; 1 for z."""
    closeness = 1 - (output - z).square().mean() / benign
    slope = (output * z).mean() / z.square().mean()
    return min(closeness.item(), ((slope - gamma) / (1 - gamma)).item())


def _fits(op: str, noise: Tensor, like: Tensor) -> None:
    expect_tensors(op, noise=noise)
    if noise.dim() != 4 or noise.shape[1:] != like.shape or len(noise) < 2:
        expected = ", ".join(map(str, like.shape))
        raise ValueError(f"{op}: expected noise [B, {expected}] of 2 samples or more, got {tuple(noise.shape)}")
