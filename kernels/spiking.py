"""Triton kernels of the spiking neurons, and the launchers that ``fastcifar._library`` registers for CUDA tensors.

The specification is ``fastcifar/spiking/reference.py``: membranes and spikes equal it bit for bit, and so both kernels
must be launched with ``enable_fp_fusion=False`` (a fused multiply-add rounds once where the reference rounds twice).

One thread owns a few neurons for the whole sequence, so the membrane lives in registers and time is the only loop.
Threads exchange nothing: both kernels are streams, limited by the bandwidth of the memory.
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import aligned, dense, in_order, step_strides


@triton.jit
def _divide(a, tau, inverse, EXACT_RECIPROCAL: tl.constexpr):
    """``a / tau`` rounded to nearest, in the dtype of ``a``; ``tau`` and ``inverse`` = 1 / tau are float64.

    In float32, div.rn takes 20 instructions and branches to a slow path, across which ptxas hoists until it spills.
    This takes 6 and gives the same bits. The product below is within 2^-51.9 of the quotient (all distances relative),
    and a quotient of two 24-bit numbers is either at least 2^-49 away from every rounding boundary of float32 or, where
    it is subnormal, exactly on one. Rounding to 50 bits on the way, which moves by 2^-50 at most, keeps the former on
    its side and puts the latter back on its boundary.
    """
    # One return, at the end: Triton compiles what follows a `return` inside an `if`, even a constant one.
    if EXACT_RECIPROCAL:
        quotient = a * inverse.to(a.dtype)
    elif a.dtype == tl.float64:
        quotient = a / tau
    else:
        bits = (a.to(tl.float64) * inverse).to(tl.int64, bitcast=True)
        quotient = ((bits + 4) & -8).to(tl.float64, bitcast=True).to(tl.float32)
    return quotient


@triton.jit
def _charge(v, x, rest, tau, inverse, DECAY_INPUT: tl.constexpr, EXACT_RECIPROCAL: tl.constexpr):
    """Membrane before the spike."""
    if DECAY_INPUT:
        h = v + _divide(x - (v - rest), tau, inverse, EXACT_RECIPROCAL)
    else:
        h = v - _divide(v - rest, tau, inverse, EXACT_RECIPROCAL) + x
    return h


@triton.jit
def _reset(h, s, v_threshold, rest, HARD_RESET: tl.constexpr):
    """Membrane after the spike. Products rather than a select: an infinite h gives NaN, as in the reference."""
    return s * rest + (1.0 - s) * h if HARD_RESET else h - s * v_threshold


@triton.jit
def _surrogate(u, amplitude, slope, width, SURROGATE: tl.constexpr):
    """What stands in for the derivative of the spike at ``u = h - v_threshold``: fastcifar/spiking/surrogate.py."""
    if SURROGATE == 0:  # atan
        z = slope * u
        g = amplitude / (1.0 + z * z)
    elif SURROGATE == 1:  # sigmoid
        e = tl.exp(-tl.abs(slope * u))
        g = amplitude * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == 2:  # piecewise_quadratic
        g = tl.where(tl.abs(u) > width, 0.0, amplitude - slope * tl.abs(u))
    else:  # rectangular
        g = tl.where(tl.abs(u) < width, amplitude, 0.0)
    return g


@triton.jit
def _place(T, N, inner, BLOCK: tl.constexpr, PANELS: tl.constexpr):
    """The neurons of this program, the offset of their first time step, and which of them exist."""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = neuron
    if PANELS:
        offset += neuron // inner * ((T - 1) * inner)
    return neuron, offset, neuron < N


@triton.jit
def _load_steps(ptr, offset, mask, steps, inner, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Time steps FIRST .. FIRST + COUNT - 1 as a tuple of registers: every load is issued before the first is used."""
    loaded = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        loaded += (tl.load(ptr + i * inner + offset, mask=mask & (i < steps), other=0.0),)  # type: ignore
    return loaded


