"""A scheduler of diffusers as a :class:`SolverTable`: by its formulas where they are known, else by trying it out."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS, solver_step
from .table import SolverTable

__all__ = ["from_diffusers"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_RANKS = (1e-10, 1e-6)  # what counts as dependent: where a scheduler computes in float64, and where it cannot
_FIT = 1e-5  # relative: a scheduler that is not linear misses by far more


def from_diffusers(scheduler: Any, **options: Any) -> SolverTable:
    """Compiles a scheduler into a table: each step a program, run by :func:`fastcifar.diffusion.solver_step`.

    The classes that :mod:`fastcifar.compat.diffusers` has are compiled by their formulas in float64, clipping included.
    Any other is tried out: each sample, output and noise of a run is set to 1 by itself, in float64 throughout (also
    where the scheduler goes to float32), which gives what each step depends on. What has to be kept between steps is
    the space that later steps see of earlier ones, in at most six slots. The table is then run against the scheduler on
    random data.

    Args:
        scheduler: one of diffusers', after ``set_timesteps``. It is not changed.
        **options: further arguments of its ``step``, such as ``eta`` of DDIM.

    Returns:
        The table. Its coefficients go as far as the scheduler's own levels of noise do, which are float32.

    Raises:
        ValueError: time steps are not set; the scheduler is not linear (thresholding, or clipping in a class that is
            tried out), uses noise of earlier steps or twice in a step, or needs more than six slots or two new ones a
            step; or it differs from its table by more than 1e-5.

    Example:
        >>> from diffusers import DPMSolverMultistepScheduler
        >>> from fastcifar.diffusion import from_diffusers
        >>> scheduler = DPMSolverMultistepScheduler(solver_order=2)
        >>> scheduler.set_timesteps(10)
        >>> table = from_diffusers(scheduler)
        >>> len(table), table.slots
        (10, 1)
    """
    if getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError(f"from_diffusers: expected {type(scheduler).__name__}.set_timesteps to be called before")
    twin = _twin(scheduler)
    if twin is not None:
        table = importlib.import_module("..compat._diffusers_table", __package__).recorded(twin, options)
        _verify(table, scheduler, options)
        return table
    config = scheduler.config
    for option in ("thresholding", "clip_sample"):
        if getattr(config, option, False):
            raise ValueError(
                f"from_diffusers: expected a linear scheduler, got {type(scheduler).__name__} with {option}"
            )
    response = _Response(scheduler, options)
    for rank in _RANKS:
        table = _realised(response, rank)
        try:
            _verify(table, scheduler, options)
        except ValueError:
            if rank == _RANKS[-1]:
                raise
        else:
            break
    return table


def _twin(scheduler: Any) -> Any:
    """The scheduler as one of ours, which are subclasses and hold the same; None where there is none of its class."""
    name = type(scheduler).__name__
    if not type(scheduler).__module__.startswith(("diffusers.", "fastcifar.")):
        return None
    ours = getattr(importlib.import_module("..compat.diffusers", __package__), name, None)
    if ours is None:
        return None
    if type(scheduler) is ours:
        return scheduler
    if type(scheduler) is not getattr(importlib.import_module("diffusers"), name):
        return None
    twin = ours.__new__(ours)
    twin.__dict__ = copy.deepcopy(scheduler.__dict__)
    twin.register_to_config(**scheduler.config)  # refuses what ours has no formula for
    return twin


class _Float64(TorchFunctionMode):
    """Has a scheduler compute in float64 where it asks for less, and draw the noise that is given."""

    def __init__(self, noise: Tensor | None = None) -> None:
        super().__init__()
        self.noise, self.draws = noise, 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            self.draws += 1
            if self.noise is None or self.draws > 1:
                raise ValueError("from_diffusers: expected at most one draw of noise a step, got more")
            return self.noise.clone()
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        wide = [_widened(value) for value in args]
        return func(*wide, **{key: _widened(value) for key, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _fresh(scheduler: Any) -> Any:
    """A copy that computes in float64 as far as what it holds goes."""
    if getattr(scheduler, "_step_index", None) is not None or getattr(scheduler, "counter", None):
        raise ValueError(f"from_diffusers: expected {type(scheduler).__name__} to have taken no step, got some taken")
    scheduler = copy.deepcopy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "timesteps":
            setattr(scheduler, name, value.double())
    if hasattr(scheduler, "_begin_index"):
        scheduler._begin_index = None
    return scheduler


def _step(scheduler: Any, timestep: Tensor, x: Tensor, output: Tensor, noise: Tensor, options: dict[str, Any]) -> Any:
    """The next sample and the factor that the model's input has, in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64(noise):
            scale = 1.0
            if hasattr(scheduler, "scale_model_input"):
                scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep).item()
            return scheduler.step(output, timestep, x, return_dict=False, **options)[0], scale
    finally:
        torch.set_default_dtype(default)


class _Response:
    """What each next sample is made of: coefficients of all samples, outputs and noises up to it."""

    def __init__(self, scheduler: Any, options: dict[str, Any]) -> None:
        self.name = type(scheduler).__name__
        self.init_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        scheduler = _fresh(scheduler)
        self.timesteps = scheduler.timesteps.cpu().double()
        steps = len(self.timesteps)
        # One element of a batch for each tensor of the run, and one for none: what a step adds of its own.
        found = torch.zeros(steps, 3 * steps + 1, dtype=torch.float64)
        scale = []
        for step, timestep in enumerate(scheduler.timesteps):
            ones = torch.zeros(3, 3 * steps + 1, 1, 1, 1, dtype=torch.float64)
            for i in range(3):
                ones[i, 3 * step + i] = 1.0
            x_next, factor = _step(scheduler, timestep, ones[0], ones[1], ones[2], options)
            found[step] = x_next.double().flatten()
            scale.append(factor)
        if not bool(torch.isfinite(found).all()) or bool(found[:, -1].any()):
            raise ValueError(f"from_diffusers: expected finite linear steps, got {self.name} with others")
        self.scale = torch.tensor(scale, dtype=torch.float64)
        parts = found[:, :-1].reshape(steps, steps, 3)
        self.noise = parts[:, :, 2]
        if bool((self.noise - torch.diag(self.noise.diagonal())).any()):
            raise ValueError(f"from_diffusers: expected noise of the step itself only, got earlier in {self.name}")
        self.inputs = parts[:, :, :2].reshape(steps, 2 * steps)  # x and output of each step, side by side


