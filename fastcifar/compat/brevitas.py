"""Binary points of networks that brevitas has trained with its fixed-point quantizers (``brevitas.quant.fixed_point``).

A brevitas state_dict holds the logarithm v of each trained scale, or none for weights whose scale is that of their
largest magnitude, v = log2 max |w|. With W bits the scale is ``2**ceil(v) * 2**-(W - 1)`` (``2**-W`` without sign): the
exponent is rounded up, where our binary points are rounded to the nearest. So what is taken over is the whole number ::

    F = W - signed - ceil(v)

with which our casts give brevitas's numbers to the bit: nearest with ties to even, saturating, and for weights a narrow
range, -(2**(W-1) - 1) to 2**(W-1) - 1, which is ``sat_sym``. Training goes on from there by the gradient of
:func:`fastcifar.fixedpoint.quantize_trainable`.

The state_dict names neither widths nor signs, nor does it tell a scale's logarithm from a scale: say which quantizers
are not of 8 bits and which have no sign, and give it only to networks whose quantizers are named ``...FixedPoint...``.
Our casts take int_bits, ``ceil(v) + signed``, of -4 to 40: a weight with no magnitude above 2^-6 is refused.
Checked against brevitas 0.13.4; it need not be installed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..fixedpoint.casting import FixedCast
from ..fixedpoint.modules import FixedPoint
from ..fixedpoint.reference import INT_BITS
from ..fixedpoint.types import FixedType

__all__ = ["BinaryPoint", "binary_points", "load_binary_points"]

_ACTIVATIONS = ("act_quant", "input_quant", "output_quant")
_PROXY = ".fused_activation_quant_proxy.tensor_quant.scaling_impl."
_WEIGHT = ".weight_quant.tensor_quant.scaling_impl."
_LEAST_SCALE = 1e-10  # brevitas's scaling_min_val of weights


@dataclass(frozen=True)
class BinaryPoint:
    """Where one of brevitas's quantizers has its binary point.

    Attributes:
        frac_bits: F, whole numbers in float32; a scalar, or ``[C, 1, ...]`` of one a channel.
        width: bits in all.
        signed: whether they are two's complement.
        narrow: whether the least number is given up, as for weights.
    """

    frac_bits: Tensor
    width: int
    signed: bool
    narrow: bool

    @property
    def overflow(self) -> str:
        return "sat_sym" if self.narrow else "sat"

    @property
    def fixed_type(self) -> FixedType:
        """The type of the numbers.

        Raises:
            ValueError: channels have binary points of their own.
        """
        if self.frac_bits.numel() != 1:
            raise ValueError(f"BinaryPoint: expected one binary point, got {self.frac_bits.numel()}, one a channel")
        int_bits = self.width - int(self.frac_bits)
        return FixedType(self.width, int_bits, self.signed, "rnd_conv", self.overflow)

    def module(self, trainable: bool = True) -> FixedPoint:
        """A cast that gives brevitas's numbers.

        Args:
            trainable: whether its binary point is a parameter. Default True.

        Raises:
            ValueError: ``width - frac_bits`` is outside -4 to 40.
        """
        _check_kept("BinaryPoint", self.width, self.frac_bits)
        channels = self.frac_bits.shape[0] if self.frac_bits.dim() else None
        cast = FixedPoint(
            self.width,
            INT_BITS[1],
            signed=self.signed,
            rounding="rnd_conv",
            overflow=self.overflow,
            trainable=trainable,
            per_channel=channels,
            channel_dim=-max(self.frac_bits.dim(), 1),
        )
        with torch.no_grad():
            cast.frac_bits.copy_(self.frac_bits)
        cast.calibrated = True
        return cast


def binary_points(
    state_dict: Mapping[str, Tensor],
    *,
    width: int = 8,
    widths: Mapping[str, int] | None = None,
    unsigned: Collection[str] = (),
    per_channel: Collection[str] = (),
) -> dict[str, BinaryPoint]:
    """The binary points in a brevitas state_dict, by the quantizer's name: ``"conv1.weight_quant"``,
    ``"conv1.output_quant"``, ``"relu1.act_quant"``.

    Each activation with a trained scale has one. So has each ``weight`` of two dimensions and more: by its trained
    scale where there is one, else by its largest magnitude.

    Args:
        state_dict: of a network whose quantizers are fixed-point ones.
        width: W, 1 to 32. Default 8.
        widths: W of the quantizers that have another, by name.
        unsigned: names of activations without sign (``Uint8Act...``, what follows a ReLU).
        per_channel: names of weights with a binary point for each of their first dimension, as far as their scales are
            not in the state_dict (where they are, they have the shape of it).

    Raises:
        ValueError: ``widths``, ``unsigned`` or ``per_channel`` has a name that the state_dict has no quantizer for, a
            width is outside 1 to 32 (a weight's 2 to 32), a weight is said to have no sign, or a number is not finite.

    Source: ``brevitas.quant.fixed_point`` of brevitas 0.13.4.

    Example:
        >>> import torch
        >>> from fastcifar.compat.brevitas import binary_points
        >>> key = "relu.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
        >>> state = {key: torch.tensor(1.2), "fc.weight": torch.tensor([[0.3, -0.2]])}
        >>> points = binary_points(state, unsigned=["relu.act_quant"])
        >>> str(points["relu.act_quant"].fixed_type), str(points["fc.weight_quant"].fixed_type)  # 0 to 4, -0.5 to 0.5
        ('ap_ufixed<8, 2, AP_RND_CONV, AP_SAT>', 'ap_fixed<8, 0, AP_RND_CONV, AP_SAT_SYM>')
    """
    exponents = _exponents(state_dict, per_channel)
    widths = widths or {}
    for given, names in (("widths", widths), ("unsigned", unsigned), ("per_channel", per_channel)):
        for name in names:
            if name not in exponents:
                known = ", ".join(exponents) or "none"
                raise ValueError(
                    f"binary_points: expected {given} to name quantizers of the state_dict ({known}), got {name}"
                )
    points = {}
    for name, exponent in exponents.items():
        bits, signed, narrow = widths.get(name, width), name not in unsigned, name.endswith(".weight_quant")
        if not 1 + narrow <= bits <= 32:
            raise ValueError(f"binary_points: expected a width of {1 + narrow} to 32 for {name}, got {bits}")
        if narrow and not signed:
            raise ValueError(f"binary_points: expected a weight's numbers to have a sign, got {name} in unsigned")
        if not bool(exponent.isfinite().all()):
            raise ValueError(f"binary_points: expected finite numbers, got others in {name}")
        points[name] = BinaryPoint(bits - signed - exponent.ceil(), bits, signed, narrow)
    return points


def load_binary_points(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Moves the binary points of a fixed-point network to where brevitas trained them.

    Layers are found by name. The output's cast of a layer (``FixedInput``, ``FixedReLU``, ``FixedConv2d``, ...) takes
    the binary point of brevitas's ``act_quant`` or ``output_quant`` in the module of the same name, its weights' cast
    that of ``weight_quant``; a :class:`FixedPoint` takes that of an ``act_quant``. Their modes become brevitas's
    (nearest with ties to even; saturating, for weights in the narrow range). Widths and signs are the casts' own: build
    the model with those of the brevitas network. Weights and statistics are not touched:
    ``model.load_state_dict(state_dict, strict=False)`` takes them over.

    Args:
        model: a network of :mod:`fastcifar.fixedpoint` layers; it is changed.
        state_dict: as in :func:`binary_points`.

    Returns:
        Names of the casts that were filled, and of those that found nothing and stay as they are: brevitas leaves out
        what it does not quantise, such as the output of a convolution before its batch norm. They are calibrated by the
        first batch.

    Raises:
        ValueError: a cast cannot have its binary point: ``width - F`` outside -4 to 40, or there is one a channel for
            a cast that has one for all.

    Example:
        >>> import torch
        >>> from fastcifar.compat.brevitas import load_binary_points
        >>> from fastcifar.fixedpoint import FixedReLU
        >>> model = torch.nn.Sequential(FixedReLU(width=8))
        >>> key = "0.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
        >>> load_binary_points(model, {key: torch.tensor(1.2)})
        (['0.output'], [])
        >>> str(model[0].output.fixed_type)
        'ap_ufixed<8, 2, AP_RND_CONV, AP_SAT>'
    """
    casts = {name: module for name, module in model.named_modules() if isinstance(module, FixedPoint)}
    layers = {name: name.rpartition(".")[0] for name in casts}
    apart = [f"{layers[name]}.weight_quant" for name, cast in casts.items() if cast.per_channel is not None]
    exponents = _exponents(state_dict, apart)
    left, moves = [], []
    for name, cast in casts.items():
        layer, weight = layers[name], name.endswith("weight_cast")
        if weight:
            sources = [f"{layer}.weight_quant"]
        elif isinstance(cast, FixedCast):
            sources = [f"{layer}.act_quant", f"{layer}.output_quant"]
        else:
            sources = [f"{name}.act_quant"]
        exponent = next((exponents[source] for source in sources if source in exponents), None)
        if exponent is None:
            left.append(name)
            continue
        frac_bits = cast.width - cast.signed - exponent.ceil()
        if frac_bits.numel() != cast.frac_bits.numel():
            raise ValueError(
                f"load_binary_points: expected as many binary points for {name} as it has, {cast.frac_bits.numel()}; "
                f"got {frac_bits.numel()}"
            )
        _check_kept(f"load_binary_points, {name}", cast.width, frac_bits)
        moves.append((cast, frac_bits, weight))
    for cast, frac_bits, weight in moves:
        with torch.no_grad():
            cast.frac_bits.copy_(frac_bits.reshape(cast.frac_bits.shape))
        cast.rounding, cast.overflow, cast.calibrated = "rnd_conv", "sat_sym" if weight else "sat", True
    return [name for name in casts if name not in left], left


def _exponents(state_dict: Mapping[str, Tensor], per_channel: Collection[str]) -> dict[str, Tensor]:
    """v of every quantizer, by its name: on the CPU, a scalar or ``[C, 1, ...]``."""
    found = {}
    for key, value in state_dict.items():
        if key.endswith((".value", ".learned_value")):  # the second is what earlier versions wrote
            layer, scaled, _ = key.partition(_WEIGHT)
            if scaled:
                found[f"{layer}.weight_quant"] = _scale(value)
            layer, scaled, _ = key.partition(_PROXY)
            if scaled and layer.rpartition(".")[2] in _ACTIVATIONS:
                found[layer] = _scale(value)
    for key, value in state_dict.items():
        prefix, _, last = key.rpartition(".")
        name = f"{prefix}.weight_quant"
        if last == "weight" and value.dim() > 1 and name not in found:
            magnitude = value.detach().cpu().abs()
            if name in per_channel:
                magnitude = magnitude.flatten(1).amax(1).view(-1, *[1] * (value.dim() - 1))
            else:
                magnitude = magnitude.max()
            found[name] = magnitude.clamp(min=_LEAST_SCALE).log2().float()
    return found


def _scale(value: Tensor) -> Tensor:
    value = value.detach().cpu().float()
    while value.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    return value


def _check_kept(op: str, width: int, frac_bits: Tensor) -> None:
    int_bits = width - frac_bits
    if bool(((int_bits < INT_BITS[0]) | (int_bits > INT_BITS[1])).any()):
        raise ValueError(
            f"{op}: expected binary points with int_bits of {INT_BITS[0]} to {INT_BITS[1]}, which casts hold; "
            f"got {int_bits.min().item():.0f} to {int_bits.max().item():.0f}"
        )
