"""Single steps of diffusers' schedulers and the same steps as one pass, on samples made of real CIFAR-10 images.

The coefficients are read off the scheduler itself: a step is linear, so that a call on unit vectors, one for each
tensor that it reads, returns them. What it makes of random data is compared first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import machine
import pytest
import torch
import torch.nn.functional as F
from harness import FLOOR, SMALL
from measure import DEVICE, peak_memory, synchronize
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.diffusion import SolverRun, SolverTable, dynamic_threshold, normal_numbers, solver_step
from fastcifar.diffusion.reference import TERMS

KERNEL = _library.owned("solver_step", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is the reference"
SHAPES = ((64, 3, 32, 32), (64, 4, 128, 128))
STEPS, AT = 20, 8  # the step that is timed: its history is full, and nothing is special about it
KEPT = 4  # three predictions and, of UniPC, a sample


@dataclass(frozen=True)
class Solver:
    """A scheduler of diffusers and what it is here: its class and options, and whether a step adds noise."""

    cls: str
    options: dict[str, Any]
    noisy: bool = False


def multistep(order: int, algorithm: str = "dpmsolver++") -> Solver:
    options = {"solver_order": order, "algorithm_type": algorithm}
    return Solver("DPMSolverMultistepScheduler", options, noisy=algorithm.startswith("sde"))


SOLVERS = {
    "DDIM": Solver("DDIMScheduler", {"clip_sample": True}),
    "DDPM": Solver("DDPMScheduler", {"clip_sample": True}, noisy=True),
    "DPM++2M": multistep(2),
    "DPM++3M": multistep(3),
    "SDE-DPM++2M": multistep(2, "sde-dpmsolver++"),
    "UniPC2": Solver("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC3": Solver("UniPCMultistepScheduler", {"solver_order": 3}),
}


class Peer:
    """A scheduler in the middle of its loop, which :meth:`step` takes a step on and back."""

    def __init__(self, solver: Solver, **options: Any) -> None:
        schedulers = pytest.importorskip("diffusers")
        self.scheduler = getattr(schedulers, solver.cls)(**solver.options | options)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps[:AT]:
            self.scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))
        self.order = solver.options.get("solver_order", 0)
        self.unipc = "UniPC" in solver.cls
        self.counted = copy.copy(vars(self.scheduler))

    def step(self, x: Tensor, output: Tensor, kept: list[Tensor], **options: Any) -> Tensor:
        """``kept``: the predictions before this one, latest first, and the sample before it."""
        scheduler = self.scheduler
        if self.order:
            scheduler._step_index = AT
            scheduler.model_outputs = kept[self.order - 1 :: -1]
        if self.unipc:
            scheduler.last_sample, scheduler.this_order = kept[KEPT - 1], self.order
            scheduler.timestep_list = list(self.counted["timestep_list"])
        made = scheduler.step(output, scheduler.timesteps[AT], x, **options)
        self.converted = scheduler.model_outputs[-1] if self.order else made.pred_original_sample
        return made.prev_sample


def program(solver: Solver) -> Tensor:
    """The step's coefficients, ``[3, 11]`` in float64."""
    peer = Peer(solver, **({"clip_sample": False} if "clip_sample" in solver.options else {}))
    units = torch.eye(2 + KEPT + 1)
    x, output, *kept, noise = (unit[None] for unit in units)
    options: dict[str, Any] = {}
    if solver.noisy and peer.order:
        options["variance_noise"] = noise
    elif solver.noisy:
        options["generator"] = torch.Generator().manual_seed(0)
    made = peer.step(x, output, kept, **options)[0].double()
    if solver.noisy and not peer.order:
        drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))[0].double()
        deviation = float(peer.scheduler._get_variance(peer.scheduler.timesteps[AT])) ** 0.5
        made = made + deviation * (units[-1].double() - drawn)
    converted = peer.converted[0].double()
    rows = torch.zeros(3, len(TERMS), dtype=torch.float64)
    places = [*range(2 + KEPT), TERMS.index("noise")]
    rows[0, places] = converted
    before, row, ends = converted, rows[2], made
    if peer.unipc:  # the prediction starts from the corrected sample, which is all that reads the sample before
        corrected = peer.scheduler.last_sample[0].double()
        rows[1, places] = corrected
        rows[1, 8] = corrected[1] / before[1]
        rows[1, places] -= rows[1, 8] * before
        row[9] = ends[1 + KEPT] / corrected[1 + KEPT]
        ends = ends - row[9] * corrected
    # DDIM reads x through the prediction alone, all others the output.
    through = 0 if solver.cls == "DDIMScheduler" else 1
    row[8] = ends[through] / before[through]
    row[places] = ends - row[8] * before
    rows[rows.abs() < 3e-6] = 0  # what float32 leaves of 0
    return rows


