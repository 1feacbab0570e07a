"""What the schedulers of :mod:`fastcifar.compat.diffusers` share: their programs, and how one is run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._library import serves
from ..diffusion.functional import Step, solver_step
from ..diffusion.noise import dynamic_threshold, normal_numbers
from ..diffusion.reference import CONVERT
from ._diffusers_rows import Level, Program, flowing, preserving

_op = torch.ops.fastcifar.solver_step.default
_into = torch.ops.fastcifar.solver_step_into.default
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
        self._seed()
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
    return_original = True  # False: pred_original_sample is None, and not written where nothing else needs it
    _keeps_converted = False
    _in_kernel = False
    _given_seed: int | None = None
    _key: Tensor
    _drawn = 0

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
        if self._programs is None:
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
        if not timestep.is_cpu and timestep.dtype == self.timesteps.dtype and timestep.numel() == 1:
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

    def draw_in_kernel(self, seed: int | None = None) -> None:
        """From now on noise is drawn where it is added, by counters, in place of a tensor of torch's numbers.

        Faster by the time that ``torch.randn`` takes, and other numbers than the peer's: those of
        :func:`fastcifar.diffusion.normal_numbers`, a stream a step, the same for any number of threads. Steps with a
        ``generator`` or ``variance_noise`` go on as before.

        Args:
            seed: 64 bits. Default: one of torch's generator at each ``set_timesteps``.
        """
        self._in_kernel, self._given_seed = True, seed
        self._seed()

    def _seed(self) -> None:
        if self._in_kernel:
            given = self._given_seed
            self._key = torch.randint(2**63 - 1, (1,)) if given is None else torch.tensor([given])
            self._drawn = 0

    def _noise(
        self, like: Tensor, generator: Any, dtype: torch.dtype | None = None, as_tensor: bool = False
    ) -> Tensor | None:
        """Noise of a generator; None where the op is to draw it."""
        if not self._in_kernel or generator is not None:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)
        if not as_tensor:
            return None
        self._drawn += 1
        return normal_numbers(self._key.to(like.device), like.numel(), stream=self._drawn - 1).view(like.shape)

    def _run(
        self,
        program: Program,
        sample: Tensor,
        output: Tensor,
        history: Sequence[Tensor | None] = (),
        noise: Tensor | None = None,
        threshold: bool = False,
        over: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Step:
        """Runs a program. ``over`` are kept tensors that may be overwritten by what is kept in their place."""
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
        key = None
        if noise is None and program.noisy:
            key = self._key if sample.is_cpu else self._key.to(sample.device, non_blocking=True)
            self._drawn += 1
        given = [sample] * (program.kept[-1] + 1) if program.kept else []  # those of coefficient 0 are not read
        for i in program.kept:
            tensor = history[i]
            if tensor is None:
                raise ValueError(f"{type(self).__name__}.step: expected what the steps before have kept, got none")
            given[i] = tensor if tensor.dtype is sample.dtype else tensor.to(sample.dtype)
        stream, wanted = self._drawn - 1 if key is not None else 0, program.wanted
        if not (self.return_original or self._keeps_converted):
            wanted &= ~2
        grad = torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad or _require(given))
        if threshold or grad or not serves("solver_step", sample):
            rows = self._threshold(program, sample, output) if threshold else program.coefficients.tolist()
            return solver_step(
                sample,
                output,
                given,
                rows,
                noise,
                limit=1.0 if threshold else program.limit,
                seed=key,
                stream=stream,
                wanted=[name for i, name in enumerate(Step._fields) if wanted >> i & 1],
            )
        numbers, limit = program.numbers, program.limit
        converted, corrected = over
        if converted is None and corrected is None:
            made = _op(sample, output, None, given, noise, key, None, numbers, 1.0, limit, stream, wanted)
            return Step(made[0], made[1] if wanted & 2 else None, made[2] if wanted & 4 else None)  # type: ignore[arg-type]
        x_next = torch.empty_like(sample)
        if converted is None and wanted & 2:
            converted = torch.empty_like(sample)
        if corrected is None and wanted & 4:
            corrected = torch.empty_like(sample)
        _into(sample, output, None, given, noise, key, None, numbers, 1.0, limit, stream, x_next, converted, corrected)
        return Step(x_next, converted, corrected)  # type: ignore[arg-type]


def result(kind: Any, x_next: Tensor, image: Tensor | None, return_dict: bool) -> Any:
    """What a step returns: a pair, or a dict of the peer's class, without its constructor, which takes longer than a
    step of few elements."""
    if not return_dict:
        return x_next, image
    made = kind.__new__(kind)
    made["prev_sample"] = x_next
    if image is not None:
        made["pred_original_sample"] = image
    else:
        made.__dict__["pred_original_sample"] = None
    return made


def one(x_next: Tensor) -> SchedulerOutput:
    made = SchedulerOutput.__new__(SchedulerOutput)
    made["prev_sample"] = x_next
    return made


def spare(kept: Sequence[Tensor | None], i: int, holders: int = 1) -> Tensor | None:
    """A kept tensor that no one would miss: one that a step has made, and that no one refers to but its holders."""
    tensor = kept[i]
    if tensor is None or not hasattr(tensor, _MADE) or _references(kept, i) > _ALONE + holders - 1:
        return None
    return None if tensor.requires_grad else tensor


def mark(tensor: Tensor) -> Tensor:
    """A tensor that a step has made to be kept."""
    setattr(tensor, _MADE, True)
    return tensor


def _references(kept: Sequence[Tensor | None], i: int) -> int:
    return sys.getrefcount(kept[i])


_MADE = "_made_by_a_step"
_ALONE = _references([torch.empty(0)], 0) + 1  # the list's, and that of the variable in spare


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
