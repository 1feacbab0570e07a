"""Tensors of more than 2^31 elements: ``python tests/large.py [name ...]`` (``make large``), minutes and up to 14 GiB.

Every op that walks elements, rows, samples or images is called once where an offset needs more than 32 bits, on its
input, its result, or both, whichever memory affords: half precision, bytes, and tensors expanded over their first
dimension, which take no memory where the op takes them as they are. The far end is compared with what the same op says
of the far end alone. One case at a time; one that needs more memory than is free is skipped, and said to be.

Not here: the ops of tree search, whose vectors of 2^31 nodes are 17 GB each, and spectrum_real_parts, which wants a
contiguous float32 tensor on both sides.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastcifar.diffusion import reference as diffusion_reference
from fastcifar.spec import identical

ops = torch.ops.fastcifar
BEYOND = 2**31
FAR = 1000  # elements, or rows, of the far end
SLACK = 3.0  # GiB that stay free
CASES: dict[str, tuple[float, Callable[[], None]]] = {}


def case(gib: float) -> Callable:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        CASES[function.__name__] = gib, function
        return function

    return add


def filled(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A dense tensor of a pattern of a million random numbers, whose length divides no size here."""
    draw = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    pattern = draw.to(dtype) if dtype.is_floating_point else (draw * 60).to(dtype)
    out = torch.empty(shape, dtype=dtype)
    flat, whole = out.view(-1), out.numel() // len(pattern) * len(pattern)
    flat[:whole].view(-1, len(pattern)).copy_(pattern)
    flat[whole:] = pattern[: len(flat) - whole]
    return out


def check(whole: Tensor, far: Tensor) -> None:
    assert identical(whole, far), f"the far end differs in {int((whole != far).sum())} of {far.numel()} elements"


def _neuron(x: Tensor, spike_format: int = 0, leak: Tensor | None = None) -> tuple[Tensor, ...]:
    return ops.neuron_forward(x, None, None, leak, None, None, None, None, 1, [2.0, 1.0, 0.0], 0.0, spike_format, False)


@case(3.0)
def spikes_as_bytes() -> None:
    """Over 40 steps, whose input is the same (and is not copied)."""
    n = BEYOND // 40 // 64 * 64 + 64 * 9
    x = (3 * filled(n, dtype=torch.bfloat16)).expand(40, n)
    whole, far = (_neuron(t, 1)[0] for t in (x, x[:, -FAR:]))
    assert whole.numel() > BEYOND
    assert bool(far.any())
    check(whole[:, -FAR:], far)


@case(10.5)
def neurons_in_one_step_as_bits() -> None:
    """With a leak of each row, which is found by a neuron's number."""
    rows, n = 2**11 + 1, 2**20
    x = 3 * filled(n, dtype=torch.bfloat16)
    leak = torch.linspace(1.5, 4, rows).view(rows, 1)
    spikes, v, *_ = _neuron(x.expand(1, rows, n), 2, leak)
    far, far_v, *_ = _neuron(x.expand(1, 2, n), 2, leak[-2:].contiguous())
    check(spikes[:, -far.shape[1] :], far)
    check(v[-2:], far_v)


@case(5.5)
def neuron_gradients() -> None:
    n = BEYOND // 40 // 64 * 64 + 64 * 9
    x = 3 * filled(n, dtype=torch.bfloat16)
    grad = filled(n, dtype=torch.bfloat16, seed=1)

    def gradient(*given: Tensor) -> Tensor:
        grad, x = (t.expand(40, len(t)) for t in given)
        return ops.neuron_backward(grad, None, None, None, x, None, None, None, None, None, None, None, 1,
                                   [2.0, 1.0, 0.0], 0.0, 0, [2.0, 0.0, 0.0], False, 0)[0]  # fmt: skip

    check(gradient(grad, x)[:, -FAR:], gradient(grad[-FAR:], x[-FAR:]))


@case(10.0)
def packed_conv_results() -> None:
    images = 2**27 + 1
    bits = filled(images, 1, dtype=torch.uint8)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    whole, far = (ops.packed_conv(t, weight, None, 1, 1, *[[1, 1]] * 2, [0, 0], [1, 1]) for t in (bits, bits[-FAR:]))
    check(whole[-FAR:], far)


