"""A scheduler of ours as a table: its steps are taken once with nothing in them, and what each reads is noted."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.functional import Step
from ..diffusion.reference import CONVERT, CORRECT, HISTORY
from ..diffusion.table import SolverTable
from ._diffusers_base import Compiled
from ._diffusers_rows import CONVERTED, CORRECTED, OUTPUT, Program, X, kept

Name = tuple[int, int]  # a step, and which of its tensors: the column that it has there


class _Recorder:
    """Stands where a step is run. Tensors of the meta device, which hold nothing, tell what is read by who they are."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.reads: list[list[Name | None]] = []
        self.names: dict[int, Name] = {}
        self.alive: list[Tensor] = []  # an id is a name only as long as its tensor lives

    def token(self, name: Name) -> Tensor:
        tensor = torch.empty(1, 1, 1, 1, dtype=torch.float64, device="meta")
        self.names[id(tensor)] = name
        self.alive.append(tensor)
        return tensor

    def run(
        self,
        program: Program,
        sample: Tensor,
        output: Tensor,
        history: Sequence[Tensor | None] = (),
        noise: Tensor | None = None,
        threshold: bool = False,
        over: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Step:
        step = len(self.programs)
        self.programs.append(program)
        reads = [None if tensor is None else self.names[id(tensor)] for tensor in history]
        self.reads.append(reads + [None] * (HISTORY - len(reads)))
        self.names[id(sample)] = (step, X)
        self.alive.append(sample)
        return Step(self.token((step + 1, X)), self.token((step, CONVERTED)), self.token((step, CORRECTED)))


def recorded(scheduler: Any, options: dict[str, Any]) -> SolverTable:
    """The table of a scheduler of ours, after ``set_timesteps``; ``options`` are further arguments of ``step``."""
    name = type(scheduler).__name__
    if getattr(scheduler.config, "thresholding", False):
        raise ValueError(f"from_diffusers: expected a linear scheduler, got {name} with thresholding")
    if getattr(scheduler, "variance_type", None) in ("learned", "learned_range"):
        raise ValueError(
            f"from_diffusers: expected a variance that is no output of the model, got {name} with a learned one"
        )
    if options.get("s_churn"):
        raise ValueError(f"from_diffusers: expected one program a step, got {name} with churn")
    scheduler = fresh(scheduler)
    times = scheduler.timesteps.cpu()
    recorder = _Recorder()
    scheduler._run = recorder.run
    x = recorder.token((0, X))
    scale = []
    for index, timestep in enumerate(times):
        if hasattr(scheduler, "scale_model_input"):
            scale.append(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep).item())
        x = scheduler.step(recorder.token((index, OUTPUT)), timestep, x, **options)[0]
    return SolverTable(
        *_slots(recorder),
        timesteps=times.double(),
        scale=torch.tensor(scale, dtype=torch.float64),
        limit=min((p.limit for p in recorder.programs if math.isfinite(p.limit)), default=None),
        init_scale=float(scheduler.init_noise_sigma),
        name=name.removesuffix("Scheduler"),
    )


def fresh(scheduler: Any) -> Any:
    """A copy that has taken no step."""
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = scheduler._begin_index = None
    return scheduler


def _slots(recorder: _Recorder) -> tuple[Tensor, Tensor]:
    """Coefficients with a slot for all that is kept, and where each step stores."""
    steps = len(recorder.programs)
    last_read: dict[Name, int] = {}
    for step, (program, reads) in enumerate(zip(recorder.programs, recorder.reads, strict=True)):
        for i, read in enumerate(reads, 1):
            if read is not None and bool(program.coefficients[:, kept(i)].any()):
                last_read[read] = step
    coefficients = torch.zeros(steps, *recorder.programs[0].coefficients.shape, dtype=torch.float64)
    store = torch.zeros(steps, 2, dtype=torch.int64)
    slot_of: dict[Name, int] = {}
    for step, program in enumerate(recorder.programs):
        rows = coefficients[step]
        rows.copy_(program.coefficients)
        rows[:, kept(1) : kept(HISTORY) + 1] = 0
        for i, read in enumerate(recorder.reads[step], 1):
            if read in slot_of and last_read.get(read, -1) >= step:
                rows[:, kept(slot_of[read])] += program.coefficients[:, kept(i)]
        slot_of = {name: slot for name, slot in slot_of.items() if last_read[name] > step}
        for name in ((step, CONVERTED), (step, CORRECTED), (step, OUTPUT), (step, X)):
            if last_read.get(name, -1) <= step:
                continue
            # What the model gave, or the sample as it came, is kept by a row that is free for it.
            place = {CONVERTED: 0, CORRECTED: 1}.get(name[1])
            if place is None:
                place = next(i for i, row in enumerate((CONVERT, CORRECT)) if not bool(rows[row].any()))
                rows[(CONVERT, CORRECT)[place], name[1]] = 1.0
            slot = min(set(range(1, HISTORY + 1)) - set(slot_of.values()))
            slot_of[name] = slot
            store[step, place] = slot
    return coefficients, store


__all__ = ["Compiled", "fresh", "recorded"]
