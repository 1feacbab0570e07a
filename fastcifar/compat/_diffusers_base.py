"""What the schedulers of :mod:`fastcifar.compat.diffusers` share: their programs, and how one is run."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._library import serves
from ..diffusion.functional import Step, dynamic_threshold, solver_step
from ..diffusion.reference import CONVERT
from ._diffusers_rows import Level, Program, flowing, preserving

_op = torch.ops.fastcifar.solver_step.default
PREDICTIONS = ("epsilon", "sample", "v_prediction")
MOST_AHEAD = 256  # constructors set as many steps as there are in training: those are computed when they are taken


def compiling(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """A peer's ``set_timesteps``, after which all programs of the new steps are computed.

    The time steps go to their device last, so that they need not be read back from it.
    """
    signature = inspect.signature(set_timesteps)

    @functools.wraps(set_timesteps)
    def wrapper(self: Compiled, *args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        device = given.pop("device", None)
        set_timesteps(**given)
        self._programs = None
        self._ready()
        if device is not None:
            self.timesteps = self.timesteps.to(device)
        if len(self._times) <= MOST_AHEAD:
            self._compile()

    return wrapper


def ahead() -> contextlib.suppress:
    """Around a program that is computed before its step: what is wrong with a step is said when it is taken, since a
    run may never come to it."""
    return contextlib.suppress(ValueError)


class Compiled:
    """A scheduler whose steps are programs, computed in float64 and run in one pass each."""

    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    _predictions: ClassVar[tuple[str, ...]] = PREDICTIONS
    _programs: dict[Hashable, Program] | None = None
    _times: Tensor

    def register_to_config(self, **kwargs: Any) -> None:
        # The peer's constructors call this before all else: so options are refused when they are given.
        super().register_to_config(**kwargs)  # type: ignore[misc]
        kind = kwargs.get("prediction_type")
        if kind is not None and kind not in self._predictions:
            raise ValueError(
                f"{type(self).__name__}: expected prediction_type to be one of {', '.join(self._predictions)}, "
                f"got {kind!r}"
            )

    def _ready(self) -> None:
        """Reads the schedule, once: schedulers may step before ``set_timesteps``."""
        if self._programs is None:
            self._programs = {}
            self._times = self.timesteps.cpu()
            self._read_schedule()

    def _read_schedule(self) -> None:
        """Takes the levels of noise from the scheduler as numbers."""

    def _compile(self) -> None:
        """Computes the programs that a run from the first step to the last will ask for."""

    def _program(self, key: Hashable, make: Callable[[], Program]) -> Program:
        self._ready()
        programs = self._programs
        assert programs is not None
        found = programs.get(key)
        if found is None:
            found = programs[key] = make()
        return found

    def _check_set(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected set_timesteps to be called before, got no time steps"
            )

    def _where(self, index: int | None = None) -> str:
        return type(self).__name__ if index is None else f"{type(self).__name__}, step {index}"

    def _value(self, timestep: Any) -> Any:
        """A time step as a number. One that was taken from ``timesteps`` on another device is looked up on the CPU by
        where it lies in memory: reading it would wait for the device."""
        if not isinstance(timestep, Tensor):
            return timestep
        if timestep.device.type != "cpu" and timestep.dtype == self.timesteps.dtype and timestep.numel() == 1:
            ours = self.timesteps
            if (
                ours.is_contiguous()
                and ours.storage_offset() == 0
                and timestep.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr()
            ):
                return self._times[timestep.storage_offset()].item()
        return timestep.item()

    def _threshold(self, program: Program, sample: Tensor, output: Tensor) -> Tensor:
        """Programs of each sample whose prediction is divided by its quantile: clamped to 1 they are thresholded."""
        most = self.config.sample_max_value
        if most <= 1:
            size = torch.full((len(sample),), float(most), dtype=torch.float64)
        else:
            rows = torch.zeros_like(program.coefficients)
            rows[CONVERT] = program.coefficients[CONVERT]
            image = solver_step(sample, output, (), rows.tolist()).converted
            size = dynamic_threshold(image, self.config.dynamic_thresholding_ratio, float(most)).double()
        rows = program.coefficients.to(size.device).repeat(len(size), 1, 1)
        rows[:, CONVERT] /= size[:, None]
        return rows

    def _run(
        self,
        program: Program,
        sample: Tensor,
        output: Tensor,
        history: Sequence[Tensor | None] = (),
        noise: Tensor | None = None,
        threshold: bool = False,
    ) -> Step:
        if sample.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__}.step: expected an output like the sample, {list(sample.shape)}, "
                f"got {list(output.shape)}"
            )
        if sample.dtype is not output.dtype:
            common = torch.promote_types(sample.dtype, output.dtype)
            sample, output = sample.to(common), output.to(common)
        if noise is not None and noise.dtype is not sample.dtype:
            noise = noise.to(sample.dtype)
        given = [sample] * (program.kept[-1] + 1) if program.kept else []  # those of coefficient 0 are not read
        for i in program.kept:
            tensor = history[i]
            if tensor is None:
                raise ValueError(f"{type(self).__name__}.step: expected what the steps before have kept, got none")
            given[i] = tensor if tensor.dtype is sample.dtype else tensor.to(sample.dtype)
        if threshold:
            rows = self._threshold(program, sample, output)
            return solver_step(sample, output, given, rows, noise, limit=1.0)
        if not serves("solver_step", sample) or (
            torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad or _require(given))
        ):
            return solver_step(sample, output, given, program.coefficients.tolist(), noise, limit=program.limit)
        return Step(
            *_op(sample, output, None, given, noise, None, None, program.numbers, 1.0, program.limit, 0, program.wanted)
        )


def _require(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


class Sigmas(Compiled):
    """One that walks along ``sigmas`` with a counter."""

    sigmas: Tensor
    _step_index: int | None
    _begin_index: int | None
    _levels: list[float]

    def _read_schedule(self) -> None:
        self._levels = self.sigmas.tolist()

    def _level(self, index: int) -> Level:
        sigma = self._levels[index]
        return flowing(sigma) if self.config.use_flow_sigmas else preserving(sigma)

    def _init_step_index(self, timestep: Any) -> None:
        self._ready()
        if self._begin_index is None:
            self._step_index = self.index_for_timestep(self._value(timestep), self._times)  # type: ignore[attr-defined]
        else:
            self._step_index = self._begin_index

    def _index(self, timestep: Any) -> int:
        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index
        assert index is not None
        if index >= len(self._levels) - 1:
            raise ValueError(
                f"{type(self).__name__}.step: expected at most {len(self._levels) - 1} steps after set_timesteps, got "
                "one more"
            )
        return index
