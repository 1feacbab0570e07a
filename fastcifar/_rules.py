"""What an op's results look like without computing them (its fake rule, ``<op>_fake``), and how it takes one dimension
more (its vmap rule, ``<op>_vmap``); :mod:`fastcifar._library` registers them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute and keep state for an input of ``dtype``."""
    return torch.float32 if dtype in _HALF else dtype


def _move(t: Tensor | None, batch_dim: int | None, to: int, size: int) -> Tensor | None:
    """``t`` with its batch dimension at ``to``; expanded there where it has none."""
    if t is None:
        return None
    if batch_dim is None:
        return t.unsqueeze(to).expand(*t.shape[:to], size, *t.shape[to:])
    return t.movedim(batch_dim, to)


# ---- spiking ---------------------------------------------------------------------------------------------------------
# Time is dimension 0 and everything after it is neurons, so a vmapped dimension is one more dimension of neurons.
# Autocast: no rule; the kernels take any floating dtype and compute in float32 inside.


_SECOND_STATE = (7, 8, 12, 13, 14)  # has_second_state in csrc/cpu/spiking.h


def _neuron_state(x: Tensor, v: Tensor | None) -> Tensor:
    dtype = state_dtype(x.dtype) if v is None else v.dtype
    return torch.empty_like(x[0], dtype=dtype) if x.shape[0] else x.new_empty(x.shape[1:], dtype=dtype)


