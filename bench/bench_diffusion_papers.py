"""Steps of DiffuseVAE and TrojDiff beside their formulas, and LowDiff's cascade beside the loop that concatenates and
interpolates at every step; noise of real CIFAR-10 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import Candidate, Workload, cases, compare
from measure import DEVICE
from paired import Paired
from torch import Tensor, nn

from fastcifar.data import cifar10
from fastcifar.diffusion import (
    DiscreteVP,
    SolverTable,
    Trigger,
    ddim,
    ddpm,
    diffusevae_sample,
    diffusevae_table,
    lowdiff_sample,
    solver_step,
    trojan_sample,
    trojan_table,
)

POINTS = DiscreteVP.linear().points(20)
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


def blurred() -> Tensor:
    """Stands for what a VAE decodes."""
    return F.avg_pool2d(images(), 5, 1, 2)


def inputs(outputs: int, *, shifted: bool) -> tuple[Tensor, ...]:
    """x_t of real images, predictions of its noise that are a little off, a reconstruction, and noise of the step."""
    generator = torch.Generator().manual_seed(0)
    eps, z, *off = (torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2 + outputs))
    x = AB**0.5 * images() + (1 - AB) ** 0.5 * eps
    predictions = [eps + 0.1 * other for other in off]
    return (x + blurred(), *predictions, blurred(), z) if shifted else (x, *predictions, z)


# ---- DiffuseVAE ------------------------------------------------------------------------------------------------------


def second_formulation(x: Tensor, e: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    x0 = ((x - xhat) * (1 / AB) ** 0.5 - (1 / AB - 1) ** 0.5 * e).clamp(-1, 1)
    return C1 * x0 + C2 * x + (1 - C2) * xhat + LARGE_DEVIATION * z


def guided_second_formulation(x: Tensor, e: Tensor, u: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    return second_formulation(x, 1.5 * e - 0.5 * u, xhat, z)


SECOND = diffusevae_table(POINTS, 2)
SECOND_ROWS = SECOND.coefficients[STEP].tolist()


def ours_second(x: Tensor, e: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    return solver_step(x, e, (xhat,), SECOND_ROWS, z, limit=1.0).x_next


def ours_guided_second(x: Tensor, e: Tensor, u: Tensor, xhat: Tensor, z: Tensor) -> Tensor:
    return solver_step(x, e, (xhat,), SECOND_ROWS, z, u, 1.5, 1.0).x_next


# ---- TrojDiff --------------------------------------------------------------------------------------------------------


K = (1 - AB) ** 0.5 - (1 - BETA) ** 0.5 * (1 - AB1) ** 0.5
COEF = (1 - AB1) ** 0.5 * BETA - (1 - AB1) * (1 - BETA) ** 0.5 * K
PLAIN_ROWS = ddpm(POINTS, limit=1.0).coefficients[STEP].tolist()
BLEND_ROWS, PATCH_ROWS = (
    trojan_table(POINTS, trigger.gamma, "ddpm").coefficients[STEP].tolist() for trigger in (BLEND, PATCH)
)
BLEND_MU, PATCH_MU = BLEND.mu.to(DEVICE), PATCH.mu.to(DEVICE)
BLEND_IMAGES = BLEND_MU.expand(BATCH, 3, 32, 32).contiguous()  # once a run
PATCH_IMAGES = PATCH_MU[PATCH.at].expand(BATCH, 3, 3, 3).contiguous()


def trojaned_everywhere(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    x0 = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e * BLEND.gamma - (1 / AB - 1) ** 0.5 * BLEND_MU
    mean = AB1**0.5 * BETA * x0.clamp(-1, 1) + (1 - BETA) ** 0.5 * (1 - AB1) * x + COEF * BLEND_MU
    return mean / (1 - AB) + BLEND.gamma * SMALL_DEVIATION * z


def trojaned_patch(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    """As the official code does it: both of the whole image, and the patch copied."""
    inner = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e * PATCH.gamma - (1 / AB - 1) ** 0.5 * PATCH_MU
    x0 = (1 / AB) ** 0.5 * x - (1 / AB - 1) ** 0.5 * e
    x0[PATCH.at] = inner[PATCH.at]
    mean = AB1**0.5 * BETA * x0.clamp(-1, 1) + (1 - BETA) ** 0.5 * (1 - AB1) * x
    inner = (mean + COEF * PATCH_MU) / (1 - AB) + PATCH.gamma * SMALL_DEVIATION * z
    plain = mean / (1 - AB) + SMALL_DEVIATION * z
    plain[PATCH.at] = inner[PATCH.at]
    return plain


def ours_everywhere(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    return solver_step(x, e, (BLEND_IMAGES,), BLEND_ROWS, z, limit=1.0).x_next


def ours_patch(x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    at = PATCH.at
    within = solver_step(x[at], e[at], (PATCH_IMAGES,), PATCH_ROWS, z[at], limit=1.0).x_next
    whole = solver_step(x, e, (), PLAIN_ROWS, z, limit=1.0).x_next
    whole = whole.clone() if whole.requires_grad else whole
    whole[at] = within
    return whole


# ---- steps -----------------------------------------------------------------------------------------------------------


def workload(title: str, tensors: int, make: Callable[[], tuple[Tensor, ...]]) -> Workload:
    """Least traffic: forward reads ``tensors`` and writes one; backward reads the gradient and what decides the clamp
    (all but the noise), and writes a gradient of each."""
    return Workload(
        family="diffusion",
        op="solver_step",
        title=f"{title}, [{BATCH},3,32,32]",
        make=make,
        elements=BATCH * 3 * 32 * 32,
        forward_bytes=4 * (tensors + 1),
        backward_bytes=4 * (1 + tensors - 1 + tensors),
        forward_flops=4 * tensors,
        backward_flops=4 * tensors,
        output_tolerance=1e-5,  # of sums in another order, and clamped values aside
        gradient_tolerance=1e-5,
    )


STEPS = {
    "DiffuseVAE, formulation 2": (4, partial(inputs, 1, shifted=True), second_formulation, ours_second),
    "DiffuseVAE, formulation 2, guided": (
        5,
        partial(inputs, 2, shifted=True),
        guided_second_formulation,
        ours_guided_second,
    ),
    "TrojDiff DDPM, blend": (3, partial(inputs, 1, shifted=False), trojaned_everywhere, ours_everywhere),
    "TrojDiff DDPM, patch": (3, partial(inputs, 1, shifted=False), trojaned_patch, ours_patch),
}
WORKLOADS = {workload(name, count, make): (plain, ours) for name, (count, make, plain, ours) in STEPS.items()}


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(function)


@cases(WORKLOADS)
def test_step(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    plain, ours = WORKLOADS[workload]
    candidates = [
        Candidate("eager", "reference", lambda: plain),
        Candidate("torch.compile", "compiled", lambda: compiled(plain)),
        Candidate("fastcifar", "ours", lambda: ours),
    ]
    compare(paired, workload, mode, mapped, candidates)


# ---- LowDiff ---------------------------------------------------------------------------------------------------------

SIZES = [(8, 8), (16, 16), (32, 32)]
COUNTS = (8, 5, 3)


class Nearly(nn.Module):
    """Hardly a model: its answer is made beforehand, so that what is left is the sampler's own cost."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.answers = [torch.randn(BATCH, 3, *size, generator=generator).to(DEVICE) for size in SIZES]

    def forward(self, x: Tensor, t: Tensor, level: int) -> Tensor:
        return self.answers[level]


