"""Spiking neurons as modules: thin and stateful. State is not in the state_dict; learnt parameters are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import functional
from .surrogate import resolve


class Neuron(nn.Module):
    """Base class: neurons that keep their state from call to call.

    ``forward`` takes currents ``[T, N...]`` and returns spikes ``[T, N...]`` (a
    :class:`~fastcifar.spiking.PackedSpikes` with ``spike_format="packed"``). The state after the last step stays in
    :attr:`v`, and the next call goes on from it: call :meth:`reset` between unrelated sequences and :meth:`detach` to
    cut the gradient (truncated backpropagation through time). Copying or pickling the module copies the state's values
    without their history.

    Args:
        options: the keyword arguments of the neuron's function in :mod:`fastcifar.spiking.functional`, with its
            defaults. A parameter given as an ``nn.Parameter`` is learnt; a tensor moves along with the module.

    Attributes:
        v: membrane ``[N...]`` after the last step, None before the first.
        w: the second state, of neurons that have one.
        v_seq: membrane ``[T, N...]`` of the last call where ``store_v_seq`` is set, else None.

    Raises:
        TypeError, ValueError: as the function; unknown options are refused.
    """

    function: ClassVar[Callable[..., Any]]
    states: ClassVar[tuple[str, ...]] = ("v",)
    learnt: ClassVar[tuple[str, ...]] = ()  # parameters that the function takes between x and the state
    v: Tensor | None
    v_seq: Tensor | None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "function" in cls.__dict__ and "__init__" not in cls.__dict__:
            parameters = inspect.signature(cls.function).parameters.values()
            cls.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])  # type: ignore

    def __init__(self, learnt: dict[str, Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        for name, value in (learnt or {}).items():
            self.register_parameter(name, nn.Parameter(value))
        defaults = self._defaults()
        self.options = tuple(defaults)
        if unknown := sorted(set(options) - set(self.options)):
            raise TypeError(f"{type(self).__name__}: expected options {', '.join(self.options)}; got {unknown[0]}")
        for name in self.options:
            option: Any = options.get(name, defaults[name])
            if name == "surrogate":
                option = resolve(option, type(self).__name__)
            if isinstance(option, Tensor) and not isinstance(option, nn.Parameter):
                self.register_buffer(name, option)
            else:
                setattr(self, name, option)
        self.reset()
        self._check()

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return dict(cls.function.__kwdefaults__ or {})

    def _check(self) -> None:
        """Raises the function's errors in the module's name."""
        tensors = [getattr(self, name) for name in (*self.options, *self.learnt)]
        shape = torch.broadcast_shapes(*[t.shape for t in tensors if isinstance(t, Tensor)])
        try:
            with torch.no_grad():
                self._call(torch.empty(0, *shape))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}:{str(error).partition(':')[2]}") from None

    def _call(self, x: Tensor) -> Any:
        options = {name: getattr(self, name) for name in self.options}
        return type(self).function(x, *[getattr(self, name) for name in (*self.learnt, *self.states)], **options)

    def forward(self, x: Tensor) -> Any:
        spikes, *state, self.v_seq = self._call(x)
        for name, value in zip(self.states, state, strict=True):
            setattr(self, name, value)
        return spikes

    def reset(self) -> None:
        """Forgets the state: the next call starts at rest."""
        for name in (*self.states, "v_seq"):
            setattr(self, name, None)

    def detach(self) -> None:
        """Keeps the state's values and cuts their gradient history."""
        for name in (*self.states, "v_seq"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.detach())

    def _apply(self, fn, recurse=True):
        """Moves the state along with the module (``.to``, ``.cuda``, ``.double``)."""
        super()._apply(fn, recurse)
        for name in self.states:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, fn(value))
        return self

    def __getstate__(self):
        """The state without its autograd history, which neither deepcopy nor pickle could carry."""
        state = self.__dict__.copy()
        for name in (*self.states, "v_seq"):
            state[name] = None if state[name] is None else state[name].detach()
        return state

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self.options}
        shown = {n: f"tensor{list(v.shape)}" if isinstance(v, Tensor) else v for n, v in values.items()}
        hidden = ("scale", "shift", "spike_format", "store_v_seq")
        defaults = self._defaults()
        return ", ".join(f"{n}={v}" for n, v in shown.items() if n not in hidden or v is not defaults[n])


