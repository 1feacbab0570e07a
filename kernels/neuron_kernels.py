"""The two Triton kernels of every spiking neuron: over time, forward and backward. kernels/spiking.py launches them.

The specification is ``fastcifar/spiking/reference.py``: membranes and spikes equal it bit for bit (but for EIF's
exponential), and so both kernels must be launched with ``enable_fp_fusion=False`` (a fused multiply-add rounds once
where the reference rounds twice).

One thread owns a few neurons for the whole sequence, so the state lives in registers and time is the only loop.
Threads exchange nothing until a parameter's gradient is summed: both kernels are streams, limited by the bandwidth of
the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .neurons import Parameters, charge_backward, divides_by, fire, fire_backward, has_second_state, reset, step


@triton.constexpr_function
def _wants(wanted, *slots):
    return any(wanted >> slot & 1 for slot in slots)


@triton.constexpr_function
def _row(wanted, slot):
    """Row of a parameter's sums: only those that are wanted have one."""
    return bin(wanted & ((1 << slot) - 1)).count("1")


@triton.jit
def _place(T, N, inner, BLOCK: tl.constexpr, PANELS: tl.constexpr):
    """The neurons of this program, the offset of their first time step, and which of them exist."""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = neuron
    if PANELS:
        offset += neuron // inner * ((T - 1) * inner)
    return neuron, offset, neuron < N


