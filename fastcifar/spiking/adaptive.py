"""Spiking neurons with a second state beside the membrane: a recovery, a synaptic current, an adaptation, a count of
spikes. Part of :mod:`fastcifar.spiking.functional`, whose :func:`~fastcifar.spiking.functional.lif` describes what all
neurons share."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _library
from . import reference
from .neurons import Parameter, check_call, check_number, check_parameter, check_tau, lif_neuron, run, shared_options
from .surrogate import AnySurrogate

TwoStates = tuple[Tensor, Tensor, Tensor, Tensor | None]


def izhikevich(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    a0: float = 1.0,
    v_rest: float = -0.1,
    v_c: float = 0.8,
    tau_w: float = 2.0,
    a: float = 0.0,
    b: float = 0.0,
    w_rest: float = 0.0,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> TwoStates:
    """Izhikevich neurons: :func:`qif`'s charge less a recovery current W::

        H[t] = V[t-1] + (X[t] + a0 (V[t-1] - v_rest) (V[t-1] - v_c) - W[t-1]) / tau
        W[t] = W[t-1] + (a (H[t] - v_rest) - W[t-1]) / tau_w + b S[t]

    The rest is :func:`lif`'s. The spike in W is never left out of the gradient, as in SpikingJelly.

    Args:
        w: recovery before the first step, ``[N...]``; None starts at ``w_rest``.
        tau: above 1, a number or a tensor. Default 2.
        a0, v_rest, v_c: curvature (positive), resting and critical membrane. Defaults 1, -0.1, 0.8.
        tau_w, a, b, w_rest: the recovery's time constant (above 0), its coupling to the membrane and to the spikes, and
            its start. Defaults 2, 0, 0, 0.

    Returns:
        ``(spikes, v_last, w_last, v_seq)``.

    Source: Izhikevich, "Simple model of spiking neurons", IEEE Transactions on Neural Networks 14 (2003);
    ``spikingjelly.activation_based.functional.izhikevich_multi_step``.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("izhikevich", x, {"v": v, "w": w}, options, spike_format)
    check_tau("izhikevich", tau, True, x)
    check_number("izhikevich", "a0", a0, above=0)
    check_number("izhikevich", "tau_w", tau_w, above=0)
    for name, value in (("v_rest", v_rest), ("v_c", v_c), ("a", a), ("b", b), ("w_rest", w_rest)):
        check_number("izhikevich", name, value)

    def plain() -> tuple:
        own: dict[str, Any] = {
            "tau": tau,
            "a0": a0,
            "v_rest": v_rest,
            "v_c": v_c,
            "tau_w": tau_w,
            "a": a,
            "b": b,
            "w_rest": w_rest,
        }
        return reference.izhikevich(x, v, w, **own, **options)

    if w is None and w_rest:
        w = x.new_full(x.shape[1:], w_rest, dtype=_library.state_dtype(x.dtype))
    more: dict[str, Any] = {"leak": tau, "constants": (a0, v_rest, v_c, tau_w, a, b)}
    return run("izhikevich", "izhikevich", x, v, w, **more, options=options, spike_format=spike_format, reference=plain)


