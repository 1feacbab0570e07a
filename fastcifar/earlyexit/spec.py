"""What every op of the family promises; see :mod:`fastcifar.spec`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import BadInput, Inputs, OpSpec, Outputs
from . import functional, reference

_SIZES = {"empty": (0, 10), "one": (1, 1), "prime": (61, 7), "large": (4099, 10)}


def _decide(**arguments: Any) -> Outputs:
    """In the form of fixed size, which a trace can hold."""
    decision = functional.exit_decide(**arguments, fixed_size=True)
    assert isinstance(decision.n_keep, Tensor)
    return decision.score, decision.prediction, decision.exit_index, decision.keep_index, decision.n_keep


def _logits_sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {"logits": (3 * torch.randn(_SIZES[size], generator=generator, dtype=torch.float64)).to(device, dtype)}


def _bad(what: str, error: type[Exception], says: str, **arguments: Any) -> BadInput:
    return BadInput(what, lambda: {"logits": torch.zeros(3, 4), "threshold": 0.5} | arguments, error, says)


SPECS = [
    OpSpec(
        name="exit_decide",
        family="earlyexit",
        function=_decide,
        reference=reference.exit_decide,
        sample=_logits_sample,
        options=(
            {"threshold": 0.7},
            {"threshold": 0.5, "criterion": "entropy", "temperature": 2.0, "strict": True},
            {"threshold": 0.4, "criterion": "margin", "temperature": 0.5},
            {"threshold": -4.2, "criterion": "energy", "temperature": 3.0},
            {"threshold": 0.3, "strict": True, "temperature": 30},
        ),
        differentiable=(),
        exact=(1, 2, 3, 4),
        raw_ops=("exit_decide",),
        module=None,
        bad_inputs=(
            _bad("no tensor", TypeError, "logits to be a dense tensor in float32, .*, got list", logits=[1.0]),
            _bad("integers", TypeError, "got torch.int64", logits=torch.zeros(3, 4).long()),
            _bad("sparse", TypeError, "torch.sparse_coo", logits=torch.zeros(3, 4).to_sparse()),
            _bad("one row without a batch", ValueError, r"logits \[B, K\].*got \(4,\)", logits=torch.zeros(4)),
            _bad("no classes", ValueError, r"at least one class K, got \(3, 0\)", logits=torch.zeros(3, 0)),
            _bad("criterion", ValueError, "one of confidence, .*; got 'gini'", criterion="gini"),
            _bad("no temperature", TypeError, "temperature to be a number, got NoneType", temperature=None),
            _bad("temperature 0", ValueError, "temperature to be positive.*got 0", temperature=0),
            _bad("temperature nan", ValueError, "temperature to be positive.*got nan", temperature=float("nan")),
            _bad("temperature infinite", ValueError, "temperature to be positive", temperature=float("inf")),
            _bad("no threshold", TypeError, "threshold to be a number or a tensor, got list", threshold=[0.5]),
            _bad("threshold nan", ValueError, "threshold to be a number, got nan", threshold=float("nan")),
            _bad("integer threshold", TypeError, "a floating dtype, got torch.int64", threshold=torch.tensor(1)),
            _bad("thresholds", ValueError, r"one for each of 3 rows, got \(2,\)", threshold=torch.zeros(2)),
            _bad("a threshold a class", ValueError, r"got \(3, 1\)", threshold=torch.zeros(3, 1)),
            _bad("device", ValueError, "on the logits' device cpu, got meta", threshold=torch.zeros(3, device="meta")),
        ),
    ),
]