@triton.jit
def _parameter(ptr, number, neuron, mask, run, period, KIND: tl.constexpr, STATE: tl.constexpr):
    """A parameter of the program's neurons; 1 where there is no neuron, so that it can be divided by.

    A Python float reaches a kernel as float32 unless its argument says tl.float64. It is rounded here, as the
    reference rounds its scalars. (tl.full, since the interpreter hands over Python floats as they are.)
    """
    if KIND == "number":
        value = tl.full((), number, STATE)
    elif KIND == "one":
        value = tl.load(ptr)
    elif KIND == "neuron":
        value = tl.load(ptr + neuron, mask=mask, other=1.0)
    else:  # 32 bits: a division of 64 takes over a hundred instructions
        value = tl.load(ptr + neuron.to(tl.int32) // run % period, mask=mask, other=1.0)
    return value


@triton.jit
def _reciprocal(value, WANTED: tl.constexpr):
    return 1.0 / value.to(tl.float64) if WANTED else value


@triton.jit
def _parameters(
    leak_ptr,
    threshold_ptr,
    gain_ptr,
    scale_ptr,
    shift_ptr,
    numbers,
    neuron,
    mask,
    run,
    period,
    LEAK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    NEURON: tl.constexpr,
    SCALE_RESET: tl.constexpr,
    STATE: tl.constexpr,
):
    leak = _parameter(leak_ptr, numbers[0], neuron, mask, run, period, LEAK, STATE)
    threshold = _parameter(threshold_ptr, numbers[1], neuron, mask, run, period, THRESHOLD, STATE)
    gain = _parameter(gain_ptr, numbers[2], neuron, mask, run, period, GAIN, STATE)
    constants = ()
    for i in tl.static_range(4, 10):
        constants += (tl.full((), numbers[i], STATE),)  # type: ignore
    divisor = constants[3] if NEURON == "izhikevich" else constants[2]  # type: ignore
    return Parameters(
        leak=leak,
        threshold=threshold,
        gain=gain,
        scale=_parameter(scale_ptr, 1.0, neuron, mask, run, period, SCALE, STATE),
        shift=_parameter(shift_ptr, 0.0, neuron, mask, run, period, SHIFT, STATE),
        rest=tl.full((), numbers[3], STATE),
        constants=constants,
        by_leak=_reciprocal(leak, divides_by(NEURON, "leak")),
        by_threshold=_reciprocal(threshold, divides_by(NEURON, "threshold")),
        by_gain=_reciprocal(gain, SCALE_RESET),
        by_constant=_reciprocal(divisor, divides_by(NEURON, "constant")),
    )


@triton.jit
def _current(x, p, SCALE: tl.constexpr, SHIFT: tl.constexpr, STATE: tl.constexpr):
    x = x.to(STATE)
    if SCALE != "number":
        x = x * p.scale
    if SHIFT != "number":
        x = x + p.shift
    return x


@triton.jit
def _load_steps(ptr, offset, mask, steps, inner, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Time steps FIRST .. FIRST + COUNT - 1 as a tuple of registers: every load is issued before the first is used."""
    loaded = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        loaded += (tl.load(ptr + i * inner + offset, mask=mask & (i < steps), other=0.0),)  # type: ignore
    return loaded


@triton.jit
def _store_sums(ptr, total, neuron, mask, KIND: tl.constexpr):
    """Sums over time: one for the program where its neurons share the parameter, else one for each neuron."""
    if KIND == "one":
        tl.store(ptr + tl.program_id(0), tl.sum(tl.where(mask, total, 0.0)))
    else:
        tl.store(ptr + neuron, total, mask=mask)


# T takes any value, and a kernel of its own for T = 1 or for multiples of 16 gains nothing.
@triton.jit(do_not_specialize=["T", "run", "period"])
def _neuron_forward_kernel(
    x_ptr,  # input, T * N elements: float32, float64, bfloat16 or float16
    v_ptr,  # membrane before the first step, [N], state dtype; None without HAS_V
    w_ptr,  # second state before the first step, as v; None without HAS_W
    leak_ptr,  # parameters, state dtype; None where the parameter is a number
    threshold_ptr,
    gain_ptr,
    scale_ptr,
    shift_ptr,
    spikes_ptr,  # out: spikes in the dtype of x or uint8, laid out as x
    v_last_ptr,  # out: membrane after the last step, [N], state dtype
    w_last_ptr,  # out: second state after the last step; None for a neuron that has none
    v_seq_ptr,  # out: membrane after each step, state dtype, laid out as x; None without STORE_V_SEQ
    T,  # time steps
    N: tl.int64,  # neurons
    inner: tl.int64,  # elements from one time step to the next: N where T is the outermost dimension
    run: tl.int32,  # of a parameter of the kind "run": neuron n takes its element n // run % period
    period: tl.int32,
    leak: tl.float64,  # parameters that are numbers
    threshold: tl.float64,
    gain: tl.float64,
    rest: tl.float64,  # where the membrane starts, leaks to and is reset to
    c0: tl.float64,  # the neuron's constants, in the order in which fastcifar.spiking.functional passes them
    c1: tl.float64,
    c2: tl.float64,
    c3: tl.float64,
    c4: tl.float64,
    c5: tl.float64,
    NEURON: tl.constexpr,  # a name of fastcifar.spiking.neurons.IDS
    STATE: tl.constexpr,  # dtype of the state: tl.float64 for float64 x or v, else tl.float32
    LEAK: tl.constexpr,  # what a parameter is: "number", "one" value in memory, one a "neuron", or one a "run" of them
    THRESHOLD: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,  # "number": there is none
    SHIFT: tl.constexpr,
    HARD_RESET: tl.constexpr,  # reset to `rest`; otherwise subtract the threshold
    SCALE_RESET: tl.constexpr,  # klif: divide h and the threshold by the gain at the reset
    HAS_V: tl.constexpr,  # start at v; otherwise at `rest`
    HAS_W: tl.constexpr,  # start the second state at w; otherwise at 0
    STORE_V_SEQ: tl.constexpr,
    PANELS: tl.constexpr,  # T is not the outermost dimension: N / inner panels of [T, inner]
    SEGMENT: tl.constexpr,  # time steps in flight
    BLOCK: tl.constexpr,  # neurons of a program
):
    """Spikes and states of a layer of neurons over all time steps.

    Bytes an element-step: 8 in float32 (read x, write spikes), 4 in 16 bits, 5 and 3 where spikes are bytes, and 4
    more with v_seq; states and parameters count once.
    Instructions an element-step of lif: 17, or 22 where tau is no power of two. An H200 has time for 55 while it moves
    8 bytes, 27 while it moves 4.
    A segment's loads are all issued before its first step is computed. 48 registers leave 40 warps a multiprocessor to
    cover what is left of their latency, so longer segments would gain nothing.
    """
    inner = inner.to(tl.int64)
    neuron, offset, mask = _place(T, N, inner, BLOCK, PANELS)
    numbers = (leak, threshold, gain, rest, c0, c1, c2, c3, c4, c5)
    p = _parameters(
        *(leak_ptr, threshold_ptr, gain_ptr, scale_ptr, shift_ptr, numbers, neuron, mask, run, period),
        *(LEAK, THRESHOLD, GAIN, SCALE, SHIFT, NEURON, SCALE_RESET, STATE),
    )
    v = tl.load(v_ptr + neuron, mask=mask, other=0.0) if HAS_V else tl.full((BLOCK,), p.rest, STATE)
    w = tl.load(w_ptr + neuron, mask=mask, other=0.0) if HAS_W else tl.full((BLOCK,), 0.0, STATE)
    for t0 in range(0, T, SEGMENT):
        steps = T - t0
        xs = _load_steps(x_ptr, offset, mask, steps, inner, 0, SEGMENT)
        for i in tl.static_range(SEGMENT):
            if i < steps:
                x = _current(xs[i], p, SCALE, SHIFT, STATE)
                _, s, v, w = step(x, v, w, p, NEURON, HARD_RESET, SCALE_RESET)
                if NEURON == "signed_if":
                    s = s * p.threshold
                tl.store(spikes_ptr + i * inner + offset, s.to(spikes_ptr.dtype.element_ty), mask=mask)
                if STORE_V_SEQ:
                    tl.store(v_seq_ptr + i * inner + offset, v, mask=mask)
        offset += SEGMENT * inner
    tl.store(v_last_ptr + neuron, v, mask=mask)
    if has_second_state(NEURON):
        tl.store(w_last_ptr + neuron, w, mask=mask)


@triton.jit(do_not_specialize=["T", "run", "period"])
def _neuron_backward_kernel(
    grad_spikes_ptr,  # gradient with respect to the spikes, dtype of x, laid out as x
    grad_v_last_ptr,  # gradients with respect to the last states, [N], state dtype; None without HAS_GRAD_V_LAST
    grad_w_last_ptr,  # None without HAS_GRAD_W_LAST
    grad_v_seq_ptr,  # gradient with respect to v_seq, state dtype, laid out as x; None without HAS_GRAD_V_SEQ
    x_ptr,  # input of the forward pass, T * N elements
    v_ptr,  # membrane before the first step, [N], state dtype; None without HAS_V
    w_ptr,  # second state before the first step, as v; None without HAS_W
    leak_ptr,  # parameters, state dtype; None where the parameter is a number
    threshold_ptr,
    gain_ptr,
    scale_ptr,
    shift_ptr,
    grad_x_ptr,  # out: gradient with respect to x, dtype of x, laid out as x
    grad_v_ptr,  # out: gradients with respect to the first states, [N], state dtype; None without HAS_V
    grad_w_ptr,  # None without HAS_W
    sums_ptr,  # out: a row for each wanted parameter of float64 sums, see _store_sums; None without any
    checkpoint_ptr,  # scratch: states before each segment, [states, ceil(T / SEGMENT), N]; None without SEGMENTED
    T,  # time steps
    N: tl.int64,  # neurons
    inner: tl.int64,  # elements from one time step to the next: N where T is the outermost dimension
    row: tl.int64,  # elements of a row of sums
    run: tl.int32,  # of a parameter of the kind "run": neuron n takes its element n // run % period
    period: tl.int32,
    leak: tl.float64,  # parameters that are numbers
    threshold: tl.float64,
    gain: tl.float64,
    rest: tl.float64,  # where the membrane starts, leaks to and is reset to
    c0: tl.float64,  # the neuron's constants, in the order in which fastcifar.spiking.functional passes them
    c1: tl.float64,
    c2: tl.float64,
    c3: tl.float64,
    c4: tl.float64,
    c5: tl.float64,
    width0: tl.float64,  # the surrogate's numbers
    width1: tl.float64,
    width2: tl.float64,
    NEURON: tl.constexpr,  # a name of fastcifar.spiking.neurons.IDS
    SURROGATE: tl.constexpr,  # SurrogateId in csrc/cpu/spiking.h
    STATE: tl.constexpr,  # dtype of the state: tl.float64 for float64 x or v, else tl.float32
    LEAK: tl.constexpr,  # what a parameter is: "number", "one" value in memory, one a "neuron", or one a "run" of them
    THRESHOLD: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,  # "number": there is none
    SHIFT: tl.constexpr,
    WANTED: tl.constexpr,  # bits 0 .. 4: the parameters whose gradients are wanted, leak to shift
    HARD_RESET: tl.constexpr,  # reset to `rest`; otherwise subtract the threshold
    SCALE_RESET: tl.constexpr,  # klif: divide h and the threshold by the gain at the reset
    DETACH_RESET: tl.constexpr,  # no gradient through the spike in the reset
    HAS_V: tl.constexpr,  # start at v, and write grad_v; otherwise start at `rest`
    HAS_W: tl.constexpr,  # start the second state at w, and write grad_w; otherwise at 0
    HAS_GRAD_V_LAST: tl.constexpr,
    HAS_GRAD_W_LAST: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    PANELS: tl.constexpr,  # T is not the outermost dimension: N / inner panels of [T, inner]
    SEGMENTED: tl.constexpr,  # T > SEGMENT
    SEGMENT: tl.constexpr,  # time steps whose h stays in registers
    GROUP: tl.constexpr,  # time steps whose gradients are loaded together; divides SEGMENT
    BLOCK: tl.constexpr,  # neurons of a program
):
    """Gradients of _neuron_forward_kernel: backpropagation through time, with h recomputed from x.

    Bytes an element-step: 12 in float32 (read x and grad_spikes, write grad_x), 6 in 16 bits. An h saved by the forward
    pass would cost 4 more there and spare none here. SEGMENTED reads x twice and passes over the checkpoints twice, 17
    bytes: a first sweep notes the states before each segment, a second walks the segments in reverse. A wanted
    gradient, other than that of shift, reads x again, out of a cache, and writes up to 8 bytes a neuron.
    Instructions an element-step of lif (atan): 38, or 43 where tau is no power of two. An H200 has time for 83 while it
    moves 12 bytes, 42 while it moves 6.
    """
    inner = inner.to(tl.int64)
    neuron, offset, mask = _place(T, N, inner, BLOCK, PANELS)
    numbers = (leak, threshold, gain, rest, c0, c1, c2, c3, c4, c5)
    p = _parameters(
        *(leak_ptr, threshold_ptr, gain_ptr, scale_ptr, shift_ptr, numbers, neuron, mask, run, period),
        *(LEAK, THRESHOLD, GAIN, SCALE, SHIFT, NEURON, SCALE_RESET, STATE),
    )
    widths = (tl.full((), width0, STATE), tl.full((), width1, STATE), tl.full((), width2, STATE))
    v = tl.load(v_ptr + neuron, mask=mask, other=0.0) if HAS_V else tl.full((BLOCK,), p.rest, STATE)
    w = tl.load(w_ptr + neuron, mask=mask, other=0.0) if HAS_W else tl.full((BLOCK,), 0.0, STATE)
    grad_v_last = tl.load(grad_v_last_ptr + neuron, mask=mask, other=0.0) if HAS_GRAD_V_LAST else None
    grad_w_last = tl.load(grad_w_last_ptr + neuron, mask=mask, other=0.0) if HAS_GRAD_W_LAST else None
    SECOND: tl.constexpr = has_second_state(NEURON)
    NEEDS_X: tl.constexpr = _wants(WANTED, 0, 1, 2, 3)
    dv = tl.full((BLOCK,), 0.0, STATE)
    dw = tl.full((BLOCK,), 0.0, STATE)
    leak_sum = tl.full((BLOCK,), 0.0, tl.float64)
    threshold_sum = tl.full((BLOCK,), 0.0, tl.float64)
    gain_sum = tl.full((BLOCK,), 0.0, tl.float64)
    scale_sum = tl.full((BLOCK,), 0.0, tl.float64)
    shift_sum = tl.full((BLOCK,), 0.0, tl.float64)
    last = 0
    second_checkpoint = 0
    if SEGMENTED:
        last = (T - 1) // SEGMENT
        second_checkpoint = (last + 1) * N
        for k in range(last):  # all full
            tl.store(checkpoint_ptr + k * N + neuron, v, mask=mask)
            if SECOND:
                tl.store(checkpoint_ptr + second_checkpoint + k * N + neuron, w, mask=mask)
            xs = _load_steps(x_ptr + k * SEGMENT * inner, offset, mask, SEGMENT, inner, 0, SEGMENT)
            for i in tl.static_range(SEGMENT):
                x = _current(xs[i], p, SCALE, SHIFT, STATE)
                _, s, v, w = step(x, v, w, p, NEURON, HARD_RESET, SCALE_RESET)
        tl.store(checkpoint_ptr + last * N + neuron, v, mask=mask)
        if SECOND:
            tl.store(checkpoint_ptr + second_checkpoint + last * N + neuron, w, mask=mask)
        tl.debug_barrier()  # the layout of the stores above need not be that of the loads below
    for j in range(last + 1):
        start = (last - j) * SEGMENT * inner
        steps = T - (last - j) * SEGMENT  # to the end of the sequence: more than SEGMENT except in the last segment
        if SEGMENTED:
            v = tl.load(checkpoint_ptr + (last - j) * N + neuron, mask=mask, other=0.0)
            if SECOND:
                w = tl.load(checkpoint_ptr + second_checkpoint + (last - j) * N + neuron, mask=mask, other=0.0)
        first_v = v
        # Gradients come in groups, one group ahead of their use. A store may alias a load for all the compiler knows,
        # so that no load moves above the stores before it; and to load the whole segment would double the registers.
        next_grad_spikes = _load_steps(grad_spikes_ptr + start, offset, mask, steps, inner, SEGMENT - GROUP, GROUP)
        if HAS_GRAD_V_SEQ:
            next_grad_v_seq = _load_steps(grad_v_seq_ptr + start, offset, mask, steps, inner, SEGMENT - GROUP, GROUP)
        xs = _load_steps(x_ptr + start, offset, mask, steps, inner, 0, SEGMENT)
        hs = ()
        ws = ()  # before each step
        for i in tl.static_range(SEGMENT):
            # Past the end, where grad_spikes reads as 0, any finite state keeps the gradients at 0. The select has a
            # second use: it hides h from the compiler, which would otherwise hold u and s of every step in registers
            # instead of computing them again (151 registers instead of 88 at SEGMENT = 8), and would see through a
            # constant.
            if SECOND:
                ws += (tl.where(i < steps, w, 0.0),)  # type: ignore
            x = _current(xs[i], p, SCALE, SHIFT, STATE)
            h, s, v, w = step(x, v, w, p, NEURON, HARD_RESET, SCALE_RESET)
            hs += (tl.where(i < steps, h, p.rest),)  # type: ignore
        for g in tl.static_range(SEGMENT - GROUP, -1, -GROUP):
            grad_spikes = next_grad_spikes
            if HAS_GRAD_V_SEQ:
                grad_v_seq = next_grad_v_seq
            if g > 0:
                next_grad_spikes = _load_steps(grad_spikes_ptr + start, offset, mask, steps, inner, g - GROUP, GROUP)
                if HAS_GRAD_V_SEQ:
                    next_grad_v_seq = _load_steps(grad_v_seq_ptr + start, offset, mask, steps, inner, g - GROUP, GROUP)
            if NEEDS_X:
                group_xs = _load_steps(x_ptr + start, offset, mask, steps, inner, g, GROUP)
            for i in tl.static_range(GROUP - 1, -1, -1):
                if HAS_GRAD_V_LAST:
                    dv = tl.where(g + i == steps - 1, grad_v_last, dv)
                if HAS_GRAD_W_LAST:
                    dw = tl.where(g + i == steps - 1, grad_w_last, dw)
                if HAS_GRAD_V_SEQ:
                    dv = dv + grad_v_seq[i]
                h = hs[g + i]
                w_before = ws[g + i] if SECOND else dw
                # The membrane before the step comes from h of the step before it, where anything asks for it.
                if g + i == 0:
                    v_before = first_v
                else:
                    w_of_it = ws[g + i - 1] if SECOND else dw
                    s = fire(hs[g + i - 1], w_of_it, p, NEURON)
                    v_before = reset(hs[g + i - 1], s, p, NEURON, HARD_RESET, SCALE_RESET)
                    v_before = tl.where(g + i < steps, v_before, p.rest)
                x_loaded = group_xs[i].to(STATE) if NEEDS_X else h
                x = _current(x_loaded, p, SCALE, SHIFT, STATE)
                ds = grad_spikes[i].to(STATE)
                dh, dw, d_threshold, d_gain = fire_backward(
                    *(h, v_before, w_before, ds, dv, dw, p, widths),
                    *(NEURON, SURROGATE, HARD_RESET, SCALE_RESET, DETACH_RESET),
                )
                dx, dv, dw, d_leak, more_d_threshold, more_d_gain = charge_backward(
                    x, v_before, w_before, h, dh, dw, p, NEURON
                )
                if WANTED & 1:
                    leak_sum += d_leak.to(tl.float64)
                if WANTED & 2:
                    threshold_sum += (d_threshold + more_d_threshold).to(tl.float64)
                if WANTED & 4:
                    gain_sum += (d_gain + more_d_gain).to(tl.float64)
                if WANTED & 8:
                    scale_sum += (dx * x_loaded).to(tl.float64)
                if WANTED & 16:
                    shift_sum += dx.to(tl.float64)
                if SCALE != "number":
                    dx = dx * p.scale
                grad_x = dx.to(grad_x_ptr.dtype.element_ty)
                tl.store(grad_x_ptr + start + (g + i) * inner + offset, grad_x, mask=mask & (g + i < steps))
    if HAS_V:
        tl.store(grad_v_ptr + neuron, dv, mask=mask)
    if HAS_W:
        tl.store(grad_w_ptr + neuron, dw, mask=mask)
    if WANTED & 1:
        _store_sums(sums_ptr + _row(WANTED, 0) * row, leak_sum, neuron, mask, LEAK)
    if WANTED & 2:
        _store_sums(sums_ptr + _row(WANTED, 1) * row, threshold_sum, neuron, mask, THRESHOLD)
    if WANTED & 4:
        _store_sums(sums_ptr + _row(WANTED, 2) * row, gain_sum, neuron, mask, GAIN)
    if WANTED & 8:
        _store_sums(sums_ptr + _row(WANTED, 3) * row, scale_sum, neuron, mask, SCALE)
    if WANTED & 16:
        _store_sums(sums_ptr + _row(WANTED, 4) * row, shift_sum, neuron, mask, SHIFT)
