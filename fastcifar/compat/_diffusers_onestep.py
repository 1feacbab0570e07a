"""Steps of DDIM and DDPM, whose programs go by the time step, and of the Euler schedulers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.functional import Step
from ._diffusers_base import Compiled, Sigmas, ahead, result
from ._diffusers_rows import CONVERTED, NOISE, OUTPUT, Level, Program, X, as_image, exploding, program, slope

LEAST_VARIANCE = 1e-20
LEARNED = ("learned", "learned_range")


class ByTime(Compiled):
    """One whose steps go by the time step that they are given, in any order, and not by a counter."""

    alphas_cumprod: Tensor
    _cumulative: list[float]

    def _read_schedule(self) -> None:
        self._cumulative = self.alphas_cumprod.tolist()
        self._steps = self._times.tolist()

    def _at_time(self, timestep: Any) -> int:
        if self._programs is None:
            self._ready()
        return self._checked(self._value(timestep))

    def _checked(self, value: float) -> int:
        index = int(value)
        if index != value or not 0 <= index < len(self._cumulative):
            raise ValueError(
                f"{type(self).__name__}.step: expected a time step of 0 to {len(self._cumulative) - 1}, got {value}"
            )
        return index

    def _signal(self, timestep: int) -> float:
        """The cumulative alpha: how much image there is, as a square."""
        found = self._cumulative[timestep] if timestep >= 0 else 1.0
        if not 0 <= found <= 1:
            raise ValueError(
                f"{type(self).__name__}, time step {timestep}: expected a cumulative alpha of 0 to 1, got {found}"
            )
        return found

    def _clip(self) -> float | None:
        return self.config.clip_sample_range if self.config.clip_sample and not self.config.thresholding else None


class DDIMSteps(ByTime):
    def _read_schedule(self) -> None:
        super()._read_schedule()
        self._final = float(self.final_alpha_cumprod)  # type: ignore[attr-defined]

    def _compile(self) -> None:
        for timestep in self._steps:
            with ahead():
                self._ddim(self._checked(timestep), 0.0, False)

    def _ddim(self, timestep: int, eta: float, clipped: bool) -> Program:
        return self._program((timestep, eta, clipped), lambda: self._make_ddim(timestep, eta, clipped))

    def _make_ddim(self, timestep: int, eta: float, clipped: bool) -> Program:
        where = f"{type(self).__name__}, time step {timestep}"
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps  # type: ignore[operator]
        a = self._signal(timestep)
        target = self._signal(before) if before >= 0 else self._final
        now = Level(math.sqrt(a), math.sqrt(1 - a))
        kind = self.config.prediction_type
        p, q = as_image(kind, now, where)
        deviation = eta * math.sqrt(max((1 - target) / (1 - a) * (1 - a / target), 0.0)) if eta else 0.0
        rest = 1 - target - deviation * deviation
        if rest < -1e-12:
            raise ValueError(f"{where}: expected an eta with a variance of at most {1 - target:.3g}, got eta={eta}")
        along = math.sqrt(max(rest, 0.0))
        predict = {CONVERTED: math.sqrt(target), NOISE: deviation}
        if clipped:
            predict[X] = along / now.sigma
            predict[CONVERTED] -= along * now.alpha / now.sigma
        elif kind == "epsilon":
            predict[OUTPUT] = along
        elif kind == "v_prediction":
            predict |= {X: along * now.sigma, OUTPUT: along * now.alpha}
        else:
            predict |= {X: along / now.sigma, OUTPUT: -along * now.alpha / now.sigma}
        return program(predict, {X: p, OUTPUT: q}, limit=self._clip(), where=where)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected set_timesteps to be called before, got no time steps"
            )
        found = self._ddim(self._at_time(timestep), float(eta), bool(use_clipped_model_output))
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError(f"{type(self).__name__}.step: expected generator or variance_noise, got both")
            noise = variance_noise
            if noise is None:
                noise = self._noise(model_output, generator)
        made = self._run(found, sample, model_output, (), noise, self.config.thresholding)
        return result(self._output, made.x_next, made.converted, return_dict)

    _output: ClassVar[Any]


class DDPMSteps(ByTime):
    variance_type: str
    custom_timesteps: bool
    _output: ClassVar[Any]

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)
        if kwargs.get("variance_type") == "fixed_large_log":
            raise ValueError(
                f"{type(self).__name__}: expected another variance_type than fixed_large_log, for which the peer takes "
                "the root of a negative logarithm"
            )

    def _compile(self) -> None:
        for timestep in self._steps:
            with ahead():
                self._ddpm(self._checked(timestep))

    def _before(self, timestep: int) -> int:
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        index = self._steps.index(timestep) if timestep in self._steps else None
        if index is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected one of the {len(self._steps)} time steps that were set, got "
                f"{timestep}"
            )
        return self._steps[index + 1] if index + 1 < len(self._steps) else -1

    def _betas(self, timestep: int) -> tuple[float, float, float, float]:
        """The cumulative alphas of now and of the target, the beta between them and the posterior's variance."""
        before = self._before(timestep)
        a, target = self._signal(timestep), self._signal(before)
        beta = 1 - a / target
        return a, target, beta, max((1 - target) / (1 - a) * beta, LEAST_VARIANCE)

    def _ddpm(self, timestep: int) -> Program:
        return self._program(timestep, lambda: self._make_ddpm(timestep))

    def _make_ddpm(self, timestep: int) -> Program:
        where = f"{type(self).__name__}, time step {timestep}"
        a, target, beta, variance = self._betas(timestep)
        p, q = as_image(self.config.prediction_type, Level(math.sqrt(a), math.sqrt(1 - a)), where)
        if self.variance_type in LEARNED:
            deviation = 1.0
        else:  # any other name than fixed_large means the posterior's variance to the peer
            deviation = math.sqrt(beta if self.variance_type == "fixed_large" else variance)
        predict = {
            X: math.sqrt(a / target) * (1 - target) / (1 - a),
            CONVERTED: math.sqrt(target) * beta / (1 - a),
            NOISE: deviation if timestep > 0 else 0.0,
        }
        return program(predict, {X: p, OUTPUT: q}, limit=self._clip(), where=where)

    def _learned(self, timestep: int, predicted: Tensor | None, noise: Tensor) -> Tensor:
        """Noise of the variance that the model predicts, for each element its own."""
        if predicted is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected an output of twice the sample's channels with a variance_type "
                f"of {self.variance_type}, got as many"
            )
        if self.variance_type == "learned":
            return predicted.sqrt() * noise
        _, _, beta, variance = self._betas(timestep)
        low, high = math.log(variance), math.log(beta)
        return (predicted * (0.25 * (high - low)) + 0.25 * (high + low)).exp() * noise

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        now = self._at_time(timestep)
        predicted, noise = None, None
        if self.variance_type in LEARNED and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, predicted = model_output.split(sample.shape[1], 1)
        if now > 0:
            learned = self.variance_type in LEARNED
            noise = self._noise(model_output, generator, as_tensor=learned)
            if learned and noise is not None:
                noise = self._learned(now, predicted, noise)
        made = self._run(self._ddpm(now), sample, model_output, (), noise, self.config.thresholding)
        return result(self._output, made.x_next, made.converted, return_dict)


