"""SpikingJelly's neurons whose spikes are integers; :mod:`fastcifar.compat.spikingjelly` says what they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spiking import functional
from ._cached import CachedRead
from ._memory import StatefulNode, States
from ._nodes import LIFNode


class MultiLevelSpikeCount:
    """SpikingJelly's ``surrogate.MultiLevelSpikeCount`` for :class:`ILIFNode`, which takes either: how many spikes at
    most, and the window of the gradient.

    Args:
        max_spike_count: an integer from 1 on.
        spiking: whether counts are rounded. Default True, which the node asks for.
        grad_window: ``(low, high)``; the gradient is 1 in it, else 0. Default ``(0, max_spike_count)``.

    Raises:
        TypeError: ``max_spike_count`` is not an integer.
        ValueError: it is below 1, or the window's ends are in the wrong order.
    """

    def __init__(
        self, max_spike_count: int, spiking: bool = True, grad_window: tuple[float, float] | None = None
    ) -> None:
        if not isinstance(max_spike_count, int) or isinstance(max_spike_count, bool):
            raise TypeError(
                f"MultiLevelSpikeCount: expected max_spike_count to be an integer, got {type(max_spike_count).__name__}"
            )
        low, high = (0.0, float(max_spike_count)) if grad_window is None else grad_window
        if max_spike_count < 1 or low > high:
            raise ValueError(
                "MultiLevelSpikeCount: expected max_spike_count from 1 on and grad_window (low, high), "
                f"got {max_spike_count} and {grad_window}"
            )
        self.max_spike_count, self.spiking = max_spike_count, spiking
        self.grad_min, self.grad_max = low, high

    def __call__(self, scaled: Tensor) -> Tensor:
        """Spike counts of a membrane that was divided by the threshold."""
        if not self.spiking:
            return scaled.clamp(0, self.max_spike_count)
        window = (self.grad_min, self.grad_max)
        # One step without a past: the charge is the current itself.
        return functional.ilif(scaled.unsqueeze(0), max_spikes=self.max_spike_count, grad_window=window)[0].squeeze(0)


class ILIFNode(LIFNode):
    """SpikingJelly's ``neuron.ILIFNode``: :func:`fastcifar.spiking.functional.ilif`, 0 to 4 spikes a step by default.

    Args:
        surrogate_function: SpikingJelly's ``MultiLevelSpikeCount``, or the class of that name here. Default
            ``MultiLevelSpikeCount(4)``.

    Raises:
        ValueError: the surrogate is another, or does not spike.
    """

    function = staticmethod(functional.ilif)

    def __init__(
        self,
        tau: float = 4.0 / 3.0,
        v_threshold: float = 1.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        counts = MultiLevelSpikeCount(4) if surrogate_function is None else surrogate_function
        if type(counts).__name__ != "MultiLevelSpikeCount" or not counts.spiking:
            raise ValueError(
                f"{type(self).__name__}: expected surrogate_function to be a spiking MultiLevelSpikeCount, "
                f"got {counts!r}"
            )
        super().__init__(tau, False, v_threshold, None, counts, detach_reset, step_mode, backend, store_v_seq)

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v / self.v_threshold)

    def _options(self) -> dict[str, Any]:
        counts = self.surrogate_function
        own = {"max_spikes": counts.max_spike_count, "grad_window": (counts.grad_min, counts.grad_max)}
        return {"tau": self.tau, "v_threshold": self.v_threshold, "detach_reset": self.detach_reset, **own}


class STBIFNode(StatefulNode):
    """SpikingJelly's ``neuron.STBIFNode`` (SpikeZIP): :func:`fastcifar.spiking.functional.signed_if` with the threshold
    and bounds of a quantiser, kept as buffers. Memories: ``q``, the membrane over the threshold, ``acc_q``, the sum of
    the spikes, and ``cur_output``, the last step's.

    SpikingJelly's refuses inputs that require a gradient; here they get ``signed_if``'s, with its default surrogate.

    Args:
        q_threshold: the quantiser's step, a number or a tensor of one element.
        level: how many values the quantiser has, from 2 on.
        sym: whether they lie on both sides of 0. Default False.
        pos_max, neg_min: bounds of the sum; by default ``level - 1`` and 0, with ``sym`` ``level // 2 - 1`` and
            ``-level // 2``.

    Raises:
        ValueError: level is below 2.
    """

    states = ("q", "acc_q", "cur_output")
    own = ("level", "sym")
    q: Any
    acc_q: Any
    cur_output: Any
    q_threshold: Tensor
    pos_max: Tensor
    neg_min: Tensor

    def __init__(
        self,
        q_threshold: float | Tensor,
        level: int,
        sym: bool = False,
        pos_max: float | Tensor | None = None,
        neg_min: float | Tensor | None = None,
        step_mode: str = "s",
        backend: str = "torch",
    ) -> None:
        super().__init__()
        if isinstance(level, bool) or int(level) < 2:
            raise ValueError(f"{type(self).__name__}: expected level >= 2 (quantizer level must be >= 2), got {level}")
        self.level, self.sym = int(level), bool(sym)
        highest, lowest = (self.level // 2 - 1, -self.level // 2) if self.sym else (self.level - 1, 0)
        bounds = {"pos_max": highest if pos_max is None else pos_max, "neg_min": lowest if neg_min is None else neg_min}
        for name, value in {"q_threshold": q_threshold, **bounds}.items():
            self.register_buffer(name, torch.as_tensor(value).detach().clone().float())
        self.step_mode = step_mode
        self.backend = backend
        for name in self.states:
            self.register_memory(name, None)
        self._pos_max, self._neg_min = CachedRead(float), CachedRead(float)

    @classmethod
    def from_quantizer(cls, quantizer: Any) -> STBIFNode:
        """The node of a quantiser with ``s``, ``sym``, ``pos_max``, ``neg_min`` and perhaps ``level``."""
        bounds = {"pos_max": quantizer.pos_max, "neg_min": quantizer.neg_min}
        level = getattr(quantizer, "level", int(bounds["pos_max"]) - int(bounds["neg_min"]) + 1)
        return cls(quantizer.s, int(level), bool(quantizer.sym), **bounds)

    @property
    def accumulated(self) -> Tensor:
        """The sum of the outputs so far; a RuntimeError before the first call."""
        if self.acc_q is None:
            raise RuntimeError(f"{type(self).__name__}: expected a forward call before accumulated is read, got none")
        return self.acc_q * self.q_threshold.to(self.acc_q.dtype)

    def _start(self, name: str) -> float:
        return 0.5 if name == "q" else 0.0

    def _call(self, x_seq: Tensor, states: States, store_v_seq: bool) -> tuple:
        q, acc_q, cur_output = states
        bounds = {"s_max": self._pos_max(self.pos_max), "s_min": self._neg_min(self.neg_min)}
        outputs, q, acc_q, _ = functional.signed_if(x_seq, q, acc_q, v_threshold=self.q_threshold, **bounds)
        if len(outputs):
            cur_output = outputs[-1].detach().sign().to(q.dtype)  # the threshold is positive
        return outputs, q, acc_q, cur_output, None
