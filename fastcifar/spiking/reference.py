"""The spiking neurons in plain PyTorch: the executable specification that every kernel is tested against.

Each neuron is a charge; firing, resetting and the loop over time are shared. ``x`` is ``[T, N...]``; parameters are
numbers or tensors that broadcast against ``[N...]``. Functions have the signatures of
:mod:`fastcifar.spiking.functional`, whose docstrings describe the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .surrogate import AnySurrogate, Surrogate, resolve

Parameter = float | Tensor
Result = tuple[Tensor, Tensor, Tensor | None]  # spikes, v after the last step, v after every step
TwoStates = tuple[Tensor, Tensor, Tensor, Tensor | None]  # spikes, v, w, v after every step


def integrate_and_fire(x: Tensor, v: Tensor | None = None, **options: Any) -> Result:
    """``H = V + X``."""
    return _one_state(x, v, lambda v, x: v + x, **options)


def lif(
    x: Tensor, v: Tensor | None = None, *, tau: Parameter = 2.0, decay_input: bool = True, **options: Any
) -> Result:
    """``H = V + (X - (V - V_rest)) / tau``, or ``V - (V - V_rest) / tau + X``; Fang et al., "SpikingJelly", Science
    Advances 2023, eqs. 1 to 4. ``V_rest`` is ``v_reset``, or 0 for a soft reset."""
    return _one_state(x, v, _leaky_charge(x, v, tau, decay_input, options), **options)


def plif(x: Tensor, w: Tensor, v: Tensor | None = None, *, decay_input: bool = True, **options: Any) -> Result:
    """:func:`lif` with ``1 / tau = sigmoid(w)``; Fang et al., "Incorporating Learnable Membrane Time Constant", ICCV
    2021, eq. 8."""
    rest, k = _rest(options), w.to(_state_dtype(x, v)).sigmoid()

    def charge(v: Tensor, x: Tensor) -> Tensor:
        return v + (x - (v - rest)) * k if decay_input else v - (v - rest) * k + x

    return _one_state(x, v, charge, **options)


def qif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    a0: float = 1.0,
    v_rest: float = 0.0,
    v_c: float = 0.8,
    v_reset: float | None = -0.1,
    **options: Any,
) -> Result:
    """``H = V + (X + a0 (V - V_rest) (V - V_c)) / tau``; Gerstner et al., "Neuronal Dynamics", 2014, eq. 5.16."""
    tau_ = _tensor(tau, x, v)

    def charge(v: Tensor, x: Tensor) -> Tensor:
        return v + (x + a0 * (v - v_rest) * (v - v_c)) / tau_

    return _one_state(x, v, charge, v_reset=v_reset, **options)


def eif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    delta_T: float = 1.0,
    theta_rh: float = 0.8,
    v_rest: float = 0.0,
    v_reset: float | None = -0.1,
    **options: Any,
) -> Result:
    """``H = V + (X + V_rest - V + delta_T exp((V - theta_rh) / delta_T)) / tau``; "Neuronal Dynamics", eq. 5.6."""
    tau_, delta = _tensor(tau, x, v), _tensor(delta_T, x, v)

    def charge(v: Tensor, x: Tensor) -> Tensor:
        return v + (x + v_rest - v + delta * torch.exp((v - theta_rh) / delta)) / tau_

    return _one_state(x, v, charge, v_reset=v_reset, **options)


def klif(
    x: Tensor,
    k: Parameter = 1.0,
    v: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    decay_input: bool = True,
    scale_reset: bool = False,
    **options: Any,
) -> Result:
    """``H = relu(k L)``, L the charge of :func:`lif`; Jiang and Zhang, "KLIF", 2023, eqs. 5 to 7. With ``scale_reset``
    the reset is that of ``H / k`` with the threshold ``V_threshold / k``."""
    leaky, k = _leaky_charge(x, v, tau, decay_input, options), _tensor(k, x, v)
    return _one_state(x, v, lambda v, x: torch.relu(k * leaky(v, x)), reset_scale=k if scale_reset else None, **options)


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
) -> Result:
    """``H = (1 - 1 / tau) V + X``, ``S = round(clamp(H / V_threshold, 0, D))``, soft reset; Luo et al., "Integer-Valued
    Training and Spike-Driven Inference", ECCV 2024, eqs. 4 to 6. dS/dH is 1 / V_threshold in the window, else 0."""
    decay, threshold = 1 - 1 / _tensor(tau, x, v, torch.float64), _tensor(v_threshold, x, v)
    decay = decay.to(threshold.dtype)
    low, high = (0.0, float(max_spikes)) if grad_window is None else grad_window

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h = decay * v + x
        scaled = h / threshold
        window = (scaled >= low) & (scaled <= high)
        s = _Straight.apply(scaled, scaled.clamp(0, max_spikes).round(), window)
        return s, h - (s.detach() if detach_reset else s) * threshold

    return _unroll(x, (_start(x, v, 0.0, v),), step, store_v_seq, scale, shift)


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
    **options: Any,
) -> TwoStates:
    """``H = V + (X + a0 (V - V_rest) (V - V_c) - W) / tau``, ``W' = W + (a (H - V_rest) - W) / tau_w + b S``;
    Izhikevich, IEEE Trans. Neural Networks 2003, in SpikingJelly's form. The spike in W' is never left out of the
    gradient."""
    tau_, tau_w_ = _tensor(tau, x, v), _tensor(tau_w, x, v)

    def charge(v: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = v + (x + a0 * (v - v_rest) * (v - v_c) - w) / tau_
        return h, w + (a * (h - v_rest) - w) / tau_w_

    return _two_states(x, v, w, charge, w_rest=w_rest, second_step=b, **options)


def cuba_lif(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    current_decay: Parameter = 0.5,
    voltage_decay: Parameter = 0.75,
    **options: Any,
) -> TwoStates:
    """``W' = current_decay W + X``, ``H = voltage_decay V + W'``: current-based synapses; Davies et al., "Loihi", IEEE
    Micro 2018, eqs. 1 and 2, in SpikingJelly's form."""
    current_decay_, voltage_decay_ = _tensor(current_decay, x, v), _tensor(voltage_decay, x, v)

    def charge(v: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        w = w * current_decay_ + x
        return v * voltage_decay_ + w, w

    return _two_states(x, v, w, charge, **options)


def alif(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    tau: Parameter = 2.0,
    decay_input: bool = True,
    beta: float = 1.8,
    rho: float = 0.9,
    **options: Any,
) -> TwoStates:
    """:func:`lif` that fires at ``V_threshold + beta W``, ``W' = rho W + S``: adaptive threshold; Bellec et al., "A
    solution to the learning dilemma", Nature Communications 2020, eqs. 8 to 10. The reset subtracts ``V_threshold``;
    the spike in W' is never left out of the gradient."""
    leaky = _leaky_charge(x, v, tau, decay_input, options)
    return _two_states(
        x, v, w, lambda v, w, x: (leaky(v, x), rho * w), raised_threshold=beta, second_step=1.0, **options
    )


def signed_if(
    x: Tensor,
    v: Tensor | None = None,
    w: Tensor | None = None,
    *,
    v_threshold: Parameter = 1.0,
    s_max: float = float("inf"),
    s_min: float = float("inf"),
    surrogate: AnySurrogate = "rectangular",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> TwoStates:
    """``Q = V + X / V_threshold``; spike +1 if ``Q >= 1 and W < s_max``, -1 if ``Q < 0 and W > s_min``;
    ``V' = Q - S``, ``W' = W + S``, output ``S V_threshold``; You et al., "SpikeZIP-TF", ICML 2024, eqs. 3 and 4
    (ST-BIF); with the default bounds, the integrate-and-fire neuron of Bu et al., "QCFS", ICLR 2022."""
    surrogate, threshold = resolve(surrogate, "signed_if"), _tensor(v_threshold, x, v)
    below = surrogate.strict if isinstance(surrogate, Surrogate) else surrogate

    def step(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = v + x / threshold
        up = surrogate(q - 1) * (w < s_max)
        down = below(-q) * (w > s_min)
        s = up - down
        fixed = s.detach()
        return s * threshold, q - (fixed if detach_reset else s), w + fixed

    state = _start(x, v, 0.5, v), _start(x, w, 0.0, v)
    return _unroll(x, state, step, store_v_seq, scale, shift)


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
) -> Result:
    """snnTorch's ``Leaky``: the reset comes one step late, the neuron fires strictly above the threshold, and V is the
    membrane before its reset. With ``R = 1 if V > V_threshold else 0`` (never part of the gradient)::

        V' = beta V + X - R V_threshold      subtract
        V' = beta (1 - R) V + X              zero
        V' = beta V + X                      none
        S  = 1 if V' > V_threshold else 0

    Eshraghian et al., "Training Spiking Neural Networks Using Lessons From Deep Learning", Proc. IEEE 2023, eq. 4."""
    surrogate = resolve(surrogate, "leaky")
    fire = surrogate.strict if isinstance(surrogate, Surrogate) else surrogate
    beta_, threshold = _tensor(beta, x, v).clamp(0, 1), _tensor(v_threshold, x, v)

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        reset = (v - threshold > 0).to(v.dtype).detach()
        if reset_mechanism == "zero":
            v = (1 - reset) * v
        v = beta_ * v + x
        if reset_mechanism == "subtract":
            v = v - reset * threshold
        return fire(v - threshold), v

    return _unroll(x, (_start(x, v, 0.0, v),), step, store_v_seq, scale, shift)


# ---- what they share -------------------------------------------------------------------------------------------------


def _one_state(x: Tensor, v: Tensor | None, charge: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Result:
    spikes, v, _, v_seq = _two_states(x, v, None, lambda v, w, x: (charge(v, x), w), **options)
    return spikes, v, v_seq


def _two_states(
    x: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    charge: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    v_threshold: Parameter = 1.0,
    v_reset: float | None = 0.0,
    surrogate: AnySurrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    w_rest: float = 0.0,
    raised_threshold: float = 0.0,
    second_step: float = 0.0,
    reset_scale: Tensor | None = None,
) -> TwoStates:
    """Charge, fire, reset::

    H, W' = charge(V, W, X)
    S  = 1 if H >= V_threshold + raised_threshold W else 0
    V' = S V_reset + (1 - S) H           hard reset
    V' = H - S V_threshold               soft reset (v_reset is None)
    W' = W' + second_step S
    """
    surrogate, threshold = resolve(surrogate), _tensor(v_threshold, x, v)

    def step(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, w_next = charge(v, w, x)
        fires_at = threshold + raised_threshold * w if raised_threshold else threshold
        s = surrogate(h - fires_at)
        s_reset = s.detach() if detach_reset else s
        subtract = threshold
        if reset_scale is not None:
            h, subtract = h / reset_scale, threshold / reset_scale
        v = h - s_reset * subtract if v_reset is None else s_reset * v_reset + (1 - s_reset) * h
        return s, v, w_next + second_step * s if second_step else w_next

    rest = 0.0 if v_reset is None else v_reset
    return _unroll(x, (_start(x, v, rest, v), _start(x, w, w_rest, v)), step, store_v_seq, scale, shift)


def _unroll(
    x: Tensor,
    state: tuple[Tensor, ...],
    step: Callable[..., tuple[Tensor, ...]],
    store_v_seq: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Any:
    """``S[t], *state = step(X[t], *state)`` over time, of the current ``scale X + shift``."""
    dtype = state[0].dtype
    current = x.to(dtype)
    if scale is not None:
        current = current * scale.to(dtype)
    if shift is not None:
        current = current + shift.to(dtype)
    spikes, v_seq = [], []
    for x_t in current.unbind(0):
        s, *after = step(x_t, *state)
        state = tuple(after)
        spikes.append(s)
        v_seq.append(state[0])

    def stack(steps: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(steps).to(dtype) if steps else x.new_empty(x.shape, dtype=dtype)

    return stack(spikes, x.dtype), *state, stack(v_seq, dtype) if store_v_seq else None


def _leaky_charge(
    x: Tensor, v: Tensor | None, tau: Parameter, decay_input: bool, options: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    rest, tau_ = _rest(options), _tensor(tau, x, v)

    def charge(v: Tensor, x: Tensor) -> Tensor:
        return v + (x - (v - rest)) / tau_ if decay_input else v - (v - rest) / tau_ + x

    return charge


def _rest(options: dict[str, Any]) -> float:
    v_reset = options.get("v_reset", 0.0)
    return 0.0 if v_reset is None else v_reset


def _state_dtype(x: Tensor, v: Tensor | None) -> torch.dtype:
    """float32 for half precision, else x's; float64 where the given state is."""
    if v is not None and v.dtype == torch.float64:
        return torch.float64
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _tensor(value: Parameter, x: Tensor, v: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """A parameter in the state's dtype. A tensor even for a number: CUDA divides by a Python number as a product with
    its rounded reciprocal."""
    dtype = _state_dtype(x, v) if dtype is None else dtype
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=x.device)


def _start(x: Tensor, given: Tensor | None, rest: float, v: Tensor | None) -> Tensor:
    """A state before the first step: as given, or at rest."""
    dtype = _state_dtype(x, v)
    return torch.full(x.shape[1:], rest, dtype=dtype, device=x.device) if given is None else given.to(dtype)


class _Straight(torch.autograd.Function):
    """The second argument, with the gradient of the first where the third holds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(soft, hard, window):
        return hard.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        (window,) = ctx.saved_tensors
        return torch.where(window, grad, 0), None, None