class Exploding(Sigmas):
    """One whose samples grow with sigma, and are scaled down where the model sees them."""

    is_scale_input_called: bool
    _step_index: int
    _output: ClassVar[Any]

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """``sample / sqrt(sigma^2 + 1)``: what the model is to be called with."""
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        return sample / math.sqrt(self._levels[self._step_index] ** 2 + 1)

    def _finish(self, made: Step, dtype: torch.dtype, return_dict: bool) -> Any:
        self._step_index += 1
        x_next = made.x_next if made.x_next.dtype is dtype else made.x_next.to(dtype)
        return result(self._output, x_next, made.converted, return_dict)

    def _float_step(self, name: str, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"{name}.step: expected one of the scheduler's timesteps, got the whole number {timestep}")


class EulerSteps(Exploding):
    _predictions = ("epsilon", "sample", "original_sample", "v_prediction")

    def _compile(self) -> None:
        for index in range(len(self._levels) - 1):
            with ahead():
                self._euler(index, 0.0)

    def _euler(self, index: int, churn: float) -> Program:
        return self._program((index, churn), lambda: self._make_euler(index, churn))

    def _make_euler(self, index: int, churn: float) -> Program:
        sigma, target, kind = self._levels[index], self._levels[index + 1], self.config.prediction_type
        raised = sigma * (churn + 1)
        if raised == 0:
            raise ValueError(f"{self._where(index)}: expected some noise in the sample, got a sigma of 0")
        # Churn raises the sigma that epsilon stands for; v stays with the schedule's.
        p, q = exploding(kind, raised if kind == "epsilon" else sigma)
        along_x, along_output = slope(kind, sigma, raised)
        predict = {X: 1 + (target - raised) * along_x, OUTPUT: (target - raised) * along_output}
        return program(predict, {X: p, OUTPUT: q}, where=self._where(index))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        self._float_step(type(self).__name__, timestep)
        index = self._index(timestep)
        sigma = self._levels[index]
        churn = min(s_churn / (len(self._levels) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if churn > 0:
            noise = self._noise(model_output, generator, as_tensor=True)
            assert noise is not None
            sample = sample.float() if sample.dtype != torch.float64 else sample
            sample = sample.add(noise, alpha=s_noise * sigma * math.sqrt((churn + 1) ** 2 - 1))
        made = self._run(self._euler(index, churn), sample, model_output)
        return self._finish(made, model_output.dtype, return_dict)


class AncestralSteps(Exploding):
    _predictions = ("epsilon", "v_prediction")

    def _compile(self) -> None:
        for index in range(len(self._levels) - 1):
            with ahead():
                self._ancestral(index)

    def _ancestral(self, index: int) -> Program:
        return self._program(index, lambda: self._make_ancestral(index))

    def _make_ancestral(self, index: int) -> Program:
        sigma, target = self._levels[index], self._levels[index + 1]
        if sigma == 0:
            raise ValueError(f"{self._where(index)}: expected some noise in the sample, got a sigma of 0")
        share = target / sigma
        up = target * math.sqrt(max(1 - share * share, 0.0))
        down = target * share  # sqrt(target^2 - up^2)
        kind = self.config.prediction_type
        (p, q), (along_x, along_output) = exploding(kind, sigma), slope(kind, sigma)
        predict = {X: 1 + (down - sigma) * along_x, OUTPUT: (down - sigma) * along_output, NOISE: up}
        return program(predict, {X: p, OUTPUT: q}, where=self._where(index))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        self._float_step(type(self).__name__, timestep)
        index = self._index(timestep)
        # Drawn at the last step too, where none is added: the generator goes on as the peer's does.
        noise = self._noise(model_output, generator)
        made = self._run(self._ancestral(index), sample, model_output, (), noise)
        return self._finish(made, model_output.dtype, return_dict)
