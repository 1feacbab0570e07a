#!/usr/bin/env python3
"""Sample images of a small diffusion model by ten solvers and a searched schedule, in 5, 8, 10 and 20 model calls.

    python examples/diffusion_cifar10.py --quick     # 10 images, half a minute on two cores
    python examples/diffusion_cifar10.py             # 40 images
    python examples/diffusion_cifar10.py --search    # searches the schedules anew, minutes more

The model is the U-Net of diffusion_unet.py, which diffusion_train.py trained on CIFAR-10 in ten minutes; it is guided
to a class for each image. All solvers start from the same noise, go to the same end (the schedule's last step) and may
call the model equally often; one call gives both outputs that guidance combines. Their error is how far they end from
where 200 steps of UniPC-3 end. The searched schedules were found by fastcifar.diffusion.search_schedule on ten other
noises, one a class.

Printed: the error of each, and the time of a solver's step beside the model's call. Drawn into examples/output/:
diffusion_cifar10.png, errors over calls, and diffusion_cifar10_images.png, images by each solver in each number of
calls. Exit status 1 means that the searched schedules are worse than the best solver on the whole.

Errors are of an ODE's solution. What a small model draws is not what a large one does; no FID is claimed.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from diffusion_unet import CLASSES, SCHEDULE, Guided, UNet, load, tiles
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastcifar.diffusion import FoundSchedule, SolverTable, sample, search_schedule, solver_table

CALLS = (5, 8, 10, 20)
GUIDANCE = 2.0
SOLVERS = {
    "DDIM": ("ddim", {}),
    "Euler": ("euler", {"time": SCHEDULE.time_of_ratio}),
    "Heun": ("heun", {"time": SCHEDULE.time_of_ratio}),  # at Karras et al.'s points, where LMS is at home as well
    "LMS": ("lms", {}),
    "PNDM": ("pndm", {}),
    "DEIS 3": ("deis", {"order": 3}),
    "DPM++ 2M": ("dpm_solver", {"order": 2}),
    "DPM++ 3M": ("dpm_solver", {"order": 3}),
    "UniPC 2": ("unipc", {"order": 2}),
    "UniPC 3": ("unipc", {"order": 3}),
}
HERE = Path(__file__).parent
OUTPUT = HERE / "output"


def table_of(name: str, calls: int) -> SolverTable:
    """The solver's table of most steps that calls the model at most ``calls`` times."""
    solver, options = SOLVERS[name]
    for steps in range(calls, 0, -1):
        spacing = "karras" if solver in ("heun", "lms") else "lambda"
        points = SCHEDULE.points(steps, spacing, final="min", rounded=False)
        table = solver_table(solver, points, prediction="v", **options)
        if int(table.evaluates.sum()) <= calls:
            return table
    raise ValueError(f"table_of: expected calls that allow a step of {name}, got {calls}")


def schedule_file(calls: int) -> Path:
    return HERE / "weights" / f"diffusion_schedule_{calls}.json"


