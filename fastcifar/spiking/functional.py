"""Spiking neurons as functions: the arguments, what they mean, and what is refused.

:mod:`fastcifar.spiking.reference` spells the formulas out; :mod:`fastcifar.spiking.neurons` hands them to the kernels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .adaptive import alif, cuba_lif, izhikevich, signed_if
from .neurons import Parameter, check_call, check_number, check_parameter, check_tau, lif_neuron, run, shared_options
from .surrogate import AnySurrogate

Result = tuple[Tensor, Tensor, Tensor | None]

__all__ = [
    "alif",
    "cuba_lif",
    "eif",
    "ilif",
    "integrate_and_fire",
    "izhikevich",
    "klif",
    "leaky",
    "lif",
    "plif",
    "qif",
    "signed_if",
]


def lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    decay_input: bool = True,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    r"""Leaky integrate-and-fire neurons over all time steps, in one pass over memory.

    For ``t = 0 .. T-1``, with ``V[-1] = v`` and ``V_reset`` read as 0 where ``v_reset`` is None::

        H[t] = V[t-1] + (X[t] - (V[t-1] - V_reset)) / tau     if decay_input
        H[t] = V[t-1] - (V[t-1] - V_reset) / tau + X[t]       otherwise
        S[t] = 1 if H[t] >= v_threshold else 0                with derivative surrogate(H[t] - v_threshold)
        V[t] = S[t] V_reset + (1 - S[t]) H[t]                 hard reset
        V[t] = H[t] - S[t] v_threshold                        soft reset (v_reset is None)

    These are SpikingJelly's equations and defaults, except that the surrogate defaults to ``"atan"``; spikes equal
    SpikingJelly's to the bit. An infinite ``H`` gives NaN after a hard reset, there and here. The backward pass
    computes the membranes again from ``x``: nothing is saved beyond the inputs. There is no second derivative: asking
    for one raises.

    Args:
        x: input currents ``[T, N...]``, time first, in membrane units; float32, float64, bfloat16 or float16. Any
            layout; one that is dense in memory (contiguous, channels-last, ``[B, T, ...]`` or ``[..., T]`` transposed)
            is read without a copy, and the results have it too.
        v: membrane before the first step, ``[N...]``; None starts at ``v_reset`` (0 for a soft reset). State is kept in
            float32 for bfloat16 and float16 ``x``, else in ``x``'s dtype; a state in ``x``'s dtype is accepted.
        tau: membrane time constant in steps; above 1 with ``decay_input``, else above 0. A number, or a floating tensor
            that broadcasts against ``[N...]`` (``[C, 1, 1]`` for one a channel of ``[B, C, H, W]``) and may be learnt:
            its gradient is summed in float64, in the same order whatever the threads. Default 2.
        decay_input: whether the input is divided by ``tau`` as well. Default True.
        v_threshold: firing threshold, a number or a tensor as ``tau``. Default 1.
        v_reset: membrane after a spike; None subtracts the threshold instead (soft reset). Default 0.
        surrogate: a name in :data:`fastcifar.spiking.surrogate.BY_NAME` (with SpikingJelly's or snnTorch's default
            width), an object of that module with its own, or any callable that maps ``H - v_threshold`` to spikes and
            has a derivative; the last runs step by step in PyTorch. Default ``"atan"``.
        detach_reset: whether the reset is left out of the gradient. Default False.
        store_v_seq: whether to return ``V`` at every step. Default False.
        scale, shift: tensors that broadcast against ``[N...]``; the current is then ``scale * x + shift``, without a
            pass over memory of its own (a batch norm in evaluation). Default None.
        spike_format: ``"float"``: spikes in ``x``'s dtype. ``"uint8"`` or ``"packed"`` (a
            :class:`~fastcifar.spiking.PackedSpikes`, one bit a spike) write a quarter or a 32nd of that, without a
            gradient. Default ``"float"``.

    Returns:
        ``(spikes, v_last, v_seq)``: spikes ``[T, N...]``, the membrane after the last step ``[N...]``, and ``V``
        ``[T, N...]`` or None.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, device or value is not as described, or a gradient is asked for of spikes that have none.

    Source: Fang et al., "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence", Science Advances 9 (2023), eqs. 1 to 4; ``spikingjelly.activation_based.functional.lif_multi_step``.

    Example:
        >>> import torch
        >>> from fastcifar.spiking.functional import lif
        >>> spikes, v, _ = lif(torch.tensor([[0.8], [1.6], [2.4]]))
        >>> spikes.flatten().tolist(), v.item()
        ([0.0, 1.0, 1.0], 0.0)
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("lif", x, {"v": v}, options, spike_format)
    check_tau("lif", tau, decay_input, x)
    neuron, leak = lif_neuron("lif", tau, decay_input)

    def plain() -> tuple:
        return reference.lif(x, v, tau=tau, decay_input=decay_input, **options)

    return run("lif", neuron, x, v, leak=leak, options=options, spike_format=spike_format, reference=plain)


