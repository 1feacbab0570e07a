"""The spectral gate on a GPU, CUDA C++ against Triton against cuFFT: ``python bench/gpu_spectral.py [out.json]``.

Prints errors against float64 (relative to the largest value), and times in microseconds beside the floor: the bytes of
tokens in and out over the bandwidth of a copy, measured here. Calls are captured in a CUDA graph, which also shows that
they can be, and replayed on tokens that do not fit in the L2 cache together; the candidates take turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median

import torch
from fastcifar.kernels import spectral, spectral_cuda
from torch import Tensor

from fastcifar.spectral import reference

SHAPES = ((64, 8, 8, 256), (64, 14, 14, 384), (64, 32, 32, 64))  # B, H, W, C
CALLS, ROUNDS = 20, 15
SPREAD = 256 << 20  # bytes of tokens that the calls of a graph walk over


def replay(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """A CUDA graph of all the calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def microseconds(graphs: dict[str, Callable[[], None]], calls: int) -> dict[str, float]:
    """The median time of a call of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: median(each) for name, each in times.items()}


def on(owner: str, call: Callable) -> Callable:
    """``call`` with the CUDA C++ library hidden, where the owner is Triton."""
    if owner == "CUDA C++":
        return call

    def without(*args):
        find = spectral_cuda.library
        spectral_cuda.library = lambda: None
        try:
            return call(*args)
        finally:
            spectral_cuda.library = find

    return without


def official_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward by torch.fft and autograd."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(reference.spectral_gate(*leaves), leaves, grad)


def ours_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The same by our ops."""
    spectral.spectral_gate_forward(x, weight, False)
    return spectral.spectral_gate_backward(grad, x, weight, True, True)


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).abs().max() / truth.abs().max()).item()


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[dict]:
    B, H, W, C = shape
    torch.manual_seed(0)
    bytes_of_x = B * H * W * C * dtype.itemsize
    copies = max(2, min(CALLS, SPREAD // bytes_of_x))
    x = torch.randn(copies, *shape, device="cuda").to(dtype)
    grad, sink = torch.randn_like(x), torch.empty_like(x)
    weight = 0.02 * torch.randn(H, W // 2 + 1, C, 2, device="cuda")
    leaves = [t.double().requires_grad_() for t in (x[0], weight)]
    truth = reference.spectral_gate(*leaves)
    true_grads = torch.autograd.grad(truth, leaves, grad[0].double())

    owners = ["Triton", *(["CUDA C++"] if spectral_cuda.serves(x[0]) else [])]
    forward: dict[str, Callable] = {"cuFFT": reference.spectral_gate}
    backward: dict[str, Callable] = {"cuFFT": official_backward}
    for owner in owners:
        forward[owner] = on(owner, lambda x, w: spectral.spectral_gate_forward(x, w, False))
        backward[owner] = on(owner, ours_backward)
    rows = []
    for mode, candidates, tokens in (("forward", forward, 2), ("forward+backward", backward, 5)):
        graphs = {"copy": replay([lambda i=i: sink[i].copy_(x[i]) for i in range(copies)])}
        for name, call in candidates.items():
            if mode == "forward":
                errors = [error(call(x[0], weight), truth.detach())]
                graphs[name] = replay([lambda i=i, call=call: call(x[i], weight) for i in range(copies)])
            else:
                found = call(grad[0], x[0], weight)
                errors = [error(a, b) for a, b in zip(found, true_grads, strict=True)]
                again = call(grad[0], x[0], weight)
                assert name == "cuFFT" or all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), name
                graphs[name] = replay([lambda i=i, call=call: call(grad[i], x[i], weight) for i in range(copies)])
            rows.append({"shape": shape, "dtype": str(dtype)[6:], "mode": mode, "owner": name, "errors": errors})
        times = microseconds(graphs, copies)
        floor = times["copy"] / 2 * tokens
        for row in rows[-len(candidates) :]:
            row |= {"us": times[row["owner"]], "floor_us": floor, "over_cufft": times["cuFFT"] / times[row["owner"]]}
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_spectral: torch sees no GPU here")
    print(f"{torch.cuda.get_device_name()}; {spectral_cuda.owner()}")
    rows = [row for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for row in measure(shape, dtype)]
    for row in rows:
        errors = " ".join(f"{e:.1e}" for e in row["errors"])
        print(
            f"{row['shape']!s:18} {row['dtype']:9} {row['mode']:17} {row['owner']:9} {row['us']:8.1f} us, floor "
            f"{row['floor_us']:6.1f}, {row['over_cufft']:5.2f} x cuFFT, errors {errors}"
        )
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
