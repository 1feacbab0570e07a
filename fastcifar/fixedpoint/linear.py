"""The layers with weights, a matrix product and a convolution; :mod:`fastcifar.fixedpoint.layers` has the others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .casting import BIAS_BITS, FixedCast, Values, WeightCast, exact_dtype, type_of
from .products import integer_conv2d, integer_matmul
from .reference import _straight_through
from .tensor import FixedTensor
from .types import FixedType

__all__ = ["FixedConv2d", "FixedLinear"]


class _Product(nn.Module):
    """What a linear layer and a convolution share: weight and bias on grids, exact sums, one cast."""

    weight: Tensor
    bias: Tensor | None

    def _start(self, width: int, weight_width: int | None, per_channel: bool, options: dict) -> None:
        self.weight_cast = WeightCast(self.weight, weight_width or width, per_channel)
        self.output = FixedCast(width, **options)

    def raw_bias(self, x: FixedType) -> tuple[Tensor, int] | None:
        """The bias as integers, and their fraction bits: those of the sums of products, as far as a cast of
        BIAS_BITS bits from floats has them."""
        if self.bias is None:
            return None
        frac_bits = min(x.frac_bits + self.weight_cast.fixed_type.frac_bits, BIAS_BITS + 4)
        int_bits = min(max(BIAS_BITS - frac_bits, -4), 40)
        raw = functional.to_raw(self.bias.detach(), BIAS_BITS, int_bits, rounding="rnd_conv", overflow="sat")
        return raw.long(), BIAS_BITS - int_bits

    def raw_weight(self) -> FixedTensor:
        return self.weight_cast.of_floats(self.weight.detach())

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _integer_sum(self, x: FixedTensor, weight: FixedTensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Values) -> Values:
        op = type(self).__name__
        input_type = type_of(op, x)
        bias = self.raw_bias(input_type)
        shape = (-1, *[1] * (self.weight.dim() - 2))
        weight_type = self.weight_cast.fixed_type
        frac_bits = input_type.frac_bits + weight_type.frac_bits
        units = self.weight[0].numel() * input_type.largest * weight_type.largest
        if bias is not None:
            units += int(bias[0].abs().max()) << (frac_bits - bias[1])
        if isinstance(x, FixedTensor):
            sums = self._integer_sum(x, self.raw_weight())
            if bias is not None:
                sums = sums.long() + (bias[0] << (frac_bits - bias[1])).view(shape)
            return self.output.integers(sums, frac_bits, units)
        weight = self.weight_cast(self.weight)
        dtype = exact_dtype(op, units)
        sums = self._sum(x.to(dtype), weight.to(dtype))
        if bias is not None:
            assert self.bias is not None
            value = bias[0].to(dtype) * 2.0 ** -bias[1]
            sums = sums + _straight_through(value, self.bias.to(dtype)).view(shape)
        return self.output(sums)


class FixedLinear(_Product):
    """``cast(x @ weight.T + bias)``: integer products, summed exactly, and one cast.

    Args:
        in_features, out_features, bias: as ``torch.nn.Linear``.
        width: of the output. Default 8.
        weight_width: of the weights; None: ``width``.
        per_channel: whether the weights of each output have a binary point of their own. The products are then aligned
            by exact shifts of the weights, and ``raw_weight`` and :func:`~fastcifar.fixedpoint.to_hls` give them in a
            type that is wider by as many bits as the binary points lie apart. Default False.
        options: of the output's :class:`FixedCast`.

    The bias is stored in 32 bits on the grid of the products.

    Raises:
        TypeError: the input has no type.
        ValueError: sums of floats might leave 2^53 units, or a binary point is not calibrated.

    Source: QFX, 2024, where each layer has a trained binary point.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedLinear, FixedTensor, FixedType
        >>> layer = FixedLinear(2, 1, bias=False, frac_bits=2)
        >>> state = {"weight": torch.tensor([[0.5, -0.25]]), "weight_cast.frac_bits": torch.tensor(7.0)}
        >>> _ = layer.load_state_dict(state, strict=False)
        >>> layer(FixedTensor(torch.tensor([[7, 2]]), FixedType(8, 4)))
        FixedTensor([[0.25]], ap_fixed<8, 6, AP_RND_CONV, AP_SAT>)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        width: int = 8,
        weight_width: int | None = None,
        per_channel: bool = False,
        **options,
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = plain.weight, plain.bias
        self._start(width, weight_width, per_channel, options)

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _integer_sum(self, x: FixedTensor, weight: FixedTensor) -> Tensor:
        return integer_matmul(x.raw, weight.raw, x.type.largest, weight.type.largest)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class FixedConv2d(_Product):
    """``cast(conv2d(x, weight) + bias)``: integer products, summed exactly, and one cast.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``torch.nn.Conv2d``;
            ``padding`` in numbers, of zeros.
        width, weight_width, per_channel, options: as :class:`FixedLinear`.

    Raises:
        TypeError, ValueError: as :class:`FixedLinear`, or ``padding`` is a word.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedConv2d, FixedTensor, FixedType
        >>> layer = FixedConv2d(1, 4, 3, padding=1, frac_bits=4)
        >>> layer(FixedTensor(torch.ones(2, 1, 8, 8).int(), FixedType(8, 4))).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        *,
        width: int = 8,
        weight_width: int | None = None,
        per_channel: bool = False,
        **options,
    ) -> None:
        super().__init__()
        if isinstance(padding, str):
            raise ValueError(f"FixedConv2d: expected padding in numbers, got {padding!r}")
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.stride, self.padding, self.dilation, self.groups = plain.stride, plain.padding, plain.dilation, groups
        self._start(width, weight_width, per_channel, options)

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def _integer_sum(self, x: FixedTensor, weight: FixedTensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return integer_conv2d(x.raw, weight.raw, x.type.largest, weight.type.largest, *geometry)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.weight.shape
        return (
            f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"
        )