def cuba_lif(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    current_decay: Parameter = 0.5,
    voltage_decay: Parameter = 0.75,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> TwoStates:
    """Current-based leaky integrate-and-fire neurons: a synaptic current W, and the membrane that it charges::

        W[t] = current_decay W[t-1] + X[t]
        H[t] = voltage_decay V[t-1] + W[t]

    The rest is :func:`~fastcifar.spiking.functional.lif`'s.

    Args:
        w: current before the first step, ``[N...]``; None starts at 0.
        current_decay, voltage_decay: what is left after a step, numbers or tensors that broadcast against ``[N...]``.
            Defaults 0.5 and 0.75.

    Returns:
        ``(spikes, v_last, w_last, v_seq)``.

    Source: Davies et al., "Loihi: A Neuromorphic Manycore Processor with On-Chip Learning", IEEE Micro 38 (2018);
    ``spikingjelly.activation_based.functional.cuba_lif_step``.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("cuba_lif", x, {"v": v, "w": w}, options, spike_format)
    check_parameter("cuba_lif", "current_decay", current_decay, x)
    check_parameter("cuba_lif", "voltage_decay", voltage_decay, x)

    def plain() -> tuple:
        return reference.cuba_lif(x, v, w, current_decay=current_decay, voltage_decay=voltage_decay, **options)

    more: dict[str, Any] = {"leak": voltage_decay, "gain": current_decay}
    return run("cuba_lif", "cuba_lif", x, v, w, **more, options=options, spike_format=spike_format, reference=plain)


def alif(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    decay_input: bool = True,
    beta: float = 1.8,
    rho: float = 0.9,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> TwoStates:
    """Adaptive leaky integrate-and-fire neurons: :func:`~fastcifar.spiking.functional.lif` that fires at ``v_threshold
    + beta W[t-1]``, where ``W[t] = rho W[t-1] + S[t]`` remembers the spikes. A soft reset subtracts ``v_threshold``.
    The spike in W is never left out of the gradient.

    Args:
        w: adaptation before the first step, ``[N...]``; None starts at 0.
        tau, decay_input: as in ``lif``.
        beta: how much a remembered spike raises the threshold. Default 1.8.
        rho: what is left of the adaptation after a step, ``exp(-1 / tau_adaptation)``. Default 0.9.

    Returns:
        ``(spikes, v_last, w_last, v_seq)``.

    Source: Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11 (2020), eqs. 8 to 10; ``norse``'s ``LSNN`` is its continuous form.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("alif", x, {"v": v, "w": w}, options, spike_format)
    check_tau("alif", tau, decay_input, x)
    check_number("alif", "beta", beta)
    check_number("alif", "rho", rho)

    def plain() -> tuple:
        return reference.alif(x, v, w, tau=tau, decay_input=decay_input, beta=beta, rho=rho, **options)

    neuron, leak = lif_neuron("alif", tau, decay_input)
    more: dict[str, Any] = {"leak": leak, "constants": (beta, rho)}
    return run("alif", neuron, x, v, w, **more, options=options, spike_format=spike_format, reference=plain)


def signed_if(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    v_threshold: Parameter = 1.0,
    s_max: float = math.inf,
    s_min: float = math.inf,
    surrogate: AnySurrogate = "rectangular",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> TwoStates:
    """Integrate-and-fire neurons with spikes of both signs and a bounded sum of spikes W, for networks converted from
    quantised ones. The membrane is counted in thresholds::

        Q[t] = V[t-1] + X[t] / v_threshold
        S[t] = +1 if Q[t] >= 1 and W[t-1] < s_max, -1 if Q[t] < 0 and W[t-1] > s_min, else 0
        V[t] = Q[t] - S[t],  W[t] = W[t-1] + S[t],  and the output is S[t] v_threshold

    With the default bounds there are no negative spikes and no bound: the neuron of QCFS. ``s_max = L, s_min = 0`` is
    ST-BIF, and QFFS's suppression of noise by negative spikes.

    Args:
        x: currents ``[T, N...]``, in the unit of the threshold.
        v: membrane before the first step over the threshold, ``[N...]``; None starts at 0.5. A float64 state with
            float32 ``x`` is kept in float64, in which little but the quotient ``X / v_threshold`` rounds.
        w: sum of the spikes before the first step, ``[N...]``, integers in v's dtype; None starts at 0.
        v_threshold: a number above 0 or a tensor that broadcasts against ``[N...]``; may be learnt. Default 1.
        s_max, s_min: bounds of W. Infinities: no bound, and no negative spikes.
        surrogate: g; the derivative of S to Q is ``g(Q - 1)`` where W may rise, plus ``g(-Q)`` where it may fall.
        spike_format: ``"float"`` only.

    Returns:
        ``(output, v_last, w_last, v_seq)``.

    Raises:
        TypeError, ValueError: as in :func:`~fastcifar.spiking.functional.lif`.

    Source: You et al., "SpikeZIP-TF", ICML 2024, eqs. 3 and 4; Bu et al., "Optimal ANN-SNN Conversion for
    High-accuracy and Ultra-low-latency Spiking Neural Networks" (QCFS), ICLR 2022; Li, Ma and Furber, "Quantization
    Framework for Fast Spiking Neural Networks" (QFFS), Frontiers in Neuroscience 16 (2022);
    ``spikingjelly.activation_based.functional.stbif_multi_step``.
    """
    options: dict[str, Any] = {
        "v_threshold": v_threshold,
        "surrogate": surrogate,
        "detach_reset": detach_reset,
        "store_v_seq": store_v_seq,
        "scale": scale,
        "shift": shift,
    }
    check_call("signed_if", x, {"v": v, "w": w}, options, spike_format)
    check_parameter("signed_if", "v_threshold", v_threshold, above=0)
    for name, value in (("s_max", s_max), ("s_min", s_min)):
        if not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"signed_if: expected {name} to be a number or infinite, got {value!r}")
    if spike_format != "float":
        raise ValueError(f"signed_if: expected spike_format 'float', as spikes have a sign; got {spike_format!r}")

    def plain() -> tuple:
        return reference.signed_if(x, v, w, s_max=s_max, s_min=s_min, **options)

    more: dict[str, Any] = {"constants": (float(s_max), float(s_min))}
    return run("signed_if", "signed_if", x, v, w, **more, options=options, spike_format=spike_format, reference=plain)
