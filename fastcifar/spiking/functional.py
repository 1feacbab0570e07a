"""Spiking neurons as functions; autograd lives here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _library
from . import reference
from .surrogate import Surrogate, resolve

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_forward = torch.ops.fastcifar.lif_forward.default
_backward = torch.ops.fastcifar.lif_backward.default


def lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: str | Surrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Leaky integrate-and-fire neurons over all time steps, in one pass over memory.

    For ``t = 0 .. T-1``, with ``V[-1] = v`` and ``V_reset`` read as 0 where ``v_reset`` is None::

        H[t] = V[t-1] + (X[t] - (V[t-1] - V_reset)) / tau     if decay_input
        H[t] = V[t-1] - (V[t-1] - V_reset) / tau + X[t]       otherwise
        S[t] = 1 if H[t] >= v_threshold else 0                with derivative surrogate(H[t] - v_threshold)
        V[t] = S[t] V_reset + (1 - S[t]) H[t]                 hard reset
        V[t] = H[t] - S[t] v_threshold                        soft reset (v_reset is None)

    These are SpikingJelly's equations and defaults, except that the surrogate defaults to ``"atan"``; spikes equal
    SpikingJelly's to the bit. An infinite ``H`` gives NaN after a hard reset, there and here. The backward pass
    computes the membranes again from ``x``: nothing is saved beyond ``x`` and ``v``. There is no second derivative:
    asking for one raises.

    Args:
        x: input currents ``[T, N...]``, time first, in membrane units; float32, float64, bfloat16 or float16. Any
            layout; one that is dense in memory (contiguous, channels-last, ``[B, T, ...]`` transposed) is read without
            a copy, and the results have it too.
        v: membrane before the first step, ``[N...]``; None starts at ``v_reset`` (0 for a soft reset). State is kept in
            float32 for bfloat16 and float16 ``x``, else in ``x``'s dtype; a state in ``x``'s dtype is accepted.
        tau: membrane time constant in steps; above 1 with ``decay_input``, else above 0. Default 2.
        decay_input: whether the input is divided by ``tau`` as well. Default True.
        v_threshold: firing threshold. Default 1.
        v_reset: membrane after a spike; None subtracts the threshold instead (soft reset). Default 0.
        surrogate: ``"atan"``, ``"sigmoid"``, ``"piecewise_quadratic"``, ``"rectangular"`` (with SpikingJelly's default
            alphas 2, 4, 1, 1), or an object of :mod:`fastcifar.spiking.surrogate` with its own.
        detach_reset: whether the reset is left out of the gradient. Default False.
        store_v_seq: whether to return ``V`` at every step. Default False.

    Returns:
        ``(spikes, v_last, v_seq)``: spikes ``[T, N...]`` in ``x``'s dtype, the membrane after the last step ``[N...]``,
        and ``V`` ``[T, N...]`` or None.

    Raises:
        TypeError: ``x`` or ``v`` is not a floating tensor of a dtype above, or ``surrogate`` is of an unknown type.
        ValueError: a shape, device or value is not as described.

    Source: Fang et al., "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence", Science Advances 9 (2023), eqs. 1 to 4; ``spikingjelly.activation_based.functional.lif_multi_step``.

    Example:
        >>> import torch
        >>> from fastcifar.spiking.functional import lif
        >>> spikes, v, _ = lif(torch.tensor([[0.8], [1.6], [2.4]]))
        >>> spikes.flatten().tolist(), v.item()
        ([0.0, 1.0, 1.0], 0.0)
    """
    surrogate = resolve(surrogate, "lif")
    _check(x, v, tau, decay_input, v_threshold, v_reset)
    if not _library.owned("lif_forward", x.device.type):
        return reference.lif(
            x,
            v,
            tau=tau,
            decay_input=decay_input,
            v_threshold=v_threshold,
            v_reset=v_reset,
            surrogate=surrogate,
            detach_reset=detach_reset,
            store_v_seq=store_v_seq,
        )
    if v is not None and x.dtype in _HALF:
        v = v.float()
    if torch.is_grad_enabled() and (x.requires_grad or (v is not None and v.requires_grad)):
        spikes, v_last, v_seq = _apply(
            x,
            v,
            tau,
            decay_input,
            v_threshold,
            v_reset,
            surrogate.kernel_id,
            surrogate.alpha,
            detach_reset,
            store_v_seq,
        )
    else:
        spikes, v_last, v_seq = _forward(x, v, tau, decay_input, v_threshold, v_reset, store_v_seq)
    return spikes, v_last, v_seq if store_v_seq else None


