"""Exact products of integers beside float32 (which is not exact), float64 emulation and torch's own integer product, on
activations and weights of 8 bits: real images through a random layer, as a linear layer and a convolution see them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.fixedpoint.products import integer_conv2d, integer_matmul

KERNEL = _library.owned("integer_conv", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is float64"
LARGEST = 128  # magnitude of 8 bits
EMULATION_TARGET = 1 / 2.5


def activations(batch: int, channels: int, side: int) -> Tensor:
    """Images through a random 3 x 3 convolution and a ReLU, integers of 0 to 127, ``[batch, channels, side, side]``."""
    images = normalize(cifar10(split="test")[0][:batch])
    weight = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    x = F.adaptive_avg_pool2d(F.conv2d(images, weight, padding=1), side).relu()
    return (x * (127 / x.max())).round().to(torch.int16)


def weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-LARGEST, LARGEST, shape, generator=generator, dtype=torch.int16)


def time_all(paired: Paired, calls: dict[str, Callable[[], Tensor]], exact: set[str]) -> None:
    """Checks that every candidate named in ``exact`` gives the integers of the first one, and times all in turn."""
    expected = next(iter(calls.values()))().long()
    for name, call in calls.items():
        wrong = int((call().long() != expected).sum())
        if name in exact and wrong:
            pytest.fail(f"{name}: {wrong} of {expected.numel()} sums are wrong")
        ours = name.startswith("fastcifar")
        role = "ours" if ours else "reference" if call is next(iter(calls.values())) else "peer"
        note = MISSING if ours else "" if name in exact else "exact for these operands only"
        paired.record(name, role=role, target=EMULATION_TARGET if ours else None, note=note)
    paired.time(calls)


def test_integer_linear(paired: Paired) -> None:
    rows, depth, columns = 512, 1152, 256
    patches = F.unfold(activations(8, 128, 8).float(), 3, padding=1).transpose(1, 2)
    a, b = patches.reshape(rows, depth).to(torch.int16).to(DEVICE), weights(columns, depth).to(DEVICE)
    floats, doubles, integers = ((a.to(t), b.to(t)) for t in (torch.float32, torch.float64, torch.int32))
    paired.describe("fixedpoint", op="integer linear", workload=f"[{rows},{depth}] x [{depth},{columns}]", mode="call")
    time_all(
        paired,
        {
            "float64 emulation": lambda: doubles[0] @ doubles[1].T,
            "float32 mm": lambda: floats[0] @ floats[1].T,
            "torch int32 mm": lambda: integers[0] @ integers[1].T,
            "fastcifar": lambda: integer_matmul(a, b, LARGEST, LARGEST),
            "fastcifar, 16 bits": lambda: integer_matmul(a, b, 1 << 15, 1 << 15),
        },
        {"float64 emulation", "torch int32 mm", "fastcifar", "fastcifar, 16 bits"},
    )


@pytest.mark.parametrize(("channels", "side"), [(64, 16), (128, 8), (16, 32)])
def test_integer_conv(paired: Paired, channels: int, side: int) -> None:
    batch = 32
    x, w = activations(batch, channels, side).to(DEVICE), weights(channels, channels, 3, 3).to(DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    floats, doubles = ((x.to(t), w.to(t)) for t in (torch.float32, torch.float64))
    paired.describe("fixedpoint", op="integer conv", workload=f"[{batch},{channels},{side},{side}], 3 x 3", mode="call")
    time_all(
        paired,
        {
            "float64 emulation": lambda: F.conv2d(*doubles, padding=1),
            "float32 conv": lambda: F.conv2d(*floats, padding=1),
            "fastcifar": lambda: integer_conv2d(last, w, LARGEST, LARGEST, padding=1),
            "fastcifar, channels first": lambda: integer_conv2d(x, w, LARGEST, LARGEST, padding=1),
        },
        {"float64 emulation", "fastcifar", "fastcifar, channels first"},
    )
