"""The spectral gate over grids of every kind of size, over channels and batches, beside the official formulation:
``python bench/grid_spectral.py`` (part of ``make bench-grid``) writes bench/results/grid-spectral-<machine>.md.

It asks one thing: is the kernel anywhere slower than eager PyTorch? A point is a grid, a number of channels and a
batch, forward or forward+backward (gradients to the tokens and to the gates). Both take turns, in an order drawn anew
each round; a ratio is the median within rounds. Points where we come out less than 1.1 times as fast are timed again at
the end, ten times as long, and that ratio counts. Outputs and gradients are compared for every shape.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from time import perf_counter

import machine
import torch
from bench_spectral import KERNEL, Grid, gates, official, ours, tokens
from grid import geometric_mean
from harness import MODES
from measure import DEVICE, seconds
from report import HERE, markdown_table
from rich.progress import track
from torch import Tensor

from fastcifar import keep_memory_mapped

SIDES = (*range(1, 18), 23, 27, 28, 31, 32, 33, 45, 49, 56, 61, 63, 64)
OBLONG = ((1, 64), (64, 1), (2, 31), (7, 14), (14, 7), (8, 56), (9, 16), (13, 17), (28, 15), (32, 64), (61, 8))
CHANNELS = (1, 3, 8, 16, 33, 64, 256)
BATCHES = (1, 2, 64)
MOST = 1 << 20  # elements a point
ROUNDS = 5
CLOSE, AGAIN, MOST_AGAIN = 1.1, 10, 20  # ratio; rounds of the second time over those of the first; shapes, the slowest
TOLERANCE = 2e-6  # of the largest magnitude
SHOWN = 10


@dataclass
class Point:
    shape: Grid
    mode: str
    over: float  # eager's time over ours

    def cells(self) -> list[str]:
        batch, height, width, channels = self.shape
        return [f"{height} x {width}", str(channels), str(batch), self.mode, f"{self.over:.2f}x"]


def shapes() -> list[Grid]:
    grids = [(side, side) for side in SIDES] + list(OBLONG)
    every = [(batch, *grid, channels) for grid in grids for channels in CHANNELS for batch in BATCHES]
    return [shape for shape in every if prod(shape) <= MOST]


def work(function: Callable[..., Tensor], x: Tensor, weight: Tensor, gradient: Tensor | None) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            function(x, weight)

    def forward_and_backward() -> None:
        function(x, weight).backward(gradient)
        x.grad = weight.grad = None

    return forward if gradient is None else forward_and_backward


def check(shape: Grid, x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Ends the run where outputs or gradients are not those of the official formulation."""
    grid = shape[1:3]
    results = []
    for function in (official, ours):
        out = function(x, weight, grid)
        results.append((out, *torch.autograd.grad(out, (x, weight), gradient)))
    for what, right, got in zip(("output", "gradient of x", "gradient of the gates"), *results, strict=True):
        difference, largest = (got - right).abs().max(), right.abs().max()
        if not difference <= TOLERANCE * largest:
            raise SystemExit(f"grid: the {what} of {shape} differs by {difference:.1e}, its largest is {largest:.1e}")


def measure(shape: Grid, budget: float, rounds: int = ROUNDS) -> list[Point]:
    """Both modes of one shape, in about ``budget`` seconds."""
    # A layer norm over one channel leaves nothing, so a single channel is one of two.
    x = tokens((*shape[:3], max(shape[3], 2)))[..., : shape[3]].contiguous()
    x, weight = (t.to(DEVICE).requires_grad_() for t in (x, gates(shape)))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(shape, x, weight, gradient)
    points = []
    for mode in MODES:
        given = gradient if mode == "forward+backward" else None
        calls = [work(partial(function, grid=shape[1:3]), x, weight, given) for function in (official, ours)]
        begin = perf_counter()
        for call in calls:
            call()
        repeats = max(1, min(20, int(budget / len(MODES) / rounds / (perf_counter() - begin))))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for which in random.sample((0, 1), 2):
                times[which].append(seconds(calls[which], repeats))
        points.append(Point(shape, mode, median(a / b for a, b in zip(*times, strict=True))))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="of timing, all points together (default: 150)")
    arguments = parser.parse_args()
    random.seed(0)
    keep_memory_mapped()  # or whoever comes after a candidate that has freed much would pay for fresh memory
    every = shapes()
    budget = arguments.seconds / len(every)
    gc.collect()
    gc.disable()
    found: dict[Grid, list[Point]] = {}
    for shape in track(every, description="grid of the spectral gate"):
        found[shape] = measure(shape, budget)
    lowest_of = {shape: min(point.over for point in points) for shape, points in found.items()}
    close = sorted((shape for shape in every if lowest_of[shape] < CLOSE), key=lowest_of.__getitem__)
    for shape in track(close[:MOST_AGAIN], description="the lowest, again"):
        found[shape] = measure(shape, AGAIN * budget, AGAIN * ROUNDS)
    points = [point for shape in every for point in found[shape]]
    rows = [["", "points", "geometric mean", "lowest", "slower than eager"]]
    for mode in MODES:
        over = [point.over for point in points if point.mode == mode]
        slower = str(sum(ratio < 1 for ratio in over))
        rows.append([mode, str(len(over)), f"{geometric_mean(over):.1f}x", f"{min(over):.2f}x", slower])
    lowest = sorted(points, key=lambda point: point.over)[:SHOWN]
    worst = [["grid", "C", "B", "", "over eager"], *(point.cells() for point in lowest)]
    about = machine.describe()
    lines = machine.lines(about, machine.ceilings())
    what = "the kernel" if KERNEL else "no kernel serves this device, so this is the reference"
    name = re.sub(r"\W+", "-", f"{about['cpu']} {about['isa']} {about['threads']} threads".lower()).strip("-")
    path = HERE / "results" / f"grid-spectral-{name}.md"
    path.write_text(
        f"- {lines[0]}\n- spectral_gate ({what}) over the official eager formulation, float32, memory kept mapped; "
        f"sides from 1 to 64, C from 1 to 256, B = 1, 2 and 64, at most {MOST:,} elements.\n\n"
        f"{markdown_table(rows)}\n\nThe lowest ones:\n\n{markdown_table(worst)}\n"
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
