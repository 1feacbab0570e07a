"""Layers of fixed-point numbers: trained as floats on the grid, evaluated as integers.

Each layer takes what the layer before it gave:

- a float tensor whose values lie on a grid, with its type in the attribute ``fixed_type`` (:class:`FixedInput` starts
  the chain in training mode). The layer computes what the integers would give, in float32 where the bound on the sum
  says that this is exact (at most 2^24 units of the grid), else in float64; gradients pass straight through the casts;
- a :class:`FixedTensor` (:class:`FixedInput` starts with one in evaluation mode). The layer computes in integers.

Both ways give the same numbers, to the bit, so long as the sums fit float64 (2^53 units), beyond which the first one
raises. Every layer sums exactly, in as many bits as that takes, and casts once, at its end, to its output's type: by
default nearest with ties to even, saturating. The binary points of that cast and of the weights are trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .casting import BIAS_BITS, FixedCast, Values, exact_dtype, range_frac_bits, type_of, with_type
from .linear import FixedConv2d, FixedLinear
from .tensor import FixedTensor
from .types import FixedType

SCALE_BITS, RECIPROCAL_BITS = 16, 16

__all__ = [
    "FixedAdd",
    "FixedAvgPool2d",
    "FixedBatchNorm2d",
    "FixedConv2d",
    "FixedFlatten",
    "FixedLinear",
    "FixedMaxPool2d",
    "FixedReLU",
]


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm as a scale and a shift in fixed point: ``cast(x * scale + shift)``.

    ``scale = weight / sqrt(var + eps)`` in 16 bits, whose binary point just holds the largest one; ``shift = bias -
    mean * scale`` in 32 bits on the grid of the product. Statistics are those of the batch in training mode and the
    running ones in evaluation mode, as in ``torch.nn.BatchNorm2d``; they are floats, what is computed from them is not.

    Args:
        num_features, eps, momentum: as ``torch.nn.BatchNorm2d``.
        width, options: of the output, as :class:`FixedLinear`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedBatchNorm2d, FixedTensor, FixedType
        >>> layer = FixedBatchNorm2d(1, eps=3.0, frac_bits=3)  # a scale of 1/2
        >>> layer(FixedTensor(torch.tensor([[[[8, 24]]]]), FixedType(8, 4))).float().tolist()
        [[[[0.25, 0.75]]]]
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, width: int = 8, **options):
        super().__init__(num_features, eps, momentum)
        self.output = FixedCast(width, **options)

    def scale_and_shift(self, x: FixedType, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Values on their grids (with gradients) in float64, and the fraction bits of scale and shift."""
        scale = (self.weight / (var + self.eps).sqrt()).double()
        most = scale.detach().abs().max().item()
        scale_frac = min(max(range_frac_bits(most, SCALE_BITS, True), SCALE_BITS - 40), SCALE_BITS + 4)
        scale = functional.quantize(scale, SCALE_BITS, SCALE_BITS - scale_frac, rounding="rnd_conv", overflow="sat")
        shift = self.bias.double() - mean.double() * scale
        int_bits = min(max(BIAS_BITS - x.frac_bits - scale_frac, -4), 40)
        shift = functional.quantize(shift, BIAS_BITS, int_bits, rounding="rnd_conv", overflow="sat")
        return scale, shift, scale_frac, BIAS_BITS - int_bits

    def raw_scale_and_shift(self, x: FixedType) -> tuple[FixedTensor, FixedTensor]:
        """Scale and shift of evaluation as they are stored."""
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            scale, shift, scale_frac, shift_frac = self.scale_and_shift(x, self.running_mean, self.running_var)
        types = FixedType(SCALE_BITS, SCALE_BITS - scale_frac), FixedType(BIAS_BITS, BIAS_BITS - shift_frac)
        raws = (t * 2.0**f for t, f in ((scale, scale_frac), (shift, shift_frac)))
        a, b = (FixedTensor(raw.long(), t) for raw, t in zip(raws, types, strict=True))
        return a, b

    def forward(self, x: Values) -> Values:  # type: ignore[override]
        input_type = type_of("FixedBatchNorm2d", x)
        if isinstance(x, FixedTensor):
            factor, offset = self.raw_scale_and_shift(input_type)
            total = x * factor.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)
            return self.output.integers(total.raw, total.type.frac_bits, total.type.largest)
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                count = x.numel() // x.shape[1]
                self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr,arg-type]
                self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)  # type: ignore[union-attr,arg-type]
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        else:
            mean, var = self.running_mean, self.running_var  # type: ignore[assignment]
        scale, shift, scale_frac, _ = self.scale_and_shift(input_type, mean, var)
        unit = 2.0 ** (input_type.frac_bits + scale_frac)
        units = input_type.largest * 2.0 ** (SCALE_BITS - 1) + shift.detach().abs().max().item() * unit
        dtype = exact_dtype("FixedBatchNorm2d", units)
        scale, shift = (t.to(dtype).view(-1, 1, 1) for t in (scale, shift))
        return self.output(x.to(dtype) * scale + shift)