def neuron_forward_fake(x, v, w, leak, threshold, gain, scale, shift, neuron, numbers, v_reset, spike_format, store):
    state = _neuron_state(x, v)
    if spike_format == 2:
        spikes = x.new_empty((x.shape[0], (state.numel() + 7) // 8), dtype=torch.uint8)
    else:
        spikes = torch.empty_like(x, dtype=torch.uint8 if spike_format else x.dtype)
    none = x.new_empty((0,), dtype=state.dtype)
    w_last = torch.empty_like(state) if neuron in _SECOND_STATE else none
    return spikes, state, w_last, torch.empty_like(x, dtype=state.dtype) if store else torch.empty_like(none)


def neuron_backward_fake(grad_spikes, grad_v_last, grad_w_last, grad_v_seq, x, v, w, *rest):
    *parameters, wanted = *rest[:5], rest[-1]
    state = _neuron_state(x, v)
    none = x.new_empty((0,), dtype=state.dtype)
    flat = sum(p.numel() for i, p in enumerate(parameters) if wanted >> i & 1)
    grad_v, grad_w = (torch.empty_like(none if t is None else state) for t in (v, w))
    return torch.empty_like(x), grad_v, grad_w, x.new_empty((flat,), dtype=torch.float64)


def _batched_parameter(p: Tensor | None, dim: int | None, x_dims: int, size: int, expand: bool) -> Tensor | None:
    """A parameter that broadcasts against ``[size, N...]``, N of ``x_dims`` dimensions."""
    if p is None or (dim is None and not expand):
        return p
    p = p.unsqueeze(0).expand(size, *p.shape) if dim is None else p.movedim(dim, 0)
    return p.reshape(size, *[1] * (x_dims - p.dim() + 1), *p.shape[1:])


def neuron_forward_vmap(info, in_dims, x, v, w, *rest):
    size = info.batch_size
    x, v, w = (_move(t, dim, to, size) for t, dim, to in zip((x, v, w), in_dims[:3], (1, 0, 0), strict=True))
    parameters = [
        _batched_parameter(p, d, x.dim() - 2, size, False) for p, d in zip(rest[:5], in_dims[3:8], strict=True)
    ]
    neuron, _, _, spike_format, store_v_seq = rest[5:]
    if spike_format == 2:
        raise RuntimeError("vmap: packed spikes have no dimension to map over")
    dims = (1, 0, 0 if neuron in _SECOND_STATE else None, 1 if store_v_seq else None)
    return torch.ops.fastcifar.neuron_forward(x, v, w, *parameters, *rest[5:]), dims


def neuron_backward_vmap(info, in_dims, *arguments):
    size, wanted = info.batch_size, arguments[-1]
    where = (1, 0, 0, 1, 1, 0, 0)
    sequences = [_move(t, d, to, size) for t, d, to in zip(arguments[:7], in_dims[:7], where, strict=True)]
    x, v, w = sequences[4:]
    assert x is not None
    # A gradient that is wanted belongs to one sample, so each sample has a parameter of its own.
    parameters = [
        _batched_parameter(p, d, x.dim() - 2, size, bool(wanted >> i & 1))
        for i, (p, d) in enumerate(zip(arguments[7:12], in_dims[7:12], strict=True))
    ]
    *grads, flat = torch.ops.fastcifar.neuron_backward(*sequences, *parameters, *arguments[12:])
    counts = [p.numel() for i, p in enumerate(parameters) if p is not None and wanted >> i & 1]
    flat = torch.cat([part.view(size, -1) for part in flat.split(counts)], 1) if counts else flat
    return (*grads, flat), (1, None if v is None else 0, None if w is None else 0, 0 if counts else None)


def packed_conv_fake(bits, weight, bias, height, width, kernel, stride, padding, dilation):
    sizes = zip((height, width), kernel, stride, padding, dilation, strict=True)
    out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    return weight.new_empty((bits.shape[0], *out, weight.shape[1]))


# ---- spectral --------------------------------------------------------------------------------------------------------
# A vmapped dimension joins the batch, or, where the weight (or its gradient) has it too, the channels.


def spectral_gate_forward_fake(x, weight, wide):
    return x.new_empty(x.shape, dtype=state_dtype(x.dtype) if wide else x.dtype)


def spectral_gate_backward_fake(grad, x, weight, wants_x, wants_weight):
    none = (0,)
    return x.new_empty(x.shape if wants_x else none), weight.new_empty(weight.shape if wants_weight else none)


def spectrum_forward_fake(x, blocks, inner):
    batch, height, width, channels = x.shape
    shape = (blocks, batch, height, width // 2 + 1, 2, channels // blocks)
    return x.new_empty(shape, dtype=state_dtype(x.dtype))


def spectrum_inverse_fake(spectrum, width, inner):
    blocks, batch, height, _, _, channels = spectrum.shape
    return spectrum.new_empty((batch, height, width, blocks * channels))


def spectrum_real_parts_fake(half, channels):
    return half.new_empty((half.shape[0], half.shape[1], channels))


def spectrum_real_parts_vmap(info, in_dims, half, channels):
    out = torch.ops.fastcifar.spectrum_real_parts(_joined(half, in_dims[0], 0, info.batch_size), channels)
    return out.unflatten(0, (info.batch_size, -1)), 0


def _joined(t: Tensor, dim: int | None, to: int, size: int) -> Tensor:
    """``t`` with its batch dimension (expanded where it has none) merged into the one that is then after it."""
    moved = _move(t, dim, to, size)
    assert moved is not None
    return moved.flatten(to, to + 1)


def spectral_gate_forward_vmap(info, in_dims, x, weight, wide):
    size = info.batch_size
    if in_dims[1] is None:
        out = torch.ops.fastcifar.spectral_gate_forward(_joined(x, in_dims[0], 0, size), weight, wide)
        return out.unflatten(0, (size, -1)), 0
    x, weight = _joined(x, in_dims[0], 3, size), _joined(weight, in_dims[1], 2, size)
    return torch.ops.fastcifar.spectral_gate_forward(x, weight, wide).unflatten(3, (size, -1)), 3


def spectral_gate_backward_vmap(info, in_dims, grad, x, weight, wants_x, wants_weight):
    size = info.batch_size
    if in_dims[2] is None and not wants_weight:
        grad, x = (_joined(t, d, 0, size) for t, d in zip((grad, x), in_dims, strict=False))
        grad_x, none = torch.ops.fastcifar.spectral_gate_backward(grad, x, weight, wants_x, wants_weight)
        return (grad_x.unflatten(0, (size, -1)) if wants_x else grad_x, none), (0 if wants_x else None, None)
    grad, x = (_joined(t, d, 3, size) for t, d in zip((grad, x), in_dims, strict=False))
    weight = _joined(weight, in_dims[2], 2, size)
    grad_x, grad_weight = torch.ops.fastcifar.spectral_gate_backward(grad, x, weight, wants_x, wants_weight)
    grad_x = grad_x.unflatten(3, (size, -1)) if wants_x else grad_x
    grad_weight = grad_weight.unflatten(2, (size, -1)) if wants_weight else grad_weight
    return (grad_x, grad_weight), (3 if wants_x else None, 2 if wants_weight else None)


def spectrum_forward_vmap(info, in_dims, x, blocks, inner):
    out = torch.ops.fastcifar.spectrum_forward(_joined(x, in_dims[0], 0, info.batch_size), blocks, inner)
    return out.unflatten(1, (info.batch_size, -1)), 1


def spectrum_inverse_vmap(info, in_dims, spectrum, width, inner):
    out = torch.ops.fastcifar.spectrum_inverse(_joined(spectrum, in_dims[0], 1, info.batch_size), width, inner)
    return out.unflatten(0, (info.batch_size, -1)), 0


# ---- fixedpoint ------------------------------------------------------------------------------------------------------
# A vmapped dimension is one more dimension of x, before the others. Where samples have binary points, their gradients,
# or random numbers of their own, they are cast one after the other.

_STOCHASTIC = 7  # of ROUNDINGS


def _fixed_like(x, rounding, dtype=None):
    if rounding == _STOCHASTIC:  # whose random numbers are counted row by row
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty_like(x, dtype=dtype)


def fixed_quantize_fake(x, frac_bits, seed, width, int_bits, signed, rounding, overflow, saturated_bits):
    return _fixed_like(x, rounding)


def limit_digits_fake(x, k, signed_digits):
    return torch.empty_like(x)


def limit_digits_vmap(info, in_dims, x, k, signed_digits):
    return torch.ops.fastcifar.limit_digits(x.movedim(in_dims[0], 0), k, signed_digits), 0


def fixed_to_raw_fake(x, seed, width, int_bits, signed, rounding, overflow, saturated_bits):
    return _fixed_like(x, rounding, torch.int64 if width == 32 and not signed else torch.int32)


def fixed_quantize_backward_fake(grad, x, frac_bits, seed, *rest):
    wants_x, wants_frac_bits = rest[-2:]
    grad_x = _fixed_like(x, rest[3]) if wants_x else x.new_empty((0,))
    points = frac_bits.numel() if wants_frac_bits else 0
    return grad_x, x.new_empty((points,), dtype=torch.float64)


def _fixed_vmap(op: str, tensors: int, alone: Callable[..., bool]) -> Callable:
    """The rule of an op whose first arguments are ``tensors`` tensors, x (and its gradient) before the others."""

    def rule(info, in_dims, *arguments):
        size, call = info.batch_size, getattr(torch.ops.fastcifar, op)
        given, rest = arguments[:tensors], arguments[tensors:]
        first = 2 if op == "fixed_quantize_backward" else 1
        dims = in_dims[:tensors]
        if all(d is None for d in dims[first:]) and not alone(*rest):
            out = call(
                *(_move(t, d, 0, size) for t, d in zip(given[:first], dims, strict=False)), *given[first:], *rest
            )
            return (out, 0) if first == 1 else (out, (0, None))
        each = [
            call(*(t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True)), *rest)
            for i in range(size)
        ]
        if first == 1:
            return torch.stack(each), 0
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0)

    return rule


fixed_quantize_vmap = _fixed_vmap("fixed_quantize", 3, lambda *rest: rest[3] == _STOCHASTIC)
fixed_to_raw_vmap = _fixed_vmap("fixed_to_raw", 2, lambda *rest: rest[3] == _STOCHASTIC)
fixed_quantize_backward_vmap = _fixed_vmap(
    "fixed_quantize_backward", 4, lambda *rest: rest[3] == _STOCHASTIC or rest[-1] or not rest[-2]
)


# ---- fixedpoint: products of integers --------------------------------------------------------------------------------


def integer_conv_fake(x, weight, stride, padding, dilation, groups, wide):
    sizes = zip(x.shape[1:3], weight.shape[1:3], stride, padding, dilation, strict=True)
    out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    return x.new_empty((x.shape[0], *out, weight.shape[0]), dtype=torch.int64 if wide else torch.int32)


def integer_conv_vmap(info, in_dims, x, weight, *geometry):
    """More images where x alone is mapped; weights of their own are taken one after the other."""
    call, size = torch.ops.fastcifar.integer_conv, info.batch_size
    x_dim, weight_dim = in_dims[:2]
    if weight_dim is None:
        return call(_joined(x, x_dim, 0, size), weight, *geometry).unflatten(0, (size, -1)), 0
    each = [call(x if x_dim is None else x.select(x_dim, i), weight.select(weight_dim, i), *geometry)
            for i in range(size)]  # fmt: skip
    return torch.stack(each), 0


# ---- earlyexit -------------------------------------------------------------------------------------------------------
# Each sample of a vmapped dimension is a batch with lists of rows of its own.


def exit_decide_fake(logits, thresholds, threshold, criterion, temperature, strict):
    rows = logits.shape[0]
    whole = [logits.new_empty((rows,), dtype=torch.int64) for _ in range(3)]
    return logits.new_empty((rows,), dtype=torch.float32), *whole, logits.new_empty((), dtype=torch.int64)


def exit_decide_vmap(info, in_dims, logits, thresholds, *rest):
    given = zip((logits, thresholds), in_dims, strict=False)
    each = [[t if d is None else t.select(d, i) for i in range(info.batch_size)] for t, d in given]
    results = [torch.ops.fastcifar.exit_decide(*pair, *rest) for pair in zip(*each, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * 5


# ---- diffusion -------------------------------------------------------------------------------------------------------
# A vmapped dimension joins the samples; programs of their own are then one for each sample.


def _step_like(x: Tensor) -> Tensor:
    """Like x where its samples are dense in some order, without gaps between them; else contiguous."""
    length = x[0].numel() if x.dim() and x.shape[0] else 0
    if x.is_contiguous() or x.dim() == 0:
        return torch.empty_like(x)
    dims = sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size != 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        expected *= size
    if x.stride(0) < length:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty_strided(x.shape, (length, *x.stride()[1:]))


def solver_step_fake(x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream, wanted):
    return tuple(_step_like(x) if wanted >> i & 1 else x.new_empty((0,)) for i in range(3))


def solver_step_into_fake(*arguments):
    return None


def solver_table_step_fake(*arguments):
    return None


def solver_step_backward_fake(grad_x_next, grad_converted, grad_corrected, x, *rest):
    *_, coefficients, _, _, _, _, wants = rest
    like = _step_like(x)
    count = bin(wants & 1023).count("1")
    grads = x.new_empty_strided((count, *like.shape), (x.numel(), *like.stride()))
    programs = coefficients.shape[0] if coefficients is not None and coefficients.dim() == 3 else 1
    shape = (programs, 3, 11) if wants >> 10 & 1 else (0,)
    return grads, torch.empty(shape, dtype=torch.float64, device="cpu" if coefficients is None else coefficients.device)


def normal_numbers_fake(seed, stream, n):
    return seed.new_empty((n,), dtype=torch.float32)


def magnitude_quantile_fake(x, q):
    return x.new_empty((x.shape[0],))


def _step_vmap(info, in_dims, given, grads=(), grad_dims=()):
    """The tensors of a step with the mapped dimension joined to the samples, programs for each of them."""
    x, output, uncond, history, noise, seed, coefficients = given
    if seed is not None:
        raise RuntimeError("vmap: noise that is drawn is counted over one tensor; give it as a tensor")
    size, (x_dim, output_dim, uncond_dim, history_dims, noise_dim, _, coefficients_dim) = info.batch_size, in_dims
    pairs = [(x, x_dim), (output, output_dim), (uncond, uncond_dim), (noise, noise_dim)]
    pairs += [*zip(history, history_dims, strict=True), *zip(grads, grad_dims, strict=True)]
    x, output, uncond, noise, *rest = (None if t is None else _joined(t, d, 0, size) for t, d in pairs)
    history, grads = rest[: len(history)], rest[len(history) :]
    if coefficients is not None:
        inner = coefficients.dim() - (coefficients_dim is not None)
        rows = _move(coefficients, coefficients_dim, 0, size)
        assert rows is not None
        assert x is not None
        samples = x.shape[0] // size
        rows = rows[:, None].expand(size, samples, 3, 11) if inner == 2 else rows
        coefficients = rows.reshape(size * samples, 3, 11)
    return x, output, uncond, history, noise, coefficients, grads


def solver_step_vmap(info, in_dims, x, output, uncond, history, noise, seed, coefficients, *rest):
    given = (x, output, uncond, history, noise, seed, coefficients)
    x, output, uncond, history, noise, coefficients, _ = _step_vmap(info, in_dims[:7], given)
    results = torch.ops.fastcifar.solver_step(x, output, uncond, history, noise, None, coefficients, *rest)
    made = [r.shape == x.shape for r in results]
    results = tuple(r.unflatten(0, (info.batch_size, -1)) if m else r for r, m in zip(results, made, strict=True))
    return results, tuple(0 if m else None for m in made)


def solver_step_backward_vmap(info, in_dims, *arguments):
    grads, given, (*numbers, wants) = arguments[:3], arguments[3:10], arguments[10:]
    of_rows = given[-1]
    one_program = of_rows is None or of_rows.dim() - (in_dims[9] is not None) == 2
    x, output, uncond, history, noise, coefficients, grads = _step_vmap(info, in_dims[3:10], given, grads, in_dims[:3])
    to_tensors, to_rows = torch.ops.fastcifar.solver_step_backward(
        *grads, x, output, uncond, history, noise, None, coefficients, *numbers, wants
    )
    to_tensors = to_tensors.unflatten(1, (info.batch_size, -1))
    if not wants >> 10 & 1:
        return (to_tensors, to_rows), (1, None)
    to_rows = to_rows.unflatten(0, (info.batch_size, -1))
    return (to_tensors, to_rows.sum(1, keepdim=True) if one_program else to_rows), (1, 0)


# ---- diffusion: tree search ------------------------------------------------------------------------------------------
# A tree has no vmap rule: more of them are more roots.


def tree_select_fake(value, visits, taken, start, count, pool, allowed, roots, uniform, descents, *rest):
    return roots.new_empty((roots.shape[0], descents))


def tree_sample_fake(value, start, count, pool, roots, uniform, lam):
    return roots.new_empty(roots.shape)


def tree_backup_fake(value, parent, depth, start, count, pool, nodes, lam):
    return None