def _check(x, v, tau, decay_input, v_threshold, v_reset) -> None:
    """Raises the TypeError or ValueError that :func:`lif` documents."""
    if not isinstance(x, Tensor):
        raise TypeError(f"lif: expected x to be a tensor [T, N...], got {type(x).__name__}")
    if x.dtype not in _DTYPES or x.layout is not torch.strided:
        raise TypeError(
            f"lif: expected x to be float32, float64, bfloat16 or float16 (strided), got {x.dtype}, {x.layout}"
        )
    if x.dim() == 0:
        raise ValueError("lif: expected x of shape [T, N...], time first, got a scalar tensor")
    check_options("lif", tau, decay_input, v_threshold, v_reset)
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"lif: expected v to be a tensor [N...] or None, got {type(v).__name__}")
    if v.device != x.device:
        raise ValueError(f"lif: expected v on x's device {x.device}, got {v.device}")
    if v.shape != x.shape[1:]:
        raise ValueError(f"lif: expected v of shape {tuple(x.shape[1:])} (x without time), got {tuple(v.shape)}")
    if v.dtype != x.dtype and v.dtype != _library.state_dtype(x.dtype):
        raise TypeError(f"lif: expected v in {_library.state_dtype(x.dtype)} or x's {x.dtype}, got {v.dtype}")


def check_options(op: str, tau: float, decay_input: bool, v_threshold: float, v_reset: float | None) -> None:
    """Raises the TypeError or ValueError that :func:`lif` documents for its numbers, naming ``op``."""
    for name, value in (("tau", tau), ("v_threshold", v_threshold), ("v_reset", 0 if v_reset is None else v_reset)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
        if not -math.inf < value < math.inf:  # math.isfinite does not trace with symbolic floats
            raise ValueError(f"{op}: expected {name} to be finite, got {value}")
    lowest = 1 if decay_input else 0
    if tau <= lowest:
        raise ValueError(f"{op}: expected tau above {lowest} with decay_input={decay_input}, got {tau}")


class LIFFunction(torch.autograd.Function):
    """``lif_forward`` with its gradient: the inputs are the op's, then ``surrogate``, ``alpha`` and
    ``detach_reset``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, v, tau, decay_input, v_threshold, v_reset, surrogate, alpha, detach_reset, store_v_seq):
        return _forward(x, v, tau, decay_input, v_threshold, v_reset, store_v_seq)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, v, *ctx.options, ctx.store_v_seq = inputs
        ctx.save_for_backward(x, v)
        ctx.set_materialize_grads(False)
        if not ctx.store_v_seq:
            ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last, grad_v_seq):
        x, v = ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(x)
        if not ctx.store_v_seq:
            grad_v_seq = None  # torch.compile gives zeros for an output that is not differentiable
        with torch.no_grad():
            grad_x, grad_v = _backward(grad_spikes, grad_v_last, grad_v_seq, x, v, *ctx.options)
        depends_on = (x, v, grad_spikes, grad_v_last, grad_v_seq)
        grad_x = _library.differentiable_once("lif", grad_x, *depends_on)
        grad_v = None if v is None else _library.differentiable_once("lif", grad_v, *depends_on)
        return grad_x, grad_v, *[None] * 8


_apply = _library.direct_apply(LIFFunction)