class FixedReLU(nn.Module):
    """``cast(max(x, 0))``, to an unsigned type.

    Args:
        width, options: of the output, as :class:`FixedLinear`; ``signed`` is False by default.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedReLU, FixedTensor, FixedType
        >>> FixedReLU(width=4, frac_bits=2)(FixedTensor(torch.tensor([-8, 24]), FixedType(8, 4)))
        FixedTensor([0.0, 1.5], ap_ufixed<4, 2, AP_RND_CONV, AP_SAT>)
    """

    def __init__(self, *, width: int = 8, **options) -> None:
        super().__init__()
        self.output = FixedCast(width, **{"signed": False, **options})

    def forward(self, x: Values) -> Values:
        type = type_of("FixedReLU", x)
        if isinstance(x, FixedTensor):
            return self.output.integers(x.raw.clamp_min(0), type.frac_bits, type.largest)
        return self.output(x.relu())


class FixedAdd(nn.Module):
    """``cast(a + b)``, the shortcut's sum.

    Args:
        width, options: of the output, as :class:`FixedLinear`.

    Raises:
        TypeError: an input has no type, or one is of floats and the other of integers.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedAdd, FixedTensor, FixedType
        >>> a = FixedTensor(torch.tensor([8]), FixedType(8, 4))
        >>> FixedAdd(width=4, frac_bits=2)(a, a).float().item()
        1.0
    """

    def __init__(self, *, width: int = 8, **options) -> None:
        super().__init__()
        self.output = FixedCast(width, **options)

    def forward(self, a: Values, b: Values) -> Values:
        types = type_of("FixedAdd", a), type_of("FixedAdd", b)
        if isinstance(a, FixedTensor) and isinstance(b, FixedTensor):
            total = a + b
            return self.output.integers(total.raw, total.type.frac_bits, total.type.largest)
        if isinstance(a, FixedTensor) or isinstance(b, FixedTensor):
            raise TypeError("FixedAdd: expected two FixedTensors or two float tensors, got one of each")
        dtype = exact_dtype("FixedAdd", (types[0] + types[1]).largest)
        return self.output(a.to(dtype) + b.to(dtype))


class FixedAvgPool2d(nn.Module):
    """``cast(sum of a window * (1 / size))``: an exact sum, and the reciprocal of its size in 16 significant bits,
    which for a power of two is exact.

    Args:
        kernel_size: of windows that do not overlap; None (default) takes the whole image.
        width, options: of the output, as :class:`FixedLinear`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedAvgPool2d, FixedTensor, FixedType
        >>> x = FixedTensor(torch.tensor([[[[8, 24], [0, 0]]]]), FixedType(8, 4))
        >>> FixedAvgPool2d(frac_bits=4)(x).float().item()
        0.5
    """

    def __init__(self, kernel_size: int | None = None, *, width: int = 8, **options) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.output = FixedCast(width, **options)

    def forward(self, x: Values) -> Values:
        type = type_of("FixedAvgPool2d", x)
        window = (self.kernel_size,) * 2 if self.kernel_size else tuple(x.shape[-2:])
        count = window[0] * window[1]
        frac_bits = RECIPROCAL_BITS - 1 + math.ceil(math.log2(count))
        reciprocal = round(2**frac_bits / count)
        largest = type.largest * count * reciprocal
        exact_dtype("FixedAvgPool2d", largest)
        values = x.raw if isinstance(x, FixedTensor) else x
        # Sums of windows, exact in float64; F.avg_pool2d divides, by 1 here.
        sums = F.avg_pool2d(values.double(), window, divisor_override=1)
        if isinstance(x, FixedTensor):
            return self.output.integers(sums.long() * reciprocal, type.frac_bits + frac_bits, largest)
        return self.output(sums * (reciprocal * 2.0**-frac_bits))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class FixedMaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``, which picks and does not compute: the type is the input's.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedMaxPool2d, FixedTensor, FixedType
        >>> FixedMaxPool2d(2)(FixedTensor(torch.tensor([[[[8, 24], [0, 0]]]]), FixedType(8, 4))).float().item()
        1.5
    """

    def forward(self, x: Values) -> Values:  # type: ignore[override]
        type = type_of("FixedMaxPool2d", x)
        if isinstance(x, FixedTensor):
            return FixedTensor.trusted(super().forward(x.raw.double()).to(x.raw.dtype), type)
        return with_type(super().forward(x), type)


class FixedFlatten(nn.Flatten):
    """``torch.nn.Flatten`` that passes the type on.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedFlatten, FixedTensor, FixedType
        >>> FixedFlatten()(FixedTensor(torch.zeros(2, 3, 4).int(), FixedType(8, 4))).shape
        torch.Size([2, 12])
    """

    def forward(self, x: Values) -> Values:  # type: ignore[override]
        type = type_of("FixedFlatten", x)
        flat = x.flatten(self.start_dim, self.end_dim)
        return flat if isinstance(flat, FixedTensor) else with_type(flat, type)
