"""snnTorch's surrogate functions by its names, and what stands in for those of snnTorch itself.

Each returns an object of :mod:`fastcifar.spiking.surrogate`. In a neuron that fires strictly above its threshold, as
``Leaky`` does, so does the object; called on its own it fires at 0 as well, where snnTorch's does not: its ``strict``
method is snnTorch's function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..spiking.surrogate import (
    ATan,
    DeterministicPass,
    FastSigmoid,
    LeakySpike,
    Sigmoid,
    SparseFastSigmoid,
    SpikeRateEscape,
    Surrogate,
    Triangular,
)


def atan(alpha: float = 2.0) -> ATan:
    return ATan(alpha)


def fast_sigmoid(slope: float = 25) -> FastSigmoid:
    return FastSigmoid(slope)


def sigmoid(slope: float = 25) -> Sigmoid:
    """Finite everywhere; snnTorch's gradient is NaN where ``exp(-slope u)`` overflows."""
    return Sigmoid(slope)


def straight_through_estimator() -> DeterministicPass:
    return DeterministicPass()


def triangular(threshold: float = 1) -> Triangular:
    return Triangular(threshold)


def heaviside() -> LeakySpike:
    return LeakySpike(0.0)


def spike_rate_escape(beta: float = 1, slope: float = 25) -> SpikeRateEscape:
    return SpikeRateEscape(beta, slope)


def LSO(slope: float = 0.1) -> LeakySpike:
    """As snnTorch documents it; its own raises."""
    return LeakySpike(slope)


def SFS(slope: float = 25, B: float = 1) -> SparseFastSigmoid:
    return SparseFastSigmoid(slope, B)


# snnTorch's LSO is missing, as calling it raises, and so are SSO, which is random, and custom_surrogate.
_KNOWN: dict[str, Callable[..., Surrogate]] = {
    f.__name__: f
    for f in (atan, fast_sigmoid, sigmoid, straight_through_estimator, triangular, heaviside, spike_rate_escape, SFS)
}


def own_surrogate(spike_grad: Any) -> Surrogate | None:
    """Our counterpart of a function that one of snnTorch's made, a :class:`Surrogate` itself, or None where only
    calling ``spike_grad`` will do."""
    if isinstance(spike_grad, Surrogate):
        return spike_grad
    maker, _, inner = getattr(spike_grad, "__qualname__", "").partition(".")
    known = getattr(spike_grad, "__module__", None) == "snntorch.surrogate" and inner == "<locals>.inner"
    if not known or maker not in _KNOWN:
        return None
    cells = zip(spike_grad.__code__.co_freevars, spike_grad.__closure__ or (), strict=True)
    try:
        # Another version's may have other numbers, and ours takes no slope below 0: both are called as they are.
        return _KNOWN[maker](**{name: cell.cell_contents for name, cell in cells})
    except (TypeError, ValueError):
        return None
