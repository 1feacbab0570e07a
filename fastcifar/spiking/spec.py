"""The spiking family's promises; see :mod:`fastcifar.spec`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..spec import BadInput, Inputs, OpSpec, Outputs
from . import functional, reference
from .modules import LIF
from .surrogate import ATan, Sigmoid, resolve

_SHAPES = {"empty": (3, 0, 5), "one": (1, 1), "prime": (5, 3, 7, 13), "large": (4, 2, 33, 31, 29)}


def _sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Currents strong enough that about a third of the neurons fire, and a membrane around the threshold."""
    generator = torch.Generator().manual_seed(seed)
    shape = _SHAPES[size]
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    v = torch.randn(shape[1:], generator=generator, dtype=torch.float64) * 0.5
    return {"x": x.to(device, dtype), "v": v.to(device, _library.state_dtype(dtype))}


def _comparable(truth: Outputs, eager: Outputs) -> dict[str, Tensor]:
    assert truth[0] is not None
    assert eager[0] is not None
    same = torch.eq(truth[0], eager[0]).all(0)
    return {"x": same, "v": same}


def _raw_calls(inputs: Inputs, options: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    x, v = inputs["x"], inputs.get("v")
    o: dict[str, Any] = {"tau": 2.0, "decay_input": True, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": "atan"}
    o |= options
    surrogate = resolve(o["surrogate"])
    store = o.get("store_v_seq", False)
    neuron = (o["tau"], o["decay_input"], o["v_threshold"], o["v_reset"])
    state = torch.ones(x.shape[1:], dtype=_library.state_dtype(x.dtype), device=x.device)
    sequence = torch.ones(x.shape, dtype=state.dtype, device=x.device) if store else None
    width = (surrogate.kernel_id, surrogate.alpha, o.get("detach_reset", False))
    return {
        "lif_forward": (x, v, *neuron, store),
        "lif_backward": (torch.ones_like(x), state, sequence, x, v, *neuron, *width),
    }


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


LIF_SPEC = OpSpec(
    name="lif",
    family="spiking",
    function=functional.lif,
    reference=reference.lif,
    sample=_sample,
    options=(
        {},
        {"surrogate": "sigmoid", "detach_reset": True, "store_v_seq": True},
        {"surrogate": "piecewise_quadratic", "v_reset": None, "tau": 3.0},
        {"surrogate": "rectangular", "decay_input": False, "tau": 1.7},
        {
            "surrogate": ATan(alpha=0.7),
            "v_reset": None,
            "detach_reset": True,
            "decay_input": False,
            "store_v_seq": True,
        },
        {"surrogate": Sigmoid(alpha=25.0), "v_reset": -0.25, "v_threshold": 0.5, "tau": 10.0, "store_v_seq": True},
    ),
    differentiable=("x", "v"),
    exact=(0, 1, 2),
    comparable=_comparable,
    raw_ops=("lif_forward", "lif_backward"),
    raw_calls=_raw_calls,
    module=lambda: LIF(tau=3.0, store_v_seq=True),
    bad_inputs=(
        BadInput("no tensor", lambda: {"x": [1.0]}, TypeError, "expected x to be a tensor"),
        BadInput("integers", lambda: {"x": _x(2, 3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        BadInput("complex", lambda: {"x": _x(2, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        BadInput("sparse", lambda: {"x": _x(2, 3).to_sparse()}, TypeError, "sparse"),
        BadInput("a scalar", lambda: {"x": torch.tensor(1.0)}, ValueError, "got a scalar"),
        BadInput("tau 1 with decay", lambda: {"x": _x(2, 3), "tau": 1.0}, ValueError, "tau above 1"),
        BadInput("tau 0", lambda: {"x": _x(2, 3), "tau": 0.0, "decay_input": False}, ValueError, "tau above 0"),
        BadInput("tau NaN", lambda: {"x": _x(2, 3), "tau": float("nan")}, ValueError, "tau to be finite"),
        BadInput("tau a tensor", lambda: {"x": _x(2, 3), "tau": torch.tensor(2.0)}, TypeError, "tau to be a number"),
        BadInput("threshold", lambda: {"x": _x(2, 3), "v_threshold": float("inf")}, ValueError, "v_threshold"),
        BadInput("reset", lambda: {"x": _x(2, 3), "v_reset": "soft"}, TypeError, "v_reset to be a number"),
        BadInput("state a number", lambda: {"x": _x(2, 3), "v": 0.0}, TypeError, "v to be a tensor"),
        BadInput("state's shape", lambda: {"x": _x(2, 3), "v": _x(2, 3)}, ValueError, r"v of shape \(3,\)"),
        BadInput("state's dtype", lambda: {"x": _x(2, 3), "v": _x(3).double()}, TypeError, "got torch.float64"),
        BadInput("state's device", lambda: {"x": _x(2, 3), "v": _x(3).to("meta")}, ValueError, "got meta"),
        BadInput("surrogate's name", lambda: {"x": _x(2, 3), "surrogate": "arctan"}, ValueError, "got 'arctan'"),
        BadInput("surrogate's type", lambda: {"x": _x(2, 3), "surrogate": torch.relu}, TypeError, "surrogate"),
    ),
)

SPECS = [LIF_SPEC]
