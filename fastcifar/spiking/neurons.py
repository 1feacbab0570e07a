"""How every neuron reaches its kernel: the checks of its arguments, the one op pair behind all of them, its autograd.

A neuron is an id (``NeuronId`` in csrc/cpu/spiking.h) with up to three parameters (numbers, or tensors that broadcast
against ``[N...]`` and may be learnt) and up to six constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import surrogate as surrogates
from .packed import PackedSpikes, pack

IDS = {
    name: index
    for index, name in enumerate(
        (
            *("if", "lif", "lif_direct", "lif_times", "lif_times_direct", "qif", "eif", "izhikevich", "cuba_lif"),
            *("klif", "klif_direct", "ilif", "alif", "alif_direct", "signed_if"),
            *("leaky_subtract", "leaky_zero", "leaky_none"),
        )
    )
}
WIDE = ("integrate_and_fire", "signed_if")  # functions that take a float64 state with float32 currents
SECOND_STATE = ("izhikevich", "cuba_lif", "alif", "alif_direct", "signed_if")
SPIKE_FORMATS = ("float", "uint8", "packed")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_NO_TENSORS = (None,) * 5
_NO_SURROGATE = surrogates.DeterministicPass()  # of neurons whose spikes have a derivative of their own
_forward = torch.ops.fastcifar.neuron_forward.default
_backward = torch.ops.fastcifar.neuron_backward.default

Parameter = float | Tensor


def run(
    op: str,
    neuron: str,
    x: Tensor,
    v: Tensor | None,
    w: Tensor | None = None,
    *,
    options: dict[str, Any],
    spike_format: str,
    reference: Callable[[], tuple],
    leak: Parameter = 0.0,
    gain: Parameter = 0.0,
    constants: Sequence[float] = (),
) -> tuple:
    """The neuron's outputs, from the kernel that owns the device or, where none does or the surrogate is a callable of
    the user's own, from ``reference()``.

    Args:
        options: those of v_threshold, v_reset, surrogate, detach_reset, store_v_seq, scale and shift that it has.
    """
    surrogate = surrogates.resolve(options.get("surrogate", _NO_SURROGATE), op)
    threshold, scale, shift = options["v_threshold"], options["scale"], options["shift"]
    store_v_seq = options["store_v_seq"]
    numbers = [leak, threshold, gain, *constants]
    tensors: tuple[Tensor | None, ...] = _NO_TENSORS
    dtype = _library.state_dtype(x.dtype) if v is None or v.dtype in _HALF else v.dtype
    plain = isinstance(leak, (int, float)) and isinstance(threshold, (int, float)) and isinstance(gain, (int, float))
    if scale is not None or shift is not None or not plain:
        given = (*numbers[:3], scale, shift)
        tensors = tuple(p.to(dtype) if isinstance(p, Tensor) else None for p in given)
        numbers[:3] = [0.0 if isinstance(p, Tensor) else p for p in numbers[:3]]
    graph = torch.is_grad_enabled() and (
        x.requires_grad
        or (v is not None and v.requires_grad)
        or (w is not None and w.requires_grad)
        or (tensors is not _NO_TENSORS and any(t is not None and t.requires_grad for t in tensors))
    )
    if graph and spike_format != "float":
        raise ValueError(
            f"{op}: expected no gradient to be asked for with spike_format={spike_format!r}, whose spikes have none "
            "(call it under torch.no_grad())"
        )
    if not (surrogates.in_kernel(surrogate) and _library.serves("neuron_forward", x)):
        spikes, *rest = reference()
        return (_formatted(spikes, spike_format), *rest)
    if v is not None or w is not None:
        v, w = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (v, w))
    v_reset, neuron_id = options.get("v_reset"), IDS[neuron]
    if graph:
        detach_reset = options.get("detach_reset", False)
        more = (v_reset, surrogate.kernel_id, list(surrogate.numbers()), detach_reset, store_v_seq, op)
        spikes, v_last, w_last, v_seq = _apply(x, v, w, *tensors, neuron_id, numbers, *more)
    else:
        format_id = SPIKE_FORMATS.index(spike_format)
        spikes, v_last, w_last, v_seq = _forward(x, v, w, *tensors, neuron_id, numbers, v_reset, format_id, store_v_seq)
        if spike_format == "packed":
            spikes = PackedSpikes.of_kernel(spikes, x)
    v_seq = v_seq if store_v_seq else None
    return (spikes, v_last, w_last, v_seq) if neuron in SECOND_STATE else (spikes, v_last, v_seq)


def _formatted(spikes: Tensor, spike_format: str) -> Tensor | PackedSpikes:
    if spike_format == "packed":
        return pack(spikes)
    return spikes.to(torch.uint8) if spike_format == "uint8" else spikes


# ---- checks: each raises what the public functions document ----------------------------------------------------------


def shared_options(
    v_threshold: Parameter,
    v_reset: float | None,
    surrogate: surrogates.AnySurrogate,
    detach_reset: bool,
    store_v_seq: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> dict[str, Any]:
    """The arguments that most neurons share, by the names that the reference has for them."""
    return {
        "v_threshold": v_threshold,
        "v_reset": v_reset,
        "surrogate": surrogate,
        "detach_reset": detach_reset,
        "store_v_seq": store_v_seq,
        "scale": scale,
        "shift": shift,
    }


def check_sequence(op: str, x: Tensor, states: dict[str, Tensor | None]) -> None:
    """Raises the TypeError or ValueError of a wrong ``x`` or state."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor [T, N...], got {type(x).__name__}")
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        raise TypeError(
            f"{op}: expected x to be float32, float64, bfloat16 or float16 (strided), got {x.dtype}, {x.layout}"
        )
    if x.dim() == 0:
        raise ValueError(f"{op}: expected x of shape [T, N...], time first, got a scalar tensor")
    for name, state in states.items():
        if state is not None:
            _check_state(op, x, name, state, states)


