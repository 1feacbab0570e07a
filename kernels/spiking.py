"""Launchers of the spiking neurons' Triton kernels, which ``fastcifar._library`` registers for CUDA tensors.

The kernels are in ``kernels/neuron_kernels.py``. Launchers check nothing: ``fastcifar.spiking`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spiking.neurons import IDS
from .layout import aligned, dense, fold, in_order, step_strides
from .neuron_kernels import _neuron_backward_kernel, _neuron_forward_kernel
from .neurons import divides_by, has_second_state, is_a, soft_reset_only

NEURONS = tuple(IDS)
PARAMETERS = ("leak", "threshold", "gain", "scale", "shift")
_CONSTANTS = 6
_BITS = 2  # of spike_format: 0 like x, 1 bytes
_LARGEST_INT = 2**31 - 1


def neuron_forward(
    x: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    neuron: int,
    numbers: Sequence[float],
    v_reset: float | None,
    spike_format: int,
    store_v_seq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastcifar::neuron_forward``: spikes, the last states (the second empty for a neuron with one), and the membrane
    after each step (empty unless stored)."""
    name = NEURONS[neuron]
    second = has_second_state(name)
    spikes = torch.empty_like(x, dtype=torch.uint8 if spike_format else x.dtype)
    v_last = _state_like(x, v)
    none = v_last.new_empty(0)
    w_last = torch.empty_like(v_last) if second else none
    v_seq = torch.empty_like(x, dtype=v_last.dtype) if store_v_seq else torch.empty_like(none)
    if x.numel() == 0:  # no neurons, or no time steps
        v_last = v_last.fill_(_rest(name, v_reset)) if v is None else v_last.copy_(v)
        w_last = w_last.fill_(0.0) if w is None or not second else w_last.copy_(w)
        return _packed(spikes, v_last) if spike_format == _BITS else spikes, v_last, w_last, v_seq
    x, inner = dense(x)
    strides = step_strides(x, inner)
    v, w = in_order(v, strides), in_order(w, strides) if second else None
    v_out, w_out = in_order(v_last, strides), in_order(w_last, strides) if second else None
    parameters = _Parameters((leak, threshold, gain, scale, shift), x.shape[1:], strides)
    blocks = forward_blocks(x.shape[0], v_last.dtype, aligned(inner, x, v, w))
    with torch.cuda.device_of(x):
        _neuron_forward_kernel[(triton.cdiv(v_last.numel(), blocks["BLOCK"]),)](
            v_ptr=v,
            w_ptr=w,
            spikes_ptr=spikes,
            v_last_ptr=v_out,
            w_last_ptr=w_out,
            v_seq_ptr=v_seq if store_v_seq else None,
            HAS_V=v is not None,
            HAS_W=w is not None,
            STORE_V_SEQ=store_v_seq,
            **_common(x, v_last.dtype, inner, name, numbers, v_reset),
            **parameters.arguments(),
            **blocks,
        )
    v_last = _copied_back(v_last, v_out)
    if spike_format == _BITS:
        spikes = _packed(spikes, v_last)
    return spikes, v_last, _copied_back(w_last, w_out), v_seq


