"""QPyTorch's fixed point over our kernels: change ``from qtorch.quant import ...`` and ``from qtorch import
FixedPoint`` to ``from fastcifar.compat.qtorch import ...``.

Signatures and defaults are qtorch 0.3.0's. Its formats are always signed: ``wl`` bits, ``fl`` of them after the binary
point: ``ap_fixed<wl, wl - fl>`` with AP_RND_CONV (``"nearest"``) and AP_SAT, or AP_SAT_SYM where ``symmetric``.

What differs from qtorch, on purpose:

- ``"nearest"`` is exact. On a CPU qtorch adds 1/2 in float32 first, so that there the float just above half a unit
  gives 0, and units of 2^23 and more (a ``wl`` above 24, or ``clamp=False``) may move by one; a negative number that
  rounds to 0 gives -0 there. On a GPU qtorch sends ties away from zero; here they go to the even number everywhere.
- ``"stochastic"`` draws other numbers: one seed of torch's generator a call.
- ``clamping_grad_zero`` and ``backward_hooks`` do what qtorch's documentation says. In qtorch 0.3.0 both do nothing
  without a ``backward_number``, and the hooks nothing without ``clamping_grad_zero``.
- float64, bfloat16 and float16 are taken too (float64 only where numbers are clamped). Formats that the kernels do not
  hold, a ``wl`` outside 1 to 32 or ``wl - fl`` outside -4 to 40, are refused, and so are a symmetric bit, block and
  floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _library
from ..fixedpoint import functional
from ..fixedpoint.reference import INT_BITS, _straight_through

__all__ = ["FixedPoint", "Quantizer", "fixed_point_quantize", "quantizer"]

_ROUNDING = {"nearest": "rnd_conv", "stochastic": "stochastic"}
_UNCLAMPED_WIDTH = 32


class FixedPoint:
    """qtorch's number format: ``wl`` bits, signed, ``fl`` of them after the binary point.

    Args:
        wl: word length, 1 to 32.
        fl: fractional length; ``wl - fl`` is -4 to 40.
        clamp: whether numbers out of range become the nearest bound; where False they keep their place on the grid of
            ``2**-fl``, beyond what ``wl`` bits hold. Default True.
        symmetric: whether the least number is given up, so that the range is symmetric; ``wl`` is then above 1. Default
            False.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``wl`` or ``fl`` is out of range.

    Source: ``qtorch.FixedPoint`` of QPyTorch 0.3.0.

    Example:
        >>> from fastcifar.compat.qtorch import FixedPoint
        >>> FixedPoint(8, 4)
        FixedPoint (wl=8, fl=4)
    """

    def __init__(self, wl: int, fl: int, clamp: bool = True, symmetric: bool = False) -> None:
        _check_format("FixedPoint", wl, fl, clamp, symmetric)
        self.wl, self.fl, self.clamp, self.symmetric = wl, fl, clamp, symmetric

    def __repr__(self) -> str:
        return f"FixedPoint (wl={self.wl:d}, fl={self.fl:d})"


def fixed_point_quantize(
    x: Tensor, wl: int, fl: int, clamp: bool = True, symmetric: bool = False, rounding: str = "stochastic"
) -> Tensor:
    """``x`` on the grid of ``2**-fl``, clamped to what ``wl`` bits with sign hold.

    As qtorch's, it has no gradient: train through :func:`quantizer`. NaN stays NaN.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        wl, fl, clamp, symmetric: as in :class:`FixedPoint`. There is no wrapping: with ``clamp=False`` numbers are
            rounded only, ``wl`` means nothing, ``fl`` is -8 to 36, and float64, whose largest numbers have fractions
            that the kernels do not round, is refused.
        rounding: ``"nearest"``, ties to even, or ``"stochastic"``, up with a probability of the fraction. Default
            ``"stochastic"``.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: ``wl`` or ``fl`` out of range, or another rounding.

    Source: ``qtorch.quant.fixed_point_quantize`` of QPyTorch 0.3.0.

    Example:
        >>> import torch
        >>> from fastcifar.compat.qtorch import fixed_point_quantize
        >>> x = torch.tensor([0.3, 0.375, -9.0])
        >>> fixed_point_quantize(x, 4, 2, rounding="nearest").tolist()
        [0.25, 0.5, -2.0]
        >>> fixed_point_quantize(x, 4, 2, clamp=False, rounding="nearest").tolist()
        [0.25, 0.5, -9.0]
    """
    op = "fixed_point_quantize"
    functional.check_x(op, x)
    _check_format(op, wl, fl, clamp, symmetric)
    _check_rounding(op, rounding)
    return _quantize(op, x.detach(), wl, fl, clamp, symmetric, rounding)


def quantizer(
    forward_number: Any = None,
    backward_number: Any = None,
    forward_rounding: str = "stochastic",
    backward_rounding: str = "stochastic",
    clamping_grad_zero: bool = False,
    backward_hooks: Iterable[Callable[[Tensor], Tensor]] = (),
) -> Callable[[Tensor], Tensor]:
    """A function that quantises what passes and, on the way back, its gradient.

    The gradient passes straight through the forward rounding: first through the hooks, then it is quantised to
    ``backward_number``, then it is 0 where a number was clamped and ``clamping_grad_zero``. There is no second
    derivative where a gradient is hooked, quantised or zeroed: asking for one raises.

    Args:
        forward_number, backward_number: a :class:`FixedPoint`, ours or qtorch's; None leaves numbers (gradients) as
            they are. Default None.
        forward_rounding, backward_rounding: ``"nearest"`` or ``"stochastic"``. Default ``"stochastic"``.
        clamping_grad_zero: whether clamped numbers have no gradient; asks for a ``forward_number`` that clamps. (With
            ``symmetric``, the least number counts as clamped.) Default False.
        backward_hooks: functions that gradients go through, in their order, before they are quantised.

    Returns:
        A function from a tensor to a tensor of its shape and dtype.

    Raises:
        TypeError: a number is a block or floating point format, or none at all.
        ValueError: another rounding, a format out of range, or ``clamping_grad_zero`` with ``clamp=False``.

    Source: ``qtorch.quant.quantizer`` of QPyTorch 0.3.0.

    Example:
        >>> import torch
        >>> from fastcifar.compat.qtorch import FixedPoint, quantizer
        >>> cast = quantizer(FixedPoint(4, 2), FixedPoint(4, 1), "nearest", "nearest", clamping_grad_zero=True)
        >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
        >>> out = cast(x)
        >>> out.backward(torch.tensor([0.7, 0.7]))
        >>> out.tolist(), x.grad.tolist()
        ([0.25, 1.75], [0.5, 0.0])
    """
    op = "quantizer"
    _check_rounding(op, forward_rounding)
    _check_rounding(op, backward_rounding)
    for number in (forward_number, backward_number):
        _check_number(op, number)
    if clamping_grad_zero and forward_number is not None and not forward_number.clamp:
        raise ValueError(f"{op}: expected a forward_number that clamps with clamping_grad_zero, got clamp=False")
    hooks = tuple(backward_hooks)

    def forward(x: Tensor) -> Tensor:
        functional.check_x(op, x)
        if forward_number is None:
            return x
        if clamping_grad_zero:
            return _of(op, x, forward_number, forward_rounding)
        value = _of(op, x.detach(), forward_number, forward_rounding)
        return _straight_through(value, x) if x.requires_grad else value

    def backward(grad: Tensor) -> Tensor:
        for hook in hooks:
            grad = hook(grad)
        return grad if backward_number is None else _of(op, grad, backward_number, backward_rounding)

    if backward_number is None and not hooks:
        return forward
    return lambda x: _Backward.apply(forward(x), backward)


class Quantizer(nn.Module):
    """:func:`quantizer` as a layer.

    Args:
        forward_number, backward_number, forward_rounding, backward_rounding: as there.

    Raises:
        TypeError, ValueError: as there.

    Source: ``qtorch.quant.Quantizer`` of QPyTorch 0.3.0.

    Example:
        >>> import torch
        >>> from fastcifar.compat.qtorch import FixedPoint, Quantizer
        >>> Quantizer(FixedPoint(4, 2), forward_rounding="nearest")(torch.tensor([0.3, 9.0])).tolist()
        [0.25, 1.75]
    """

    def __init__(
        self,
        forward_number: Any = None,
        backward_number: Any = None,
        forward_rounding: str = "stochastic",
        backward_rounding: str = "stochastic",
    ) -> None:
        super().__init__()
        self.quantize = quantizer(forward_number, backward_number, forward_rounding, backward_rounding)
        self._shown = f"{forward_number}, {backward_number}, {forward_rounding!r}, {backward_rounding!r}"

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x)

    def extra_repr(self) -> str:
        return self._shown


class _Backward(torch.autograd.Function):
    """Passes a tensor on, and its gradient through a function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, function):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            result = ctx.function(grad)
        return _library.differentiable_once("quantizer", result, grad), None