def integrate_and_fire(
    x: Tensor,
    v: Tensor | None = None,
    *,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """Integrate-and-fire neurons, ``H[t] = V[t-1] + X[t]``; the rest is :func:`lif`'s, errors and returns included.

    Args:
        v: as in :func:`lif`; a float64 state with float32 ``x`` is kept in float64, where sums of float32 currents are
            exact.

    Source: ``spikingjelly.activation_based.functional.if_multi_step``.

    Example:
        >>> import torch
        >>> from fastcifar.spiking.functional import integrate_and_fire
        >>> integrate_and_fire(torch.full((4, 1), 0.5), v_reset=None)[0].flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("integrate_and_fire", x, {"v": v}, options, spike_format)

    def plain() -> tuple:
        return reference.integrate_and_fire(x, v, **options)

    return run("integrate_and_fire", "if", x, v, options=options, spike_format=spike_format, reference=plain)


def plif(
    x: Tensor,
    w: Tensor,
    v: Tensor | None = None,
    *,
    decay_input: bool = True,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """Parametric leaky integrate-and-fire neurons: :func:`lif` with ``1 / tau = sigmoid(w)`` and a learnt ``w``.

    Args:
        w: a floating tensor that broadcasts against ``[N...]``; ``-log(tau - 1)`` gives the time constant ``tau``.

    Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", ICCV 2021, eq. 8; ``spikingjelly.activation_based.functional.plif_multi_step``.

    Example:
        >>> import torch
        >>> from fastcifar.spiking.functional import plif
        >>> plif(torch.tensor([[0.8], [1.6], [2.4]]), torch.tensor(0.0))[0].flatten().tolist()
        [0.0, 1.0, 1.0]
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("plif", x, {"v": v}, options, spike_format)
    if not isinstance(w, Tensor):
        raise TypeError(f"plif: expected w to be a tensor, got {type(w).__name__}")
    check_parameter("plif", "w", w, x)
    dtype = x.dtype if v is None else v.dtype
    leak = (w.float() if dtype.itemsize == 2 else w.to(dtype)).sigmoid()
    neuron = "lif_times" if decay_input else "lif_times_direct"

    def plain() -> tuple:
        return reference.plif(x, w, v, decay_input=decay_input, **options)

    return run("plif", neuron, x, v, leak=leak, options=options, spike_format=spike_format, reference=plain)


def qif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    a0: float = 1.0,
    v_rest: float = 0.0,
    v_c: float = 0.8,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = -0.1,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """Quadratic integrate-and-fire neurons, ``H[t] = V[t-1] + (X[t] + a0 (V[t-1] - v_rest) (V[t-1] - v_c)) / tau``; the
    rest is :func:`lif`'s, errors and returns included.

    Args:
        tau: above 1, a number or a tensor. Default 2.
        a0, v_rest, v_c: curvature (positive), resting and critical membrane. Defaults 1, 0, 0.8.

    Source: Gerstner et al., "Neuronal Dynamics", 2014, eq. 5.16;
    ``spikingjelly.activation_based.functional.qif_multi_step``.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("qif", x, {"v": v}, options, spike_format)
    check_tau("qif", tau, True, x)
    check_number("qif", "a0", a0, above=0)
    check_number("qif", "v_rest", v_rest)
    check_number("qif", "v_c", v_c)

    def plain() -> tuple:
        return reference.qif(x, v, tau=tau, a0=a0, v_rest=v_rest, v_c=v_c, **options)

    constants = (a0, v_rest, v_c)
    return run(
        "qif", "qif", x, v, leak=tau, constants=constants, options=options, spike_format=spike_format, reference=plain
    )


def eif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    delta_T: float = 1.0,
    theta_rh: float = 0.8,
    v_rest: float = 0.0,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = -0.1,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """Exponential integrate-and-fire neurons, ``H[t] = V[t-1] + (X[t] + v_rest - V[t-1] + delta_T E) / tau`` with ``E =
    exp((V[t-1] - theta_rh) / delta_T)``; the rest is :func:`lif`'s, errors and returns included.

    The exponential is our own, within 1.5 ulp, so membranes agree with eager PyTorch's to rounding, not to the bit.

    Args:
        tau: above 1, a number or a tensor. Default 2.
        delta_T, theta_rh, v_rest: sharpness (positive), rheobase threshold and resting membrane. Defaults 1, 0.8, 0.

    Source: "Neuronal Dynamics", eq. 5.6; ``spikingjelly.activation_based.functional.eif_multi_step``.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("eif", x, {"v": v}, options, spike_format)
    check_tau("eif", tau, True, x)
    check_number("eif", "delta_T", delta_T, above=0)
    check_number("eif", "theta_rh", theta_rh)
    check_number("eif", "v_rest", v_rest)

    def plain() -> tuple:
        return reference.eif(x, v, tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_rest=v_rest, **options)

    constants = (v_rest, theta_rh, delta_T)
    return run(
        "eif", "eif", x, v, leak=tau, constants=constants, options=options, spike_format=spike_format, reference=plain
    )


def klif(
    x: Tensor,
    k: Parameter = 1.0,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    decay_input: bool = True,
    scale_reset: bool = False,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """KLIF neurons, ``H[t] = relu(k L[t])`` with ``L`` the charge of :func:`lif`; the rest is its, errors included.

    Args:
        k: a number or a learnt tensor that broadcasts against ``[N...]``. Default 1.
        scale_reset: whether the reset acts on ``H / k`` with the threshold ``v_threshold / k``. Default False.

    Source: Jiang and Zhang, "KLIF: An optimized spiking neuron unit for tuning surrogate gradient slope and membrane
    potential", 2023, eqs. 5 to 7; ``spikingjelly.activation_based.functional.klif_step``.
    """
    options = shared_options(v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale, shift)
    check_call("klif", x, {"v": v}, options, spike_format)
    check_tau("klif", tau, decay_input, x)
    check_parameter("klif", "k", k, x)

    def plain() -> tuple:
        return reference.klif(x, k, v, tau=tau, decay_input=decay_input, scale_reset=scale_reset, **options)

    neuron, leak = lif_neuron("klif", tau, decay_input)
    more: dict[str, Any] = {"leak": leak, "gain": k, "constants": (float(scale_reset),)}
    return run("klif", neuron, x, v, **more, options=options, spike_format=spike_format, reference=plain)


def ilif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 4.0 / 3.0,
    v_threshold: Parameter = 1.0,
    max_spikes: int = 4,
    grad_window: tuple[float, float] | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """Integer leaky integrate-and-fire neurons, 0 to ``max_spikes`` spikes a step: ``H[t] = (1 - 1 / tau) V[t-1] +
    X[t]``, ``S[t] = round(clamp(H[t] / v_threshold, 0, max_spikes))`` (ties to even), soft reset; the rest is
    :func:`lif`'s.

    Args:
        tau: above 1, a number or a tensor. Default 4/3.
        max_spikes: an integer of 1 to 255. Default 4.
        grad_window: ``(low, high)``: dS/dH is ``1 / v_threshold`` where ``low <= H / v_threshold <= high``, else 0.
            Default ``(0, max_spikes)``.
        spike_format: ``"float"`` or ``"uint8"``.

    Source: Luo et al., "Integer-Valued Training and Spike-Driven Inference Spiking Neural Network for High-performance
    and Energy-efficient Object Detection", ECCV 2024, eqs. 4 to 6;
    ``spikingjelly.activation_based.functional.ilif_multi_step``.
    """
    options: dict[str, Any] = {
        "v_threshold": v_threshold,
        "detach_reset": detach_reset,
        "store_v_seq": store_v_seq,
        "scale": scale,
        "shift": shift,
    }
    check_call("ilif", x, {"v": v}, options, spike_format)
    check_tau("ilif", tau, True, x)
    if not isinstance(max_spikes, int) or not 1 <= max_spikes <= 255:
        raise ValueError(f"ilif: expected max_spikes to be an integer of 1 to 255, got {max_spikes!r}")
    if spike_format == "packed":
        raise ValueError("ilif: expected spike_format 'float' or 'uint8', as a spike count is no bit; got 'packed'")
    low, high = (0.0, float(max_spikes)) if grad_window is None else grad_window
    leak = 1 - 1 / (tau.double() if isinstance(tau, Tensor) else tau)

    def plain() -> tuple:
        return reference.ilif(x, v, tau=tau, max_spikes=max_spikes, grad_window=grad_window, **options)

    constants = (float(max_spikes), float(low), float(high))
    return run(
        "ilif",
        "ilif",
        x,
        v,
        leak=leak,
        constants=constants,
        options=options,
        spike_format=spike_format,
        reference=plain,
    )


def leaky(
    x: Tensor,
    v: Tensor | None = None,
    *,
    beta: Parameter = 0.9,
    v_threshold: Parameter = 1.0,
    reset_mechanism: str = "subtract",
    surrogate: AnySurrogate = "atan",
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    spike_format: str = "float",
) -> Result:
    """snnTorch's ``Leaky`` neurons over all time steps: the reset comes one step late and never takes part in the
    gradient, and the neuron fires strictly above the threshold. With ``R[t] = 1 if V[t-1] > v_threshold else 0``::

        V[t] = beta V[t-1] + X[t] - R[t] v_threshold       "subtract"
        V[t] = beta (1 - R[t]) V[t-1] + X[t]               "zero"
        V[t] = beta V[t-1] + X[t]                          "none"
        S[t] = 1 if V[t] > v_threshold else 0

    The rest is :func:`lif`'s, errors and returns included; V is the membrane before its reset, as snnTorch returns it.

    Args:
        beta: decay of the membrane a step, clamped to 0 .. 1; a number or a tensor that broadcasts against ``[N...]``.

    Source: Eshraghian et al., "Training Spiking Neural Networks Using Lessons From Deep Learning", Proceedings of the
    IEEE 2023, eq. 4; ``snntorch.Leaky`` with ``reset_delay=True``.
    """
    options: dict[str, Any] = {
        "v_threshold": v_threshold,
        "surrogate": surrogate,
        "store_v_seq": store_v_seq,
        "scale": scale,
        "shift": shift,
    }
    check_call("leaky", x, {"v": v}, options, spike_format)
    check_parameter("leaky", "beta", beta, x)
    if reset_mechanism not in ("subtract", "zero", "none"):
        raise ValueError(f"leaky: expected reset_mechanism to be subtract, zero or none; got {reset_mechanism!r}")

    def plain() -> tuple:
        return reference.leaky(x, v, beta=beta, reset_mechanism=reset_mechanism, **options)

    leak = beta.clamp(0, 1) if isinstance(beta, Tensor) else min(max(beta, 0.0), 1.0)
    neuron = f"leaky_{reset_mechanism}"
    return run("leaky", neuron, x, v, leak=leak, options=options, spike_format=spike_format, reference=plain)
