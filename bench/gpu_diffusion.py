"""Solver steps on a GPU, ours against eager PyTorch: ``python bench/gpu_diffusion.py [out.json]``.

First whether they are right: programs and dtypes against the reference on the CPU, and drawn noise against the CPU's
own kernel to the bit. Then times in microseconds beside the floor: the bytes in and out over the bandwidth of a copy,
measured here. A loop of steps is captured in a CUDA graph, which also shows that nothing waits for the device.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from fastcifar.kernels import diffusion
from gpu_spectral import CALLS, SPREAD, microseconds, replay
from torch import Tensor

from fastcifar import _library
from fastcifar.diffusion import reference
from fastcifar.diffusion.reference import TERMS

SHAPES = ((64, 3, 32, 32), (64, 4, 128, 128), (256, 4, 128, 128))
UNIPC = (("x", "output"), ("h1", "h2", "converted"), ("h2", "converted", "corrected"))
# Row and term of each coefficient; how many tensors pass through memory; whether noise is drawn.
PROGRAMS = {
    "DDIM": (((2, "x"), (2, "output")), 3, False),
    "DPM++ 2M": (((0, "x"), (0, "output"), (2, "x"), (2, "converted"), (2, "h1")), 5, False),
    "UniPC 2": (
        tuple((row, term) for row, terms in enumerate(UNIPC) for term in terms),
        7,
        False,
    ),
    "DDPM": (((0, "x"), (0, "output"), (2, "x"), (2, "converted"), (2, "noise")), 3, True),
}


def coefficients(name: str) -> Tensor:
    rows = torch.zeros(3, len(TERMS), dtype=torch.float64)
    for place, (row, term) in enumerate(PROGRAMS[name][0]):
        rows[row, TERMS.index(term)] = 0.9 - 0.1 * place
    return rows


def made(name: str) -> int:
    """The results that a step keeps, as bits of x_next, converted and corrected."""
    return {"DDIM": 1, "DDPM": 1, "DPM++ 2M": 3, "UniPC 2": 7}[name]


def check(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, output, *history = (torch.randn(5, 3, 37, generator=generator).to(dtype) for _ in range(4))
    rows, seed = coefficients(name), torch.tensor(-3)
    numbers = reference.normal_numbers(-3, 2, x.numel())
    if _library.WHY_NO_EXTENSION is None:
        numbers = torch.ops.fastcifar.normal_numbers.default(seed, 2, x.numel())
        assert torch.equal(diffusion.normal_numbers(seed.cuda(), 2, x.numel()).cpu(), numbers)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = numbers.view(x.shape).to(wide)
    expected = reference.solver_step(*(t.to(wide) for t in (x, output)), [h.to(wide) for h in history], rows, noise)
    given = [t.cuda() for t in (x, output, *history)]
    drawn = seed.cuda() if PROGRAMS[name][2] else None
    ours = diffusion.solver_step(
        *(given[0], given[1], None, given[2:], None, drawn, None, rows.flatten().tolist(), 1.0, math.inf, 2, 7)
    )
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs.to(dtype)), (name, dtype)


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    _, tensors, draws = PROGRAMS[name]
    rows, wanted = coefficients(name), made(name)
    size = math.prod(shape) * dtype.itemsize
    copies = max(2, min(CALLS, SPREAD // (size * tensors)))
    x, output, h1, h2 = (torch.randn(copies, *shape, device="cuda").to(dtype) for _ in range(4))
    sink = torch.empty_like(x)
    seed = torch.tensor(5, device="cuda") if draws else None
    numbers, on_device = rows.flatten().tolist(), rows.to("cuda")

    def ours(i: int, given: Tensor | None) -> object:
        arguments = x[i], output[i], None, [h1[i], h2[i]], None, seed, given, numbers, 1.0, math.inf, i, wanted
        return diffusion.solver_step(*arguments)

    def eager(i: int) -> object:
        noise = torch.randn_like(x[i]) if draws else None
        return reference.solver_step(x[i], output[i], (h1[i], h2[i]), on_device, noise)

    graphs = {
        "copy": replay([lambda i=i: sink[i].copy_(x[i]) for i in range(copies)]),
        "eager": replay([lambda i=i: eager(i) for i in range(copies)]),
        "ours": replay([lambda i=i: ours(i, None) for i in range(copies)]),
        "coefficients on the device": replay([lambda i=i: ours(i, on_device) for i in range(copies)]),
    }
    times = microseconds(graphs, copies)
    row = {"solver": name, "shape": list(shape), "dtype": str(dtype)[6:], "us": times["ours"]}
    row |= {"on_device_us": times["coefficients on the device"], "floor_us": times["copy"] / 2 * tensors}
    return row | {"eager_us": times["eager"]}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_diffusion: torch sees no GPU here")
    print(torch.cuda.get_device_name())
    for name in PROGRAMS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            check(name, dtype)
    print(f"{4 * len(PROGRAMS)} steps equal the reference bit for bit")
    cases = [(name, shape, torch.float32) for shape in SHAPES for name in PROGRAMS]
    cases += [(name, SHAPES[-1], torch.bfloat16) for name in PROGRAMS]
    rows = [measure(*case) for case in cases]
    for row in rows:
        print(
            f"{row['solver']:9} {row['shape']!s:20} {row['dtype']:9} {row['us']:8.1f} us, "
            f"floor {row['floor_us']:7.1f}, {row['floor_us'] / row['us']:4.0%} of a copy's bandwidth "
            f"({row['floor_us'] / row['on_device_us']:4.0%} with coefficients on the device), "
            f"{row['eager_us'] / row['us']:5.2f} x eager"
        )
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