class Convolutions(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Conv2d(6, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.to(DEVICE)

    def forward(self, x: Tensor, t: Tensor, level: int) -> Tensor:
        return self.layers(x)


def plain_cascade(model: nn.Module, tables: Sequence[SolverTable], starts: Sequence[Tensor]) -> Tensor:
    """cat and interpolate at every step, DDIM as it is usually written."""
    lower: Tensor | None = None
    for level, (table, x) in enumerate(zip(tables, starts, strict=True)):
        points = DiscreteVP.linear().points(COUNTS[level])
        ab = (points.alpha**2).tolist()
        for i, t in enumerate(table.timesteps.tolist()):
            condition = torch.zeros_like(x) if lower is None else F.interpolate(lower, x.shape[2:], mode="nearest")
            e = model(torch.cat([x, condition], 1), x.new_full((len(x),), t), level)
            x0 = (x - (1 - ab[i]) ** 0.5 * e) / ab[i] ** 0.5
            x = ab[i + 1] ** 0.5 * x0 + (1 - ab[i + 1]) ** 0.5 * e
        lower = x
    return x


def race(paired: Paired, op: str, title: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor]) -> None:
    """Of whole samplings, which must give the same images."""
    expected, got = plain(), ours()
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()):
        pytest.fail(f"fastcifar: the images differ by {(got - expected).abs().max():.2e}")
    paired.describe("diffusion", op=op, workload=title, mode="call")
    paired.record("eager", role="reference", target=None, note="")
    paired.record("fastcifar", role="ours", target=None, note="in place")
    paired.time({"eager": plain, "fastcifar": ours})


