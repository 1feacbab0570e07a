"""Dynamic Confidence: a spiking network that stops as soon as it is sure, sample by sample within a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..earlyexit.cost import CostModel
from ..earlyexit.functional import compact, exit_decide
from ..earlyexit.modules import gathered, refuse_batch_statistics
from .calibration import Calibration
from .conversion import SpikingNetwork
from .modules import Neuron
from .quantize import SpikingActivation

__all__ = ["DynamicConfidence", "DynamicConfidenceResult", "DynamicConfidenceTrace"]


class DynamicConfidenceResult(NamedTuple):
    """What :class:`DynamicConfidence` returns; B samples.

    Attributes:
        logits: the sum of the outputs up to the exit over ``scale``, float32 ``[B, K]``.
        exit_step: the step of the exit, int64 ``[B]``, 1 to T.
        confidence: the largest probability there, float32 ``[B]``.
    """

    logits: Tensor
    exit_step: Tensor
    confidence: Tensor


class DynamicConfidenceTrace(NamedTuple):
    """All T steps of B samples, from :meth:`DynamicConfidence.trace`.

    Attributes:
        confidence: float32 ``[T, B]``.
        prediction: int64 ``[T, B]``.
        spikes: how many spikes (outputs of neurons other than 0) there were up to and including each step, int64
            ``[T, B]``.
        neurons: how many neurons a sample has.
    """

    confidence: Tensor
    prediction: Tensor
    spikes: Tensor
    neurons: int


class DynamicConfidence(nn.Module):
    r"""Runs a spiking network step by step, and lets every sample go at the first step where it is sure.

    With ``o_t`` the network's output at step t and A the ``scale``::

        z_t = z_{t-1} + o_t / A,   exit at the first t with max softmax(z_t) > threshold, else at T

    The samples of a batch that leave are dropped from the images, from ``z`` and from every membrane of every neuron,
    so that later steps run on those that stay: predictions and steps are those of one sample after the other, at the
    cost of the mean step and not of the last one.

    Args:
        model: a :class:`~fastcifar.spiking.SpikingNetwork`, or a module that is called once a step with images
            ``[B, ...]``, returns ``[B, K]``, and keeps its state in neurons of :mod:`fastcifar.spiking` (which see one
            step, ``neuron(x[None])[0]``) or in SpikingJelly's single-step nodes, with a row for each sample. The same
            images are shown at every step. It is run in evaluation, and reset before and after each batch.
        steps: T, 1 or more.
        threshold: exits above it; :meth:`calibrate` chooses one. Default 0.6.
        scale: A, the smoothing of the confidence, above 0. Default 30.
        cost: decides at which steps moving the rows pays; see :class:`~fastcifar.earlyexit.EarlyExit`.

    ``forward(images)`` returns a :class:`DynamicConfidenceResult`, without a gradient.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a number is out of range, the model has no neurons, a batch norm batch statistics; at a call, the
            output is not ``[B, K]``, or a state has not a row for each sample.

    Source: Li et al., "Unleashing the Potential of Spiking Neural Networks with Dynamic Confidence", ICCV 2023
    (arXiv 2303.10276), and its official demo, whose 27 steps, 0.6 and 30 these are.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import QCFS, DynamicConfidence, convert
        >>> ann = torch.nn.Sequential(torch.nn.Linear(8, 16), QCFS(4), torch.nn.Linear(16, 10))
        >>> model = DynamicConfidence(convert(ann), steps=8, threshold=0.11, scale=4)
        >>> logits, exit_step, confidence = model(torch.randn(5, 8))
        >>> logits.shape, exit_step.shape, bool((exit_step <= 8).all())
        (torch.Size([5, 10]), torch.Size([5]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int = 27,
        threshold: float = 0.6,
        scale: float = 30.0,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__()
        op = "DynamicConfidence"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: expected a module, got {type(model).__name__}")
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"{op}: expected steps to be an integer, got {steps!r}")
        if steps < 1:
            raise ValueError(f"{op}: expected steps above 0, got {steps}")
        if math.isnan(threshold):
            raise ValueError(f"{op}: expected threshold to be a number, got nan")
        if not 0 < scale < math.inf:
            raise ValueError(f"{op}: expected scale to be finite and above 0, got {scale}")
        if isinstance(model, SpikingNetwork) and model.max_steps is not None and steps > model.max_steps:
            raise ValueError(f"{op}: expected at most the network's {model.max_steps} steps, got {steps}")
        self.model, self.steps, self.threshold, self.scale = model, steps, float(threshold), float(scale)
        self.cost = CostModel() if cost is None else cost
        self.eval()
        if not any(_is_stateful(module) for module in model.modules()):
            raise ValueError(
                f"{op}: expected a model with neurons of fastcifar.spiking that keep their state, got none"
            )
        refuse_batch_statistics(op, model, "train it with running statistics")

    def train(self, mode: bool = True) -> DynamicConfidence:
        """Stays in evaluation, where a sample does not see the others."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> DynamicConfidenceResult:
        rows: Tensor | None = None  # the sample of each row; None: in order
        alive: Tensor | None = None  # rows that have not left; None: all
        parts: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        with _clean(self.model):
            z: Tensor | float = 0.0
            for t in range(1, self.steps + 1):
                z = z + self._step(images) / self.scale
                live = z if alive is None else z.index_select(0, alive)
                limit = self.threshold if t < self.steps else -math.inf
                decision = exit_decide(live, limit, strict=True, fixed_size=False)
                step = torch.full_like(decision.prediction, t)
                if decision.n_keep == len(live) and t < self.steps:
                    continue
                samples = _chosen(rows, alive, len(live), live.device)
                if t == self.steps:  # with what is NaN, which no threshold takes
                    parts.append((samples, live, decision.score, step))
                    break
                leave, stay = decision.exit_index, decision.keep_index
                parts.append((samples[leave], live[leave], decision.score[leave], step[leave]))
                if not len(stay):
                    break
                alive = stay if alive is None else alive[stay]
                if self.cost.pays(t - 1, len(z), len(alive)):
                    images, z = compact((images, z), alive)
                    _compact_states(self.model, alive)
                    rows, alive = samples[stay], None
        logits, exit_step, confidence, _ = gathered(parts)
        return DynamicConfidenceResult(logits, exit_step, confidence)

    @torch.no_grad()
    def trace(self, images: Tensor) -> DynamicConfidenceTrace:
        """All T steps of all samples, and how many spikes they took."""
        spikes: list[Tensor] = []
        sizes: dict[nn.Module, int] = {}

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                output = output.unpack()
            sizes[module] = output.numel() // max(len(images), 1)
            spikes.append(output.reshape(len(images), sizes[module]).count_nonzero(1))

        hooks = [m.register_forward_hook(count) for m in self.model.modules() if _is_stateful(m)]
        confidences, predictions, counts = [], [], []
        z: Tensor | float = 0.0
        try:
            with _clean(self.model):
                for _ in range(self.steps):
                    z = z + self._step(images) / self.scale
                    decision = exit_decide(z, math.inf, strict=True, fixed_size=False)
                    confidences.append(decision.score)
                    predictions.append(decision.prediction)
                    counts.append(torch.stack(spikes).sum(0))
                    spikes.clear()
        finally:
            for hook in hooks:
                hook.remove()
        total = torch.stack(counts).cumsum(0)
        return DynamicConfidenceTrace(torch.stack(confidences), torch.stack(predictions), total, sum(sizes.values()))

    def calibrate(self, loader: Iterable[tuple[Tensor, Tensor]], max_loss: float = 0.0) -> Calibration:
        """Chooses the threshold: of all there are, the fastest that loses no accuracy.

        Args:
            loader: batches of images and labels. Not the ones that accuracy will be reported on: a threshold chosen on
                these would know their labels.
            max_loss: accuracy that may be lost against all T steps. Default 0.

        Returns:
            :class:`~fastcifar.spiking.calibration.Calibration`, with the whole front, the oracle's bound and the
            curves. Its threshold is set here as well.

        Raises:
            ValueError: the loader is empty, or ``max_loss`` negative.
        """
        if not max_loss >= 0:
            raise ValueError(f"DynamicConfidence.calibrate: expected max_loss of 0 or more, got {max_loss}")
        confidences, corrects, spikes, neurons = [], [], [], 0
        for images, labels in loader:
            trace = self.trace(images)
            confidences.append(trace.confidence)
            corrects.append(trace.prediction == labels.to(trace.prediction.device))
            spikes.append(trace.spikes)
            neurons = trace.neurons
        if not confidences:
            raise ValueError("DynamicConfidence.calibrate: expected batches of images and labels, got none")
        result = Calibration(torch.cat(confidences, 1), torch.cat(corrects, 1), torch.cat(spikes, 1), neurons, max_loss)
        self.threshold = result.threshold
        return result

    def _step(self, images: Tensor) -> Tensor:
        """The outputs of one step, float32 ``[B, K]``."""
        model: Any = self.model
        if isinstance(model, SpikingNetwork):
            for module in model.net.modules():
                if isinstance(module, SpikingActivation):
                    module.start(1, len(images))
            model = model.net
        output = model(images)
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"DynamicConfidence: expected the model to return [{len(images)}, K], got {got}")
        return output.float()

    def extra_repr(self) -> str:
        return f"steps={self.steps}, threshold={self.threshold:g}, scale={self.scale:g}, cost={self.cost!r}"


def _is_stateful(module: nn.Module) -> bool:
    # SpikingJelly's nodes, and ours with their names, keep all state in one dictionary.
    return isinstance(module, Neuron | SpikingActivation) or "_memories" in module.__dict__


@contextlib.contextmanager
def _clean(model: nn.Module) -> Iterator[None]:
    """A batch starts at rest and leaves nothing behind, also where something is raised."""
    _reset(model)
    try:
        yield
    finally:
        _reset(model)


def _reset(model: nn.Module) -> None:
    for module in model.modules():
        if _is_stateful(module):
            module.reset()  # type: ignore[operator]


def _compact_states(model: nn.Module, stay: Tensor) -> None:
    """Keeps the rows ``stay`` of every state of every neuron."""
    for module in model.modules():
        if isinstance(module, Neuron):
            states = {name: getattr(module, name) for name in module.states}
            for name, value in compact(states, stay).items():
                setattr(module, name, value)
            module.v_seq = None
        elif isinstance(module, SpikingActivation):
            module.state = compact(module.state, stay)
        elif "_memories" in module.__dict__:
            memories: Any = module._memories
            for name, value in list(memories.items()):
                if isinstance(value, Tensor) and value.dim():
                    memories[name] = compact(value, stay)


def _chosen(rows: Tensor | None, alive: Tensor | None, count: int, device: torch.device) -> Tensor:
    if rows is None:
        return torch.arange(count, device=device) if alive is None else alive
    return rows if alive is None else rows[alive]
