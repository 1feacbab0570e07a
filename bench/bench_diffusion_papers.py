"""Steps of DiffuseVAE and TrojDiff beside their formulas, and LowDiff's cascade beside the loop that concatenates and
interpolates at every step; noise of real CIFAR-10 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from harness import Candidate, Workload, cases, compare
from measure import DEVICE
from paired import Paired
from torch import Tensor, nn

from fastcifar.data import cifar10
from fastcifar.diffusion import SolverTable, Trigger, diffusevae_table, lowdiff_sample, trojan_table
from fastcifar.diffusion._ancestral import ddpm_table, linear_alphas_cumprod, points_of
from fastcifar.diffusion.reference import solver_step

PRODUCT = linear_alphas_cumprod()
POINTS = points_of(PRODUCT, torch.arange(0, 1000, 50).flip(0))
STEP = 9  # of 20, in the middle
AB, AB1 = (float(POINTS.alpha[i] ** 2) for i in (STEP, STEP + 1))
BETA = 1 - AB / AB1
C1, C2 = BETA * AB1**0.5 / (1 - AB), (1 - BETA) ** 0.5 * (1 - AB1) / (1 - AB)
SMALL_DEVIATION, LARGE_DEVIATION = (BETA * (1 - AB1) / (1 - AB)) ** 0.5, BETA**0.5
BATCH = 64
BLEND = Trigger.blend(torch.linspace(-1, 1, 3 * 32 * 32).view(3, 32, 32))
PATCH = Trigger.patch(torch.ones(3, 32, 32))


def images() -> Tensor:
    return cifar10(split="test")[0][:BATCH].float() / 127.5 - 1


def noisy(*more: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """x_t, a prediction of its noise that is a little off, and whatever else a step takes."""
    generator = torch.Generator().manual_seed(0)
    eps, off = (torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2))
    x = AB**0.5 * images() + (1 - AB) ** 0.5 * eps
    return (x, eps + 0.1 * off, *(make() for make in more), torch.randn(x.shape, generator=generator))


def blurred() -> Tensor:
    """Stands for what a VAE decodes."""
    return F.avg_pool2d(images(), 5, 1, 2)


# ---- DiffuseVAE ------------------------------------------------------------------------------------------------------


def second_formulation(x: Tensor, e: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    x0 = ((x - xhat) * (1 / AB) ** 0.5 - (1 / AB - 1) ** 0.5 * e).clamp(-1, 1)
    return C1 * x0 + C2 * x + (1 - C2) * xhat + LARGE_DEVIATION * z


def guided_second_formulation(x: Tensor, e: Tensor, u: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    return second_formulation(x, 1.5 * e - 0.5 * u, xhat, z)


def ours(table: SolverTable) -> Callable[..., Tensor]:
    rows = table.coefficients[STEP]

    def step(x: Tensor, e: Tensor, image: Tensor, z: Tensor) -> Tensor:
        return solver_step(x, e, (image,), rows, z, limit=table.limit).x_next

    return step


def ours_guided(table: SolverTable) -> Callable[..., Tensor]:
    rows = table.coefficients[STEP]

    def step(x: Tensor, e: Tensor, u: Tensor, image: Tensor, z: Tensor) -> Tensor:
        return solver_step(x, e, (image,), rows, z, u, 1.5, table.limit).x_next

    return step


# ---- TrojDiff --------------------------------------------------------------------------------------------------------


def trojaned_everywhere(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    mu, gamma = BLEND.mu.to(x), BLEND.gamma
    k = (1 - AB) ** 0.5 - (1 - BETA) ** 0.5 * (1 - AB1) ** 0.5
    coef = (1 - AB1) ** 0.5 * BETA - (1 - AB1) * (1 - BETA) ** 0.5 * k
    x0 = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e * gamma - (1 / AB - 1) ** 0.5 * mu
    mean = (AB1**0.5 * BETA * x0.clamp(-1, 1) + (1 - BETA) ** 0.5 * (1 - AB1) * x + coef * mu) / (1 - AB)
    return mean + gamma * SMALL_DEVIATION * z


def trojaned_patch(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    """As the official code: both for the whole image, and the patch copied."""
    mu, gamma = PATCH.mu.to(x), PATCH.gamma
    k = (1 - AB) ** 0.5 - (1 - BETA) ** 0.5 * (1 - AB1) ** 0.5
    coef = (1 - AB1) ** 0.5 * BETA - (1 - AB1) * (1 - BETA) ** 0.5 * k
    inner = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e * gamma - (1 / AB - 1) ** 0.5 * mu
    x0 = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e
    x0[PATCH.at] = inner[PATCH.at]
    plain = (AB1**0.5 * BETA * x0.clamp(-1, 1) + (1 - BETA) ** 0.5 * (1 - AB1) * x) / (1 - AB)
    inner = plain + coef * mu / (1 - AB) + gamma * SMALL_DEVIATION * z
    plain = plain + SMALL_DEVIATION * z
    plain[PATCH.at] = inner[PATCH.at]
    return plain


def ours_everywhere(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    table = trojan_table(POINTS, BLEND.gamma, "ddpm")
    return solver_step(x, e, (BLEND.mu.to(x).expand(x.shape),), table.coefficients[STEP], z, limit=1.0).x_next


def ours_patch(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    at, limit = PATCH.at, 1.0
    whole = solver_step(x, e, (), ddpm_table(POINTS, "fixedsmall").coefficients[STEP], z, limit=limit).x_next
    rows = trojan_table(POINTS, PATCH.gamma, "ddpm").coefficients[STEP]
    whole[at] = solver_step(x[at], e[at], (PATCH.mu.to(x)[at].expand(x[at].shape),), rows, z[at], limit=limit).x_next
    return whole
