"""Spikes as bits: eight neurons a byte, and the layers that read them without unpacking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _library

# Share of neurons that fire above which unpacking and a dense product is the faster way (docs/spiking.md has the
# measurement).
DENSEST = 0.25


@dataclass(frozen=True)
class PackedSpikes:
    """Spikes ``[T, N...]`` as one bit each.

    Attributes:
        bits: uint8 ``[T, ceil(n / 8)]`` with n the neurons of a step; neuron i of a step, counted in the memory order
            of ``strides``, is bit ``i % 8`` (from the lowest) of byte ``i // 8``. Bits past the last neuron are 0.
        shape: the shape of the spikes, time first.
        strides: strides of one step as it lies in memory (dense, any order of its dimensions).
    """

    bits: Tensor
    shape: torch.Size
    strides: tuple[int, ...]

    @staticmethod
    def of_kernel(bits: Tensor, x: Tensor) -> PackedSpikes:
        """What neuron_forward wrote for ``x``."""
        return PackedSpikes(bits, x.shape, _step_strides(x))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The spikes ``[T, N...]`` in ``dtype``, in the layout that was packed."""
        steps, inner = self.shape[0], self.shape[1:]
        table = (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).to(self.bits.device, dtype)
        flat = nn.functional.embedding(self.bits.int(), table).flatten(1)
        return flat.as_strided((steps, *inner), (flat.stride(0), *self.strides))

    def count(self) -> int:
        """How many spikes there are. On a GPU this waits for them."""
        counts = torch.tensor([bin(byte).count("1") for byte in range(256)], device=self.bits.device)
        return int((torch.bincount(self.bits.flatten(), minlength=256) * counts).sum())

    def density(self) -> float:
        """The share of neurons and steps that fire."""
        return self.count() / max(1, self.shape.numel())


def pack(spikes: Tensor) -> PackedSpikes:
    """Spikes ``[T, N...]`` (0 or 1, any dtype) as bits; see :class:`PackedSpikes`.

    Raises:
        TypeError: ``spikes`` is not a tensor.
        ValueError: it has no time dimension.
    """
    if not isinstance(spikes, Tensor):
        raise TypeError(f"pack: expected spikes to be a tensor [T, N...], got {type(spikes).__name__}")
    if spikes.dim() == 0:
        raise ValueError("pack: expected spikes of shape [T, N...], time first, got a scalar tensor")
    strides = _step_strides(spikes)
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    flat = spikes.permute(0, *[d + 1 for d in order]).reshape(spikes.shape[0], spikes.shape[1:].numel()) != 0
    padded = nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = 2 ** torch.arange(8, device=spikes.device)
    return PackedSpikes((padded * weights).sum(-1).to(torch.uint8), spikes.shape, strides)


def packed_linear(spikes: PackedSpikes, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on packed spikes: ``unpack() @ weight.T + bias``.

    Where few neurons fire (up to :data:`DENSEST` of them), a float32 ``weight`` is added up row by row for the spikes
    there are, and nothing is unpacked; else, and where a gradient is recorded or the features are no multiple of 8,
    the spikes are unpacked into a dense product. Both agree to rounding.

    Args:
        spikes: ``[T, B, features]``, contiguous when it was packed.
        weight: ``[outputs, features]``; bias: ``[outputs]`` or None.

    Returns:
        ``[T, B, outputs]`` in weight's dtype.

    Raises:
        TypeError, ValueError: the arguments do not fit.
    """
    _check("packed_linear", spikes, weight, 2)
    steps, batch, features = spikes.shape
    contiguous = spikes.strides == (features, 1) or batch == 1
    if not (contiguous and features % 8 == 0 and _pays(spikes, weight, bias)):
        return nn.functional.linear(spikes.unpack(weight.dtype), weight, bias)
    bits = spikes.bits.view(steps * batch, features // 8)
    out = _conv(bits, weight.t(), bias, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    return out.view(steps, batch, weight.shape[0])


def packed_conv2d(
    spikes: PackedSpikes,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """A convolution on packed spikes; :func:`packed_linear` says when they are read as bits.

    Args:
        spikes: ``[T, B, C, H, W]``, channels-last when it was packed (else it is unpacked), C a multiple of 8.
        weight: ``[outputs, C, kernel, kernel]``; bias: ``[outputs]`` or None.
        stride, padding, dilation: numbers or pairs, as in ``torch.nn.functional.conv2d``.

    Returns:
        ``[T, B, outputs, H', W']`` in weight's dtype, channels-last.

    Raises:
        TypeError, ValueError: the arguments do not fit.
    """
    _check("packed_conv2d", spikes, weight, 4)
    steps, batch, channels, height, width = spikes.shape
    last = (height * width * channels, 1, width * channels, channels)
    channels_last = all(a == b or n == 1 for a, b, n in zip(spikes.strides, last, spikes.shape[1:], strict=True))
    stride_, padding_, dilation_ = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    if not (channels_last and channels % 8 == 0 and _pays(spikes, weight, bias)):
        x = spikes.unpack(weight.dtype).flatten(0, 1)
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation).unflatten(0, (steps, batch))
    bits = spikes.bits.view(steps * batch, -1)
    outputs, kernel = weight.shape[0], (weight.shape[2], weight.shape[3])
    rows = weight.permute(2, 3, 1, 0).reshape(-1, outputs)
    out = _conv(bits, rows, bias, (height, width), kernel, stride_, padding_, dilation_)
    return out.movedim(-1, 1).unflatten(0, (steps, batch))


def _conv(
    bits: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The kernel takes outputs in multiples of 16."""
    outputs = rows.shape[1]
    missing = -outputs % 16
    rows = nn.functional.pad(rows, (0, missing)).contiguous()
    bias = None if bias is None else nn.functional.pad(bias, (0, missing)).contiguous()
    op = torch.ops.fastcifar.packed_conv.default
    return op(bits, rows, bias, *size, list(kernel), list(stride), list(padding), list(dilation))[..., :outputs]


def _pays(spikes: PackedSpikes, weight: Tensor, bias: Tensor | None) -> bool:
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    served = weight.dtype == torch.float32 and _library.serves("packed_conv", weight)
    return served and not graph and spikes.density() <= DENSEST


def _check(op: str, spikes: PackedSpikes, weight: Tensor, dims: int) -> None:
    if not isinstance(spikes, PackedSpikes):
        raise TypeError(f"{op}: expected spikes to be a PackedSpikes, got {type(spikes).__name__}")
    if len(spikes.shape) != dims + 1:
        raise ValueError(f"{op}: expected spikes of {dims + 1} dimensions, time first, got {tuple(spikes.shape)}")
    if weight.dim() != dims or weight.shape[1] != spikes.shape[2]:
        raise ValueError(
            f"{op}: expected weight of {dims} dimensions, the second being {spikes.shape[2]} as in spikes, "
            f"got {tuple(weight.shape)}"
        )


def _step_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a dense step in the order in which the dimensions of ``x`` lie in memory."""
    return torch.empty_like(x[0], device="meta").stride() if x.shape[0] else x.new_empty(x.shape[1:]).stride()
