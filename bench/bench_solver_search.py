"""Searched schedules against the best of 96 classical solvers and points: errors on noise that neither has seen.

The data are a mixture of Gaussians, whose score and whose flow are exact. What is timed is sampling, which costs the
same; what is compared are the errors, in the notes. The schedules are those of ``search_schedules.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from measure import DEVICE
from paired import Paired
from torch import Tensor

from fastcifar.diffusion import (
    FoundSchedule,
    GaussianMixture,
    LinearVP,
    Points,
    SolverTable,
    ddim,
    deis,
    dpm_solver,
    dpm_solver_singlestep,
    sample,
    unipc,
)

TARGET = 0.5  # of the grid's error
SAMPLES = 512
EVALUATIONS = (5, 8, 10)
SPACINGS = {
    "even in time": {"spacing": "linspace"},
    "even in its root": {"spacing": "quadratic"},
    "even in lambda": {"spacing": "lambda"},
    "Karras": {"spacing": "karras"},
    "Karras, rho 3": {"spacing": "karras", "rho": 3.0},
    "Karras, rho 15": {"spacing": "karras", "rho": 15.0},
}
WHOLE: dict = {"lower_order_final": False}
SOLVERS: dict[str, Callable[[Points], SolverTable]] = {
    "DDIM": ddim,
    "DPM-Solver++ 2M": dpm_solver,
    "DPM-Solver++ 2M, heun": partial(dpm_solver, solver_type="heun"),
    "DPM-Solver++ 3M": partial(dpm_solver, order=3),
    "DPM-Solver++ 3M, third order": partial(dpm_solver, order=3, exact=True, **WHOLE),
    "DPM-Solver 2M": partial(dpm_solver, algorithm="dpmsolver"),
    "DPM-Solver 3M, third order": partial(dpm_solver, order=3, algorithm="dpmsolver", exact=True, **WHOLE),
    "DPM-Solver++ 2S": dpm_solver_singlestep,
    "DPM-Solver++ 3S": partial(dpm_solver_singlestep, order=3),
    "DPM-Solver 3S": partial(dpm_solver_singlestep, order=3, algorithm="dpmsolver"),
    "UniPC 2, bh1": partial(unipc, variant="bh1"),
    "UniPC 2, bh2": unipc,
    "UniPC 3": partial(unipc, order=3),
    "UniPC 3, noise": partial(unipc, order=3, expands="noise"),
    "DEIS 3": partial(deis, order=3, **WHOLE),
    "DEIS 4": partial(deis, order=4, **WHOLE),
}


def noises(seed: int) -> Tensor:
    return torch.randn(SAMPLES, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rmse(samples: Tensor, targets: Tensor) -> Tensor:
    return (samples - targets).square().mean(1).sqrt()


@pytest.mark.parametrize("evaluations", EVALUATIONS)
@pytest.mark.parametrize("name", ["smooth", "sharp"])
@torch.no_grad()
def test_searched_schedule(paired: Paired, name: str, evaluations: int) -> None:
    mixture, schedule = getattr(GaussianMixture, name)(), LinearVP()
    model = mixture.model("epsilon", schedule)
    training, unseen = noises(1_000_000), noises(2_000_000)  # the first is what the search had, too
    targets = {seed: mixture.solve(x, 1.0, 1e-3) for seed, x in (("training", training), ("unseen", unseen))}
    grid = {
        f"{solver}, {points}": build(schedule.points(evaluations, **spacing))
        for solver, build in SOLVERS.items()
        for points, spacing in SPACINGS.items()
    }
    found = FoundSchedule.load(f"mixture-{name}-{evaluations}").table(schedule)
    if len(grid) != 96 or any(int(t.evaluates.sum()) != evaluations for t in [found, *grid.values()]):
        pytest.fail(f"expected 96 solvers of {evaluations} evaluations")
    errors = {solver: rmse(sample(model, training, table), targets["training"]) for solver, table in grid.items()}
    ours = rmse(sample(model, unseen, found), targets["unseen"])

    paired.describe(
        "solver_search",
        op="searched schedule",
        workload=f"{name} mixture, {evaluations} evaluations, {SAMPLES} unseen noises",
        mode="call",
    )
    calls: dict[str, Callable[[], Tensor]] = {}
    for statistic in (torch.mean, torch.median):
        what = statistic.__name__
        best = min(grid, key=lambda solver: float(statistic(errors[solver])))
        theirs = rmse(sample(model, unseen, grid[best]), targets["unseen"])
        line = f"best of 96 by its {what}: {best}"
        note = f"mean {float(theirs.mean()):.2g}, median {float(theirs.median()):.2g}"
        paired.record(line, role="reference" if what == "mean" else "peer", target=None, note=note)
        calls[line] = partial(sample, model, unseen, grid[best])
        ratio = float(statistic(ours) / statistic(theirs))
        if not ratio <= TARGET:
            pytest.fail(f"searched: its {what} error is {ratio:.2f} of that of {best}, and not {TARGET}")
    note = f"mean {float(ours.mean()):.2g}, median {float(ours.median()):.2g}"
    paired.record("searched", role="ours", target=None, note=note)
    calls["searched"] = partial(sample, model, unseen, found)
    paired.time(calls)