def formula(rows: Tensor, limit: float | None, stores: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The step in plain PyTorch, without the terms that are 0; what the solver does not keep is not returned."""
    listed = [[(t, float(c)) for t, c in enumerate(row) if c] for row in rows]

    def step(x: Tensor, output: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        kept, noise = rest[:KEPT], rest[KEPT:]
        terms: list[Tensor | None] = [x, output, *kept, *[None] * (6 - KEPT), None, None, *noise]
        terms += [] if noise else [torch.randn_like(x) if listed[2][-1][0] == len(TERMS) - 1 else None]
        results = []
        for place, row in ((8, listed[0]), (9, listed[1]), (None, listed[2])):
            if not row:
                continue
            total = sum(terms[t] * c for t, c in row)
            if place == 8 and limit is not None:
                total = total.clamp(-limit, limit)
            if place is not None:
                terms[place] = total
            if place is None or stores:
                results.append(total)
        return tuple(results)

    return step


def tensors(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Real images, and noise in them of a different share each."""
    images = normalize(cifar10(split="test")[0])[: shape[0]]
    images = F.interpolate(images, shape[2:])
    images = images[:, [c % 3 for c in range(shape[1])]]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.lerp(images, torch.randn(shape, generator=generator), (i + 1) / count).to(DEVICE).contiguous()
        for i in range(count)
    ]


def run_of(rows: Tensor, x: Tensor, kept: list[Tensor], limit: float | None) -> SolverRun:
    """The step in place: the prediction goes where the oldest one was, the corrected sample where the last one was."""
    used = rows[:, 2 : 2 + KEPT].any(0)
    oldest = max((i for i in range(KEPT - 1) if used[i]), default=0)
    stores = bool(used[: KEPT - 1].any())  # DDIM and DDPM keep nothing
    store = torch.tensor([[oldest + 1 if stores else 0, KEPT if rows[1].any() else 0]])
    slots = tuple(i + 1 for i in range(KEPT) if used[i])
    numbers = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    table = SolverTable(rows[None], store, *numbers, limit=limit, preloaded=slots)
    return SolverRun(table, x, seed=0, preload={slot: kept[slot - 1] for slot in slots})


