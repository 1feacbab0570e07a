"""Steps of Heun, LMS and PNDM, which keep derivatives, running sums or samples from one step to the next."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor

from ..diffusion.reference import HISTORY
from ._diffusers_base import Compiled, ahead, one
from ._diffusers_onestep import Exploding
from ._diffusers_rows import CONVERTED, CORRECTED, OUTPUT, Program, X, adams, exploding, kept, program, slope, transfer


def _plus(terms: dict[int, float], factor: float, others: dict[int, float]) -> dict[int, float]:
    return terms | {term: terms.get(term, 0.0) + factor * value for term, value in others.items()}


class HeunSteps(Exploding):
    dt: float | None
    prev_derivative: Tensor | None
    sample: Tensor | None

    def _compile(self) -> None:
        for index in range(len(self._levels) - 1):
            with ahead():
                self._heun(index, index % 2 == 1)

    def _heun(self, index: int, second: bool) -> Program:
        return self._program((index, second), lambda: self._make_heun(index, second))

    def _make_heun(self, index: int, second: bool) -> Program:
        where = self._where(index)
        sigma = self._levels[index - 1 if second else index]
        target = self._levels[index if second else index + 1]
        at = target if second else sigma
        if at == 0:
            raise ValueError(f"{where}: expected some noise in the sample, got a sigma of 0")
        kind = self.config.prediction_type
        p, q = exploding(kind, at)
        half = 0.5 * (target - sigma)
        limit = self.config.clip_sample_range if self.config.clip_sample else None
        convert = {X: p, OUTPUT: q}
        # What a step of 1 adds: the derivative, by way of the image where that is clipped.
        along = (
            {X: 1 / at, CONVERTED: -1 / at}
            if self.config.clip_sample
            else dict(zip((X, OUTPUT), slope(kind, at), strict=True))
        )
        if second:
            return program(_plus({kept(1): 1.0}, half, along), convert, limit=limit, where=where)
        # Kept is where half of the step leads: the other half goes by the derivative at its end.
        return program(_plus({X: 1.0}, 2 * half, along), convert, _plus({X: 1.0}, half, along), limit, where)

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        index = self._index(timestep)
        second = self.dt is not None
        made = self._run(self._heun(index, second), sample, model_output, (self.sample,) if second else ())
        self.sample = None if second else made.corrected
        # Whether it is set tells which half comes next, to the peer's state_in_first_order too.
        self.dt = None if second else self._levels[index + 1] - self._levels[index]
        return self._finish(made, made.x_next.dtype, return_dict)


class LMSSteps(Exploding):
    derivatives: list[Tensor]

    def _compile(self) -> None:
        for index in range(len(self._levels) - 1):
            order = min(index + 1, 4)
            with ahead():
                self._lms(index, order, order - 1)

    def _lms(self, index: int, order: int, before: int) -> Program:
        return self._program((index, order, before), lambda: self._make_lms(index, order, before))

    def _make_lms(self, index: int, order: int, before: int) -> Program:
        where, sigma = self._where(index), self._levels[index]
        if sigma == 0:
            raise ValueError(f"{where}: expected some noise in the sample, got a sigma of 0")
        now, *old = adams(self._levels[index + 1], sigma, [self._levels[index - i] for i in range(1, order)], where)
        kind = self.config.prediction_type
        (p, q), (along_x, along_output) = exploding(kind, sigma), slope(kind, sigma)
        # A run that starts in the middle has fewer derivatives than its order, and goes without those it has not.
        predict = {X: 1.0, CORRECTED: now, **{kept(i): w for i, w in enumerate(old[:before], 1)}}
        return program(predict, {X: p, OUTPUT: q}, {X: along_x, OUTPUT: along_output}, where=where)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        if not 1 <= order <= HISTORY + 1:
            raise ValueError(f"{type(self).__name__}.step: expected an order of 1 to {HISTORY + 1}, got {order}")
        if not self.is_scale_input_called:
            warnings.warn(
                f"{type(self).__name__}.step: scale_model_input was not called, which models of this scheduler expect",
                stacklevel=2,
            )
        index = self._index(timestep)
        history = self.derivatives[:-order:-1] if order > 1 else []
        made = self._run(self._lms(index, min(index + 1, order), len(history)), sample, model_output, history)
        self.derivatives.append(made.corrected)
        if len(self.derivatives) > order:
            self.derivatives.pop(0)
        return self._finish(made, made.x_next.dtype, return_dict)


ADAMS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
MEAN = (0.5, 0.5)
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_BASE, _SUM = 5, 6  # where the start of a Runge-Kutta step and the sum of its outputs stand, after four outputs


class PNDMSteps(Compiled):
    _predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    alphas_cumprod: Tensor
    prk_timesteps: Any
    counter: int
    ets: list[Tensor]
    cur_sample: Tensor | None
    cur_model_output: Tensor | int

    def _read_schedule(self) -> None:
        self._cumulative = self.alphas_cumprod.tolist()
        self._final = float(self.final_alpha_cumprod)  # type: ignore[attr-defined]

    def _transfer(self, now: int, before: int) -> tuple[float, float]:
        target = self._cumulative[before] if before >= 0 else self._final
        return transfer(self.config.prediction_type, self._cumulative[now], target)

    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__}.step: expected set_timesteps to be called before, got no time steps"
            )
        return self.config.num_train_timesteps // self.num_inference_steps  # type: ignore[operator]

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The sample of the next time step, as the peer's: see :mod:`fastcifar.compat.diffusers`."""
        self._stride()
        if self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps:
            return self.step_prk(model_output, timestep, sample, return_dict)
        return self.step_plms(model_output, timestep, sample, return_dict)

    def _compile(self) -> None:
        runs = 0 if self.config.skip_prk_steps else len(self.prk_timesteps)
        for counter, timestep in enumerate(self._times.tolist()):
            with ahead():
                if counter < runs:
                    self._prk(counter, timestep, counter % 4 == 0, counter % 4 < 2)
                else:  # how many outputs are kept: three after the Runge-Kutta steps; the second step keeps none
                    self._plms(counter, timestep, 3 if runs else min(max(counter - 1, counter == 1), 3))

    def step_prk(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """A quarter of a Runge-Kutta step of the fourth order."""
        phase = self.counter % 4
        if phase == 0:
            self.cur_sample = sample
        base = self.cur_sample if phase else None
        summed = self.cur_model_output if isinstance(self.cur_model_output, Tensor) else None
        found = self._prk(self.counter, int(self._value(timestep)), base is None, summed is None)
        last = self.ets[-1] if phase == 1 else None
        made = self._run(found, sample, model_output, (last, None, None, None, base, summed))
        if phase == 0:
            self.ets.append(model_output)
        self.cur_model_output = made.corrected if phase in (1, 2) else 0
        return self._finish(made.x_next, return_dict)

    def _prk(self, counter: int, timestep: int, from_x: bool, first: bool) -> Program:
        before = timestep - (0 if counter % 2 else self._stride() // 2)
        start = int(self.prk_timesteps[counter // 4 * 4])
        key = ("prk", start, before, counter % 4, from_x, first)
        return self._program(key, lambda: self._make_prk(start, before, counter % 4, from_x, first))

    def _make_prk(self, start: int, before: int, phase: int, from_x: bool, first: bool) -> Program:
        x, along = self._transfer(start, before)
        base = X if from_x else kept(_BASE)
        summed = {OUTPUT: RUNGE_KUTTA[phase]}
        if phase == 1:
            summed[kept(1)] = RUNGE_KUTTA[0]
        elif not first:
            summed[kept(_SUM)] = 1.0
        if phase < 3:
            return program({base: x, OUTPUT: along}, correct=summed if phase else None, where=self._where())
        return program({base: x, **{term: along * w for term, w in summed.items()}}, where=self._where())

    def step_plms(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """A linear multistep step, after the Runge-Kutta ones or from the first where these are skipped."""
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError(
                f"{type(self).__name__}.step_plms: expected 12 steps of step_prk before the first, got {self.counter}"
            )
        again = self.counter == 1
        self.ets = self.ets[-4 if again else -3 :]
        count = len(self.ets)
        base = self.cur_sample if again and count == 1 else None
        found = self._plms(self.counter, int(self._value(timestep)), count)
        history = [*self.ets[::-1], *[None] * (_BASE - 1 - count), base]
        made = self._run(found, sample, model_output, history)
        if not again:
            self.ets.append(model_output)
        self.cur_sample = sample if self.counter == 0 and count == 0 else None
        return self._finish(made.x_next, return_dict)

    def _plms(self, counter: int, timestep: int, count: int) -> Program:
        return self._program(
            ("plms", timestep, counter == 1, count), lambda: self._make_plms(timestep, counter == 1, count)
        )

    def _make_plms(self, timestep: int, again: bool, count: int) -> Program:
        # The first step is taken twice, the second time by the mean of the outputs at its ends. A second step that has
        # more of them (set from outside) goes by those alone: so the peer does.
        now, before = (timestep + self._stride(), timestep) if again else (timestep, timestep - self._stride())
        x, along = self._transfer(now, before)
        outputs = range(kept(1), kept(count) + 1)
        if again and count != 1:
            rule, terms = ADAMS[count - 1], list(outputs)
            base = X
        else:
            rule = MEAN if again else ADAMS[count]
            terms = [OUTPUT, *outputs]
            base = kept(_BASE) if again else X
        return program({base: x, **{term: along * w for term, w in zip(terms, rule, strict=True)}}, where=self._where())

    def _finish(self, sample: Tensor, return_dict: bool) -> Any:
        self.counter += 1
        return one(sample) if return_dict else (sample,)
