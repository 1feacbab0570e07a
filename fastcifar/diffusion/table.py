"""A solver as a table of numbers: the programs of its steps, in float64, and what to call the model with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS


class Points(NamedTuple):
    """Where a sampler evaluates and where it ends: S + 1 points of the noise schedule, from noise to image, float64.

    At a point a sample is ``alpha x0 + sigma eps``; ``alpha`` is 1 where the variance explodes (EDM), and ``sigma`` of
    the last point may be 0.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def lam(self) -> Tensor:
        """Half the logarithm of the signal-to-noise ratio, ``ln(alpha / sigma)``; infinite where sigma is 0."""
        return torch.log(self.alpha / self.sigma)


@dataclass(frozen=True, eq=False)
class SolverTable:
    """S steps of a linear solver.

    Attributes:
        coefficients: float64 ``[S, 3, 11]``: the program of each step, see
            :func:`fastcifar.diffusion.reference.solver_step` for rows and columns (``TERMS``).
        store: int64 ``[S, 2]``: the history slot (1 to 6, or 0 for none) into which each step writes ``converted`` and
            ``corrected``, once it has read what it needs. Slots stay where they are; the coefficients name them.
        timesteps: float64 ``[S]``: what the model is called with.
        scale: float64 ``[S]``: what x is multiplied by where the model is called (1 but for variance exploding ones).
        limit: ``converted`` is clamped to -limit...limit; None for no clamp.
        init_scale: what standard normal noise is multiplied by to start from.
        name: for tables and plots.
        preloaded: slots that hold something before the first step, such as the image that a sampler is conditioned on.

    Raises:
        ValueError: a shape is not as described, a coefficient is not finite, a row uses what does not exist yet, or a
            slot is read that no step has written and that is not preloaded.
    """

    coefficients: Tensor
    store: Tensor
    timesteps: Tensor
    scale: Tensor
    limit: float | None = None
    init_scale: float = 1.0
    name: str = "solver"
    preloaded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = len(self.coefficients)
        shapes = {
            "coefficients": (steps, 3, len(TERMS)),
            "store": (steps, 2),
            "timesteps": (steps,),
            "scale": (steps,),
        }
        for field, shape in shapes.items():
            if tuple(getattr(self, field).shape) != shape:
                raise ValueError(f"SolverTable: expected {field} {list(shape)}, got {list(getattr(self, field).shape)}")
        if not bool(torch.isfinite(self.coefficients).all()):
            row = int((~torch.isfinite(self.coefficients)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"SolverTable: expected finite coefficients, got {self.name!r} with others in step {row}")
        first_absent = {CONVERT: 2 + HISTORY, CORRECT: 3 + HISTORY, PREDICT: len(TERMS)}
        for row, end in first_absent.items():
            if bool(self.coefficients[:, row, end:].any()):
                raise ValueError("SolverTable: expected converted to use inputs only, and corrected no noise")
        if self.store.numel() and not 0 <= int(self.store.min()) <= int(self.store.max()) <= HISTORY:
            raise ValueError(f"SolverTable: expected slots of 1 to {HISTORY}, or 0 for none, got {self.store.tolist()}")
        if not all(1 <= slot <= HISTORY for slot in self.preloaded):
            raise ValueError(f"SolverTable: expected preloaded slots of 1 to {HISTORY}, got {self.preloaded}")
        written = set(self.preloaded)
        for step in range(steps):
            read = {i for i in range(1, HISTORY + 1) if bool(self.coefficients[step, :, 1 + i].any())}
            if not read <= written:
                raise ValueError(
                    f"SolverTable: step {step} of {self.name!r} reads slot {min(read - written)}, which no step before "
                    "it has written"
                )
            written |= set(self.store[step].tolist()) - {0}

    def __len__(self) -> int:
        return len(self.coefficients)

    @property
    def slots(self) -> int:
        """How many history slots the table uses."""
        return max([*self.store.flatten().tolist(), *self.preloaded], default=0)

    @property
    def evaluates(self) -> Tensor:
        """Whether a step needs the model, bool ``[S]``: where nothing but x and history is used, the call is saved."""
        return (self.coefficients[:, :, 1] != 0).any(1)

    @property
    def noisy(self) -> Tensor:
        """Whether a step adds noise, bool ``[S]``."""
        return self.coefficients[:, PREDICT, -1] != 0

    def save(self, path: str | Path) -> None:
        """As JSON, every number in full."""
        fields = ("coefficients", "store", "timesteps", "scale")
        record = {name: getattr(self, name).tolist() for name in fields}
        record |= {"limit": self.limit, "init_scale": self.init_scale, "name": self.name}
        record["preloaded"] = list(self.preloaded)
        Path(path).write_text(json.dumps(record))

    @classmethod
    def load(cls, path: str | Path) -> SolverTable:
        """What :meth:`save` wrote."""
        record = json.loads(Path(path).read_text())
        for name in ("coefficients", "timesteps", "scale"):
            record[name] = torch.tensor(record[name], dtype=torch.float64)
        record["store"] = torch.tensor(record["store"], dtype=torch.int64)
        record["preloaded"] = tuple(record.get("preloaded", ()))
        return cls(**record)
