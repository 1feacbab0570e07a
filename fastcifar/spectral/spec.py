"""What every op of the family promises; see :mod:`fastcifar.spec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import BadInput, Inputs, OpSpec, Outputs
from . import functional, mixers, mixers_reference, modules, reference

_SIZES = {"empty": (0, 4, 6, 2), "one": (1, 1, 1, 2), "prime": (3, 5, 7, 26), "large": (16, 8, 8, 64)}


def _one(function: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The function with its result in a tuple."""
    return lambda **arguments: (function(**arguments),)


def _gate_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    batch, height, width, channels = _SIZES[size]
    x = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(height, width // 2 + 1, channels, 2, generator=generator, dtype=torch.float64)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {"x": x.to(device, dtype), "weight": weight.to(device, state)}


def _x_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    return {"x": _gate_sample(size, dtype, device, seed)["x"]}


def _sequence_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    return {"x": _gate_sample(size, dtype, device, seed)["x"].flatten(1, 2)}


def _spectrum_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    batch, height, _, channels = _SIZES[size]
    shape = (2, batch, height, 4, 2, channels // 2)  # four columns: a width of 6 or 7
    return {"spectrum": torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)}


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _bad_tokens(**others: Any) -> tuple[BadInput, ...]:
    """Of an op whose first argument is tokens x, with its other arguments for a grid of 4 x 6 and 3 channels."""

    def bad(what: str, x: Any, error: type[Exception], says: str, **more: Any) -> BadInput:
        return BadInput(what, lambda: {"x": x() if callable(x) else x, **others, **more}, error, says)

    return (
        bad("no tensor", [1.0], TypeError, "expected x to be a tensor, got list"),
        bad("integers", lambda: _x(1, 4, 6, 3, dtype=torch.int64), TypeError, "got torch.int64"),
        bad("complex", lambda: _x(1, 4, 6, 3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        bad("sparse", lambda: _x(1, 4, 6, 3).to_sparse(), TypeError, "sparse"),
        bad("two dimensions", lambda: _x(4, 6), ValueError, r"\[B, H, W, C\] or \[B, N, C\], got \(4, 6\)"),
        bad("tokens that are no square", lambda: _x(1, 24, 3), ValueError, "24 tokens are no square"),
        bad("another grid", lambda: _x(1, 23, 3), ValueError, "4 x 6 tokens, got 23", spatial_size=(4, 6)),
        bad("spatial_size against x", lambda: _x(1, 4, 6, 3), ValueError, r"\(4, 6\) as in x", spatial_size=(6, 4)),
        bad("spatial_size a fraction", lambda: _x(1, 24, 3), TypeError, "two integers", spatial_size=(4.0, 6)),
        bad("no pixels", lambda: _x(1, 0, 6, 3), ValueError, "at least 1 x 1"),
    )


def _bad_weight(what: str, weight: Callable[[], Any], error: type[Exception], says: str, *grid: int) -> BadInput:
    return BadInput(what, lambda: {"x": _x(1, *(grid or (4, 6)), 3), "weight": weight()}, error, says)


def _filter() -> nn.Module:
    torch.manual_seed(0)
    return modules.GlobalFilter(26, h=5, w=4)


SPECS = [
    OpSpec(
        name="spectral_gate",
        family="spectral",
        function=_one(functional.spectral_gate),
        reference=_one(reference.spectral_gate),
        sample=_gate_sample,
        options=({}, {"out_dtype": torch.float32}),
        differentiable=("x", "weight"),
        exact=(),
        raw_ops=("spectral_gate_forward", "spectral_gate_backward"),
        module=_filter,
        smooth=True,
        bad_inputs=(
            *_bad_tokens(weight=_x(4, 4, 3, 2)),
            _bad_weight("no weight", lambda: 1.0, TypeError, "expected weight to be a tensor, got float"),
            _bad_weight("half weight", lambda: _x(4, 4, 3, 2).half(), TypeError, "weight in torch.float32"),
            _bad_weight("double weight", lambda: _x(4, 4, 3, 2).double(), TypeError, "got torch.float64"),
            _bad_weight("a square's weight", lambda: _x(4, 3, 3, 2), ValueError, r"\(4, 4, 3, 2\) for a grid of 4 x 6"),
            _bad_weight("one row of weight", lambda: _x(1, 4, 3, 2), ValueError, r"got \(1, 4, 3, 2\)"),
            _bad_weight("one column of weight", lambda: _x(4, 1, 3, 2), ValueError, r"got \(4, 1, 3, 2\)"),
            _bad_weight("weight's device", lambda: _x(4, 4, 3, 2).to("meta"), ValueError, "got meta"),
            BadInput(
                "out_dtype",
                lambda: {"x": _x(1, 4, 6, 3), "weight": _x(4, 4, 3, 2), "out_dtype": torch.float16},
                TypeError,
                "out_dtype None, torch.float32",
            ),
        ),
    ),
    OpSpec(
        name="spectrum",
        family="spectral",
        function=_one(functional.spectrum),
        reference=_one(reference.spectrum),
        sample=_x_sample,
        options=({}, {"blocks": 2}),
        differentiable=("x",),
        exact=(),
        raw_ops=("spectrum_forward", "spectrum_inverse"),
        module=None,
        smooth=True,
        bad_inputs=(
            *_bad_tokens(),
            BadInput("blocks", lambda: {"x": _x(1, 4, 6, 3), "blocks": 2}, ValueError, "blocks to divide 3 channels"),
        ),
        layouts=("contiguous", "transposed", "sliced"),
    ),
    OpSpec(
        name="inverse_spectrum",
        family="spectral",
        function=_one(functional.inverse_spectrum),
        reference=_one(reference.inverse_spectrum),
        sample=_spectrum_sample,
        options=({"width": 6}, {"width": 7}),
        differentiable=("spectrum",),
        exact=(),
        raw_ops=("spectrum_inverse", "spectrum_forward"),
        module=None,
        smooth=True,
        bad_inputs=(
            BadInput("no tensor", lambda: {"spectrum": 1, "width": 6}, TypeError, "to be a tensor, got int"),
            BadInput("integers", lambda: {"spectrum": _x(1, 2).int(), "width": 6}, TypeError, "got torch.int32"),
            BadInput(
                "another width",
                lambda: {"spectrum": _x(1, 1, 4, 4, 2, 3), "width": 8},
                ValueError,
                r"\[blocks, B, H, 5, 2, C / blocks\] for width 8",
            ),
        ),
        layouts=("contiguous", "transposed", "sliced"),
    ),
    OpSpec(
        name="fnet",
        family="spectral",
        function=_one(mixers.fnet),
        reference=_one(mixers_reference.fnet),
        sample=_sequence_sample,
        options=({}, {}),
        differentiable=("x",),
        exact=(),
        raw_ops=("spectrum_real_parts",),
        module=modules.FourierLayer,
        smooth=True,
        bad_inputs=(
            BadInput("no tensor", lambda: {"x": 1.0}, TypeError, "expected x to be a tensor, got float"),
            BadInput("integers", lambda: {"x": _x(2, 4, 6).int()}, TypeError, "got torch.int32"),
            BadInput("a vector", lambda: {"x": _x(4)}, ValueError, r"got \(4,\)"),
            BadInput("no tokens", lambda: {"x": _x(2, 0, 3)}, ValueError, r"got \(2, 0, 3\)"),
        ),
        layouts=("contiguous", "transposed", "sliced"),
    ),
]
