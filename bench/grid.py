"""IF, LIF and PLIF over a grid of sequence lengths, shapes, resets and surrogates, forward and backward, beside peers:
``python bench/grid.py`` (``make bench-grid``) writes bench/results/grid-<machine>.md.

The main suite times a few workloads with care; this one asks whether any corner is slow. Each point takes a few rounds
of all candidates in turn, in a new order each round, each called once untimed and once timed; ratios are medians within
rounds. Spikes are checked against
SpikingJelly's at every point.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import exp, log
from statistics import median
from types import SimpleNamespace

import machine
import torch
from bench_spiking import currents
from measure import seconds
from report import HERE, markdown_table
from rich.progress import track
from torch import Tensor

from fastcifar import keep_memory_mapped
from fastcifar.spiking import functional, reference

NEURONS = ("if", "lif", "plif")
STEPS = (1, 4, 8, 16, 32)
SHAPES = ((8, 64, 16, 16), (16, 64, 16, 16), (64, 64, 16, 16))
RESETS = (0.0, None)
SURROGATES = ("atan", "sigmoid", "piecewise_quadratic")
COMPILED_STEPS = (1, 4, 8)  # compiling takes half a minute or more a point, and grows with the steps
Work = Callable[[], None]


@dataclass
class Point:
    neuron: str
    steps: int
    shape: tuple[int, ...]
    v_reset: float | None
    surrogate: str
    over: dict[str, float] = field(default_factory=dict)  # a peer's time over ours

    def title(self) -> str:
        reset = "soft" if self.v_reset is None else "hard"
        return f"{self.neuron}, T={self.steps} x {list(self.shape)}, {reset}, {self.surrogate}"


def ours(point: Point, w: Tensor, module=functional) -> Callable[[Tensor], Tensor]:
    options = {"v_reset": point.v_reset, "surrogate": point.surrogate, "detach_reset": True}
    if point.neuron == "if":
        return lambda x: module.integrate_and_fire(x, **options)[0]
    if point.neuron == "lif":
        return lambda x: module.lif(x, tau=2.0, **options)[0]
    return lambda x: module.plif(x, w, **options)[0]


def spikingjelly(point: Point, w: Tensor) -> Callable[[Tensor], Tensor]:
    from spikingjelly.activation_based import functional as sj
    from spikingjelly.activation_based import surrogate

    names = {"atan": "ATan", "sigmoid": "Sigmoid", "piecewise_quadratic": "PiecewiseQuadratic"}
    curve = getattr(surrogate, names[point.surrogate])()
    more = {"v_reset": point.v_reset, "surrogate_function": curve, "detach_reset": True}
    if point.neuron == "if":
        return lambda x: sj.if_multi_step(x, torch.zeros_like(x[0]), 1.0, **more)[0]
    if point.neuron == "lif":
        return lambda x: sj.lif_multi_step(x, torch.zeros_like(x[0]), 2.0, True, 1.0, **more)[0]
    return lambda x: sj.plif_multi_step(x, torch.zeros_like(x[0]), w, True, 1.0, **more)[0]


def snntorch(point: Point) -> Callable[[Tensor], Tensor]:
    """Another convention (the reset a step later, no decay of the input), so only its cost compares; its surrogates are
    matched where it has them."""
    import snntorch as snn

    curves = {"atan": snn.surrogate.atan(2.0), "sigmoid": snn.surrogate.sigmoid(4), "piecewise_quadratic": None}
    beta = torch.tensor(1.0 if point.neuron == "if" else 0.5)
    node = snn.Leaky(
        beta=beta,
        learn_beta=point.neuron == "plif",
        spike_grad=curves[point.surrogate],
        reset_mechanism="subtract" if point.v_reset is None else "zero",
    )

    def call(x: Tensor) -> Tensor:
        membrane, spikes = torch.zeros_like(x[0]), []
        for current in x:
            spike, membrane = node(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return call


def compiled(point: Point, w: Tensor) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    # The whole function, the last membrane included, which torch.compile would leave out of a call that drops it.
    names = ("integrate_and_fire", "lif", "plif")
    return ours(point, w, SimpleNamespace(**{name: torch.compile(getattr(reference, name)) for name in names}))


def measure(point: Point, x: Tensor, rounds: int, with_compile: bool) -> None:
    w = torch.tensor(0.0, requires_grad=True)
    functions = {"fastcifar": ours(point, w), "SpikingJelly": spikingjelly(point, w), "snnTorch": snntorch(point)}
    if with_compile:
        functions["torch.compile"] = compiled(point, w)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        spikes = functions["fastcifar"](x)
        for name in set(functions) - {"fastcifar", "snnTorch"}:
            if not torch.equal(spikes, functions[name](x)):
                raise SystemExit(f"grid: {name} and fastcifar give other spikes at {point.title()}")

    def work(function: Callable[[Tensor], Tensor]) -> Work:
        def call() -> None:
            function(x).backward(gradient)
            x.grad = w.grad = None

        return call

    calls = {name: work(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for done in range(rounds + 1):
        order = list(calls)
        random.shuffle(order)
        for name in order:
            calls[name]()  # so that each is timed on what it left behind, not on another's caches and sleeping threads
            elapsed = seconds(calls[name])
            if done >= 1:
                times[name].append(elapsed)
    for name in set(calls) - {"fastcifar"}:
        pairs = zip(times[name], times["fastcifar"], strict=True)
        point.over[name] = median(a / b for a, b in pairs)


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def summary(points: list[Point]) -> Iterator[list[str]]:
    """Over each peer: the geometric mean, the lowest point and where it is, by neuron and over all."""
    for name in ("SpikingJelly", "torch.compile", "snnTorch"):
        for neuron in (*NEURONS, "all"):
            found = [p for p in points if name in p.over and neuron in (p.neuron, "all")]
            if not found:
                continue
            worst = min(found, key=lambda p: p.over[name])
            mean = geometric_mean([p.over[name] for p in found])
            yield [name, neuron, str(len(found)), f"{mean:.1f}x", f"{worst.over[name]:.1f}x", worst.title()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds a point (default: 3)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, most of the time")
    arguments = parser.parse_args()
    random.seed(0)
    keep_memory_mapped()  # or whoever comes after a peer that has freed much would pay for fresh memory
    rows = itertools.product(STEPS, SHAPES, NEURONS, RESETS, SURROGATES)
    points = [Point(neuron, steps, shape, reset, curve) for steps, shape, neuron, reset, curve in rows]
    given: tuple[object, Tensor] = (None, torch.empty(0))
    for point in track(points, description="grid, forward+backward"):
        if given[0] != (point.steps, point.shape):
            given = (point.steps, point.shape), currents(point.steps, point.shape, torch.float32)[0].requires_grad_()
        usual = (point.neuron, point.v_reset, point.surrogate) == ("lif", 0.0, "atan")
        with_compile = usual and point.steps in COMPILED_STEPS and not arguments.no_compile
        measure(point, given[1], arguments.rounds, with_compile)
    about = machine.describe()
    table = markdown_table([["over", "neuron", "points", "geometric mean", "lowest", "where"], *summary(points)])
    lines = machine.lines(about, machine.ceilings())
    name = re.sub(r"\W+", "-", f"{about['cpu']} {about['isa']} {about['threads']} threads".lower()).strip("-")
    path = HERE / "results" / f"grid-{name}.md"
    compile_note = "torch.compile: LIF with a hard reset and atan only, up to 8 steps, since each point compiles anew."
    path.write_text(f"- {lines[0]}\n- forward+backward, float32, memory kept mapped; {compile_note}\n\n{table}\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