def check(name: str, got: Tensor, expected: Tensor) -> None:
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= 5e-6:
        pytest.fail(f"{name}: differs from diffusers by {difference:.2e} of its magnitude")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_step(paired: Paired, solver: str, shape: tuple[int, ...]) -> None:
    what = SOLVERS[solver]
    rows, limit = program(what), 1.0 if "clip_sample" in what.options else None
    peer = Peer(what)
    x, output, *kept, noise = tensors(shape, 2 + KEPT + 1)
    stores = bool(rows[:, 2 : 2 + KEPT].any())
    wanted = ["x_next", *(["converted"] if stores else []), *(["corrected"] if bool(rows[1].any()) else [])]
    history = [k if rows[:, 2 + i].any() else None for i, k in enumerate(kept)]
    run, eager = run_of(rows, x, kept, limit), formula(rows, limit, stores)
    torch.compiler.reset()
    fused = torch.compile(eager)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE) if what.noisy else None

    def in_place() -> None:
        run.index = 0
        run.step(output)

    calls: dict[str, Callable[[], Any]] = {
        "eager": lambda: eager(x, output, *kept),
        "torch.compile": lambda: fused(x, output, *kept),
        "diffusers": lambda: peer.step(x, output, kept),
        "fastcifar": lambda: solver_step(x, output, history, rows, None, None, 1.0, limit, seed=seed, wanted=wanted),
        "fastcifar in place": in_place,
    }
    given = [noise] if what.noisy else []
    options: dict[str, Any] = {"variance_noise": noise} if what.noisy and peer.order else {}
    if what.noisy and not peer.order:
        options["generator"] = torch.Generator(DEVICE).manual_seed(0)
        given = [torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)]
    expected = peer.step(x, output, kept, **options)
    check("eager", eager(x, output, *kept, *given)[-1], expected)
    check("torch.compile", fused(x, output, *kept, *given)[-1], expected)
    z = given[0] if given else None
    check("fastcifar", solver_step(x, output, history, rows, z, limit=limit).x_next, expected)
    run.step(output, noise=z)
    check("fastcifar in place", run.x, expected)

    streams = int(rows[:, : 2 + KEPT].any(0).sum()) + len(wanted)
    title = f"{solver} [{','.join(map(str, shape))}] float32"
    paired.describe(
        "diffusion", op="solver_step", workload=title, mode="forward", mapped=False, elements=x.numel(), note="",
        bytes=4 * x.numel() * streams, flops=2 * x.numel() * int((rows != 0).sum()),
    )  # fmt: skip
    roles = {"eager": "reference", "torch.compile": "compiled", "diffusers": "peer"}
    for name, call in calls.items():
        begin = perf_counter()
        call()
        synchronize()
        first = perf_counter() - begin
        note = MISSING if name.startswith("fastcifar") else ""
        note = "writes over x and what is kept, where the others allocate" if name.endswith("in place") else note
        facts = {"first_call": first, "peak_bytes": peak_memory(call), "checked": True, "note": note}
        paired.record(name, role=roles.get(name, "ours"), **facts)
    paired.record(FLOOR, role="floor")
    calls[FLOOR] = machine.copier(4 * x.numel() * streams)
    paired.time(calls, repeats=max(1, SMALL // x.numel()))


def test_step_on_one_element(paired: Paired) -> None:
    """What a call costs."""
    rows = program(SOLVERS["DPM++2M"])
    peer = Peer(SOLVERS["DPM++2M"])
    x, output, *kept = (torch.randn(1, 1, device=DEVICE) for _ in range(2 + KEPT))
    history = [kept[0]]
    run = run_of(rows, x, kept, None)

    def in_place() -> None:
        run.index = 0
        run.step(output)

    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: torch.add(x, output),
        "diffusers": lambda: peer.step(x, output, kept),
        "fastcifar": lambda: solver_step(x, output, history, rows),
        "fastcifar in place": in_place,
    }
    paired.describe("diffusion", op="solver_step", workload="DPM++2M on one element", mode="call")
    for name in calls:
        target = 2.0 if name == "fastcifar in place" else None
        paired.record(name, role="ours" if name.startswith("fastcifar") else "peer", target=target)
    paired.time(calls, repeats=2000)


def test_normal_numbers(paired: Paired) -> None:
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    n = 64 * 3 * 32 * 32
    calls: dict[str, Callable[[], Any]] = {
        "torch.randn": lambda: torch.randn(n, device=DEVICE),
        "fastcifar": lambda: normal_numbers(seed, n),
    }
    paired.describe("diffusion", op="normal_numbers", workload=f"[{n}] float32", mode="call")
    paired.record("torch.randn", role="reference", target=None)
    paired.record("fastcifar", role="ours", target=None, note=MISSING)
    paired.time(calls, repeats=5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_threshold(paired: Paired, shape: tuple[int, ...]) -> None:
    (x,) = tensors(shape, 1)
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.quantile": lambda: torch.quantile(x.flatten(1).abs(), 0.995, dim=1).clamp(1.0, 10.0),
        "fastcifar": lambda: dynamic_threshold(x, 0.995, 10.0),
    }
    workload = f"[{','.join(map(str, shape))}] float32"
    paired.describe("diffusion", op="dynamic_threshold", workload=workload, mode="call")
    expected = calls["torch.quantile"]()
    for name, call in calls.items():
        check(name, call(), expected)
        ours = name == "fastcifar"
        paired.record(name, role="ours" if ours else "reference", target=None, note=MISSING if ours else "")
    paired.time(calls)
