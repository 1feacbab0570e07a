"""diffusers' schedulers and those of fastcifar.compat.diffusers, as users call them: runs of 20 steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from measure import DEVICE, FULL, synchronize
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize

STEPS, ROUNDS = 20, 9
KERNEL = _library.owned("solver_step", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is the reference"
SDE = {"algorithm_type": "sde-dpmsolver++"}
# What, class, configuration, at most this share of the peer's time: the targets, of the step.
CASES = [
    ("DDIM", "DDIMScheduler", {}, 1 / 5),
    ("DDPM", "DDPMScheduler", {}, 1 / 10),
    ("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", {}, 1 / 6),
    ("DPM-Solver++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}, 1 / 8),
    ("DPM-Solver++ SDE 2M", "DPMSolverMultistepScheduler", SDE, 1 / 10),
    ("UniPC 2", "UniPCMultistepScheduler", {}, 1 / 10),
    ("UniPC 3", "UniPCMultistepScheduler", {"solver_order": 3}, 1 / 10),
    ("DEIS 3", "DEISMultistepScheduler", {"solver_order": 3}, None),
    ("Euler", "EulerDiscreteScheduler", {}, None),
    ("Euler ancestral", "EulerAncestralDiscreteScheduler", {}, None),
    ("Heun", "HeunDiscreteScheduler", {}, None),
    ("LMS", "LMSDiscreteScheduler", {}, None),
    ("PNDM", "PNDMScheduler", {"skip_prk_steps": True}, None),
]
NOISY = ("DDPM", "DPM-Solver++ SDE 2M", "Euler ancestral")
WITH_IMAGES = ("DDIM", "DDPM", "Euler", "Euler ancestral", "Heun", "LMS")
SHAPES = [(64, 3, 32, 32), *([(64, 4, 128, 128)] if FULL else [])]


def samples(shape: tuple[int, ...]) -> Tensor:
    """Real images, as latents (tiled, and their mean as the fourth channel) where the shape asks for them."""
    images = normalize(cifar10(split="test")[0][: shape[0]])
    if shape[1] == 4:
        images = torch.cat([images, images.mean(1, keepdim=True)], 1).repeat(1, 1, 4, 4)
    return images.contiguous().to(DEVICE)


def run(scheduler: Any, x: Tensor, output: Tensor, seed: int | None) -> tuple[Tensor, float]:
    """The end of a run by one output, and the seconds of its steps without what a model would take."""
    generator = None if seed is None else torch.Generator(DEVICE).manual_seed(seed)
    options = {} if generator is None else {"generator": generator}
    scheduler.set_timesteps(STEPS, device=DEVICE)
    scheduler.is_scale_input_called = True  # or Euler and LMS warn at each step
    synchronize()
    begin = perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, **options).prev_sample
    synchronize()
    return x, (perf_counter() - begin) / len(scheduler.timesteps)


def fast(scheduler: Any) -> Any:
    scheduler.return_original = False
    scheduler.draw_in_kernel(0)
    return scheduler


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("what", "name", "config", "target"), CASES, ids=[case[0] for case in CASES])
def test_schedulers(paired: Paired, what: str, name: str, config: dict, target: float | None, shape: tuple) -> None:
    diffusers = pytest.importorskip("diffusers")
    from fastcifar.compat import diffusers as compat

    diffusers.utils.logging.set_verbosity_error()
    x = samples(shape)
    output = 0.5 * x + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    makes: dict[str, Callable[[], Any]] = {
        "diffusers": lambda: getattr(diffusers, name)(**config),
        "fastcifar": lambda: getattr(compat, name)(**config),
    }
    if what in NOISY + WITH_IMAGES:
        makes["fastcifar, less"] = lambda: fast(getattr(compat, name)(**config))
    less = " and ".join(
        [*["no pred_original_sample"] * (what in WITH_IMAGES), *["noise by counters in the kernel"] * (what in NOISY)]
    )
    title = f"{what} {list(shape)} float32".replace(", ", ",")
    paired.describe("diffusion", op="scheduler.step", workload=title, mode="step")
    schedulers = {which: make() for which, make in makes.items()}
    with torch.no_grad():
        expected, _ = run(schedulers["diffusers"], x, output, 1 if what in NOISY else None)
        for which, scheduler in schedulers.items():
            checked = which != "fastcifar, less" or what not in NOISY
            made, _ = run(scheduler, x, output, 1 if what in NOISY else None)
            error = float((made - expected).norm() / expected.norm())
            if not error < 5e-6:
                pytest.fail(f"{which}: the end of a run differs from diffusers' by {error:.1e} of its magnitude")
            ours = which != "diffusers"
            note = MISSING or (less if which == "fastcifar, less" else "")
            role = "ours" if ours else "peer"
            paired.record(which, role=role, checked=checked, note=note, target=target if ours else None)
        times: dict[str, list[float]] = {which: [] for which in schedulers}
        order, shuffle = list(schedulers), random.Random(0)
        for done in range(ROUNDS):
            shuffle.shuffle(order)
            for which in order:
                times[which].append(run(schedulers[which], x, output, None)[1])
            paired.progress("timing", done + 1, ROUNDS)
    paired.keep(times)