class IF(Neuron):
    """Integrate-and-fire neurons: :func:`~fastcifar.spiking.functional.integrate_and_fire`; see :class:`Neuron`."""

    function = staticmethod(functional.integrate_and_fire)


class LIF(Neuron):
    """Leaky integrate-and-fire neurons: :func:`~fastcifar.spiking.functional.lif`; see :class:`Neuron`.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import LIF
        >>> neurons = LIF(tau=2.0, v_threshold=torch.nn.Parameter(torch.ones(3)))  # a threshold learnt by each neuron
        >>> neurons(torch.full((4, 2, 3), 1.5)).shape
        torch.Size([4, 2, 3])
    """

    function = staticmethod(functional.lif)


class PLIF(Neuron):
    """Parametric LIF neurons: :func:`~fastcifar.spiking.functional.plif`; see :class:`Neuron`.

    Args:
        init_tau: time constant before training, above 1. Default 2.
        shape: shape of the learnt ``w``, which broadcasts against ``[N...]``. Default ``()``, one for all.

    Attributes:
        w: the parameter, ``1 / tau = sigmoid(w)``; the state_dict's key, as SpikingJelly's.
    """

    function = staticmethod(functional.plif)
    learnt = ("w",)

    def __init__(self, init_tau: float = 2.0, shape: tuple[int, ...] = (), **options: Any) -> None:
        if not init_tau > 1:
            raise ValueError(f"PLIF: expected init_tau above 1, got {init_tau}")
        super().__init__({"w": torch.full(shape, -math.log(init_tau - 1))}, **options)


class QIF(Neuron):
    """Quadratic integrate-and-fire neurons: :func:`~fastcifar.spiking.functional.qif`; see :class:`Neuron`."""

    function = staticmethod(functional.qif)


class EIF(Neuron):
    """Exponential integrate-and-fire neurons: :func:`~fastcifar.spiking.functional.eif`; see :class:`Neuron`."""

    function = staticmethod(functional.eif)


class KLIF(Neuron):
    """KLIF neurons with a learnt ``k``: :func:`~fastcifar.spiking.functional.klif`; see :class:`Neuron`.

    Args:
        init_k: k before training. Default 1.
        shape: shape of k, which broadcasts against ``[N...]``. Default ``()``, one for all.
    """

    function = staticmethod(functional.klif)
    learnt = ("k",)

    def __init__(self, init_k: float = 1.0, shape: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__({"k": torch.full(shape, float(init_k))}, **options)


class ILIF(Neuron):
    """Integer LIF neurons: :func:`~fastcifar.spiking.functional.ilif`; see :class:`Neuron`."""

    function = staticmethod(functional.ilif)


class Leaky(Neuron):
    """snnTorch's neurons over all time steps: :func:`~fastcifar.spiking.functional.leaky`; see :class:`Neuron`."""

    function = staticmethod(functional.leaky)


class Izhikevich(Neuron):
    """Izhikevich neurons: :func:`~fastcifar.spiking.functional.izhikevich`; see :class:`Neuron`."""

    function = staticmethod(functional.izhikevich)
    states = ("v", "w")


class CUBALIF(Neuron):
    """Current-based LIF neurons: :func:`~fastcifar.spiking.functional.cuba_lif`; see :class:`Neuron`."""

    function = staticmethod(functional.cuba_lif)
    states = ("v", "w")


class ALIF(Neuron):
    """Adaptive LIF neurons: :func:`~fastcifar.spiking.functional.alif`; see :class:`Neuron`."""

    function = staticmethod(functional.alif)
    states = ("v", "w")


class SignedIF(Neuron):
    """Integrate-and-fire neurons with bounded, signed spikes: :func:`~fastcifar.spiking.functional.signed_if`; see
    :class:`Neuron`."""

    function = staticmethod(functional.signed_if)
    states = ("v", "w")