@case(3.0)
def packed_conv_bits() -> None:
    """One image of 17 million pixels and a stride over most of them."""
    height, width, channels = 4097, 4096, 1024
    bits = filled(1, height * width * channels // 8, dtype=torch.uint8)
    weight = torch.randn(channels, 16, generator=torch.Generator().manual_seed(1))
    geometry = [[1, 1], [64, 64], [0, 0], [1, 1]]
    whole = ops.packed_conv(bits, weight, None, height, width, *geometry)
    row = bits.view(height, -1)[-1:]
    check(whole[:, -1:], ops.packed_conv(row.contiguous(), weight, None, 1, width, *geometry))


def _cast(x: Tensor, frac_bits: Tensor | None = None) -> Tensor:
    return ops.fixed_quantize(x, frac_bits, None, 8, 3, True, 0, 0, 0)


@case(9.5)
def fixed_quantize() -> None:
    x = filled(2**11 + 1, 2**20, dtype=torch.bfloat16)
    check(_cast(x)[-2:], _cast(x[-2:]))


@case(9.5)
def fixed_quantize_with_a_binary_point_a_row_and_a_column() -> None:
    x = filled(2**11 + 1, 2**20, dtype=torch.bfloat16)
    rows = torch.arange(2**11 + 1).remainder(6).float().view(-1, 1)
    check(_cast(x, rows)[-2:], _cast(x[-2:], rows[-2:]))
    columns = torch.arange(2**20).remainder(5).float()
    check(_cast(x, columns)[-2:], _cast(x[-2:], columns))


@case(13.5)
def fixed_to_raw() -> None:
    x = filled(2**11 + 1, 2**20, dtype=torch.bfloat16)
    whole, far = (ops.fixed_to_raw(t, None, 8, 3, True, 0, 0, 0) for t in (x, x[-2:]))
    check(whole[-2:], far)


@case(13.5)
def fixed_quantize_backward() -> None:
    x = filled(2**11 + 1, 2**20, dtype=torch.bfloat16)
    whole, far = (
        ops.fixed_quantize_backward(t, t, None, None, 8, 3, True, 0, 0, 0, False, True, False)[0] for t in (x, x[-2:])
    )
    check(whole[-2:], far)


@case(9.5)
def integer_conv_results() -> None:
    x, weight = filled(2**27 + 1, 1, 1, 2, dtype=torch.int16), filled(16, 1, 1, 2, dtype=torch.int16)
    whole, far = (ops.integer_conv(t, weight, [1, 1], [0, 0], [1, 1], 1, False) for t in (x, x[-FAR:]))
    check(whole[-FAR:], far)


@case(5.5)
def integer_conv_operand() -> None:
    x = filled(2**25 + 9, 1, 1, 64, dtype=torch.int16)
    for outputs, groups in ((2, 1), (64, 64)):
        few = x if groups == 1 else x.view(-1, 1, 1, 64)[-(2**23) :]  # its results are as many as x
        weight = filled(outputs, 1, 1, 64 // groups, dtype=torch.int16)
        whole, far = (ops.integer_conv(t, weight, [1, 1], [0, 0], [1, 1], groups, False) for t in (few, few[-FAR:]))
        check(whole[-FAR:], far)


@case(5.5)
def exit_decide() -> None:
    logits = filled(2**21 + 9, 1024, dtype=torch.bfloat16)
    whole, far = (ops.exit_decide(t, None, 0.02, 0, 1.0, False) for t in (logits, logits[-FAR:]))
    check(whole[0][-FAR:], far[0])
    check(whole[1][-FAR:], far[1])
    assert int(whole[2][: len(logits) - int(whole[4])].max()) > len(logits) - FAR


def _program(**factors: float) -> list[float]:
    """x' = the sum of these terms."""
    row = dict.fromkeys(diffusion_reference.TERMS, 0.0) | factors
    return [0.0] * 22 + list(row.values())


@case(5.5)
def solver_step_into() -> None:
    """In the place of x, with noise that is drawn and counted over all elements."""
    n, infinity, seed = BEYOND + 64 * 1000, float("inf"), torch.tensor(7)
    x = filled(1, n, dtype=torch.bfloat16)
    far = x[:, -640:].clone()
    ops.solver_step_into(x, x, None, [], None, seed, None, _program(x=0.5, output=0.25, noise=1.0), 1.0, infinity, 3,
                         x, None, None)  # fmt: skip
    noise = _numbers(seed, 3, n - 640, 640)
    check(x[0, -640:].float(), (far.float() * 0.5 + far.float() * 0.25 + noise).bfloat16().float()[0])


@case(9.5)
def solver_step_of_samples() -> None:
    x = filled(2**11 + 1, 2**20, dtype=torch.bfloat16)
    whole, far = (
        ops.solver_step(t, t, None, [t], None, None, None, _program(x=0.5, h1=0.25, output=-1.0), 1.0, 1.0, 0, 1)[0]
        for t in (x, x[-2:])
    )
    check(whole[-2:], far)


@case(5.5)
def solver_table_step() -> None:
    n = BEYOND // 2 + 640
    ring = filled(2, n, dtype=torch.bfloat16)
    far = ring[:, -640:].clone()
    row = torch.tensor([*_program(x=0.5, h1=0.25), 0.0, 0.0, float("inf")], dtype=torch.float64).view(1, 36)
    for t in (ring, far):
        ops.solver_table_step(t, None, row, 0)
    check(ring[:, -640:], far)


@case(13.0)
def solver_step_backward() -> None:
    x = filled(2**10 + 1, 2**20, dtype=torch.bfloat16)
    wants = 1 | 1 << 1  # of x and output: a stack of both
    whole, far = (
        ops.solver_step_backward(t, None, None, t, t, None, [], None, None, None, _program(x=0.5, output=0.25), 1.0,
                                 1.0, 0, wants)[0]
        for t in (x, x[-2:])
    )  # fmt: skip
    assert whole.numel() > BEYOND
    check(whole[:, -2:], far)


def _numbers(seed: Tensor, stream: int, first: int, n: int) -> Tensor:
    """Numbers ``first`` to ``first + n`` of a stream by the reference, which counts from 0."""
    arange = torch.arange
    with mock.patch.object(torch, "arange", lambda counters: arange(first // 4, first // 4 + counters)):
        return diffusion_reference.normal_numbers(int(seed), stream, n)


@case(9.0)
def normal_numbers() -> None:
    n, seed = BEYOND + 64 * 100 + 7, torch.tensor(3)
    first = n // 64 * 64 - 640
    torch.testing.assert_close(ops.normal_numbers(seed, 5, n)[first:], _numbers(seed, 5, first, n - first))


@case(11.0)
def magnitude_quantile() -> None:
    x = torch.rand(1, BEYOND + 999, generator=torch.Generator().manual_seed(0))
    x[0, -1] = -2.0
    assert ops.magnitude_quantile(x, 1.0).item() == 2.0
    assert abs(ops.magnitude_quantile(x, 0.7).item() - 0.7) < 1e-4


@case(5.5)
def spectral_gate() -> None:
    """With few channels, where images are folded into channels; the gradients of many."""
    images = 2**22 + 1
    weight = torch.randn(8, 5, 8, 2, generator=torch.Generator().manual_seed(0))
    x = filled(1, 8, 8, 8, dtype=torch.bfloat16).expand(images, 8, 8, 8)
    whole, far = (ops.spectral_gate_forward(t, weight, False) for t in (x, x[-9:]))
    check(whole[-9:], far)


@case(5.5)
def spectral_gate_gradient() -> None:
    images = 2**22 + 1
    weight = torch.randn(8, 5, 8, 2, generator=torch.Generator().manual_seed(0))
    x = filled(1, 8, 8, 8, dtype=torch.bfloat16).expand(images, 8, 8, 8)
    whole, far = (ops.spectral_gate_backward(t, t, weight, True, True)[0] for t in (x, x[-9:]))
    check(whole[-9:], far)


@case(10.0)
def spectrum_of_tokens() -> None:
    x = filled(1, 8, 8, 8, dtype=torch.bfloat16).expand(2**31 // (8 * 5 * 2 * 8) + 9, 8, 8, 8)
    whole, far = (ops.spectrum_forward(t, 1, 1.0) for t in (x, x[-9:]))
    assert whole.numel() > BEYOND
    check(whole[:, -9:], far)


@case(5.0)
def stream_copy() -> None:
    x = filled(BEYOND + 4099, dtype=torch.uint8)
    out = torch.empty_like(x)
    ops._stream_copy(out, x)
    check(out[-9000:], x[-9000:])


def available() -> float:
    """GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def main() -> int:
    chosen, bad, skipped = sys.argv[1:] or list(CASES), 0, 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
    for name in chosen:
        gib, function = CASES[name]
        gc.collect()
        trim(0)
        if available() < gib + SLACK:
            skipped += 1
            print(f"{name:<56} skipped: it needs {gib:.1f} GiB, and {available():.1f} are free", flush=True)
            continue
        began = time.monotonic()
        try:
            function()
            said = "ok"
        except (AssertionError, RuntimeError) as error:
            bad, said = bad + 1, f"FAILED: {error}"
        print(f"{name:<56} {time.monotonic() - began:5.1f} s  {said}", flush=True)
    print(
        f"{len(chosen) - bad - skipped} of {len(chosen)} cases hold" + (f", {skipped} were skipped" if skipped else "")
    )
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