def _check_state(op: str, x: Tensor, name: str, state: Tensor, states: dict[str, Tensor | None]) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor [N...] or None, got {type(state).__name__}")
    if state.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {state.device}")
    if state.shape != x.shape[1:]:
        raise ValueError(
            f"{op}: expected {name} of shape {tuple(x.shape[1:])} (x without time), got {tuple(state.shape)}"
        )
    own = _library.state_dtype(x.dtype)
    wide = op in WIDE and x.dtype == torch.float32 and state.dtype == torch.float64
    both = all(not isinstance(other, Tensor) or other.dtype == state.dtype for other in states.values())
    if not (state.dtype in (x.dtype, own) or (wide and both)):
        raise TypeError(f"{op}: expected {name} in {own} or x's {x.dtype}, got {state.dtype}")


def check_parameter(op: str, name: str, value: Parameter, x: Tensor | None = None, above: float = -math.inf) -> None:
    """Raises the TypeError or ValueError of a wrong parameter; with ``x``, also of one that does not fit it. A tensor's
    values are not looked at, as on a GPU that would wait for them."""
    if isinstance(value, (int, float)):  # asked first: to ask whether a number is a Tensor takes far longer
        if not -math.inf < value < math.inf:  # math.isfinite does not trace with symbolic floats
            raise ValueError(f"{op}: expected {name} to be finite, got {value}")
        if value <= above:
            raise ValueError(f"{op}: expected {name} above {above:g}, got {value}")
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a number or a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: expected {name} to be a number or a floating tensor, got {value.dtype}")
    if x is None:
        return
    if value.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {value.device}")
    inner = x.shape[1:]
    pairs = zip(reversed(value.shape), reversed(inner), strict=False)
    if value.dim() > len(inner) or any(size != 1 and size != n for size, n in pairs):
        raise ValueError(
            f"{op}: expected {name} to broadcast against {tuple(inner)} (x without time), got {tuple(value.shape)}"
        )


