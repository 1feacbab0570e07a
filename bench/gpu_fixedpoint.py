"""The fixed-point cast on a GPU, ours against eager PyTorch: ``python bench/gpu_fixedpoint.py [out.json]``.

First whether it is exact: every mode and dtype, in the layouts of binary points, against the reference on the CPU. Then
times in microseconds beside the floor: the bytes in and out over the bandwidth of a copy, measured here. Calls are
captured in a CUDA graph, which also shows that they can be, and replayed on tensors that do not fit in the L2 cache
together; the candidates take turns.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable

import torch
from fastcifar.kernels import fixedpoint
from gpu_spectral import CALLS, SPREAD, microseconds, replay
from torch import Tensor

from fastcifar.fixedpoint import reference
from fastcifar.fixedpoint.reference import OVERFLOWS, ROUNDINGS

ELEMENTS = 2**22
CONV, STOCHASTIC = ROUNDINGS.index("rnd_conv"), ROUNDINGS.index("stochastic")
WIDTH = 8
POINTS = {  # shapes of x and of its binary points
    "one": ((ELEMENTS,), ()),
    "rows": ((64, 64, 32, 32), (64, 1, 1)),
    "columns": ((ELEMENTS // 256, 256), (256,)),
}


def check(dtype: torch.dtype) -> int:
    """Every mode against the reference on the CPU; returns how many calls were compared."""
    x = torch.cat([torch.randn(2000) * 6, torch.arange(-80, 80) / 8]).to(dtype)
    calls = 0
    for (width, n), signed, rounding, overflow in itertools.product(
        ((8, 0), (5, 1), (7, 3), (30, 2)), (True, False), range(len(ROUNDINGS)), range(len(OVERFLOWS))
    ):
        if OVERFLOWS[overflow] == "wrap_sm" and not signed:
            continue
        modes = signed, rounding, overflow, n
        seed = torch.tensor(-7) if rounding == STOCHASTIC else None
        names = {"signed": signed, "rounding": ROUNDINGS[rounding], "overflow": OVERFLOWS[overflow]}
        expected = reference.quantize(x, width, 3, saturated_bits=n, seed=seed, **names)
        ours = fixedpoint.fixed_quantize(x.cuda(), None, None if seed is None else seed.cuda(), width, 3, *modes)
        assert torch.equal(ours.cpu(), expected), (dtype, width, modes)
        calls += 1
    return calls


def eager(x: Tensor, frac_bits: Tensor) -> Tensor:
    """What one writes in PyTorch: straight-through rounding and a clamp."""
    scale = torch.exp2(frac_bits + (frac_bits.round() - frac_bits).detach()).to(x.dtype)
    y = x * scale
    y = y + (y.round() - y).detach()
    return y.clamp(-(2 ** (WIDTH - 1)), 2 ** (WIDTH - 1) - 1) / scale


def eager_backward(grad: Tensor, x: Tensor, frac_bits: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, by autograd."""
    leaves = [t.detach().requires_grad_() for t in (x, frac_bits)]
    return torch.autograd.grad(eager(*leaves), leaves, grad)


def ours_backward(seed: Tensor | None, rounding: int, overflow: int) -> Callable:
    """The same by our ops."""
    modes = WIDTH, 0, True, rounding, overflow, 0

    def call(grad: Tensor, x: Tensor, frac_bits: Tensor) -> tuple[Tensor, ...]:
        fixedpoint.fixed_quantize(x, frac_bits, seed, *modes)
        return fixedpoint.fixed_quantize_backward(grad, x, frac_bits, seed, *modes, True, True, True)

    return call


def measure(points: str, dtype: torch.dtype, rounding: int, overflow: int) -> list[dict]:
    shape, of_points = POINTS[points]
    torch.manual_seed(0)
    copies = max(2, min(CALLS, SPREAD // (ELEMENTS * dtype.itemsize)))
    x = torch.randn(copies, *shape, device="cuda").to(dtype)
    grad, sink = torch.randn_like(x), torch.empty_like(x)
    frac_bits = torch.full(of_points, 4.6, device="cuda")
    seed = torch.tensor(3, device="cuda") if rounding == STOCHASTIC else None
    backward = ours_backward(seed, rounding, overflow)
    found, again = (backward(grad[0], x[0], frac_bits) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"

    def forward(x: Tensor, frac_bits: Tensor) -> Tensor:
        return fixedpoint.fixed_quantize(x, frac_bits, seed, WIDTH, 0, True, rounding, overflow, 0)

    rows = []
    for mode, tensors, calls in (
        ("forward", 2, {"eager": eager, "ours": forward}),
        ("forward+backward", 5, {"eager": eager_backward, "ours": backward}),
    ):
        graphs = {"copy": replay([lambda i=i: sink[i].copy_(x[i]) for i in range(copies)])}
        for name, call in calls.items():
            given = [(x[i], frac_bits) if mode == "forward" else (grad[i], x[i], frac_bits) for i in range(copies)]
            graphs[name] = replay([lambda g=g, call=call: call(*g) for g in given])
        times = microseconds(graphs, copies)
        row = {"points": points, "dtype": str(dtype)[6:], "mode": mode, "rounding": ROUNDINGS[rounding]}
        row |= {"overflow": OVERFLOWS[overflow], "us": times["ours"], "floor_us": times["copy"] / 2 * tensors}
        rows.append(row | {"eager_us": times["eager"]})
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_fixedpoint: torch sees no GPU here")
    print(torch.cuda.get_device_name())
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    print(f"{sum(map(check, dtypes))} casts equal the reference bit for bit")
    cases = [(points, dtype, CONV, 0) for points in POINTS for dtype in dtypes[:2]]
    cases += [("one", torch.float32, rounding, 0) for rounding in range(len(ROUNDINGS))]
    cases += [("one", torch.float32, CONV, overflow) for overflow in range(1, len(OVERFLOWS))]
    rows = [row for case in cases for row in measure(*case)]
    for row in rows:
        print(
            f"{row['points']:8} {row['dtype']:9} {row['rounding']:11} {row['overflow']:8} {row['mode']:17} "
            f"{row['us']:8.1f} us, floor {row['floor_us']:6.1f}, {row['floor_us'] / row['us']:4.0%} of a copy's "
            f"bandwidth, {row['eager_us'] / row['us']:5.2f} x eager"
        )
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
