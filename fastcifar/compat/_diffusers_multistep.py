"""Steps of the multistep schedulers: DPM-Solver, UniPC and DEIS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.functional import Step
from ..diffusion.reference import HISTORY
from ._diffusers_base import PREDICTIONS, Sigmas, ahead, mark, one, spare
from ._diffusers_rows import (
    CONVERTED,
    CORRECTED,
    OUTPUT,
    Before,
    Program,
    X,
    as_image,
    as_noise,
    deis,
    distinct,
    dpm_solver,
    kept,
    program,
    uni,
)

FEW_STEPS = 15  # below it lower_order_final acts


def _columns(before: Sequence[Before], weights: Sequence[float]) -> dict[int, float]:
    return {place.column: weight for place, weight in zip(before, weights, strict=True)}


class Multistep(Sigmas):
    """One that keeps the predictions of the steps before, at most ``solver_order - 1`` of them."""

    _predictions = (*PREDICTIONS, "flow_prediction")
    _keeps_converted = True
    model_outputs: list[Tensor | None]
    lower_order_nums: int
    _step_index: int

    def _begin(self, timestep: Any) -> int:
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected set_timesteps to be called before, got no time steps"
            )
        return self._index(timestep)

    def _finish(self, prediction: Tensor, sample: Tensor, return_dict: bool) -> Any:
        self.model_outputs.pop(0)
        self.model_outputs.append(mark(prediction))
        if len(self.model_outputs) > 1 and self.model_outputs[0] is prediction:
            self.model_outputs[0] = None  # which had its memory, and was read for the last time
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1
        return one(sample) if return_dict else (sample,)

    def _over(self) -> tuple[Tensor | None, Tensor | None]:
        """The oldest prediction that is read, whose memory the new one may have."""
        return (spare(self.model_outputs, 1) if len(self.model_outputs) > 1 else None), None

    def _before(self) -> Sequence[Tensor | None]:
        return self.model_outputs[:0:-1]

    def _compile(self) -> None:
        for index in range(len(self._times)):
            with ahead():
                self._at(index, min(index, self.config.solver_order))

    def _steps_before(self, index: int, count: int) -> list[Before]:
        return distinct(self._level(index), [self._level(index - i) for i in range(1, count + 1)])

    def _at(self, index: int, done: int) -> Program:
        return self._program((index, done), lambda: self._make(index, done))

    def _make(self, index: int, done: int) -> Program:
        raise NotImplementedError

    def _order(self, index: int, done: int, last_is_euler: bool) -> int:
        config, left = self.config, len(self.timesteps) - index
        few = config.lower_order_final and len(self.timesteps) < FEW_STEPS
        if config.solver_order == 1 or done < 1 or (left == 1 and (few or last_is_euler)):
            return 1
        if config.solver_order == 2 or done < 2 or (left == 2 and few):
            return 2
        return 3


class DPMSolverSteps(Multistep):
    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)
        if kwargs.get("algorithm_type") == "sde-dpmsolver" and kwargs.get("solver_order", 2) > 2:
            raise ValueError(
                f"{type(self).__name__}: expected solver_order 1 or 2 with sde-dpmsolver, got {kwargs['solver_order']}"
            )
        algorithm = kwargs.get("algorithm_type", "dpmsolver++")
        if algorithm in ("dpmsolver", "sde-dpmsolver") and kwargs.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"{type(self).__name__}: expected flow_prediction with dpmsolver++ or sde-dpmsolver++, got {algorithm}"
            )

    def _make(self, index: int, done: int) -> Program:
        config, where = self.config, self._where(index)
        now, kind = self._level(index), config.prediction_type
        order = self._order(index, done, config.euler_at_final or config.final_sigmas_type == "zero")
        predict = dpm_solver(
            config.algorithm_type,
            config.solver_type == "midpoint",
            self._level(index + 1),
            now,
            self._steps_before(index, order - 1),
            where,
        )
        correct = None
        if config.algorithm_type.endswith("++"):
            convert = as_image(kind, now, where)
        elif config.thresholding:
            # The noise that the thresholded image leaves is what is kept.
            convert = as_image(kind, now, where)
            correct = {X: 1 / now.sigma, CONVERTED: -now.alpha / now.sigma}
            predict[CORRECTED] = predict.pop(CONVERTED)
        else:
            convert = as_noise(kind, now, where)
        return program(predict, {X: convert[0], OUTPUT: convert[1]}, correct, where=where)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        index = self._begin(timestep)
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape != sample.shape:
            model_output = model_output[:, : sample.shape[1]]
        config = self.config
        noise = None
        if config.algorithm_type.startswith("sde"):
            noise = variance_noise
            if noise is None:
                noise = self._noise(sample, generator, torch.float32)
        over = self._over()
        found = self._at(index, self.lower_order_nums)
        made = self._run(found, sample, model_output, self._before(), noise, config.thresholding, over)
        kept_noise = config.thresholding and not config.algorithm_type.endswith("++")
        return self._finish(made.corrected if kept_noise else made.converted, made.x_next, return_dict)


class DEISSteps(Multistep):
    def _make(self, index: int, done: int) -> Program:
        config, where = self.config, self._where(index)
        now = self._level(index)
        order = self._order(index, done, False)
        before = self._steps_before(index, order - 1)
        x, first, *others = deis(self._level(index + 1), now, before, where)
        predict = {X: x, **_columns(before, others)}
        if config.thresholding:
            p, q = as_image(config.prediction_type, now, where)
            predict[CORRECTED] = first
            return program(
                predict, {X: p, OUTPUT: q}, {X: 1 / now.sigma, CONVERTED: -now.alpha / now.sigma}, where=where
            )
        p, q = as_noise(config.prediction_type, now, where)
        return program({**predict, CONVERTED: first}, {X: p, OUTPUT: q}, where=where)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        index, threshold = self._begin(timestep), self.config.thresholding
        over = self._over()
        found = self._at(index, self.lower_order_nums)
        made = self._run(found, sample, model_output, self._before(), None, threshold, over)
        return self._finish(made.corrected if threshold else made.converted, made.x_next, return_dict)


class UniPCSteps(Multistep):
    last_sample: Tensor | None
    this_order: int

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)
        if kwargs.get("solver_p") is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: expected no solver_p, which replaces the predictor by another scheduler"
            )
        if not 1 <= kwargs.get("solver_order", 2) < HISTORY:
            raise ValueError(
                f"{type(self).__name__}: expected solver_order of 1 to {HISTORY - 1}, got {kwargs['solver_order']}"
            )
        if not kwargs.get("predict_x0", True) and kwargs.get("prediction_type") == "flow_prediction":
            raise ValueError(f"{type(self).__name__}: expected predict_x0 with flow_prediction, got predict_x0=False")

    def _uni_order(self, index: int, done: int) -> int:
        order = self.config.solver_order
        if self.config.lower_order_final:
            order = min(order, len(self.timesteps) - index)
        return min(order, done + 1)

    def _compile(self) -> None:
        before = 0
        for index in range(len(self._times)):
            done = min(index, self.config.solver_order)
            corrects = index > 0 and index - 1 not in self.config.disable_corrector
            with ahead():
                self._uni(index, done, before if corrects else 0)
            before = self._uni_order(index, done)

    def _uni(self, index: int, done: int, corrector: int) -> Program:
        return self._program((index, done, corrector), lambda: self._make_uni(index, done, corrector))

    def _make_uni(self, index: int, done: int, corrector: int) -> Program:
        config, where = self.config, self._where(index)
        image, kind = config.predict_x0, config.solver_type
        p, q = (as_image if image else as_noise)(config.prediction_type, self._level(index), where)
        order = self._uni_order(index, done)
        now, before = self._level(index), self._steps_before(index, order - 1)
        x, first, *others = uni(image, kind, self._level(index + 1), now, before, False, where)
        predict = {CONVERTED: first, **_columns(before, others)}
        if not corrector:
            return program({**predict, X: x}, {X: p, OUTPUT: q}, where=where)
        # The step that led here once more, from the last sample, which is the last tensor that is kept.
        before = [Before(place.column + 1, place.level) for place in self._steps_before(index - 1, corrector - 1)]
        last, new, first, *others = uni(image, kind, now, self._level(index - 1), before, True, where)
        correct = {kept(HISTORY): last, CONVERTED: new, kept(1): first, **_columns(before, others)}
        return program({**predict, CORRECTED: x}, {X: p, OUTPUT: q}, correct, where=where)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        index = self._begin(timestep)
        config = self.config
        corrects = index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None  # type: ignore[attr-defined]
        # The oldest prediction and the last sample are read for the last time, and new ones take their memory.
        over = (spare(self.model_outputs, 0), spare([self.last_sample], 0, 2) if corrects else None)
        history = self.model_outputs[::-1]
        if corrects:
            history += [None] * (HISTORY - 1 - len(history))
            history.append(self.last_sample)
        done = self.lower_order_nums
        made: Step = self._run(
            self._uni(index, done, self.this_order if corrects else 0),
            sample,
            model_output,
            history,
            None,
            config.thresholding and config.predict_x0,
            over,
        )
        self.last_sample = mark(made.corrected) if corrects else sample
        self.this_order = self._uni_order(index, done)
        return self._finish(made.converted, made.x_next, return_dict)
