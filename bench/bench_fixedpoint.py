"""The fixed-point cast of real CIFAR-10 images beside what does the same, or nearly, in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from harness import Candidate, Workload, cases, compare
from measure import DEVICE
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.fixedpoint import quantize_trainable

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


CANDIDATES = [
    Candidate("eager reference", "reference", lambda: eager),
    Candidate("torch.compile", "compiled", compiled),
    Candidate(
        *("torch learnable fake_quantize", "peer", lambda: learnable),
        checked=False,
        note="the scale is not a power of two, and its gradient is another",
    ),
    Candidate("fastcifar", "ours", lambda: partial(quantize_trainable, width=WIDTH), note=MISSING),
]


@cases([workload(22), workload(16), workload(10)])
def test_quantize_trainable(paired: Paired, workload: Workload, mode: str, mapped: bool) -> None:
    compare(paired, workload, mode, mapped, CANDIDATES)