# T takes any value, and a kernel of its own for T = 1 or for multiples of 16 gains nothing.
@triton.jit(do_not_specialize=["T"])
def _lif_forward_kernel(
    x_ptr,  # input current, T * N elements: float32, float64, bfloat16 or float16
    v_ptr,  # membrane before the first step, [N], state dtype; None without HAS_V
    spikes_ptr,  # out: 0 or 1 in the dtype of x, laid out as x
    v_last_ptr,  # out: membrane after the last step, [N], state dtype
    v_seq_ptr,  # out: membrane after each step, state dtype, laid out as x; None without STORE_V_SEQ
    T,  # time steps
    N: tl.int64,  # neurons
    inner: tl.int64,  # elements from one time step to the next: N where T is the outermost dimension
    tau: tl.float64,  # membrane time constant in steps
    inverse: tl.float64,  # 1 / tau, of tau as STATE holds it
    v_threshold: tl.float64,  # membrane at which a neuron fires
    rest: tl.float64,  # where the membrane starts, leaks to and is reset to: v_reset, or 0 without HARD_RESET
    STATE: tl.constexpr,  # dtype of the membrane: tl.float64 for float64 x, else tl.float32
    DECAY_INPUT: tl.constexpr,  # divide x by tau too
    HARD_RESET: tl.constexpr,  # reset to `rest`; otherwise subtract the threshold
    HAS_V: tl.constexpr,  # start at v; otherwise at `rest`
    STORE_V_SEQ: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,  # tau is a power of two: multiplying gives the same bits
    PANELS: tl.constexpr,  # T is not the outermost dimension: N / inner panels of [T, inner]
    SEGMENT: tl.constexpr,  # time steps in flight
    BLOCK: tl.constexpr,  # neurons of a program
):
    """Spikes and membrane of leaky integrate-and-fire neurons.

    Bytes an element-step: 8 in float32 (read x, write spikes), 4 in 16 bits, and 4 with v_seq; v and v_last count once.
    Instructions an element-step: 17, or 22 where tau is no power of two. An H200 has time for 55 while it moves 8
    bytes, 27 while it moves 4.
    A segment's loads are all issued before its first step is computed. 48 registers leave 40 warps a multiprocessor to
    cover what is left of their latency, so longer segments would gain nothing.
    """
    # A Python float reaches a kernel as float32 unless its parameter says tl.float64. It is rounded here, as the
    # reference rounds its scalars. (tl.full, since the interpreter hands over Python floats as they are.)
    tau = tl.full((), tau, tl.float64)
    inverse = tl.full((), inverse, tl.float64)
    v_threshold = tl.full((), v_threshold, STATE)
    rest = tl.full((), rest, STATE)
    inner = inner.to(tl.int64)
    neuron, offset, mask = _place(T, N, inner, BLOCK, PANELS)
    v = tl.load(v_ptr + neuron, mask=mask, other=0.0) if HAS_V else tl.full((BLOCK,), rest, STATE)
    for t0 in range(0, T, SEGMENT):
        steps = T - t0
        xs = _load_steps(x_ptr, offset, mask, steps, inner, 0, SEGMENT)
        for i in tl.static_range(SEGMENT):
            if i < steps:
                h = _charge(v, xs[i].to(STATE), rest, tau, inverse, DECAY_INPUT, EXACT_RECIPROCAL)
                s = (h - v_threshold >= 0.0).to(STATE)
                v = _reset(h, s, v_threshold, rest, HARD_RESET)
                tl.store(spikes_ptr + i * inner + offset, s.to(spikes_ptr.dtype.element_ty), mask=mask)
                if STORE_V_SEQ:
                    tl.store(v_seq_ptr + i * inner + offset, v, mask=mask)
        offset += SEGMENT * inner
    tl.store(v_last_ptr + neuron, v, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _lif_backward_kernel(
    grad_spikes_ptr,  # gradient with respect to the spikes, dtype of x, laid out as x
    grad_v_last_ptr,  # gradient with respect to v_last, [N], state dtype; None without HAS_GRAD_V_LAST
    grad_v_seq_ptr,  # gradient with respect to v_seq, state dtype, laid out as x; None without HAS_GRAD_V_SEQ
    x_ptr,  # input current of the forward pass, T * N elements
    v_ptr,  # membrane before the first step, [N], state dtype; None without HAS_V
    grad_x_ptr,  # out: gradient with respect to x, dtype of x, laid out as x
    grad_v_ptr,  # out: gradient with respect to v, [N], state dtype; None without HAS_V
    checkpoint_ptr,  # scratch: membrane before each segment, [ceil(T / SEGMENT), N]; None without SEGMENTED
    T,  # time steps
    N: tl.int64,  # neurons
    inner: tl.int64,  # elements from one time step to the next: N where T is the outermost dimension
    tau: tl.float64,  # membrane time constant in steps
    inverse: tl.float64,  # 1 / tau, of tau as STATE holds it
    v_threshold: tl.float64,  # membrane at which a neuron fires
    rest: tl.float64,  # where the membrane starts, leaks to and is reset to: v_reset, or 0 without HARD_RESET
    amplitude: tl.float64,  # the surrogate's numbers: _surrogate_numbers
    slope: tl.float64,
    width: tl.float64,
    STATE: tl.constexpr,  # dtype of the membrane: tl.float64 for float64 x, else tl.float32
    DECAY_INPUT: tl.constexpr,  # divide x by tau too
    HARD_RESET: tl.constexpr,  # reset to `rest`; otherwise subtract the threshold
    DETACH_RESET: tl.constexpr,  # no gradient through the spike in the reset
    SURROGATE: tl.constexpr,  # 0 atan, 1 sigmoid, 2 piecewise_quadratic, 3 rectangular
    HAS_V: tl.constexpr,  # start at v, and write grad_v; otherwise start at `rest`
    HAS_GRAD_V_LAST: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,  # tau is a power of two: multiplying gives the same bits
    PANELS: tl.constexpr,  # T is not the outermost dimension: N / inner panels of [T, inner]
    SEGMENTED: tl.constexpr,  # T > SEGMENT
    SEGMENT: tl.constexpr,  # time steps whose h stays in registers
    GROUP: tl.constexpr,  # time steps whose gradients are loaded together; divides SEGMENT
    BLOCK: tl.constexpr,  # neurons of a program
):
    """Gradients of _lif_forward_kernel: backpropagation through time, with h recomputed from x.

    Bytes an element-step: 12 in float32 (read x and grad_spikes, write grad_x), 6 in 16 bits. An h saved by the forward
    pass would cost 4 more there and spare none here. SEGMENTED reads x twice and passes over the checkpoints twice, 17
    bytes: a first sweep notes the membrane before each segment, a second walks the segments in reverse.
    Instructions an element-step (atan): 38, or 43 where tau is no power of two. An H200 has time for 83 while it moves
    12 bytes, 42 while it moves 6.
    """
    tau = tl.full((), tau, tl.float64)
    inverse = tl.full((), inverse, tl.float64)
    v_threshold = tl.full((), v_threshold, STATE)
    rest = tl.full((), rest, STATE)
    amplitude = tl.full((), amplitude, STATE)
    slope = tl.full((), slope, STATE)
    width = tl.full((), width, STATE)
    inner = inner.to(tl.int64)
    neuron, offset, mask = _place(T, N, inner, BLOCK, PANELS)
    v = tl.load(v_ptr + neuron, mask=mask, other=0.0) if HAS_V else tl.full((BLOCK,), rest, STATE)
    grad_v_last = tl.load(grad_v_last_ptr + neuron, mask=mask, other=0.0) if HAS_GRAD_V_LAST else None
    c = tl.full((BLOCK,), 0.0, STATE)
    last = 0
    if SEGMENTED:
        last = (T - 1) // SEGMENT
        for k in range(last):  # all full
            tl.store(checkpoint_ptr + k * N + neuron, v, mask=mask)
            xs = _load_steps(x_ptr + k * SEGMENT * inner, offset, mask, SEGMENT, inner, 0, SEGMENT)
            for i in tl.static_range(SEGMENT):
                h = _charge(v, xs[i].to(STATE), rest, tau, inverse, DECAY_INPUT, EXACT_RECIPROCAL)
                s = (h - v_threshold >= 0.0).to(STATE)
                v = _reset(h, s, v_threshold, rest, HARD_RESET)
        tl.store(checkpoint_ptr + last * N + neuron, v, mask=mask)
        tl.debug_barrier()  # the layout of the stores above need not be that of the loads below
    for j in range(last + 1):
        start = (last - j) * SEGMENT * inner
        steps = T - (last - j) * SEGMENT  # to the end of the sequence: more than SEGMENT except in the last segment
        if SEGMENTED:
            v = tl.load(checkpoint_ptr + (last - j) * N + neuron, mask=mask, other=0.0)
        # Gradients come in groups, one group ahead of their use. A store may alias a load for all the compiler knows,
        # so that no load moves above the stores before it; and to load the whole segment would double the registers.
        next_grad_spikes = _load_steps(grad_spikes_ptr + start, offset, mask, steps, inner, SEGMENT - GROUP, GROUP)
        if HAS_GRAD_V_SEQ:
            next_grad_v_seq = _load_steps(grad_v_seq_ptr + start, offset, mask, steps, inner, SEGMENT - GROUP, GROUP)
        xs = _load_steps(x_ptr + start, offset, mask, steps, inner, 0, SEGMENT)
        hs = ()
        for i in tl.static_range(SEGMENT):
            h = _charge(v, xs[i].to(STATE), rest, tau, inverse, DECAY_INPUT, EXACT_RECIPROCAL)
            s = (h - v_threshold >= 0.0).to(STATE)
            v = _reset(h, s, v_threshold, rest, HARD_RESET)
            # Past the end, where grad_spikes reads as 0, any finite h keeps c at 0. The select has a second use: it
            # hides h from the compiler, which would otherwise hold u and s of every step in registers instead of
            # computing them again (151 registers instead of 88 at SEGMENT = 8), and would see through a constant.
            hs += (tl.where(i < steps, h, rest),)  # type: ignore
        for g in tl.static_range(SEGMENT - GROUP, -1, -GROUP):
            grad_spikes = next_grad_spikes
            if HAS_GRAD_V_SEQ:
                grad_v_seq = next_grad_v_seq
            if g > 0:
                next_grad_spikes = _load_steps(grad_spikes_ptr + start, offset, mask, steps, inner, g - GROUP, GROUP)
                if HAS_GRAD_V_SEQ:
                    next_grad_v_seq = _load_steps(grad_v_seq_ptr + start, offset, mask, steps, inner, g - GROUP, GROUP)
            for i in tl.static_range(GROUP - 1, -1, -1):
                if HAS_GRAD_V_LAST:
                    c = tl.where(g + i == steps - 1, grad_v_last, c)
                if HAS_GRAD_V_SEQ:
                    c = c + grad_v_seq[i]
                h = hs[g + i]
                u = h - v_threshold
                ds = grad_spikes[i].to(STATE)
                if not DETACH_RESET:
                    ds = ds + c * (rest - h) if HARD_RESET else ds - v_threshold * c
                gh = ds * _surrogate(u, amplitude, slope, width, SURROGATE)
                gh = gh + c * (1.0 - (u >= 0.0).to(STATE)) if HARD_RESET else gh + c
                q = gh * inverse.to(STATE)  # within an ulp of gh / tau: only the membrane has to be exact
                gx = (q if DECAY_INPUT else gh).to(grad_x_ptr.dtype.element_ty)
                tl.store(grad_x_ptr + start + (g + i) * inner + offset, gx, mask=mask & (g + i < steps))
                c = gh - q
    if HAS_V:
        tl.store(grad_v_ptr + neuron, c, mask=mask)


# ---- launchers: they check nothing, fastcifar.spiking.functional does ------------------------------------------------


def forward_blocks(T: int, dtype: torch.dtype, on_16_bytes: bool) -> dict[str, int]:
    """SEGMENT, BLOCK and num_warps of _lif_forward_kernel."""
    return {"SEGMENT": 4 if T <= 4 else 8, "BLOCK": 128 * _per_thread(dtype, on_16_bytes), "num_warps": 4}


def backward_blocks(T: int, dtype: torch.dtype, on_16_bytes: bool, grad_v_seq: bool) -> dict[str, int]:
    """SEGMENTED, SEGMENT, GROUP and BLOCK of _lif_backward_kernel, and how to compile it.

    Up to 32 steps (16 in float64) are one segment. Its h and x take 64 to 128 of a thread's 255 registers, so neurons a
    thread halve as it grows. Longer sequences use segments of 8: rereading checkpoints costs one byte in 17, and
    segments of 16 would double the registers.
    """
    longest = 16 if dtype == torch.float64 else 32
    segment = 8 if longest < T else max(4, 1 << (T - 1).bit_length())
    neurons = _per_thread(dtype, on_16_bytes)
    if segment >= 16:
        neurons = max(1, neurons // 2)
    blocks = {"SEGMENTED": segment < T, "SEGMENT": segment, "GROUP": 8 if segment == 8 else 4}
    blocks |= {"BLOCK": 128 * neurons, "num_warps": 4}
    if grad_v_seq:  # left alone, ptxas spills a register or two to fit one more block on a multiprocessor
        blocks["maxnreg"] = 255
    return blocks


def _per_thread(dtype: torch.dtype, on_16_bytes: bool) -> int:
    """Neurons a thread: 16 bytes of membrane, one vector access, or one neuron where rows do not start on 16 bytes."""
    if not on_16_bytes:
        return 1
    return 2 if dtype == torch.float64 else 4


def _surrogate_numbers(surrogate: int, alpha: float) -> tuple[float, float, float]:
    """amplitude, slope and width, computed in double as fastcifar/spiking/surrogate.py computes its scalars."""
    return (
        (alpha / 2, math.pi / 2 * alpha, 0.0),
        (alpha, alpha, 0.0),
        (alpha, alpha**2, 1 / alpha),
        (alpha, 0.0, 0.5 / alpha),
    )[surrogate]


def _common(x: Tensor, inner: int, tau: float, v_threshold: float, v_reset: float | None) -> dict[str, object]:
    """The kernel arguments that forward and backward share."""
    numel = x.numel() // x.shape[0]
    return {
        "x_ptr": x,
        "T": x.shape[0],
        "N": numel,
        "inner": inner,
        "tau": tau,
        "inverse": 1 / (tau if x.dtype == torch.float64 else ctypes.c_float(tau).value),
        "v_threshold": v_threshold,
        "rest": 0.0 if v_reset is None else v_reset,
        "STATE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "HARD_RESET": v_reset is not None,
        "EXACT_RECIPROCAL": _exact_reciprocal(tau),
        "PANELS": inner != numel,
        "enable_fp_fusion": False,
    }


def _exact_reciprocal(tau: float) -> bool:
    """Whether a product with 1 / tau has the bits of the quotient; tau = 2, the default of every library, does."""
    return math.frexp(tau)[0] == 0.5 and tau < 2.0**100


def _state_like(x: Tensor) -> Tensor:
    """An uninitialised membrane for x; its layout is the op's contract."""
    dtype = _state_dtype(x)
    return torch.empty_like(x[0], dtype=dtype) if x.shape[0] else x.new_empty(x.shape[1:], dtype=dtype)


def _copied_back(promised: Tensor, written: Tensor | None) -> Tensor:
    """The output in the layout it was promised in: for an expanded x that may not be the order of x's dense copy."""
    return promised if written is None or written is promised else promised.copy_(written)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lif_forward(
    x: Tensor,
    v: Tensor | None,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    store_v_seq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastcifar::lif_forward``: spikes, the last membrane, and the membrane after each step (empty unless stored)."""
    spikes, v_last = torch.empty_like(x), _state_like(x)
    v_seq = torch.empty_like(x, dtype=v_last.dtype) if store_v_seq else x.new_empty(0, dtype=v_last.dtype)
    if x.numel() == 0:  # no neurons, or no time steps
        v_last = v_last.fill_(0.0 if v_reset is None else v_reset) if v is None else v_last.copy_(v)
        return spikes, v_last, v_seq
    x, inner = dense(x)
    strides = step_strides(x, inner)
    v, v_out = in_order(v, strides), in_order(v_last, strides)
    blocks = forward_blocks(x.shape[0], x.dtype, aligned(inner, x, v))
    with torch.cuda.device_of(x):
        _lif_forward_kernel[(triton.cdiv(v_last.numel(), blocks["BLOCK"]),)](
            v_ptr=v,
            spikes_ptr=spikes,
            v_last_ptr=v_out,
            v_seq_ptr=v_seq if store_v_seq else None,
            DECAY_INPUT=decay_input,
            HAS_V=v is not None,
            STORE_V_SEQ=store_v_seq,
            **_common(x, inner, tau, v_threshold, v_reset),
            **blocks,
        )
    return spikes, _copied_back(v_last, v_out), v_seq


def lif_backward(
    grad_spikes: Tensor,
    grad_v_last: Tensor | None,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor]:
    """``fastcifar::lif_backward``: gradients with respect to x and v (empty without v)."""
    grad_x = torch.empty_like(x)
    grad_v = x.new_empty(0, dtype=_state_dtype(x)) if v is None else _state_like(x)
    if x.numel() == 0:
        if v is not None:
            grad_v = grad_v.zero_() if grad_v_last is None else grad_v.copy_(grad_v_last)
        return grad_x, grad_v
    x, inner = dense(x)
    steps, neurons, strides = x.shape[0], x.numel() // x.shape[0], step_strides(x, inner)
    grad_spikes, grad_v_seq = in_order(grad_spikes, x.stride()), in_order(grad_v_seq, x.stride())
    grad_v_last, v = in_order(grad_v_last, strides), in_order(v, strides)
    grad_v_out = None if v is None else in_order(grad_v, strides)
    on_16_bytes = aligned(inner, x, v, grad_spikes, grad_v_last, grad_v_seq)
    blocks = backward_blocks(steps, x.dtype, on_16_bytes, grad_v_seq is not None)
    checkpoint = None
    if blocks["SEGMENTED"]:
        checkpoint = grad_v.new_empty(triton.cdiv(steps, blocks["SEGMENT"]), neurons)
    amplitude, slope, width = _surrogate_numbers(surrogate, alpha)
    with torch.cuda.device_of(x):
        _lif_backward_kernel[(triton.cdiv(neurons, blocks["BLOCK"]),)](
            grad_spikes_ptr=grad_spikes,
            grad_v_last_ptr=grad_v_last,
            grad_v_seq_ptr=grad_v_seq,
            v_ptr=v,
            grad_x_ptr=grad_x,
            grad_v_ptr=grad_v_out,
            checkpoint_ptr=checkpoint,
            amplitude=amplitude,
            slope=slope,
            width=width,
            DECAY_INPUT=decay_input,
            DETACH_RESET=detach_reset,
            SURROGATE=surrogate,
            HAS_V=v is not None,
            HAS_GRAD_V_LAST=grad_v_last is not None,
            HAS_GRAD_V_SEQ=grad_v_seq is not None,
            **_common(x, inner, tau, v_threshold, v_reset),
            **blocks,
        )
    return grad_x, _copied_back(grad_v, grad_v_out)
