"""What the family's ops promise; see :mod:`fastcifar.spec`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..spec import BadInput, Inputs, OpSpec, Outputs
from . import functional, reference
from .reference import TERMS

_SIZES = {"empty": (0, 3, 4, 4), "one": (1, 1, 1, 1), "prime": (5, 3, 7, 11), "large": (3, 2, 41, 67)}


def program(**rows: dict[str, float]) -> list[list[float]]:
    """Rows of coefficients by the names of TERMS: ``program(convert={"x": 1.0}, predict={"converted": 0.5})``."""
    table = [[0.0] * len(TERMS) for _ in range(3)]
    for row, name in enumerate(("convert", "correct", "predict")):
        for term, value in rows.get(name, {}).items():
            table[row][TERMS.index(term)] = value
    return table


DDIM = program(convert={"x": 1.25, "output": -0.75}, predict={"converted": 0.9, "output": 0.4})
MULTISTEP = program(convert={"x": 1.25, "output": -0.75}, predict={"x": 0.7, "converted": 0.5, "h1": -0.2})
UNIPC = program(
    convert={"x": 1.25, "output": -0.75},
    correct={"h2": 0.8, "h1": 0.3, "converted": -0.1},
    predict={"corrected": 0.7, "converted": 0.5, "h1": -0.2},
)
ANCESTRAL = program(convert={"x": 1.1, "output": -0.6}, predict={"x": 0.3, "converted": 0.6, "noise": 0.25})


def _step(
    x: Tensor,
    output: Tensor,
    h1: Tensor,
    h2: Tensor,
    noise: Tensor,
    coefficients: Any,
    uncond: Tensor | None = None,
    **options: Any,
) -> Outputs:
    return tuple(functional.solver_step(x, output, (h1, h2), coefficients, noise, uncond, **options))


def _reference(
    x: Tensor,
    output: Tensor,
    h1: Tensor,
    h2: Tensor,
    noise: Tensor,
    coefficients: Any,
    uncond: Tensor | None = None,
    **options: Any,
) -> Outputs:
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    made = reference.solver_step(x, output, (h1, h2), rows, noise, uncond, **options)
    return tuple(value if bool(rows[i].any()) else None for value, i in zip(made, (2, 0, 1), strict=True))


def _sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    names = ("x", "output", "h1", "h2", "noise")
    return {n: torch.randn(_SIZES[size], generator=generator, dtype=torch.float64).to(device, dtype) for n in names}


def _bad(what: str, error: type[Exception], says: str, **arguments: Any) -> BadInput:
    given: dict[str, Any] = dict(zip(("x", "output", "h1", "h2", "noise"), [torch.zeros(2, 3)] * 5, strict=True))
    return BadInput(what, lambda: given | {"coefficients": DDIM} | arguments, error, re.escape(says))


SPECS = [
    OpSpec(
        name="solver_step",
        family="diffusion",
        function=_step,
        reference=_reference,
        sample=_sample,
        options=(
            {"coefficients": DDIM, "limit": 1.0},
            {"coefficients": MULTISTEP},
            {"coefficients": UNIPC},
            {"coefficients": ANCESTRAL, "limit": 0.5},
        ),
        differentiable=("x", "output", "h1", "h2", "noise"),
        exact=(0, 1, 2),
        raw_ops=("solver_step", "solver_step_backward"),
        module=None,
        bad_inputs=(
            _bad("another shape", ValueError, "output of x's shape (2, 3), got (3, 2)", output=torch.zeros(3, 2)),
            _bad("another dtype", TypeError, "expected noise in x's torch.float32", noise=torch.zeros(2, 3).double()),
            _bad("integers", TypeError, "expected x to be a tensor in float32", x=torch.zeros(2, 3).long()),
            _bad("a scalar", ValueError, "expected x [B, ...]", x=torch.zeros(())),
            _bad("too few numbers", ValueError, "expected three rows of 11 coefficients", coefficients=[[1.0]] * 3),
            _bad("no numbers", TypeError, "rows of numbers", coefficients="ddim"),
            _bad(
                "a tensor of another shape", ValueError, "expected coefficients [3, 11] or [2, 3, 11], got (4, 3, 11)",
                coefficients=torch.zeros(4, 3, 11),
            ),
            _bad("integer coefficients", TypeError, "in float64 or float32", coefficients=torch.zeros(3, 11).long()),
            _bad("no limit", ValueError, "expected a positive limit", limit=0.0),
            _bad("NaN as limit", ValueError, "expected limit to be a number", limit=float("nan")),
            _bad("a limit in words", TypeError, "expected limit to be a number", limit="one"),
            _bad(
                "noise too early", ValueError, "got a coefficient of noise in row 0",
                coefficients=program(convert={"noise": 1.0}),
            ),
            _bad("a missing tensor", ValueError, "expected noise, which has a coefficient", noise=None,
                 coefficients=ANCESTRAL),
            _bad("noise twice", ValueError, "expected noise or a seed", seed=1),
            _bad("guidance without an output", ValueError, "expected an output beside uncond", output=None,
                 uncond=torch.zeros(2, 3)),
        ),
    ),
]  # fmt: skip