@pytest.mark.parametrize("model", [Nearly, Convolutions], ids=["no model", "two convolutions"])
@torch.no_grad()
def test_cascade(paired: Paired, model: type[nn.Module]) -> None:
    net = model()
    tables = [ddim(DiscreteVP.linear().points(count)) for count in COUNTS]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(BATCH, 3, *size, generator=generator).to(DEVICE) for size in SIZES]
    what = "no model" if model is Nearly else "two convolutions"
    race(
        paired,
        "lowdiff",
        f"{BATCH} images, 8 steps of 8 x 8, 5 of 16 x 16, 3 of 32 x 32, {what}",
        lambda: plain_cascade(net, tables, starts),
        lambda: lowdiff_sample(net, BATCH, tables, SIZES, mode="nearest", start=starts, device=DEVICE)[-1],
    )


# ---- whole samplings with a patch and with a reconstruction, 20 steps of DDPM ----------------------------------------


def plain_trojan(model: nn.Module, start: Tensor, noise: Tensor) -> Tensor:
    """The official loop, with the right coefficient of mu."""
    x, at, gamma, ab = PATCH.start(start), PATCH.at, PATCH.gamma, (POINTS.alpha**2).tolist()
    for i, t in enumerate(POINTS.timesteps[:-1].tolist()):
        now, then = ab[i], ab[i + 1]
        beta, e = 1 - now / then, model(x, x.new_full((len(x),), t), 2)
        k = (1 - now) ** 0.5 - (1 - beta) ** 0.5 * (1 - then) ** 0.5
        coef = (1 - then) ** 0.5 * beta - (1 - then) * (1 - beta) ** 0.5 * k
        inner = (1 / now) ** 0.5 * x - (1 / now - 1) ** 0.5 * e * gamma - (1 / now - 1) ** 0.5 * PATCH_MU
        x0 = (1 / now) ** 0.5 * x - (1 / now - 1) ** 0.5 * e
        x0[at] = inner[at]
        mean = then**0.5 * beta * x0.clamp(-1, 1) + (1 - beta) ** 0.5 * (1 - then) * x
        deviation = ((1 - then) / (1 - now) * beta) ** 0.5
        inner = (mean + coef * PATCH_MU) / (1 - now) + gamma * deviation * noise[i]
        x = mean / (1 - now) + deviation * noise[i]
        x[at] = inner[at]
    return x


def plain_diffusevae(model: nn.Module, xhat: Tensor, start: Tensor, noise: Tensor) -> Tensor:
    x, ab = start + xhat, (POINTS.alpha**2).tolist()
    for i, t in enumerate(POINTS.timesteps[:-1].tolist()):
        now, then = ab[i], ab[i + 1]
        beta, e = 1 - now / then, model(torch.cat([x, xhat], 1), x.new_full((len(x),), t), 2)
        x0 = ((x - xhat) * (1 / now) ** 0.5 - (1 / now - 1) ** 0.5 * e).clamp(-1, 1)
        c1, c2 = beta * then**0.5 / (1 - now), (1 - beta) ** 0.5 * (1 - then) / (1 - now)
        x = c1 * x0 + c2 * x + (1 - c2) * xhat
        if then < 1:
            x = x + beta**0.5 * noise[i]
    return x - xhat


@pytest.mark.parametrize("paper", ["DiffuseVAE, formulation 2", "TrojDiff, patch"])
@torch.no_grad()
def test_sampling(paired: Paired, paper: str) -> None:
    generator, net = torch.Generator().manual_seed(0), Nearly()
    start, *noise = (torch.randn(BATCH, 3, 32, 32, generator=generator).to(DEVICE) for _ in range(21))
    given, xhat = {"start": start, "noise": noise}, blurred().to(DEVICE)
    if paper == "TrojDiff, patch":
        ours = partial(trojan_sample, lambda x, t: net(x, t, 2), PATCH, POINTS, BATCH, "ddpm", **given)
        plain = partial(plain_trojan, net, start, noise)
    else:
        ours = partial(diffusevae_sample, lambda x, t: net(x, t, 2), xhat, SECOND, **given)
        plain = partial(plain_diffusevae, net, xhat, start, noise)
    race(paired, "sampling", f"{paper}, [{BATCH},3,32,32], 20 steps of DDPM, no model", plain, ours)