def _of(op: str, x: Tensor, number: Any, rounding: str) -> Tensor:
    return _quantize(op, x, number.wl, number.fl, number.clamp, number.symmetric, rounding)


def _quantize(op: str, x: Tensor, wl: int, fl: int, clamp: bool, symmetric: bool, rounding: str) -> Tensor:
    mode = _ROUNDING[rounding]
    if clamp:
        return functional.quantize(x, wl, wl - fl, rounding=mode, overflow="sat_sym" if symmetric else "sat")
    if x.dtype == torch.float64:
        raise TypeError(f"{op}: expected float32, bfloat16 or float16 with clamp=False, got float64")
    # A float of these dtypes that 32 bits do not hold has no bits below a unit: it is on the grid as it is.
    int_bits = _UNCLAMPED_WIDTH - fl
    value = functional.quantize(x, _UNCLAMPED_WIDTH, int_bits, rounding=mode, overflow="sat")
    return torch.where(x.float().abs() < 2.0 ** (int_bits - 1), value, x)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_format(op: str, wl: object, fl: object, clamp: object, symmetric: object) -> None:
    for name, value in (("wl", wl), ("fl", fl)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}")
    for name, value in (("clamp", clamp), ("symmetric", symmetric)):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: expected {name} to be True or False, got {value!r}")
    assert isinstance(wl, int)
    assert isinstance(fl, int)
    if not 1 <= wl <= 32:
        raise ValueError(f"{op}: expected wl of 1 to 32, got {wl}")
    if clamp and symmetric and wl == 1:
        raise ValueError(f"{op}: expected wl above 1 with symmetric, as 0 is all that one bit would hold")
    width = wl if clamp else _UNCLAMPED_WIDTH
    if not INT_BITS[0] <= width - fl <= INT_BITS[1]:
        least, most = width - INT_BITS[1], width - INT_BITS[0]
        with_what = f"wl = {wl}" if clamp else "clamp=False"
        raise ValueError(f"{op}: expected fl of {least} to {most} with {with_what}, got {fl}")


def _check_rounding(op: str, rounding: object) -> None:
    if rounding not in _ROUNDING:
        raise ValueError(f"{op}: expected rounding to be nearest or stochastic, got {rounding!r}")


def _check_number(op: str, number: Any) -> None:
    if number is None:
        return
    if not all(hasattr(number, name) for name in ("wl", "fl", "clamp", "symmetric")):
        raise TypeError(
            f"{op}: expected a FixedPoint or None, as block and floating point formats have no kernel here; "
            f"got {number!r}"
        )
    _check_format(op, number.wl, number.fl, number.clamp, number.symmetric)
