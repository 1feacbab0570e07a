"""The fixed-point cast of real CIFAR-10 images beside what does the same, or nearly, in PyTorch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from harness import MODES, Candidate, Workload, cases, compare
from measure import DEVICE
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.fixedpoint import OVERFLOWS, ROUNDINGS, limit_digits, quantize_trainable, reference

KERNEL = _library.owned("fixed_quantize", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is the reference"
WIDTH = 8


def images(elements: int) -> tuple[Tensor, Tensor]:
    """So many numbers of normalised images, repeated where there are not enough, and a binary point for them."""
    pixels = normalize(cifar10(split="test")[0][:256]).flatten()
    repeated = pixels.repeat(elements // pixels.numel() + 1)[:elements]
    return repeated.clone(), torch.tensor(5.0)


def gradient_scale(power: int) -> float:
    """Root of the sum of squares of what the gradient to the binary point adds up: ln 2 (x - out) g a number, with g
    of variance 1."""
    x, frac_bits = images(2**power)
    error = x.double() - eager(x, frac_bits).double()
    return math.log(2) * error.square().sum().sqrt().item()


def workload(power: int, full: bool = False) -> Workload:
    return Workload(
        family="fixedpoint",
        op="quantize_trainable",
        title=f"2^{power} float32, width {WIDTH}, rnd_conv, sat",
        make=partial(images, 2**power),
        elements=2**power,
        forward_bytes=8,
        backward_bytes=12,
        forward_flops=6,
        backward_flops=10,
        gradient_tolerance=3e-4,  # eager and torch.compile add up in float32: see test_gradient_to_the_binary_point
        gradient_scales=((1, gradient_scale(power)),),
        full=full,
    )


def eager(x: Tensor, frac_bits: Tensor) -> Tensor:
    """What one writes in PyTorch: straight-through rounding and a clamp."""
    scale = torch.exp2(frac_bits + (frac_bits.round() - frac_bits).detach())
    y = x * scale
    y = y + (y.round() - y).detach()
    return y.clamp(-(2 ** (WIDTH - 1)), 2 ** (WIDTH - 1) - 1) / scale


@lru_cache
def compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(eager)


def learnable(x: Tensor, frac_bits: Tensor) -> Tensor:
    low, high = -(2 ** (WIDTH - 1)), 2 ** (WIDTH - 1) - 1
    scale, zero = torch.exp2(-frac_bits).view(1), x.new_zeros(1)
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, low, high, 1.0)


@pytest.mark.parametrize("power", [22, 16, 10])
def test_gradient_to_the_binary_point(power: int) -> None:
    """Holds our gradient to the binary point to eager's in float64.

    Measured at 2^22, 2^16 and 2^10 elements, relative: ours 4e-8, 5e-8, 4e-8; eager in float32, whose terms cancel,
    3e-4, 1e-4, 4e-6. So :func:`compare`, which holds all to eager in float32, takes differences relative to the terms.
    """
    x, frac_bits = images(2**power)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    point, truth = (
        frac_bits.detach().to(DEVICE, t, copy=True).requires_grad_() for t in (torch.float32, torch.float64)
    )
    quantize_trainable(x.to(DEVICE), point, width=WIDTH).backward(gradient.to(DEVICE))
    eager(x.double().to(DEVICE), truth).backward(gradient.double().to(DEVICE))
    torch.testing.assert_close(point.grad.double(), truth.grad, rtol=1e-6, atol=0)


def fake_quantize(x: Tensor, frac_bits: Tensor) -> Tensor:
    scale = torch.exp2(-frac_bits.detach()).view(1)
    zero = torch.zeros(1, dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -(2 ** (WIDTH - 1)), 2 ** (WIDTH - 1) - 1)


def brevitas() -> Callable[..., Tensor]:
    """Its layer in training mode, with the binary point where ours is; it trains a parameter of its own."""
    from brevitas.nn import QuantIdentity
    from brevitas.quant.fixed_point import Int8ActPerTensorFixedPoint

    layer = QuantIdentity(act_quant=Int8ActPerTensorFixedPoint).to(DEVICE)
    _, frac_bits = images(1)
    key = "act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    layer.load_state_dict({key: WIDTH - 1 - frac_bits.to(DEVICE)})
    return lambda x, frac_bits: layer(x)


def qtorch() -> Callable[..., Tensor]:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where its ninja lies
    from qtorch import FixedPoint
    from qtorch.quant import quantizer

    _, frac_bits = images(1)
    cast = quantizer(FixedPoint(WIDTH, int(frac_bits)), forward_rounding="nearest", clamping_grad_zero=True)
    return lambda x, frac_bits: cast(x)


CANDIDATES = [
    Candidate("eager reference", "reference", lambda: eager),
    Candidate("torch.compile", "compiled", compiled),
    Candidate(
        *("torch fake_quantize", "peer", lambda: fake_quantize),
        missing=(1,),
        note="nearest and clamped only, and no gradient to the scale",
    ),
    Candidate(
        *("torch learnable fake_quantize", "peer", lambda: learnable),
        checked=False,
        note="the scale is not a power of two, and its gradient is another",
    ),
    Candidate(
        *("brevitas", "peer", brevitas),
        missing=(1,),
        note="no wrapping; trains the logarithm of its scale, which it rounds up, by its own gradient",
    ),
    Candidate(
        *("qtorch", "peer", qtorch),
        missing=(1,),
        full=True,  # it compiles C++ for a minute where it is imported
        note="nearest or stochastic and clamped only, one thread, and no gradient to the binary point",
    ),
    Candidate("fastcifar", "ours", lambda: partial(quantize_trainable, width=WIDTH), note=MISSING),
]


@cases([workload(22), workload(16), workload(10)])
def test_quantize_trainable(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    compare(paired, workload, mode, mapped, CANDIDATES)


@pytest.mark.skipif(not KERNEL, reason="no kernel of fastcifar's serves this device")
@pytest.mark.keep_mapped  # else some of them pay for fresh memory, by the luck of the heap, and others do not
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_the_time_of_the_fastest(paired: Paired, mode: str) -> None:
    """At equal traffic, 8 bytes an element forward and 12 backward: target 1.5 times the time of the fastest, which is
    known afterwards and then put first."""
    x, frac_bits = (t.to(DEVICE) for t in images(2**22))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = x.clone().requires_grad_(), frac_bits.clone().requires_grad_()

    def work(rounding: str, overflow: str) -> Callable[[], None]:
        cast = partial(quantize_trainable, width=WIDTH, rounding=rounding, overflow=overflow)

        def forward() -> None:
            with torch.no_grad():
                cast(x, frac_bits)

        def forward_and_backward() -> None:
            cast(*leaves).backward(gradient)
            for leaf in leaves:
                leaf.grad = None

        return forward if mode == "forward" else forward_and_backward

    calls = {f"{rounding}, {overflow}": work(rounding, overflow) for rounding in ROUNDINGS for overflow in OVERFLOWS}
    title = f"2^22 float32, width {WIDTH}, memory kept mapped, {mode}"
    paired.describe("fixedpoint", op="every mode", workload=title, mode="call")
    for name in calls:
        paired.record(name, role="ours", target=1.5)
    times = paired.time(calls)
    fastest = min(times, key=lambda name: times[name]["median"])
    paired.record(fastest, target=None)
    paired.info["candidates"] = {fastest: paired.info["candidates"].pop(fastest), **paired.info["candidates"]}


@pytest.mark.parametrize("power", [22, 10])
@pytest.mark.parametrize("signed", [False, True], ids=["highest", "signed"])
@torch.no_grad()
def test_limit_digits(paired: Paired, power: int, signed: bool) -> None:
    x = images(2**power)[0].to(DEVICE)
    compiled = torch.compile(partial(reference.limit_digits, k=2, signed_digits=signed))
    calls = {
        "eager reference": lambda: reference.limit_digits(x, 2, signed),
        "torch.compile": lambda: compiled(x),
        "fastcifar": lambda: limit_digits(x, 2, signed_digits=signed),
    }
    what = "signed" if signed else "highest"
    paired.describe("fixedpoint", op="limit_digits", workload=f"2^{power} float32, 2 {what} digits", mode="call")
    expected = calls["eager reference"]()
    for name, call in calls.items():
        role = {"eager reference": "reference", "torch.compile": "compiled"}.get(name, "ours")
        if not torch.equal(call(), expected):
            pytest.fail(f"{name}: other digits than the reference's")
        paired.record(name, role=role, note=MISSING if role == "ours" else "")
    paired.time(calls, repeats=max(1, 2**16 >> power))