def search(model: UNet, calls: int, budget: int) -> FoundSchedule:
    labels = torch.arange(CLASSES)
    noise = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output, uncond = Guided(model, labels.repeat(len(x) // CLASSES))(x, t)  # several candidates at once
        return uncond + GUIDANCE * (output - uncond)

    targets = sample(guided, noise, table_of("UniPC 3", 200))
    OUTPUT.mkdir(exist_ok=True)
    result = search_schedule(
        guided,
        budget,
        calls,
        noise=noise,
        prediction="v",
        schedule=SCHEDULE,
        targets=targets,
        population=16,
        batch=4,
        workers=0,
        threads=torch.get_num_threads(),
        state=OUTPUT / f"diffusion_schedule_{calls}_state.json",
    )
    about = f"diffusion_cifar10.py: {budget} schedules tried on the U-Net of diffusion_unet.py, guidance {GUIDANCE}"
    return replace(result[calls], about=about)


def draw(rows: dict[str, dict[int, tuple[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in rows.items():
        style = {"color": "black", "linewidth": 2, "zorder": 3} if name == "searched" else {}
        axes.plot(*zip(*found.values(), strict=True), "o-", markersize=4, label=name, **style)
    axes.set(xlabel="model calls", ylabel="error against 200 steps", yscale="log", xscale="log")
    axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.minorticks_off()
    axes.set_title("Solvers of a small diffusion model on CIFAR-10")
    axes.legend(ncols=2)
    figure.savefig(path, dpi=150)


def draw_images(images: dict[str, dict[int, Tensor]], truth: Tensor, path: Path, shown: int) -> None:
    """A row a solver: the same images in each number of calls, and by 200 steps."""
    figure = Figure(figsize=(2 + 0.56 * shown * (len(CALLS) + 1), 0.6 * len(images) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(images), len(CALLS) + 1, squeeze=False)
    for row, (name, found) in zip(grid, images.items(), strict=True):
        for axes, (calls, x) in zip(row, {**found, 200: truth}.items(), strict=True):
            axes.imshow(tiles(x[:shown], shown))
            axes.set(xticks=[], yticks=[], frame_on=False)
            if axes is row[0]:
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
            if name == next(iter(images)):
                axes.set_title(f"{calls} calls", fontsize="medium")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 images")
    parser.add_argument("--images", type=int, help="how many, a multiple of 10 (default: 40; 10 with --quick)")
    parser.add_argument("--search", action="store_true", help="search the schedules, and write them")
    parser.add_argument("--budget", type=int, default=64, help="of the search: schedules to try (default: 64)")
    parser.add_argument("--picture", type=Path, help="also draw a small picture of four solvers there")
    args = parser.parse_args()
    count = args.images or (10 if args.quick else 40)
    model = load()
    if args.search:
        for calls in CALLS:
            search(model, calls, args.budget).save(schedule_file(calls))

    labels = torch.arange(CLASSES).repeat(count // CLASSES)
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    denoiser = Guided(model, labels)

    def run(table: SolverTable) -> tuple[Tensor, float]:
        """Samples, and the milliseconds of a step without the model."""
        denoiser.seconds, begin = 0.0, time.perf_counter()
        x = sample(denoiser, noise, table, guidance=GUIDANCE)
        return x, (time.perf_counter() - begin - denoiser.seconds) / len(table) * 1e3

    with torch.inference_mode():
        begin = time.perf_counter()
        truth, _ = run(table_of("UniPC 3", 200))
        call = (time.perf_counter() - begin) / 200 * 1e3
        errors: dict[str, dict[int, tuple[int, float]]] = {}
        images: dict[str, dict[int, Tensor]] = {}
        report = Table("", *(f"{calls} calls" for calls in CALLS), "a step, ms", title="Error against 200 steps")
        for name in (*SOLVERS, "searched"):
            errors[name], images[name], step = {}, {}, []
            for calls in CALLS:
                if name == "searched":
                    table = FoundSchedule.load(schedule_file(calls)).table(SCHEDULE, "v")
                else:
                    table = table_of(name, calls)
                x, took = run(table)
                error = (x - truth).square().mean((1, 2, 3)).sqrt().mean().item()
                errors[name][calls], images[name][calls] = (int(table.evaluates.sum()), error), x
                step.append(took)
            report.add_row(name, *(f"{error:.4f}" for _, error in errors[name].values()), f"{min(step):.2f}")
    Console().print(report)
    print(f"A model call takes {call:.1f} ms for {count} images and both outputs of guidance.")
    OUTPUT.mkdir(exist_ok=True)
    draw(errors, OUTPUT / "diffusion_cifar10.png")
    draw_images(images, truth, OUTPUT / "diffusion_cifar10_images.png", 5)
    if args.picture:
        few = ("DDIM", "DPM++ 2M", "UniPC 3", "searched")
        draw_images({name: images[name] for name in few}, truth, args.picture, 3)
    print(f"errors over calls, and images: {OUTPUT}")
    best = {calls: min(errors[name][calls][1] for name in SOLVERS) for calls in CALLS}
    ratios = torch.tensor([errors["searched"][calls][1] / best[calls] for calls in CALLS])
    if not ratios.log().mean() < 0:
        sys.exit(f"The searched schedules' errors are {ratios.tolist()} times those of the best solvers.")


if __name__ == "__main__":
    main()
