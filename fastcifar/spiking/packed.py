"""Spikes as bits: eight neurons a byte, and the layers that read them without unpacking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        n = inner.numel()
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flat = (self.bits.unsqueeze(-1) >> shifts & 1).flatten(1)[:, :n].to(dtype)
        return flat.as_strided((steps, *inner), (flat.stride(0), *self.strides))

    def count(self) -> int:
        """How many spikes there are."""
        return int(_COUNTS.to(self.bits.device)[self.bits.long()].sum())


_COUNTS = torch.tensor([bin(byte).count("1") for byte in range(256)])


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
    flat = spikes.permute(0, *[d + 1 for d in order]).reshape(spikes.shape[0], -1) != 0
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = 2 ** torch.arange(8, device=spikes.device)
    return PackedSpikes((padded * weights).sum(-1).to(torch.uint8), spikes.shape, strides)


def _step_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a dense step in the order in which the dimensions of ``x`` lie in memory."""
    return torch.empty_like(x[0], device="meta").stride() if x.shape[0] else x.new_empty(x.shape[1:]).stride()
