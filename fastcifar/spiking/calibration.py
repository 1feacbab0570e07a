"""What a spiking network's threshold costs and gains: latency, accuracy and spikes over all thresholds and steps."""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import expect_tensors
from ..earlyexit.thresholds import ParetoFront, first_exit, pareto

__all__ = ["Calibration", "Curve"]


class Curve(NamedTuple):
    """Means over the samples where all stop at step 1, 2, ... T at the latest, float64 ``[T]``.

    Attributes:
        latency: steps, ``mean_i min(t_i, T)``.
        accuracy: share of right predictions at ``min(t_i, T)``.
        spikes: spikes of a neuron up to there.
    """

    latency: Tensor
    accuracy: Tensor
    spikes: Tensor


class Calibration:
    """All T steps of n samples with their labels; what :meth:`DynamicConfidence.calibrate` returns.

    Args:
        confidence: ``[T, n]``.
        correct: whether the prediction after each step is right, bool ``[T, n]``.
        spikes: the sample's spikes up to each step, ``[T, n]``.
        neurons: how many neurons they come from.
        max_loss: accuracy that :attr:`threshold` may lose against all T steps. Default 0.

    Attributes:
        front: the :class:`~fastcifar.earlyexit.ParetoFront` of mean steps and accuracy over all thresholds.
        threshold: of the front, the one of least latency that loses no more than ``max_loss``.

    Raises:
        ValueError: there is no sample, or a shape differs.

    Example:
        >>> import torch
        >>> from fastcifar.spiking.calibration import Calibration
        >>> confidence = torch.tensor([[0.3, 0.7], [0.8, 0.9]])
        >>> correct, spikes = torch.tensor([[False, True], [True, True]]), torch.tensor([[2, 2], [4, 4]])
        >>> calibration = Calibration(confidence, correct, spikes, neurons=2)
        >>> curve = calibration.curve()  # the second sample leaves at the first step
        >>> curve.latency[-1].item(), curve.accuracy[-1].item(), curve.spikes[-1].item()
        (1.5, 1.0, 1.5)
    """

    def __init__(
        self, confidence: Tensor, correct: Tensor, spikes: Tensor, neurons: int, max_loss: float = 0.0
    ) -> None:
        expect_tensors("Calibration", confidence=confidence, correct=correct, spikes=spikes)
        if spikes.shape != confidence.shape:
            raise ValueError(
                f"Calibration: expected spikes {tuple(confidence.shape)} as confidence, got {tuple(spikes.shape)}"
            )
        self.confidence, self.correct, self.spikes, self.neurons = confidence, correct, spikes, neurons
        self.front: ParetoFront = pareto(confidence, correct, strict=True)
        # Counts, since shares that should be equal may differ in their last bit.
        right = (self.front.accuracy * confidence.shape[1]).round()
        enough = right >= correct[-1].sum() - max_loss * confidence.shape[1]
        self.threshold = self.front.threshold[enough][0].item()

    def exit_step(self, threshold: float | None = None) -> Tensor:
        """The step at which each sample leaves, int64 ``[n]``, 1 to T."""
        return first_exit(self.confidence, self.threshold if threshold is None else threshold, strict=True) + 1

    def curve(self, threshold: float | None = None) -> Curve:
        """Latency, accuracy and spikes over the most steps allowed. ``threshold`` inf: without early exit."""
        return self._curve(self.exit_step(threshold))

    def oracle(self, miss: int | None = None) -> tuple[float, float]:
        """The bound: mean steps and accuracy if each sample left at the first step that is right.

        Args:
            miss: what a sample that is never right counts. Default T (the paper does not say).
        """
        steps = len(self.correct)
        ever = self.correct.any(0)
        first = self.correct.int().argmax(0) + 1
        latency = torch.where(ever, first, steps if miss is None else miss).double().mean()
        return latency.item(), ever.double().mean().item()

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws the front, the oracle, and accuracy and spikes over the steps, into a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        fixed, dynamic = self._curve(torch.full_like(self.exit_step(), len(self.confidence))), self.curve()
        left.step(self.front.cost, self.front.accuracy, where="post", label="all thresholds")
        left.plot(dynamic.latency[-1], dynamic.accuracy[-1], "o", label=f"threshold {self.threshold:.3f}")
        left.plot(*self.oracle(), "*", label="oracle")
        left.plot(fixed.latency, fixed.accuracy, "--", color="gray", label="all samples alike")
        left.set(xlabel="mean steps", ylabel="accuracy")
        for curve, name in ((fixed, "all samples alike"), (dynamic, "Dynamic Confidence")):
            steps = torch.arange(1, len(curve.latency) + 1)
            middle.plot(steps, curve.latency, label=name)
            right.plot(steps, curve.spikes, label=name)
        middle.set(xlabel="steps allowed", ylabel="mean steps")
        right.set(xlabel="steps allowed", ylabel="spikes of a neuron")
        for axes in (left, middle, right):
            axes.legend()
        figure.savefig(path, dpi=150)

    def _curve(self, exit_step: Tensor) -> Curve:
        caps = torch.arange(1, len(self.confidence) + 1, device=exit_step.device)
        stop = torch.minimum(exit_step, caps[:, None]) - 1  # [T, n]
        return Curve(
            (stop + 1).double().mean(1),
            self.correct.gather(0, stop).double().mean(1),
            self.spikes.gather(0, stop).double().mean(1) / self.neurons,
        )
