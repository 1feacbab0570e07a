"""What tells one neuron from another, in Triton: its charge, how it fires and resets, and their derivatives.

Formulas: fastcifar/spiking/reference.py; the operations are its, in its order. kernels/neuron_kernels.py runs them over
time. NEURON is a name of ``fastcifar.spiking.neurons.IDS``; "times" multiplies by 1 / tau where the others divide by
tau, "direct" leaves the input as it is.

A function here returns once, at its end: Triton compiles what follows a `return` inside an `if`, even a constant one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .surrogates import surrogate_grad

_DIVIDES_BY = {
    "leak": ("lif", "lif_direct", "qif", "eif", "izhikevich", "klif", "klif_direct", "alif", "alif_direct"),
    "threshold": ("ilif", "signed_if"),
    "constant": ("eif", "izhikevich"),
}
_SOFT_ONLY = ("ilif", "signed_if", "leaky")
_SECOND_STATE = ("izhikevich", "cuba_lif", "alif", "signed_if")


@triton.constexpr_function
def is_a(neuron, *families):
    """Whether it is one of these neurons, or a variant: "lif" includes lif_times_direct."""
    return any(neuron == family or neuron.startswith(family + "_") for family in families)


@triton.constexpr_function
def variant(neuron, name):
    return name in neuron.split("_")


@triton.constexpr_function
def divides_by(neuron, parameter):
    return neuron in _DIVIDES_BY[parameter]


@triton.constexpr_function
def has_second_state(neuron):
    return is_a(neuron, *_SECOND_STATE)


@triton.constexpr_function
def soft_reset_only(neuron):
    return is_a(neuron, *_SOFT_ONLY)


class Parameters(NamedTuple):
    """What the neurons of a program compute with: numbers, or one for each, in the dtype of the membrane."""

    leak: Any  # tau, 1 / tau of "times", or what is left of the membrane after a step
    threshold: Any
    gain: Any
    scale: Any  # the current is scale * x + shift
    shift: Any
    rest: Any  # where the membrane leaks to and is reset to
    constants: Any  # six, by the order in which fastcifar.spiking.functional passes them
    by_leak: Any  # reciprocals in float64 of what is divided by
    by_threshold: Any
    by_gain: Any
    by_constant: Any  # izhikevich: of tau_w; eif: of delta_T


@triton.jit
def divide(a, divisor, inverse):
    """``a / divisor`` rounded to nearest, in the dtype of ``a``; ``inverse`` = 1 / divisor in float64.

    In float32, div.rn takes 20 instructions and branches to a slow path, across which ptxas hoists until it spills.
    This takes 6 and gives the same bits. The product below is within 2^-51.9 of the quotient (all distances relative),
    and a quotient of two 24-bit numbers is either at least 2^-49 away from every rounding boundary of float32 or, where
    it is subnormal, exactly on one. Rounding to 50 bits on the way, which moves by 2^-50 at most, keeps the former on
    its side and puts the latter back on its boundary.
    """
    if a.dtype == tl.float64:
        quotient = a / divisor
    else:
        bits = (a.to(tl.float64) * inverse).to(tl.int64, bitcast=True)
        quotient = ((bits + 4) & -8).to(tl.float64, bitcast=True).to(tl.float32)
    return quotient


@triton.jit
def _leaky_drive(x, v, p, NEURON: tl.constexpr):
    """What the leak divides or multiplies."""
    return v - p.rest if variant(NEURON, "direct") else x - (v - p.rest)


@triton.jit
def _leaky_charge(x, v, p, NEURON: tl.constexpr):
    drive = _leaky_drive(x, v, p, NEURON)
    leaked = drive * p.leak if variant(NEURON, "times") else divide(drive, p.leak, p.by_leak)
    return v - leaked + x if variant(NEURON, "direct") else v + leaked


@triton.jit
def _quadratic_drive(x, v, c):
    return x + c[0] * (v - c[1]) * (v - c[2])


@triton.jit
def _rise(v, p):
    return tl.exp(divide(v - p.constants[1], p.constants[2], p.by_constant))


@triton.jit
def charge(x, v, w, p, NEURON: tl.constexpr):
    """Membrane before the spike, and the second state before it."""
    c = p.constants
    w_next = w
    if NEURON == "if":
        h = v + x
    elif NEURON == "qif":
        h = v + divide(_quadratic_drive(x, v, c), p.leak, p.by_leak)
    elif NEURON == "eif":
        h = v + divide(x + c[0] - v + c[2] * _rise(v, p), p.leak, p.by_leak)
    elif NEURON == "izhikevich":
        h = v + divide(_quadratic_drive(x, v, c) - w, p.leak, p.by_leak)
        w_next = w + divide(c[4] * (h - c[1]) - w, c[3], p.by_constant)
    elif NEURON == "cuba_lif":
        w_next = w * p.gain + x
        h = v * p.leak + w_next
    elif NEURON == "ilif":
        h = p.leak * v + x
    elif NEURON == "signed_if":
        h = v + divide(x, p.threshold, p.by_threshold)
    elif is_a(NEURON, "leaky"):
        fired = (v - p.threshold > 0.0).to(v.dtype)
        left = (1.0 - fired) * v if NEURON == "leaky_zero" else v
        h = p.leak * left + x
        if NEURON == "leaky_subtract":
            h = h - fired * p.threshold
    else:
        h = _leaky_charge(x, v, p, NEURON)
        if is_a(NEURON, "klif"):
            h = p.gain * h
            h = tl.where(h < 0.0, 0.0, h)  # relu, of NaN too
        elif is_a(NEURON, "alif"):
            w_next = c[1] * w
    return h, w_next


@triton.jit
def _above_threshold(h, w, p, NEURON: tl.constexpr):
    return h - (p.threshold + p.constants[0] * w) if is_a(NEURON, "alif") else h - p.threshold


@triton.jit
def fire(h, w, p, NEURON: tl.constexpr):
    """Spikes of the charged membrane; w is the second state before the step."""
    if NEURON == "signed_if":
        up = ((h >= 1.0) & (w < p.constants[0])).to(h.dtype)
        s = up - ((h < 0.0) & (w > p.constants[1])).to(h.dtype)
    elif NEURON == "ilif":
        scaled = divide(h, p.threshold, p.by_threshold)
        scaled = tl.where(scaled < 0.0, 0.0, scaled)
        scaled = tl.where(scaled > p.constants[0], p.constants[0], scaled)
        # 1.5 * 2^23 and 1.5 * 2^52: where its numbers are 1 apart, a float rounds ties to even.
        magic = 12582912.0 if h.dtype == tl.float32 else 6755399441055744.0
        s = scaled + magic - magic
    elif is_a(NEURON, "leaky"):
        s = (h - p.threshold > 0.0).to(h.dtype)
    else:
        s = (_above_threshold(h, w, p, NEURON) >= 0.0).to(h.dtype)
    return s


@triton.jit
def reset(h, s, p, NEURON: tl.constexpr, HARD_RESET: tl.constexpr, SCALE_RESET: tl.constexpr):
    """Membrane after the spike. Products rather than a select: an infinite h gives NaN, as in the reference."""
    if is_a(NEURON, "leaky"):
        v = h
    elif NEURON == "signed_if":
        v = h - s
    else:
        subtract = p.threshold
        if SCALE_RESET:
            h = divide(h, p.gain, p.by_gain)
            subtract = divide(subtract, p.gain, p.by_gain)
        v = s * p.rest + (1.0 - s) * h if HARD_RESET else h - s * subtract
    return v


@triton.jit
def step(x, v, w, p, NEURON: tl.constexpr, HARD_RESET: tl.constexpr, SCALE_RESET: tl.constexpr):
    """One time step: the charged membrane, the spikes, and the states after it."""
    h, w_next = charge(x, v, w, p, NEURON)
    s = fire(h, w, p, NEURON)
    if NEURON == "izhikevich":
        w_next = w_next + p.constants[5] * s
    elif is_a(NEURON, "alif", "signed_if"):
        w_next = w_next + s
    return h, s, reset(h, s, p, NEURON, HARD_RESET, SCALE_RESET), w_next


@triton.jit
def fire_backward(
    h,  # charged membrane
    v,  # states before the step
    w,
    ds,  # gradient with respect to the spikes
    dv,  # gradients with respect to the states after the step
    dw,
    p,
    widths,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    HARD_RESET: tl.constexpr,
    SCALE_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
):
    """Gradients of firing and reset with respect to h, the second state, the threshold and the gain."""
    c = p.constants
    s = fire(h, w, p, NEURON)
    d_gain = tl.zeros_like(h)
    if is_a(NEURON, "leaky"):
        dh = ds * surrogate_grad(h - p.threshold, widths, SURROGATE)
        d_threshold = -dh
        dh = dh + dv
        if NEURON == "leaky_subtract":
            d_threshold = d_threshold - dh * (v - p.threshold > 0.0).to(h.dtype)
    elif NEURON == "signed_if":
        slope = tl.where(w < c[0], surrogate_grad(h - 1.0, widths, SURROGATE), 0.0)
        slope = slope + tl.where(w > c[1], surrogate_grad(-h, widths, SURROGATE), 0.0)
        d_threshold = ds * s
        d_spike = ds * p.threshold if DETACH_RESET else ds * p.threshold - dv
        dh = d_spike * slope + dv
    elif NEURON == "ilif":
        # The window's edges belong to it, so that the quotient has to be the one that was compared in the reference.
        scaled = divide(h, p.threshold, p.by_threshold)
        d_spike = ds if DETACH_RESET else ds - dv * p.threshold
        d_spike = tl.where((scaled >= c[1]) & (scaled <= c[2]), d_spike, 0.0) * p.by_threshold.to(h.dtype)
        d_threshold = -(d_spike * scaled) - dv * s
        dh = d_spike + dv
    else:
        slope = surrogate_grad(_above_threshold(h, w, p, NEURON), widths, SURROGATE)
        by_gain = p.by_gain.to(h.dtype)
        kept, subtract = h, p.threshold  # what the reset acts on
        if SCALE_RESET:
            kept = h * by_gain
            subtract = p.threshold * by_gain
        if NEURON == "izhikevich":
            ds = ds + dw * c[5]
        elif is_a(NEURON, "alif"):
            ds = ds + dw
        if not DETACH_RESET:
            ds = ds + dv * (p.rest - kept) if HARD_RESET else ds - dv * subtract
        d_spike = ds * slope
        d_threshold = -d_spike
        d_kept = dv * (1.0 - s) if HARD_RESET else dv
        d_subtract = tl.zeros_like(h) if HARD_RESET else -(dv * s)
        if SCALE_RESET:
            d_kept = d_kept * by_gain
            d_subtract = d_subtract * by_gain
            d_gain = -(d_kept * kept) - d_subtract * subtract
        d_threshold = d_threshold + d_subtract
        dh = d_spike + d_kept
        if is_a(NEURON, "alif"):
            dw = dw * c[1] - d_spike * c[0]
    return dh, dw, d_threshold, d_gain


@triton.jit
def charge_backward(x, v, w, h, dh, dw, p, NEURON: tl.constexpr):
    """Gradients of the charge with respect to x, the states, the leak, the threshold and the gain.

    That of a leak that divides is left without its factor of -1 / leak^2. Quotients are within an ulp: only membranes
    have to be exact.
    """
    c = p.constants
    d_threshold, d_gain = tl.zeros_like(h), tl.zeros_like(h)
    if NEURON == "if":
        d_leak = tl.zeros_like(h)
        dx = dh
        dv = dh
    elif NEURON == "cuba_lif":
        dx = dh + dw
        d_gain = dx * w
        d_leak = dh * v
        dw = dx * p.gain
        dv = dh * p.leak
    elif NEURON == "ilif":
        d_leak = dh * v
        dx = dh
        dv = dh * p.leak
    elif NEURON == "signed_if":
        d_leak = tl.zeros_like(h)
        by_threshold = p.by_threshold.to(h.dtype)
        dx = dh * by_threshold
        d_threshold = -(dx * x * by_threshold)
        dv = dh
    elif is_a(NEURON, "leaky"):
        left = 1.0 - (v - p.threshold > 0.0).to(h.dtype) if NEURON == "leaky_zero" else tl.full(h.shape, 1.0, h.dtype)
        d_leak = dh * (left * v)
        dx = dh
        dv = dh * p.leak * left
    elif is_a(NEURON, "qif", "eif", "izhikevich"):
        if NEURON == "izhikevich":
            recovered = dw * p.by_constant.to(h.dtype)
            dh = dh + recovered * c[4]
        leaked = dh * p.by_leak.to(h.dtype)
        dx = leaked
        if NEURON == "eif":
            rise = _rise(v, p)
            d_leak = dh * (x + c[0] - v + c[2] * rise)
            dv = dh + (leaked * rise - leaked)
        else:
            drive = _quadratic_drive(x, v, c)
            if NEURON == "izhikevich":
                drive = drive - w
                dw = dw - recovered - leaked
            d_leak = dh * drive
            dv = dh + leaked * (c[0] * (v - c[1]) + c[0] * (v - c[2]))
    else:
        if is_a(NEURON, "klif"):
            dh = tl.where(h > 0.0, dh, 0.0)
            d_gain = dh * _leaky_charge(x, v, p, NEURON)
            dh = dh * p.gain
        leaked = dh * (p.leak if variant(NEURON, "times") else p.by_leak.to(h.dtype))
        drive = _leaky_drive(x, v, p, NEURON)
        d_leak = -(dh * drive) if variant(NEURON, "direct") else dh * drive
        dx = dh if variant(NEURON, "direct") else leaked
        dv = dh - leaked
    return dx, dv, dw, d_leak, d_threshold, d_gain