def _basis(rows: Tensor, rank: float) -> Tensor:
    """Orthonormal rows that span as much as these do."""
    if not rows.numel():
        return rows[:0]
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > rank * max(float(sizes[0]), 1e-300)] if float(sizes[0]) > 0 else rows[:0]


def _scaled(rows: Tensor) -> Tensor:
    sizes = rows.norm(dim=1, keepdim=True)
    return (rows / sizes.clamp(min=1e-300))[sizes[:, 0] > 0]


def _realised(response: _Response, rank: float) -> SolverTable:
    """The least memory that gives the response. After a step it must span what later steps see of all until then; what
    is new of that is a combination of the step's x, its output, and what was kept, and at most two are stored."""
    steps = len(response.timesteps)
    coefficients = torch.zeros(steps, 3, len(TERMS), dtype=torch.float64)
    store = torch.zeros(steps, 2, dtype=torch.int64)
    slots: dict[int, Tensor] = {}  # what each holds, as coefficients of all inputs
    for step in range(steps):
        inputs = torch.eye(2 * steps, dtype=torch.float64)[2 * step : 2 * step + 2]
        columns = [0, 1, *(1 + slot for slot in slots)]
        known = torch.stack([*inputs, *slots.values()])

        def express(
            row: int, target: Tensor, columns: list[int] = columns, known: Tensor = known, step: int = step
        ) -> None:
            weights = torch.linalg.lstsq(known.T, target.unsqueeze(1), driver="gelsd").solution[:, 0]
            if float((weights @ known - target).norm()) > 1e3 * rank * float(target.norm()):
                raise ValueError(
                    f"from_diffusers: expected steps of x, output and what was kept, got another in step {step} of "
                    f"{response.name}"
                )
            small = weights.abs() * known.norm(dim=1) < 1e-13 * float(target.norm())
            coefficients[step, row, columns] = weights.masked_fill(small, 0.0)

        express(PREDICT, response.inputs[step])
        coefficients[step, PREDICT, -1] = response.noise[step, step]

        seen = response.inputs[step + 1 :].clone()
        seen[:, 2 * step + 2 :] = 0
        needed = _basis(_scaled(seen), rank)
        slots, new = _split(slots, needed, rank, f"step {step} of {response.name}")
        for place, (row, vector) in enumerate(zip((CONVERT, CORRECT), new, strict=False)):
            express(row, vector)
            free = min(set(range(1, HISTORY + 1)) - set(slots))
            slots[free] = vector
            store[step, place] = free
    return SolverTable(
        coefficients,
        store,
        timesteps=response.timesteps,
        scale=response.scale,
        init_scale=response.init_scale,
        name=response.name.removesuffix("Scheduler"),
    )


def _split(slots: dict[int, Tensor], needed: Tensor, rank: float, where: str) -> tuple[dict[int, Tensor], list[Tensor]]:
    """The fewest slots to keep and the fewest vectors to add, at most two, that span what is needed."""
    for kept_count in range(len(slots) + 1):
        found: tuple[dict[int, Tensor], list[Tensor]] | None = None
        for names in itertools.combinations(slots, kept_count):
            kept = {name: slots[name] for name in names}
            base = _basis(_scaled(torch.stack(list(kept.values()))), rank) if kept else needed[:0]
            rest = needed - needed @ base.T @ base
            rest = rest[rest.norm(dim=1) > 10 * rank]
            new = _basis(rest, rank)
            if len(new) <= 2 and kept_count + len(new) <= HISTORY and (found is None or len(new) < len(found[1])):
                found = kept, list(new)
        if found is not None:
            return found
    raise ValueError(f"from_diffusers: expected at most two new tensors to be kept, six in all, got more in {where}")


def _verify(table: SolverTable, scheduler: Any, options: dict[str, Any]) -> None:
    """Runs the table beside the scheduler on random samples, outputs and noise."""
    generator = torch.Generator().manual_seed(0)
    scheduler = _fresh(scheduler)
    shape = (2, 3, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * table.init_scale
    expected, slots = x, [None] * HISTORY  # type: ignore[var-annotated]
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(shape, dtype=torch.float64, generator=generator)
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        expected, _ = _step(scheduler, timestep, expected, output, noise, options)
        made = solver_step(x, output, slots, table.coefficients[step], noise, limit=table.limit)
        for slot, tensor in zip(table.store[step].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                slots[slot - 1] = tensor
        x = made.x_next
        if not bool(torch.isfinite(expected).all()):
            raise ValueError(
                f"from_diffusers: expected finite samples, got others from {type(scheduler).__name__} in step {step}"
            )
        error = float((x - expected).norm()) / max(float(expected.norm()), 1e-300)
        if not error <= _FIT:
            raise ValueError(
                f"from_diffusers: expected a linear scheduler, got {type(scheduler).__name__} which differs from its "
                f"table by {error:.1e} after step {step}"
            )