def check_number(op: str, name: str, value: float, above: float = -math.inf) -> None:
    """Raises the TypeError or ValueError of a wrong number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    check_parameter(op, name, value, above=above)


def check_call(
    op: str, x: Tensor, states: dict[str, Tensor | None], options: dict[str, Any], spike_format: str
) -> None:
    """Raises the TypeError or ValueError of whatever all neurons share."""
    check_sequence(op, x, states)
    check_parameter(op, "v_threshold", options["v_threshold"], x)
    if (v_reset := options.get("v_reset")) is not None:
        check_number(op, "v_reset", v_reset)
    for name in ("scale", "shift"):
        if (value := options[name]) is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"{op}: expected {name} to be a tensor or None, got {type(value).__name__}")
            check_parameter(op, name, value, x)
    if spike_format not in SPIKE_FORMATS:
        raise ValueError(f"{op}: expected spike_format to be one of {', '.join(SPIKE_FORMATS)}; got {spike_format!r}")


def check_tau(op: str, tau: Parameter, decay_input: bool, x: Tensor | None = None) -> None:
    """Raises the TypeError or ValueError of a wrong membrane time constant."""
    check_parameter(op, "tau", tau, x)
    lowest = 1 if decay_input else 0
    if isinstance(tau, (int, float)) and tau <= lowest:
        raise ValueError(f"{op}: expected tau above {lowest} with decay_input={decay_input}, got {tau}")


def lif_neuron(neuron: str, tau: Parameter, decay_input: bool) -> tuple[str, Parameter]:
    """The kernel of a neuron with a leak, and its leak. Dividing by a power of two is multiplying by its reciprocal, to
    the bit, and several times as fast."""
    name = neuron if decay_input else f"{neuron}_direct"
    if neuron == "lif" and isinstance(tau, (int, float)) and math.frexp(tau)[0] == 0.5 and tau < 2.0**60:
        return name.replace("lif", "lif_times"), 1 / tau
    return name, tau


class NeuronFunction(torch.autograd.Function):
    """``neuron_forward`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x,
        v,
        w,
        leak,
        threshold,
        gain,
        scale,
        shift,
        neuron,
        numbers,
        v_reset,
        surrogate,
        widths,
        detach_reset,
        store_v_seq,
        op,
    ):
        return _forward(x, v, w, leak, threshold, gain, scale, shift, neuron, numbers, v_reset, 0, store_v_seq)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *ctx.options, ctx.store_v_seq, ctx.op = inputs[8:]
        ctx.save_for_backward(*inputs[:8])
        ctx.set_materialize_grads(False)
        unused = [] if ctx.store_v_seq else [output[3]]
        if ctx.options[0] not in _SECOND:
            unused.append(output[2])
        ctx.mark_non_differentiable(*unused)

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last, grad_w_last, grad_v_seq):
        x, v, w, *parameters = ctx.saved_tensors
        neuron, numbers, v_reset, surrogate, widths, detach_reset = ctx.options
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(x)
        # torch.compile gives zeros for an output that is not differentiable
        grad_v_seq = grad_v_seq if ctx.store_v_seq else None
        grad_w_last = grad_w_last if neuron in _SECOND else None
        wanted = sum(1 << i for i, p in enumerate(parameters) if p is not None and ctx.needs_input_grad[3 + i])
        with torch.no_grad():
            grad_x, grad_v, grad_w, flat = _backward(
                *(grad_spikes, grad_v_last, grad_w_last, grad_v_seq, x, v, w, *parameters),
                *(neuron, numbers, v_reset, surrogate, widths, detach_reset, wanted),
            )
        depends_on = (x, v, w, *parameters, grad_spikes, grad_v_last, grad_w_last, grad_v_seq)
        grads = [grad_x, None if v is None else grad_v, None if w is None else grad_w]
        offset = 0
        for i, p in enumerate(parameters):
            if wanted >> i & 1:
                grads.append(flat[offset : offset + p.numel()].reshape(p.shape).to(p.dtype))
                offset += p.numel()
            else:
                grads.append(None)
        once = [None if g is None else _library.differentiable_once(ctx.op, g, *depends_on) for g in grads]
        return *once, *[None] * 8


_SECOND = frozenset(IDS[name] for name in SECOND_STATE)
_apply = _library.direct_apply(NeuronFunction)