def neuron_backward(
    grad_spikes: Tensor,
    grad_v_last: Tensor | None,
    grad_w_last: Tensor | None,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    neuron: int,
    numbers: Sequence[float],
    v_reset: float | None,
    surrogate: int,
    widths: Sequence[float],
    detach_reset: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastcifar::neuron_backward``: gradients with respect to x, v and w (empty without them), and of the wanted
    parameters, flat, in float64."""
    name = NEURONS[neuron]
    second = has_second_state(name)
    tensors = (leak, threshold, gain, scale, shift)
    grad_x, state = torch.empty_like(x), _state_like(x, v)
    none = state.new_empty(0)
    grad_v = torch.empty_like(none if v is None else state)
    grad_w = torch.empty_like(none if w is None else state)
    if x.numel() == 0:
        for grad, first, last in ((grad_v, v, grad_v_last), (grad_w, w, grad_w_last)):
            grad.copy_(last) if first is not None and last is not None else grad.zero_()
        count = sum(p.numel() for i, p in enumerate(tensors) if p is not None and wanted >> i & 1)
        return grad_x, grad_v, grad_w, x.new_zeros(count, dtype=torch.float64)
    x, inner = dense(x)
    steps, neurons, strides = x.shape[0], x.numel() // x.shape[0], step_strides(x, inner)
    grad_spikes, grad_v_seq = in_order(grad_spikes, x.stride()), in_order(grad_v_seq, x.stride())
    grad_v_last, v = in_order(grad_v_last, strides), in_order(v, strides)
    grad_w_last, w = (in_order(t, strides) if second else None for t in (grad_w_last, w))
    grad_v_out = None if v is None else in_order(grad_v, strides)
    grad_w_out = None if w is None else in_order(grad_w, strides)
    on_16_bytes = aligned(inner, x, v, w, grad_spikes, grad_v_last, grad_w_last, grad_v_seq)
    plain = grad_v_seq is None and all(p is None for p in tensors)
    blocks = backward_blocks(steps, state.dtype, on_16_bytes, name, wanted, plain)
    programs = triton.cdiv(neurons, blocks["BLOCK"])
    parameters = _Parameters(tensors, x.shape[1:], strides)
    sums = parameters.new_sums(wanted, programs)
    checkpoint = None
    if blocks["SEGMENTED"]:
        checkpoint = state.new_empty(1 + second, triton.cdiv(steps, blocks["SEGMENT"]), neurons)
    with torch.cuda.device_of(x):
        _neuron_backward_kernel[(programs,)](
            grad_spikes_ptr=grad_spikes,
            grad_v_last_ptr=grad_v_last,
            grad_w_last_ptr=grad_w_last,
            grad_v_seq_ptr=grad_v_seq,
            v_ptr=v,
            w_ptr=w,
            grad_x_ptr=grad_x,
            grad_v_ptr=grad_v_out,
            grad_w_ptr=grad_w_out,
            sums_ptr=sums,
            checkpoint_ptr=checkpoint,
            row=0 if sums is None else sums.shape[1],
            width0=widths[0],
            width1=widths[1],
            width2=widths[2],
            SURROGATE=surrogate,
            WANTED=wanted,
            DETACH_RESET=detach_reset,
            HAS_V=v is not None,
            HAS_W=w is not None,
            HAS_GRAD_V_LAST=grad_v_last is not None,
            HAS_GRAD_W_LAST=grad_w_last is not None,
            HAS_GRAD_V_SEQ=grad_v_seq is not None,
            **_common(x, state.dtype, inner, name, numbers, v_reset),
            **parameters.arguments(),
            **blocks,
        )
    if sums is None:
        flat = x.new_empty(0, dtype=torch.float64)
    else:
        flat = parameters.gradients(sums, wanted, programs, divides_by(name, "leak"))
    return grad_x, _copied_back(grad_v, grad_v_out), _copied_back(grad_w, grad_w_out), flat


# ---- how to launch ---------------------------------------------------------------------------------------------------


def forward_blocks(T: int, state: torch.dtype, on_16_bytes: bool) -> dict[str, int]:
    """SEGMENT, BLOCK and num_warps of _neuron_forward_kernel."""
    return {"SEGMENT": 4 if T <= 4 else 8, "BLOCK": 128 * _per_thread(state, on_16_bytes), "num_warps": 4}


def backward_blocks(
    T: int, state: torch.dtype, on_16_bytes: bool, name: str, wanted: int, plain: bool
) -> dict[str, int]:
    """SEGMENTED, SEGMENT, GROUP and BLOCK of _neuron_backward_kernel, and how to compile it.

    Up to 32 steps are one segment, half as many for each of float64, a second state and wanted gradients. Its h and x
    take 64 to 128 of a thread's 255 registers, so neurons a thread halve as it grows, and where they have sums of
    gradients. Longer sequences use segments of 8: rereading checkpoints costs one byte in 17, and segments of 16 would
    double the registers.

    Args:
        plain: parameters are numbers, and v_seq has no gradient.
    """
    longest = 32 >> sum((state == torch.float64, has_second_state(name), wanted != 0))
    segment = 8 if longest < T else max(4, 1 << (T - 1).bit_length())
    neurons = _per_thread(state, on_16_bytes)
    if segment >= 16 or wanted:
        neurons = max(1, neurons // 2)
    blocks = {"SEGMENTED": segment < T, "SEGMENT": segment, "GROUP": 8 if segment == 8 else 4}
    blocks |= {"BLOCK": 128 * neurons, "num_warps": 4}
    if blocks["SEGMENTED"] or not (plain and is_a(name, "if", "lif")):
        # Left alone, ptxas spills a register or two to fit one more block on a multiprocessor; told this it takes up to
        # twice as many as it needs, so that the neurons that nearly everyone runs are left alone.
        blocks["maxnreg"] = 255
    return blocks


def _per_thread(state: torch.dtype, on_16_bytes: bool) -> int:
    """Neurons a thread: 16 bytes of membrane, one vector access, or one neuron where rows do not start on 16 bytes."""
    if not on_16_bytes:
        return 1
    return 2 if state == torch.float64 else 4


def _common(
    x: Tensor, state: torch.dtype, inner: int, name: str, numbers: Sequence[float], v_reset: float | None
) -> dict[str, object]:
    """The kernel arguments that forward and backward share, but for the parameters."""
    neurons = x.numel() // x.shape[0]
    constants = [*numbers[3:], *[0.0] * (_CONSTANTS + 3 - len(numbers))]
    return {
        "x_ptr": x,
        "T": x.shape[0],
        "N": neurons,
        "inner": inner,
        "leak": numbers[0],
        "threshold": numbers[1],
        "gain": numbers[2],
        "rest": _rest(name, v_reset),
        **{f"c{i}": constant for i, constant in enumerate(constants)},
        "NEURON": name,
        "STATE": tl.float64 if state == torch.float64 else tl.float32,
        "HARD_RESET": v_reset is not None and not soft_reset_only(name),
        "SCALE_RESET": is_a(name, "klif") and constants[0] != 0.0,
        "PANELS": inner != neurons,
        "enable_fp_fusion": False,
    }


@dataclass(frozen=True)
class _Folded:
    """A parameter as a kernel reads it."""

    values: Tensor
    kind: str
    original: Tensor


class _Parameters:
    """The parameters of a launch: tensors in the order in which neurons are counted, and the sums of their gradients.

    Args:
        tensors: leak, threshold, gain, scale and shift, None where it is a number.
        shape: of one step.
        strides: of a dense step in the order of the count.
    """

    def __init__(self, tensors: Sequence[Tensor | None], shape: torch.Size, strides: tuple[int, ...]):
        self._shape, self._strides, self._neurons = shape, strides, shape.numel()
        # One length of the runs and one period for all: where parameters differ in it, the later are written out.
        self._runs: tuple[int, int] | None = None
        self._folded = [None if t is None else self._fold(t) for t in tensors]

    def _fold(self, t: Tensor) -> _Folded:
        if t.numel() == 1:
            return _Folded(t, "one", t)
        values, run, period = fold(t, self._shape, self._strides)
        kind = "neuron"
        if period != self._neurons:
            if self._neurons <= _LARGEST_INT and self._runs in (None, (run, period)):
                self._runs = run, period
                kind = "run"
            else:
                values, _, _ = fold(t.expand(self._shape), self._shape, self._strides)
        return _Folded(values, kind, t)

    def arguments(self) -> dict[str, object]:
        """Those of either kernel."""
        run, period = self._runs or (1, 1)
        found: dict[str, object] = {"run": run, "period": period}
        for name, folded in zip(PARAMETERS, self._folded, strict=True):
            found[f"{name}_ptr"] = None if folded is None else folded.values
            found[name.upper()] = "number" if folded is None else folded.kind
        return found

    def new_sums(self, wanted: int, programs: int) -> Tensor | None:
        """Room for the sums over time: a row for each wanted parameter, one for a neuron or, where a row has one value
        only, for a program."""
        rows = self._wanted(wanted)
        if not rows:
            return None
        columns = programs if all(folded.kind == "one" for _, folded in rows) else self._neurons
        return rows[0][1].values.new_empty(len(rows), columns, dtype=torch.float64)

    def gradients(self, sums: Tensor, wanted: int, programs: int, divides: bool) -> Tensor:
        """The wanted gradients, one after the other, each in its tensor's own order. Sums of torch's: in a fixed order.

        Args:
            divides: the neuron divides by the leak, and its sums lack the factor of -1 / leak^2.
        """
        flat = []
        for row, (slot, folded) in enumerate(self._wanted(wanted)):
            if folded.kind == "one":
                gradient = sums[row, :programs].sum().reshape(1)
            else:
                each = sums.as_strided(self._shape, self._strides, row * sums.shape[1])
                gradient = each.sum_to_size(folded.original.shape).reshape(-1)
            if divides and slot == 0:
                gradient = -gradient / folded.original.reshape(-1).double().square()
            flat.append(gradient)
        return torch.cat(flat)

    def _wanted(self, wanted: int) -> list[tuple[int, _Folded]]:
        return [(i, folded) for i, folded in enumerate(self._folded) if folded is not None and wanted >> i & 1]


def _rest(name: str, v_reset: float | None) -> float:
    """Where the membrane starts, leaks to and is reset to."""
    if name == "signed_if":
        return 0.5
    return 0.0 if v_reset is None else v_reset


def _packed(spikes: Tensor, state: Tensor) -> Tensor:
    """Bytes ``[T, N...]`` as bits, the first neuron lowest; neurons are counted in the memory order of a state.

    By torch, after the kernel: a byte's eight neurons may lie in two threads or two panels, and packing reads an eighth
    of what the kernel read in float32 or less.
    """
    strides = state.stride()
    order = sorted(range(state.dim()), key=lambda d: -strides[d])
    flat = spikes.permute(0, *[d + 1 for d in order]).reshape(spikes.shape[0], state.numel())
    eights = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights << torch.arange(8, dtype=torch.uint8, device=spikes.device)).sum(-1, dtype=torch.uint8)


def _state_like(x: Tensor, v: Tensor | None) -> Tensor:
    """An uninitialised membrane for x; its layout is the op's contract."""
    wide = torch.float64 in (x.dtype, None if v is None else v.dtype)
    dtype = torch.float64 if wide else torch.float32
    return torch.empty_like(x[0], dtype=dtype) if x.shape[0] else x.new_empty(x.shape[1:], dtype=dtype)


def _copied_back(promised: Tensor, written: Tensor | None) -> Tensor:
    """The output in the layout it was promised in: for an expanded x that may not be the order of x's dense copy."""
    return promised if written is None or written is promised else promised.copy_(written)
