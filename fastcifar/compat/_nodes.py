"""SpikingJelly's neurons with a membrane and binary spikes; what they share is in
:mod:`fastcifar.compat.spikingjelly`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spiking import functional
from ..spiking.surrogate import AnySurrogate, Rectangular
from ._memory import SpikingNode


class IFNode(SpikingNode):
    """SpikingJelly's ``neuron.IFNode``: :func:`fastcifar.spiking.functional.integrate_and_fire`."""

    function = staticmethod(functional.integrate_and_fire)

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x


class LIFNode(SpikingNode):
    """SpikingJelly's ``neuron.LIFNode``: :func:`fastcifar.spiking.functional.lif`, which explains the arguments."""

    function: ClassVar[Callable[..., Any]] = staticmethod(functional.lif)
    own = ("tau", "decay_input")

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        super().__init__(*shared, tau=tau, decay_input=decay_input)

    def neuronal_charge(self, x: Tensor) -> None:
        above = self.v - self._start("v")
        self.v = self.v + (x - above) / self.tau if self.decay_input else self.v - above / self.tau + x


class ParametricLIFNode(SpikingNode):
    """SpikingJelly's ``neuron.ParametricLIFNode``: :func:`fastcifar.spiking.functional.plif` with a learnt ``w`` of
    shape ``()``, ``1 / tau = sigmoid(w)``.

    Args:
        init_tau: time constant before training, above 1. Default 2.
    """

    function = staticmethod(functional.plif)
    learnt = ("w",)
    own = ("decay_input",)
    w: nn.Parameter

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        if not init_tau > 1:
            raise ValueError(f"{type(self).__name__}: expected init_tau above 1, got {init_tau}")
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        w = nn.Parameter(torch.as_tensor(-math.log(init_tau - 1.0)))
        super().__init__(*shared, decay_input=decay_input, w=w)

    def neuronal_charge(self, x: Tensor) -> None:
        above, k = self.v - self._start("v"), self.w.sigmoid()
        self.v = self.v + (x - above) * k if self.decay_input else self.v - above * k + x

    def extra_repr(self) -> str:
        return f"tau={1 / self.w.detach().sigmoid()}, {super().extra_repr()}"


class QIFNode(SpikingNode):
    """SpikingJelly's ``neuron.QIFNode``: :func:`fastcifar.spiking.functional.qif`, which explains the arguments."""

    function = staticmethod(functional.qif)
    own = ("tau", "v_c", "a0", "v_rest")

    def __init__(
        self,
        tau: float = 2.0,
        v_c: float = 0.8,
        a0: float = 1.0,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        super().__init__(*shared, tau=tau, v_c=v_c, a0=a0, v_rest=v_rest)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x + self.a0 * (self.v - self.v_rest) * (self.v - self.v_c)) / self.tau


class EIFNode(SpikingNode):
    """SpikingJelly's ``neuron.EIFNode``: :func:`fastcifar.spiking.functional.eif`, which explains the arguments. Its
    exponential may differ from torch's in the last bit, and membranes with it."""

    function = staticmethod(functional.eif)
    own = ("tau", "delta_T", "theta_rh", "v_rest")

    def __init__(
        self,
        tau: float = 2.0,
        delta_T: float = 1.0,
        theta_rh: float = 0.8,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        super().__init__(*shared, tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_rest=v_rest)

    def neuronal_charge(self, x: Tensor) -> None:
        spread = self.delta_T * torch.exp((self.v - self.theta_rh) / self.delta_T)
        self.v = self.v + (x + self.v_rest - self.v + spread) / self.tau


class IzhikevichNode(SpikingNode):
    """SpikingJelly's ``neuron.IzhikevichNode``: :func:`fastcifar.spiking.functional.izhikevich`, which explains the
    arguments. Memories: ``v`` and the recovery ``w``."""

    function = staticmethod(functional.izhikevich)
    states = ("v", "w")
    own = ("tau", "v_c", "a0", "v_rest", "w_rest", "tau_w", "a", "b")
    w: Any  # the recovery [N...]; a float while at rest

    def __init__(
        self,
        tau: float = 2.0,
        v_c: float = 0.8,
        a0: float = 1.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        v_rest: float = -0.1,
        w_rest: float = 0.0,
        tau_w: float = 2.0,
        a: float = 0.0,
        b: float = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        recovery: dict[str, Any] = {"w_rest": w_rest, "tau_w": tau_w, "a": a, "b": b}
        super().__init__(*shared, {"w": w_rest}, tau=tau, v_c=v_c, a0=a0, v_rest=v_rest, **recovery)

    def _start(self, name: str) -> float:
        return self.w_rest if name == "w" else super()._start(name)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x + self.a0 * (self.v - self.v_rest) * (self.v - self.v_c) - self.w) / self.tau

    def neuronal_adaptation(self) -> None:
        self.w = self.w + (self.a * (self.v - self.v_rest) - self.w) / self.tau_w

    def neuronal_reset(self, spike: Tensor) -> None:
        super().neuronal_reset(spike)
        self.w = self.w + self.b * spike


class KLIFNode(SpikingNode):
    """SpikingJelly's ``neuron.KLIFNode``: :func:`fastcifar.spiking.functional.klif` with a learnt ``k`` of shape ``()``
    that starts at 1.

    Args:
        scale_reset: whether the reset acts on the membrane over k. Default False.
    """

    function = staticmethod(functional.klif)
    learnt = ("k",)
    own = ("scale_reset", "tau", "decay_input")
    k: nn.Parameter

    def __init__(
        self,
        scale_reset: bool = False,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        k = nn.Parameter(torch.as_tensor(1.0))
        super().__init__(*shared, scale_reset=scale_reset, tau=tau, decay_input=decay_input, k=k)

    def neuronal_charge(self, x: Tensor) -> None:
        LIFNode.neuronal_charge(self, x)  # type: ignore[arg-type]
        self.v = torch.relu(self.k * self.v)

    def neuronal_reset(self, spike: Tensor) -> None:
        if self.scale_reset:
            self.v = self._after(spike, self.v / self.k, self.v_threshold / self.k)
        else:
            super().neuronal_reset(spike)


class CUBALIFNode(SpikingNode):
    """SpikingJelly's ``neuron.CUBALIFNode``: :func:`fastcifar.spiking.functional.cuba_lif`. Memories: ``v`` and the
    synaptic current ``c``. SpikingJelly's takes the first five arguments only.

    Args:
        c_decay, v_decay: what is left of the current and of the membrane after a step. Defaults 0.5 and 0.75.
        surrogate_function: Default ``Rectangular()``.
    """

    function = staticmethod(functional.cuba_lif)
    states = ("v", "c")
    own = ("c_decay", "v_decay")
    c: Any  # the current [N...]; a float while at rest

    def __init__(
        self,
        c_decay: float = 0.5,
        v_decay: float = 0.75,
        v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        surrogate_function: AnySurrogate | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | bool = "torch",
        store_v_seq: bool = False,
    ) -> None:
        surrogate_function = Rectangular() if surrogate_function is None else surrogate_function
        shared = (v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        super().__init__(*shared, {"c": 0.0}, c_decay=c_decay, v_decay=v_decay)

    def neuronal_charge(self, x: Tensor) -> None:
        self.c = self.c * self.c_decay + x
        self.v = self.v * self.v_decay + self.c

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        decays = {"current_decay": options.pop("c_decay"), "voltage_decay": options.pop("v_decay")}
        return {**decays, **options}
