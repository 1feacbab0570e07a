"""SpikingJelly's neurons over our kernels: change ``from spikingjelly.activation_based import neuron`` to
``from fastcifar.compat import spikingjelly as neuron`` and nothing else.

Arguments are those of SpikingJelly 2.0.0 and of 0.0.0.0.14 (which has ``backend=``); the state_dict has no entry, as
there. Where SpikingJelly is installed the nodes derive from its ``MemoryModule``, so that ``functional.reset_net``,
``detach_net`` and ``set_step_mode`` treat them as its own; elsewhere from a small class of the same interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..spiking import functional
from ..spiking.surrogate import ATan, PiecewiseQuadratic, Rectangular, Sigmoid, Surrogate

try:
    from spikingjelly.activation_based.base import MemoryModule
except ImportError:

    class MemoryModule(nn.Module):  # type: ignore[no-redef]
        """The part of SpikingJelly's ``base.MemoryModule`` that neurons need, where SpikingJelly is not installed."""

        def __init__(self) -> None:
            super().__init__()
            self._rest: dict[str, object] = {}
            self._step_mode = "s"

        @property
        def step_mode(self) -> str:
            return self._step_mode

        @step_mode.setter
        def step_mode(self, value: str) -> None:
            if value not in ("s", "m"):
                raise ValueError(f"step_mode: expected 's' (single-step) or 'm' (multi-step), got {value!r}")
            self._step_mode = value

        def register_memory(self, name: str, value: object) -> None:
            self._rest[name] = value
            setattr(self, name, value)

        def reset(self) -> None:
            for name, value in self._rest.items():
                setattr(self, name, value)

        def detach(self) -> None:
            for name in self._rest:
                if isinstance(value := getattr(self, name), Tensor):
                    setattr(self, name, value.detach())

        def forward(self, *args):
            step = self.single_step_forward if self.step_mode == "s" else self.multi_step_forward
            return step(*args)  # type: ignore[operator]


# SpikingJelly's surrogate classes that a kernel knows, by class name; any other callable takes the generic path.
_SURROGATES = {"ATan": ATan, "Sigmoid": Sigmoid, "PiecewiseQuadratic": PiecewiseQuadratic, "Rect": Rectangular}


def _kernel_surrogate(surrogate: object) -> Surrogate | None:
    """Our counterpart of a surrogate, or None where only calling it will do."""
    if isinstance(surrogate, Surrogate):
        return surrogate
    ours = _SURROGATES.get(type(surrogate).__name__)
    alpha = getattr(surrogate, "alpha", None)
    if ours is None or not getattr(surrogate, "spiking", True) or not isinstance(alpha, (int, float)):
        return None
    return ours(float(alpha))


class LIFNode(MemoryModule):
    """SpikingJelly's ``neuron.LIFNode``; see its documentation for the arguments and
    :func:`fastcifar.spiking.functional.lif` for the formula.

    Args:
        tau, decay_input, v_threshold, v_reset, detach_reset: as in :func:`~fastcifar.spiking.functional.lif`.
        surrogate_function: a surrogate of SpikingJelly or of :mod:`fastcifar.spiking.surrogate`, or any callable that
            maps ``h - v_threshold`` to spikes. ATan, Sigmoid, PiecewiseQuadratic and Rect run in the kernel, others
            step by step in PyTorch. Default ``Sigmoid(alpha=4)``, as in SpikingJelly.
        step_mode: ``"s"`` takes ``[N...]`` at each call, ``"m"`` takes ``[T, N...]``. Default ``"s"``.
        backend: accepted for SpikingJelly 0.0.0.0.14's sake and without effect; torch's dispatcher picks the kernel.
        store_v_seq: whether to keep the membrane of every step in :attr:`v_seq`. Default False.

    A subclass that overrides ``neuronal_charge``, ``neuronal_fire`` or ``neuronal_reset`` is run step by step through
    them. The membrane :attr:`v` starts at ``v_reset`` (0 for a soft reset), also again after a change of shape. In
    bfloat16 and float16 it is float32 on the kernel's path.

    Raises:
        TypeError, ValueError: as :func:`~fastcifar.spiking.functional.lif`.
    """

    v: Any  # the membrane [N...]; a float while at rest
    supported_backends = ("torch", "cupy", "triton", "inductor")

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(backend, bool):  # 2.0.0 has no backend: its eighth argument is store_v_seq
            store_v_seq, backend = backend, "torch"
        functional.check_options("LIFNode", tau, decay_input, v_threshold, v_reset)
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        self.tau = tau
        self.decay_input = decay_input
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        self.v_seq: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self.v_seq = None

    # ---- SpikingJelly's three phases, for subclasses that change one ----

    def neuronal_charge(self, x: Tensor) -> None:
        rest = 0.0 if self.v_reset is None else self.v_reset
        if self.decay_input:
            self.v = self.v + (x - (self.v - rest)) / self.tau
        else:
            self.v = self.v - (self.v - rest) / self.tau + x

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        spike = spike.detach() if self.detach_reset else spike
        if self.v_reset is None:
            self.v = self.v - spike * self.v_threshold
        else:
            self.v = spike * self.v_reset + (1.0 - spike) * self.v

    # ---- one step, many steps ----

    def single_step_forward(self, x: Tensor) -> Tensor:
        if (surrogate := self._kernel_path()) is None:
            return self._generic_step(x)
        return self._kernel(x.unsqueeze(0), surrogate).squeeze(0)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if (surrogate := self._kernel_path()) is not None:
            return self._kernel(x_seq, surrogate)
        spikes, v_seq = [], []
        for x in x_seq:
            spikes.append(self._generic_step(x))
            v_seq.append(self.v)
        self.v_seq = torch.stack(v_seq) if self.store_v_seq else None
        return torch.stack(spikes)

    def _kernel_path(self) -> Surrogate | None:
        """The surrogate for the kernel, or None where the three phases must be called one by one."""
        cls = type(self)
        overridden = any(
            getattr(cls, name) is not getattr(LIFNode, name)
            for name in ("neuronal_charge", "neuronal_fire", "neuronal_reset")
        )
        return None if overridden else _kernel_surrogate(self.surrogate_function)

    def _state(self, x: Tensor) -> Tensor | None:
        """The membrane for a step of ``x``'s shape; None where it is at rest."""
        v = self.v
        if not isinstance(v, Tensor) or v.shape != x.shape:
            return None
        return v.to(x.device)

    def _kernel(self, x_seq: Tensor, surrogate: Surrogate) -> Tensor:
        v = self._state(x_seq[0]) if len(x_seq) else None
        if v is not None and v.dtype != x_seq.dtype:
            v = v.to(torch.float64 if x_seq.dtype == torch.float64 else torch.float32)
        spikes, self.v, self.v_seq = functional.lif(
            x_seq,
            v,
            tau=self.tau,
            decay_input=self.decay_input,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            surrogate=surrogate,
            detach_reset=self.detach_reset,
            store_v_seq=self.store_v_seq,
        )
        return spikes

    def _generic_step(self, x: Tensor) -> Tensor:
        v = self._state(x)
        self.v = torch.full_like(x, 0.0 if self.v_reset is None else self.v_reset) if v is None else v.to(x.dtype)
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode}, tau={self.tau}"
        )
