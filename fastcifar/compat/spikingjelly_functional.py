"""SpikingJelly 2.0.0's ``functional.*_multi_step`` over our kernels: the same arguments, states passed and returned.

What the arguments mean is said in :mod:`fastcifar.spiking.functional`; ``surrogate_function`` is as in
:mod:`fastcifar.compat.spikingjelly`. ``neuron_storage`` asks for kernels that only SpikingJelly has and is refused;
``neuron_fwd`` and ``neuron_bwd``, which belong to it, are without effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spiking import functional
from ..spiking.surrogate import AnySurrogate, Sigmoid
from ._memory import own_surrogate

__all__ = [
    "eif_multi_step",
    "if_multi_step",
    "ilif_multi_step",
    "izhikevich_multi_step",
    "lif_multi_step",
    "plif_multi_step",
    "qif_multi_step",
    "stbif_multi_step",
]

Result = tuple[Tensor, Tensor, Tensor | None]


def _shared(
    v_threshold: float,
    v_reset: float | None,
    surrogate_function: AnySurrogate | None,
    detach_reset: bool,
    store_v_seq: bool,
    neuron_storage: object = None,
) -> dict[str, Any]:
    if neuron_storage is not None:
        raise ValueError(f"multi_step: expected neuron_storage to be None, got {neuron_storage!r}")
    return {
        "v_threshold": v_threshold,
        "v_reset": v_reset,
        "surrogate": Sigmoid() if surrogate_function is None else own_surrogate(surrogate_function),
        "detach_reset": detach_reset,
        "store_v_seq": store_v_seq,
    }


def if_multi_step(
    x_seq: Tensor,
    v: Tensor,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: AnySurrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    neuron_storage: object = None,
    neuron_fwd: str = "fp32",
    neuron_bwd: str = "fp32",
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.integrate_and_fire`."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq, neuron_storage)
    return functional.integrate_and_fire(x_seq, v, **shared)


def lif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: AnySurrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    neuron_storage: object = None,
    neuron_fwd: str = "fp32",
    neuron_bwd: str = "fp32",
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.lif`."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq, neuron_storage)
    return functional.lif(x_seq, v, tau=tau, decay_input=decay_input, **shared)


def plif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    w: Tensor,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: AnySurrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    neuron_storage: object = None,
    neuron_fwd: str = "fp32",
    neuron_bwd: str = "fp32",
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.plif`."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq, neuron_storage)
    return functional.plif(x_seq, w, v, decay_input=decay_input, **shared)


def qif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_rest: float = 0.0,
    v_c: float = 0.8,
    a0: float = 1.0,
    detach_reset: bool = False,
    surrogate_function: AnySurrogate | None = None,
    store_v_seq: bool = False,
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.qif`."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq)
    return functional.qif(x_seq, v, tau=tau, v_rest=v_rest, v_c=v_c, a0=a0, **shared)


def eif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_rest: float = 0.0,
    theta_rh: float = 1.0,
    delta_t: float = 1.0,
    detach_reset: bool = False,
    surrogate_function: AnySurrogate | None = None,
    store_v_seq: bool = False,
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.eif`."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq)
    return functional.eif(x_seq, v, tau=tau, v_rest=v_rest, theta_rh=theta_rh, delta_T=delta_t, **shared)


def izhikevich_multi_step(
    x_seq: Tensor,
    v: Tensor,
    w: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_rest: float = 0.0,
    a: float = 0.1,
    b: float = 0.2,
    tau_w: float = 2.0,
    v_c: float = 0.8,
    a0: float = 1.0,
    detach_reset: bool = False,
    surrogate_function: AnySurrogate | None = None,
    store_state_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(spikes, v, w, v_seq, w_seq)`` of :func:`fastcifar.spiking.functional.izhikevich`; with ``store_state_seq``
    step by step, as the kernel keeps no w_seq."""
    shared = _shared(v_threshold, v_reset, surrogate_function, detach_reset, False)
    own: dict[str, Any] = {"tau": tau, "v_rest": v_rest, "a": a, "b": b, "tau_w": tau_w, "v_c": v_c, "a0": a0}
    if not store_state_seq:
        spikes, v, w, _ = functional.izhikevich(x_seq, v, w, **own, **shared)
        return spikes, v, w, None, None
    steps = []
    for x in x_seq:
        spike, v, w, _ = functional.izhikevich(x.unsqueeze(0), v, w, **own, **shared)
        steps.append((spike.squeeze(0), v, w))
    spikes, v_seq, w_seq = (torch.stack(series) for series in zip(*steps, strict=True))
    return spikes, v, w, v_seq, w_seq


def ilif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    surrogate_function: Any = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
) -> Result:
    """``(spikes, v, v_seq)`` of :func:`fastcifar.spiking.functional.ilif`, with the bound and window of a
    ``MultiLevelSpikeCount``, by default of 4 spikes."""
    counts: dict[str, Any] = {}
    if surrogate_function is not None:
        counts["max_spikes"] = surrogate_function.max_spike_count
        counts["grad_window"] = (surrogate_function.grad_min, surrogate_function.grad_max)
    more: dict[str, Any] = {"detach_reset": detach_reset, "store_v_seq": store_v_seq, **counts}
    return functional.ilif(x_seq, v, tau=tau, v_threshold=v_threshold, **more)


def stbif_multi_step(
    x_seq: Tensor, q: Tensor, acc_q: Tensor, q_threshold: Tensor, pos_max: Tensor, neg_min: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(outputs, q, acc_q, cur_output)`` of :func:`fastcifar.spiking.functional.signed_if`; the last are the last
    step's spikes, -1, 0 or 1."""
    s_max, s_min = float(pos_max), float(neg_min)
    outputs, q, acc_q, _ = functional.signed_if(x_seq, q, acc_q, v_threshold=q_threshold, s_max=s_max, s_min=s_min)
    return outputs, q, acc_q, outputs[-1].detach().sign().to(q.dtype)
