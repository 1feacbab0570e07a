"""How a sequence [T, N...] lies in memory, for launchers that read it in place instead of calling ``contiguous``.

A dense tensor, whatever the order of its dimensions, is `outer` panels of [T, inner]: dimensions inside of T count as
one, and so do those outside of it. Outer is 1 where T is outermost, channels_last included; a [B, T, ...] tensor seen
as [T, B, ...] has B panels. Neuron n then lies at ``n + n // inner * (T - 1) * inner``, its next step `inner` further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def inner_size(x: Tensor) -> int | None:
    """Elements from one time step of x to the next; None if x overlaps itself or has gaps. x is not empty."""
    if x.is_contiguous():
        return x.numel() // x.shape[0]
    expected, inner = 1, None
    for stride, size, dim in sorted((x.stride(d), x.shape[d], d) for d in range(x.dim()) if x.shape[d] != 1):
        if stride != expected:
            return None
        if dim == 0:
            inner = expected
        expected *= size
    return expected if inner is None else inner  # T = 1: nothing is further out than it


def dense(x: Tensor) -> tuple[Tensor, int]:
    """x and its inner size; a copy of x, laid out as ``empty_like(x)``, if x is not dense."""
    inner = inner_size(x)
    if inner is None:
        x = torch.empty_like(x).copy_(x)
        inner = inner_size(x)
        assert inner is not None
    return x, inner


def step_strides(x: Tensor, inner: int) -> tuple[int, ...]:
    """Strides of a dense tensor with the shape of one time step of x and x's order of dimensions."""
    return tuple(stride // x.shape[0] if stride > inner else stride for stride in x.stride()[1:])


def in_order(t: MaybeTensor, strides: tuple[int, ...]) -> MaybeTensor:
    """``t`` itself if it has these strides, else a copy that has them."""
    if t is None or has_strides(t, strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def has_strides(t: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``t`` has these strides, where they matter."""
    return all(a == b or size == 1 for a, b, size in zip(t.stride(), strides, t.shape, strict=True))


def aligned(inner: int, *tensors: Tensor | None) -> bool:
    """Whether every time step starts on 16 bytes, in multiples of 16 elements: what Triton specialises a kernel on."""
    return inner % 16 == 0 and not any(t is not None and t.data_ptr() % 16 for t in tensors)


def fold(parameter: Tensor, shape: Sequence[int], strides: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """A parameter that broadcasts against a step of this shape, in the order in which a kernel counts neurons.

    Returns:
        ``(values, run, period)``: neuron n, counted in the memory order of a dense step with these strides, takes
        ``values[n // run % period]``. A parameter that does not fold like that is written out for every neuron.
    """
    sizes = (1,) * (len(shape) - parameter.dim()) + tuple(parameter.shape)
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])  # outermost first
    own = [place for place, d in enumerate(order) if sizes[d] != 1]
    if not own:
        return parameter.reshape(1), math.prod(shape), 1
    first, last = own[0], own[-1] + 1
    if last - first != len(own):
        parameter = parameter.expand(shape)
        sizes, first, last = tuple(shape), 0, len(order)
    inside = order[first:last]
    rest = [d for d in range(len(shape)) if d not in inside]
    values = parameter.reshape(sizes).permute(*rest, *inside).reshape(-1)
    return values, math.prod(shape[d] for d in order[last:]), values.numel()
